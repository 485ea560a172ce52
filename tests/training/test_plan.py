# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest

from training.data import plan


def make_sources(sizes, weights, batch_size, group=5):
    """Sources of that many clips each, in row groups of five."""
    steps, given = plan.quotas(sizes, weights, batch_size)
    start, sources = 0, []
    for size, num_items in zip(sizes, given, strict=True):
        cuts = np.append(np.arange(0, size, group), size).astype(np.int64)
        sources.append(plan.Source(cuts + start, num_items))
        start += size
    return steps, sources


def make_layout(steps, batch_size, *, slots=2, lanes=2, shuffle_buffer=10):
    return plan.Layout(batch_size, slots, np.arange(steps) % lanes, shuffle_buffer)


def one_epoch(num_clips, batch_size, *, seed=7, epoch=0, columns=None, videos=None, **layout):
    steps, sources = make_sources([num_clips], [1.0], batch_size)
    return plan.epoch_batches(
        sources,
        make_layout(steps, batch_size, **layout),
        seed=seed,
        epoch=epoch,
        columns=columns,
        video_hash=videos,
    )


GRID = list(
    itertools.product(
        (1, 7, 48, 101), (1, 4, 9), (1, 2, 7), (1, 3, 4), (1, 10, 1000),
        ((1.0,), (2.0, 0.25), (1.0, 0.5, 1.5)),
    )
)  # fmt: skip


def test_every_source_gives_its_clips_as_often_as_its_weight_says_over_the_grid():
    for num_clips, batch_size, slots, lanes, buffer, weights in GRID:
        sizes = [num_clips // len(weights)] * len(weights)
        sizes[-1] += num_clips - sum(sizes)
        steps, sources = make_sources(sizes, weights, batch_size)
        layout = make_layout(steps, batch_size, slots=slots, lanes=lanes, shuffle_buffer=buffer)
        total = np.zeros(num_clips, dtype=int)
        for epoch in (0, 1, 2):
            items = plan.epoch_batches(sources, layout, seed=1, epoch=epoch)
            assert items.shape == (steps, batch_size)
            assert len(np.unique(items)) == items.size  # no copy twice
            seen = np.bincount(items.ravel() % num_clips, minlength=num_clips)
            total += seen
            for source, weight in zip(sources, weights, strict=True):
                own = seen[source.group_start[0] : source.group_start[-1]]
                assert own.sum() == source.num_items
                assert not len(own) or own.max() <= np.ceil(weight)
                assert not len(own) or own.max() - own.min() <= 1
        for source in sources:
            own = total[source.group_start[0] : source.group_start[-1]]
            assert not len(own) or own.max() - own.min() <= 1, (num_clips, batch_size, weights)


def test_weights_are_kept_exactly_where_they_fill_batches():
    _, sources = make_sources([40, 40, 40], [2.0, 0.25, 1.5], 10)
    assert [source.num_items for source in sources] == [80, 10, 60]
    layout = make_layout(15, 10)
    epochs = [plan.epoch_batches(sources, layout, seed=1, epoch=epoch) for epoch in range(8)]
    seen = np.array([np.bincount(e.ravel() % 120, minlength=120) for e in epochs])
    assert (seen[:, :40] == 2).all()
    # A quarter of the clips, another one each time; in four epochs each once.
    assert (seen[:4, 40:80].sum(axis=0) == 1).all()
    assert (seen[4:, 40:80].sum(axis=0) == 1).all()
    assert set(seen[0, 80:].tolist()) == {1, 2}
    assert (seen[:2, 80:].sum(axis=0) == 3).all()


def test_a_part_of_a_source_is_read_by_whole_row_groups():
    _, sources = make_sources([1000], [0.25], 10)
    items = plan.epoch_batches(sources, make_layout(25, 10), seed=1, epoch=0)
    assert len(np.unique(items // 5)) <= 51


def test_clips_that_cannot_fill_a_batch_are_cut_off_every_source_in_proportion():
    assert plan.quotas([100, 100, 3], [1.0, 0.5, 1.0], 50) == (3, [98, 49, 3])
    assert plan.quotas([5, 5], [1.0, 1.0], 11) == (0, [0, 0])
    for sizes in itertools.product((1, 5, 64), repeat=3):
        for weights in itertools.product((0.1, 1.0, 2.5), repeat=3):
            steps, given = plan.quotas(sizes, weights, 7)
            wanted = [max(round(n * w), 1) for n, w in zip(sizes, weights, strict=True)]
            assert sum(given) == steps * 7
            assert all(g <= w for g, w in zip(given, wanted, strict=True))
            assert sum(wanted) - sum(given) < 7


def test_left_over_clips_take_turns():
    # 10 clips, batches of 4: two sit out an epoch, so in five epochs each sits out once.
    out = [set(range(10)) - set(one_epoch(10, 4, epoch=e).ravel().tolist()) for e in range(5)]
    assert sorted(itertools.chain(*out)) == list(range(10))


@pytest.mark.parametrize("unique", [False, True])
def test_any_number_of_processes_makes_the_same_global_batches(unique):
    for batch_size, slots, lanes in itertools.product((4, 12), (1, 3, 4, 50), (1, 3)):
        videos = np.arange(101) // 4 if unique else None
        options = {"slots": slots, "lanes": lanes, "videos": videos}
        whole = one_epoch(101, batch_size, **options)
        for world_size in (2, 4):
            share = batch_size // world_size
            parts = [
                one_epoch(101, batch_size, columns=(r * share, (r + 1) * share), **options)
                for r in range(world_size)
            ]
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_lane_of_a_slot_reads_row_groups_of_its_own():
    items = one_epoch(800, 10, slots=2, lanes=4)
    read = [
        set(np.unique(items[lane::4, half : half + 5] // 5).tolist())
        for lane in range(4)
        for half in (0, 5)
    ]
    # Only a row group on a cut is read by two: there are seven cuts.
    assert sum(map(len, read)) <= 160 + 7
    assert len(set.union(*read)) == 160


def test_lanes_may_take_turns_in_any_order():
    steps, sources = make_sources([800], [1.0], 10)
    lane_of_step = np.random.default_rng(0).integers(0, 3, steps)
    layout = plan.Layout(10, 1, lane_of_step, 10)
    items = plan.epoch_batches(sources, layout, seed=1, epoch=0)
    assert sorted(items.ravel()) == list(range(800))
    read = [set(np.unique(items[lane_of_step == lane] // 5).tolist()) for lane in range(3)]
    assert sum(map(len, read)) <= 160 + 2


def test_order_depends_on_seed_epoch_and_stream_alone():
    # Without a buffer: the order of row groups must differ by itself.
    steps, sources = make_sources([64], [1.0], 4)

    def order(seed=1, epoch=0, **changed):
        layout = make_layout(steps, 4, shuffle_buffer=1)
        return plan.epoch_batches(sources, layout, seed=seed, epoch=epoch, **changed)

    np.testing.assert_array_equal(order(), order())
    for changed in ({"epoch": 1}, {"seed": 2}, {"stream": 1}):
        assert (order(**changed) == order()).mean() < 0.2


def test_no_clip_moves_further_than_the_buffer_beyond_its_row_group():
    shape = {"slots": 1, "lanes": 1}
    plain = one_epoch(1000, 10, shuffle_buffer=1, **shape).ravel()
    # Without a buffer a row group's clips stay together, in random order.
    assert len(np.flatnonzero(np.diff(plain // 5))) == 199
    assert (np.diff(plain) == 1).mean() < 0.5
    shuffled = one_epoch(1000, 10, shuffle_buffer=50, **shape).ravel()
    moved = np.argsort(shuffled) - np.argsort(plain)
    assert np.abs(moved).max() <= 55
    assert np.abs(moved).mean() > 10


def clips_of_videos(rng, num_videos, mean):
    """The video of each clip, videos of very different length, clips of one side by side."""
    counts = np.maximum(rng.geometric(1 / mean, num_videos), 1)
    hashes = rng.integers(-(2**63), 2**63 - 1, num_videos)
    return np.repeat(hashes, counts)


@pytest.mark.parametrize(("mean", "batch_size"), [(1, 8), (4, 16), (12, 32), (60, 32)])
@pytest.mark.parametrize(("slots", "lanes"), [(1, 1), (4, 4), (3, 2)])
def test_no_batch_holds_two_clips_of_a_video(mean, batch_size, slots, lanes):
    videos = clips_of_videos(np.random.default_rng(mean), 3000 // mean, mean)
    for epoch in (0, 1):
        options = {"epoch": epoch, "slots": slots, "lanes": lanes}
        items = one_epoch(len(videos), batch_size, videos=videos, **options)
        placed = items[items >= 0]
        assert len(np.unique(placed)) == len(placed)
        # The same clips as without, save those that cannot be placed: a video with more clips
        # than steps; where it is tight, one in a hundred of the others.
        free = one_epoch(len(videos), batch_size, **options)
        assert set(placed.tolist()) <= set(free.ravel().tolist())
        _, counts = np.unique(videos[free], return_counts=True)
        most = np.minimum(counts, len(items)).sum()
        assert 0.99 * most <= len(placed) <= most
        for batch in items:
            own = videos[batch[batch >= 0]]
            assert len(np.unique(own)) == len(own)


def test_copies_of_a_clip_are_of_one_video_too():
    videos = np.arange(60) // 2
    _, sources = make_sources([60], [2.0], 12)
    layout = make_layout(10, 12)
    items = plan.epoch_batches(sources, layout, seed=0, epoch=0, video_hash=videos)
    assert sorted(items.ravel()) == list(range(120))  # both copies of all of them
    for batch in items:
        assert len(np.unique(videos[batch % 60])) == 12


def test_a_video_with_more_clips_than_steps_leaves_holes():
    videos = np.array([0] * 20 + list(range(1, 21)))
    items = one_epoch(40, 10, videos=videos)
    assert items.shape == (4, 10)
    assert (items < 0).sum() == 16
    assert all((videos[batch[batch >= 0]] == 0).sum() == 1 for batch in items)


def test_kinds_of_media_take_turns_as_often_as_they_have_steps():
    first, second = (plan.kinds_in_turn([5, 30, 0], seed=3, epoch=epoch) for epoch in (0, 1))
    assert np.bincount(first, minlength=3).tolist() == [5, 30, 0]
    assert sorted(first) == sorted(second)
    assert (first != second).any()
    assert np.flatnonzero(first == 0).max() > 5
    np.testing.assert_array_equal(first, plan.kinds_in_turn([5, 30, 0], seed=3, epoch=0))


@pytest.mark.parametrize("num_clips", [0, 1, 5, 48, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_coverage_takes_every_clip_once_in_order(num_clips, world_size, batch_size):
    batches = [
        batch
        for rank in range(world_size)
        for batch in plan.coverage_batches(
            num_clips, rank=rank, world_size=world_size, batch_size=batch_size
        )
    ]
    assert [clip for batch in batches for clip in batch] == list(range(num_clips))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
