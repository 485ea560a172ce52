# SPDX-License-Identifier: Apache-2.0
import pytest

from dataengine.sampling import FrameSampler, even_times, pick_nearest


@pytest.mark.parametrize("max_aside", [0, 40, 10_000])
def test_old_frames_of_a_long_shot_are_encoded_only_where_memory_ends(max_aside):
    encoded: list[int] = []

    def encode(picture: int) -> bytes:
        encoded.append(picture)
        return b"%d" % picture

    sampler = FrameSampler(8, 600_000, 4_000_000, encode, max_aside)
    held = 0
    for n in range(5_000):
        sampler.push(n * 40_000, lambda n=n: n)
        held = max(held, sampler.num_held)
    assert held <= 60 + max_aside
    early = len(encoded)
    spans = [(i * 4_000_000, (i + 1) * 4_000_000) for i in range(50)]
    taken = sampler.take(spans)
    for (start, end), frames in zip(spans, taken, strict=True):
        assert len(frames) == 8
        for (time_us, jpeg), ideal in zip(frames, even_times(start, end, 8), strict=True):
            assert abs(time_us - ideal) <= 250_000
            assert int(jpeg) == time_us // 40_000
    if max_aside == 10_000:
        assert (early, len(encoded)) == (0, 400)  # each chosen frame, once
    else:
        assert early > 1000
    # Nothing of the old shot is left over for the next one.
    assert sampler.take([(200_000_000, 200_000_001)]) == [[]]
    assert sampler.num_held == 0


def test_nearest_candidates_are_distinct_and_ascending():
    assert pick_nearest([0, 10, 20, 30], [9, 11, 12]) == [1, 2, 3]
    assert pick_nearest([0, 10], [1, 2, 3]) == [0, 1]
    assert pick_nearest([], [1]) == []
