# SPDX-License-Identifier: Apache-2.0
import random
from pathlib import Path

import numpy as np
import pytest

from dataengine import media
from dataengine.models.shots import (
    AdaptiveSettings,
    ContentSettings,
    WholeSettings,
    build_shot_detector,
)
from dataengine.sampling import FrameSampler, even_times, pick_nearest
from dataengine.stage import Drop, Kept, Row
from dataengine.stages import segment
from dataengine.stages.segment import SegmentStage, mean_motion, split_shot
from tests.media_factory import frame_number, make_video, truncate

VFR = [n / 25 + (n % 3) * 0.009 + (0.5 if n > 70 else 0) for n in range(150)]


def run(path: Path, **config) -> Kept | Drop:
    stage = SegmentStage(SegmentStage.Config(**config))
    stage.setup()
    row = {"video_id": "v", "source_url": "u", "_video": {"title": "t"}, "_path": str(path)}
    (outcome,) = stage.process([row])
    return outcome  # pyright: ignore[reportReturnType]


def clips(path: Path, **config) -> list[Row]:
    outcome = run(path, **config)
    assert isinstance(outcome, Kept), outcome
    return [dict(row) for row in outcome.rows]


def numbers(row: Row) -> list[int]:
    return [frame_number(media.jpeg_decode(jpeg)) for jpeg in row["frames"]]


# ---------------------------------------------------------------------------------- pure functions


def test_even_times_are_middles_of_equal_parts():
    assert even_times(1000, 9000, 4) == [2000, 4000, 6000, 8000]
    assert even_times(0, 10, 1) == [5]


@pytest.mark.parametrize(
    ("times", "wanted", "picked"),
    [
        ([0, 10, 20, 30, 40], [11, 29], [1, 3]),
        ([0, 10, 20, 30, 40], [15], [1]),
        ([0, 10], [1, 2, 3], [0, 1]),
        ([0, 100, 101, 102], [1, 2, 3], [0, 1, 2]),
        ([0, 1, 2, 100], [99, 100, 101], [1, 2, 3]),
        ([], [5], []),
    ],
    ids=["nearest", "tie_goes_left", "too_few", "crowded_left", "crowded_right", "none"],
)
def test_nearest_times_are_distinct_and_ascending(times, wanted, picked):
    assert pick_nearest(times, wanted) == picked


@pytest.mark.parametrize(
    ("num_frames", "max_us", "expected"),
    [
        (10, None, [(0, 10)]),
        (10, 10_000, [(0, 10)]),
        (10, 9_999, [(0, 5), (5, 10)]),
        (10, 4_000, [(0, 4), (4, 7), (7, 10)]),
        (3, 500, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_long_shots_are_cut_into_equal_pieces(num_frames, max_us, expected):
    times = [5_000 + 1_000 * n for n in range(num_frames)]
    assert split_shot(times, 5_000 + 1_000 * num_frames, max_us) == expected


def test_motion_leaves_out_the_jump_from_the_clip_before():
    assert mean_motion([0.9, 0.1, 0.3]) == pytest.approx(0.2)
    assert mean_motion([0.9]) == 0.0


# --------------------------------------------------------------------------------------- sampling


def _sampled(length: int, cuts: list[int], lag: int, num: int, max_us: int | None = None):
    """Feeds ``length`` frames, 40 ms apart, with boundaries known ``lag`` frames late."""
    sampler = FrameSampler(num, lag * 40_000, max_us, lambda picture: b"%d" % picture)
    taken, held, start = [], 0, 0
    for n in range(length + lag + 1):
        if n < length:
            sampler.push(n * 40_000, lambda n=n: n)
            held = max(held, sampler.num_held)
        for cut in cuts:
            if cut == n - lag:
                taken += sampler.take([(start * 40_000, cut * 40_000)])
                start = cut
    return taken, held


@pytest.mark.parametrize("lag", [0, 3, 15, 75])
@pytest.mark.parametrize("num", [1, 8, 16])
def test_samples_are_even_whatever_the_length_of_the_shot(lag, num):
    draw = random.Random(lag * 100 + num)
    cuts = sorted(draw.sample(range(90, 4000), 12))
    cuts = [c for c, before in zip(cuts, [0, *cuts], strict=False) if c - before > 60]
    taken, held = _sampled(cuts[-1], cuts, lag, num)
    assert held <= 7 * num + 4
    for (start, end), frames in zip(zip([0, *cuts], cuts, strict=False), taken, strict=True):
        assert len(frames) == num
        times = [time_us / 40_000 for time_us, _ in frames]
        assert all(start <= t < end for t in times)
        assert times == sorted(set(times))
        assert [int(jpeg) for _, jpeg in frames] == times
        part = (end - start) / num
        ideal = [start + (i + 0.5) * part for i in range(num)]
        # Within its own part, so that the spread is real.
        assert max(abs(a - b) for a, b in zip(times, ideal, strict=True)) <= part / 2 + 1


def test_pieces_of_a_shot_without_end_are_all_sampled():
    max_us = 4_000_000
    sampler = FrameSampler(8, 600_000, max_us, lambda picture: b"%d" % picture)
    held = 0
    for n in range(10_000):
        sampler.push(n * 40_000, lambda n=n: n)
        held = max(held, sampler.num_held)
    spans = [(i * 4_000_000, (i + 1) * 4_000_000) for i in range(100)]
    taken = sampler.take(spans)
    assert held <= 60
    for (start, end), frames in zip(spans, taken, strict=True):
        assert len(frames) == 8
        for (time_us, jpeg), ideal in zip(frames, even_times(start, end, 8), strict=True):
            assert abs(time_us - ideal) <= 250_000
            assert int(jpeg) == time_us // 40_000


# --------------------------------------------------------------------------------------- detectors


@pytest.mark.parametrize("settings", [ContentSettings(), AdaptiveSettings()])
def test_detectors_find_cuts_within_their_lag(settings):
    detector = build_shot_detector(settings, 25.0)
    found = []
    for n in range(200):
        value = (20, 200, 90, 240)[n // 50]
        frame = np.full((60, 100, 3), (value, 255 - value, value // 2), np.uint8)
        frame[20:30, n % 80 : n % 80 + 10] = 128
        for boundary_us in detector.push(7_000 + n * 40_000, frame):
            found.append((boundary_us - 7_000) // 40_000)
            assert (n * 40_000 + 7_000) - boundary_us <= detector.lag_us(40_000)
    found += [(boundary_us - 7_000) // 40_000 for boundary_us in detector.flush()]
    assert found == [50, 100, 150]


def test_flicker_is_merged_and_announced_late_but_within_the_lag():
    detector = build_shot_detector(ContentSettings(), 25.0)
    found, late_us = [], []
    for n in range(150):
        flicker = 60 <= n <= 80 and n % 2
        frame = np.full((60, 100, 3), 255 if flicker else 20 if n < 50 else 140, np.uint8)
        for boundary_us in detector.push(n * 40_000, frame):
            found.append(boundary_us // 40_000)
            late_us.append(n * 40_000 - boundary_us)
    assert found == [50, 80]
    assert late_us[0] == 0
    assert 500_000 < late_us[1] <= detector.lag_us(40_000)


# -------------------------------------------------------------------------------------------- stage


@pytest.mark.parametrize(
    ("name", "arguments", "boundaries_ms"),
    [
        ("cfr.mp4", {}, [0, 2000, 3600, 6000]),
        ("late.mp4", {"start_s": 0.85, "audio": "aac"}, [850, 2850, 4450, 6850]),
        ("vfr.mp4", {"times_s": VFR}, [0, 2018, 4100, None]),
        ("rotated.mp4", {"rotation": 90}, [0, 2000, 3600, 6000]),
        ("two.mp4", {"second_video": True}, [0, 2000, 3600, 6000]),
        ("vp8.webm", {"codec": "libvpx"}, [0, 2000, 3600, 6000]),
        ("film.mkv", {"fps": 24000 / 1001}, [0, 2085, 3754, None]),
    ],
)
@pytest.mark.parametrize("detector", [{"kind": "content"}, {"kind": "adaptive"}])
def test_shots_begin_at_the_known_cuts(name, arguments, boundaries_ms, detector, tmp_path):
    path = make_video(tmp_path / name, **arguments)
    rows = clips(path, detector=detector)
    assert [row["start_ms"] for row in rows] == boundaries_ms[:-1]
    assert [row["end_ms"] for row in rows[:-1]] == boundaries_ms[1:-1]
    if boundaries_ms[-1] is not None:
        assert rows[-1]["end_ms"] == boundaries_ms[-1]
    assert [row["clip_id"] for row in rows] == [
        f"v_{row['start_ms']}_{row['end_ms']}" for row in rows
    ]
    for row, frame_range in zip(rows, [(0, 50), (50, 90), (90, 150)], strict=True):
        assert row["duration_ms"] == row["end_ms"] - row["start_ms"]
        assert len(row["_frame_us"]) == frame_range[1] - frame_range[0] + 1
        shown = range(*frame_range)
        if not arguments.get("rotation"):
            found = numbers(row)
            assert len(found) == 8
            assert all(n in shown for n in found)
            assert found == sorted(set(found))
            times = row["_frame_us"]
            assert [times[n - shown[0]] // 1000 for n in found] == row["frame_ms"]


def test_a_frames_millisecond_lies_in_its_clip(tmp_path):
    path = make_video(tmp_path / "a.mp4", fps=30000 / 1001)
    rows = clips(path)
    with media.VideoReader(str(path)) as reader:
        all_ms = [media.floor_ms(frame.time_us) for frame in reader]
    for row in rows:
        inside = [t for t in all_ms if row["start_ms"] <= t < row["end_ms"]]
        assert inside == [t // 1000 for t in row["_frame_us"][:-1]]
    assert sum(len(row["_frame_us"]) - 1 for row in rows) == len(all_ms)
    assert [row["end_ms"] for row in rows[:-1]] == [row["start_ms"] for row in rows[1:]]


def test_clips_carry_the_facts_of_the_video(tmp_path):
    path = make_video(tmp_path / "a.mp4", audio="aac", size=(384, 256), rotation=90)
    row = clips(path, frame_short_side=128)[0]
    assert (row["width"], row["height"], row["has_audio"]) == (256, 384, True)
    assert row["fps"] == pytest.approx(25.0)
    assert media.jpeg_decode(row["frames"][0]).shape == (192, 128, 3)
    video = row["_video"]
    assert video["title"] == "t"
    assert video["duration_ms"] == pytest.approx(6000, abs=2)
    assert (video["video_codec"], video["audio_codec"]) == ("h264", "aac")
    assert (video["width"], video["height"]) == (256, 384)
    (origin,) = row["provenance"]
    assert (origin["column"], origin["model"]) == ("start_ms", "scenedetect/content")
    allowed = {*SegmentStage.outputs.names, "provenance"}
    assert set(row) <= allowed


def test_motion_is_measured_on_brightness(tmp_path):
    still = clips(make_video(tmp_path / "a.mp4", shot_frames=(60,)))[0]["motion_score"]
    # The block moves 2 px a frame: 2 * 2 columns of 40 rows change by |128 - luma|, and the bits.
    assert 0.001 < still < 0.05


def test_short_shots_are_dropped_by_name_and_keep_their_time(tmp_path):
    path = make_video(tmp_path / "a.mp4", shot_frames=(50, 20, 60))
    first, short, last = clips(path)
    assert short["_drop"] == {"stage": "segment", "reason": "clip_too_short", "detail": ""}
    assert (short["start_ms"], short["end_ms"], short["duration_ms"]) == (2000, 2800, 800)
    assert short["clip_id"] == "v_2000_2800"
    assert short["_video"]["title"] == "t"
    assert first.get("_drop") is None
    assert (first["end_ms"], last["start_ms"]) == (2000, 2800)


def test_long_shots_become_equal_pieces(tmp_path):
    rows = clips(make_video(tmp_path / "a.mp4", shot_frames=(50, 150)), max_clip_ms=2500)
    assert [(row["start_ms"], row["end_ms"]) for row in rows] == [
        (0, 2000),
        (2000, 4000),
        (4000, 6000),
        (6000, 8000),
    ]
    for row in rows:
        found = numbers(row)
        assert len(found) == 8
        assert all(row["start_ms"] <= n * 40 < row["end_ms"] for n in found)


def test_a_clip_with_few_frames_gives_them_all(tmp_path):
    path = make_video(tmp_path / "a.mp4", shot_frames=(5,), fps=4)
    (row,) = clips(path)
    assert numbers(row) == [0, 1, 2, 3, 4]


def test_frames_the_pass_did_not_hold_are_sought(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4")
    expected = [row["frame_ms"] for row in clips(path)]
    monkeypatch.setattr(
        FrameSampler, "take", lambda self, spans: [[(span[0], b"")] for span in spans]
    )
    rows = clips(path)
    for row, times in zip(rows, expected, strict=True):
        assert row["frame_ms"] == pytest.approx(times, abs=80)
        assert [n * 40 for n in numbers(row)] == row["frame_ms"]


def test_large_pictures_are_held_shrunk(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", rotation=90)
    plain = clips(path, frame_short_side=64)
    monkeypatch.setattr(segment, "HELD_BYTES", 0)
    shrunk = clips(path, frame_short_side=64)
    for a, b in zip(plain, shrunk, strict=True):
        assert a["frame_ms"] == b["frame_ms"]
        one, other = (media.jpeg_decode(row["frames"][3]).astype(int) for row in (a, b))
        assert np.abs(one - other).mean() < 2


def test_a_broken_off_video_keeps_what_decodes(tmp_path):
    whole = make_video(tmp_path / "whole.mkv")
    rows = clips(truncate(whole, tmp_path / "half.mkv", 0.5))
    assert rows[0]["start_ms"] == 0
    assert 1600 < rows[-1]["end_ms"] < 4400
    assert rows[-1]["_video"]["duration_ms"] == rows[-1]["end_ms"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"max_duration_s": 5.0}, "too_long"),
        ({"min_duration_s": 7.0}, "too_short"),
        ({"max_pixels": 1000}, "too_large"),
        ({"min_clip_ms": 3000}, "no_clips"),
        ({"timeout_s": 1e-9}, "segment_timeout"),
    ],
)
def test_videos_beyond_the_limits_are_dropped_by_name(config, reason, tmp_path):
    outcome = run(make_video(tmp_path / "a.mp4"), **config)
    assert isinstance(outcome, Drop)
    assert outcome.reason == reason
    assert outcome.retryable == (reason == "segment_timeout")


def test_length_is_measured_where_the_header_is_silent(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setattr(SegmentStage, "_refuse", lambda self, info: None)
    outcome = run(path, max_duration_s=5.0)
    assert isinstance(outcome, Drop)
    assert outcome.reason == "too_long"


def test_unreadable_files_are_dropped_with_the_readers_reason(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("<html></html>")
    assert run(path) == Drop("not_a_video", "Invalid data found when processing input")


def test_without_detection_a_video_is_one_clip(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    (row,) = clips(path, detector=WholeSettings())
    assert (row["start_ms"], row["end_ms"]) == (0, 6000)
