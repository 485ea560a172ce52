# SPDX-License-Identifier: Apache-2.0
import random
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from scenedetect import FrameTimecode, detectors
from scenedetect.common import Timecode

from dataengine import media
from dataengine.activity import ActivityMeter
from dataengine.clip_rules import group_spans, random_window, snap_span, split_shot
from dataengine.models.shots import (
    AdaptiveSettings,
    ContentSettings,
    WholeSettings,
    build_shot_detector,
)
from dataengine.sampling import FrameSampler, even_times, pick_nearest
from dataengine.stage import Drop, Kept, Row
from dataengine.stages import segment
from dataengine.stages.segment import SegmentStage
from tests.media_factory import frame_number, make_video, truncate

VFR = [n / 25 + (n % 3) * 0.009 + (0.5 if n > 70 else 0) for n in range(150)]


def run(path: Path, spans=None, **config) -> Kept | Drop:
    stage = SegmentStage(SegmentStage.Config(**config))
    stage.setup()
    row = {"video_id": "v", "source_url": "u", "_video": {"title": "t"}, "_path": str(path)}
    row["_spans"] = spans
    (outcome,) = stage.process([row])
    return outcome  # pyright: ignore[reportReturnType]


def clips(path: Path, spans=None, **config) -> list[Row]:
    outcome = run(path, spans, **config)
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


def test_a_random_window_is_whole_and_the_same_for_the_same_seed():
    draw = random.Random(5)
    starts = set()
    for case in range(300):
        times, now = [], draw.randrange(10_000)
        for _ in range(draw.randrange(2, 200)):
            times.append(now)
            now += draw.choice([1_000, 1_000, 40_000, 700_000])
        end_us, max_us = now, (now - times[0]) * draw.randrange(1, 100) // 100 or 1
        first, after, stop_us = random_window(times, end_us, max_us, f"v_{case}")
        assert (first, after, stop_us) == random_window(times, end_us, max_us, f"v_{case}")
        assert 0 <= first < after <= len(times)
        assert stop_us == (times[after] if after < len(times) else end_us)
        assert stop_us - times[first] <= max_us or after == first + 1
        # No longer than needed: one more frame would be too much, unless the shot ends there.
        if after < len(times):
            longer_us = times[after + 1] if after + 1 < len(times) else end_us
            assert longer_us - times[first] > max_us
        starts.add(first)
    assert len(starts) > 40


@pytest.mark.parametrize(
    ("span_us", "frames"),
    [
        ((0, 120_000), (0, 3)),
        ((39_000, 81_000), (1, 2)),  # published times are rounded either way
        ((41_000, 119_000), (1, 3)),
        ((100_000, 280_000), (2, 5)),  # beyond the end: up to it
        ((100_000, 900_000), None),  # but not when most of it is
        ((45_000, 46_000), (1, 2)),  # never empty
        ((200_000, 300_000), None),
        ((199_000, 200_500), (4, 5)),
        ((-50_000, 0), None),
    ],
)
def test_published_spans_snap_to_the_nearest_frames(span_us, frames):
    assert snap_span([0, 40_000, 80_000, 120_000, 160_000], 200_000, span_us) == frames


def test_spans_far_apart_are_decoded_apart():
    spans = [(100, 110), (0, 10), (5, 40), (45, 50), (300, 301)]
    assert group_spans(spans, 20) == [(0, 50, [1, 2, 3]), (100, 110, [0]), (300, 301, [4])]
    assert group_spans([], 20) == []


# --------------------------------------------------------------------------------------- activity


def _meter(values, fps=25):
    """Returns a meter that has seen grey pictures of these values, a gradient laid over them."""
    meter = ActivityMeter()
    gradient = np.linspace(0, 40, 100, dtype=np.uint8)[None, :, None]
    for n, value in enumerate(values):
        picture = np.full((60, 100, 3), np.uint8(value), np.uint8) + gradient
        meter.push(n * 1_000_000 // fps, picture)
    return meter


def test_nothing_moves_in_a_still_and_everything_in_a_strobe():
    still, strobe = _meter([90] * 50), _meter([40, 40, 40, 200, 200, 200] * 10)
    assert still.still_score(0, 50) == 1.0
    assert still.motion_score(0, 50) == still.jump_score(0, 50, 2_000_000) == 0.0
    assert strobe.still_score(0, 60) == 0.0
    assert strobe.jump_score(0, 60, 2_400_000) == pytest.approx(19 / 2.4)


def test_a_flash_whose_period_is_the_step_is_not_still():
    # Every fifth frame (200 ms at 25 fps) looks the same.
    assert _meter([90, 90, 250, 90, 90] * 10).still_score(0, 50) == 0.0


def test_what_moves_in_colour_alone_is_not_still():
    meter = ActivityMeter()
    for n in range(50):
        picture = np.full((60, 100, 3), 100, np.uint8)
        # As bright as the ground (0.114 B + 0.587 G + 0.299 R = 100), but red.
        picture[20:40, n : n + 20] = (100, 49, 200)
        meter.push(n * 40_000, picture)
    assert meter.motion_score(0, 50) < 0.001
    assert meter.still_score(0, 50) == 0.0


def test_a_pan_over_a_rough_texture_does_not_jump():
    noise = np.random.default_rng(0).integers(0, 256, (60, 400, 1), np.uint8).repeat(3, axis=2)
    meter = ActivityMeter()
    for n in range(50):
        meter.push(n * 40_000, np.ascontiguousarray(noise[:, 5 * n : 5 * n + 100]))
    assert meter.motion_score(0, 50) > 0.2
    assert meter.jump_score(0, 50, 2_000_000) == 0.0


def test_scores_of_a_span_do_not_see_its_neighbours():
    meter = _meter([40] * 50 + [200] * 50 + [40, 200] * 25)
    assert meter.motion_score(50, 100) == 0.0
    assert meter.still_score(50, 100) == 1.0
    assert meter.jump_score(50, 100, 4_000_000) == 0.0
    assert meter.jump_score(0, 150, 6_000_000) == pytest.approx(51 / 6)


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
    detector = build_shot_detector(settings)
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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_scene_s", [0.0, 0.6, 2.0])
def test_content_detection_is_that_of_pyscenedetect(seed, min_scene_s):
    """Pictures whose differences lie around the threshold, at uneven times, flashes among them."""
    draw = np.random.default_rng(seed)
    ours = build_shot_detector(ContentSettings(min_scene_s=min_scene_s))
    theirs = detectors.ContentDetector(threshold=27.0, min_scene_len=min_scene_s)
    time_us, found, expected = 0, [], []
    timecode = FrameTimecode(0, 25.0)
    picture = draw.integers(0, 256, (24, 32, 3), np.uint8)
    for _ in range(400):
        time_us += int(draw.integers(10_000, 90_000))
        if draw.random() < 0.05:
            changed = draw.random((24, 32, 1)) < draw.uniform(0.2, 0.6)
            picture = np.where(changed, draw.integers(0, 256, (24, 32, 3), np.uint8), picture)
        found += ours.push(time_us, picture)
        timecode = FrameTimecode(Timecode(time_us, Fraction(1, 1_000_000)), 25.0)
        expected += [cut.pts for cut in theirs.process_frame(timecode, picture)]
    assert found == expected
    assert found
    assert ours.flush() == theirs.post_process(timecode) == []


def test_flicker_is_merged_and_announced_late_but_within_the_lag():
    detector = build_shot_detector(ContentSettings())
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
@pytest.mark.parametrize("detector", [{"kind": k} for k in ("content", "adaptive", "transnetv2")])
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


def test_one_window_of_a_long_shot_is_taken_and_the_rest_is_accounted_for(tmp_path):
    path = make_video(tmp_path / "a.mp4", shot_frames=(50, 150))
    rows = clips(path, max_clip_ms=2500, long_shots="random")
    assert rows[0]["end_ms"] == rows[1]["start_ms"] == 2000
    assert [a["end_ms"] for a in rows[:-1]] == [b["start_ms"] for b in rows[1:]]
    assert sum(row["duration_ms"] for row in rows) == 8000
    (window,) = (row for row in rows[1:] if "_drop" not in row)
    assert window["duration_ms"] == 2480 or window["duration_ms"] == 2500
    assert {row["_drop"]["reason"] for row in rows[1:] if "_drop" in row} == {"outside_window"}
    found = numbers(window)
    assert len(found) == 8
    assert all(window["start_ms"] <= n * 40 < window["end_ms"] for n in found)
    assert rows == clips(path, max_clip_ms=2500, long_shots="random")


@pytest.mark.parametrize(
    ("picture", "limits", "reason"),
    [
        ("color=red:s=192x128:d=2", {"max_still": 0.9}, "still"),
        ("nullsrc=s=192x128:d=2,geq=lum=255*mod(floor(N/3)\\,2):cb=128:cr=128", {"max_jumps": 4.0},
         "extreme_dynamics"),
    ],
)  # fmt: skip
def test_still_and_restless_clips_are_dropped_when_asked(picture, limits, reason, tmp_path):
    path = tmp_path / "a.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-f", "lavfi"]
    subprocess.run([*command, "-i", picture, str(path)], check=True, stdin=subprocess.DEVNULL)
    assert isinstance(run(path, detector=WholeSettings()), Kept)
    outcome = run(path, detector=WholeSettings(), **limits)
    assert isinstance(outcome, Drop)
    assert (outcome.reason, outcome.detail) == ("no_clips", f"1 spans, all dropped: {reason}")
    assert isinstance(run(make_video(tmp_path / "b.mp4"), **limits), Kept)


def test_detectors_agree_at_cuts_and_only_there(tmp_path):
    path = make_video(tmp_path / "a.mp4", shot_frames=(50, 150))
    both = {"also": [AdaptiveSettings()], "max_clip_ms": 3000}
    rows = clips(path, **both)
    names = ["scenedetect/content", "scenedetect/adaptive"]
    assert [row["start_ms"] for row in rows] == [0, 2000, 5000]
    assert [row["start_detectors"] for row in rows] == [[], names, []]
    assert [row["end_detectors"] for row in rows] == [names, [], []]
    assert "start_detectors" not in clips(path)[0]


# -------------------------------------------------------------------------------------- given spans


def _spans(*spans_ms):
    empty = {"caption": None, "aesthetic_score": None, "video_text_score": None}
    return [empty | {"start_ms": a, "end_ms": b} for a, b in spans_ms]


def test_given_spans_are_the_clips_whatever_the_shots(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    rows = clips(path, _spans((3000, 4000), (501, 2959), (1000, 3000)))
    assert [(row["start_ms"], row["end_ms"]) for row in rows] == [
        (520, 2960),
        (1000, 3000),
        (3000, 4000),
    ]
    for row in rows:
        found = numbers(row)
        assert len(found) == 8
        assert [n * 40 for n in found] == row["frame_ms"]
        assert all(row["start_ms"] <= t < row["end_ms"] for t in row["frame_ms"])
        assert row["_frame_us"][0] == row["start_ms"] * 1000
        assert row["_frame_us"][-1] == row["end_ms"] * 1000
        assert row["provenance"][0]["model"] == "given"


def test_what_the_list_says_of_a_clip_is_kept_and_named(tmp_path):
    spans = _spans((0, 1000), (1000, 2000))
    spans[1] |= {"caption": "a dog", "aesthetic_score": 4.5}
    first, second = clips(make_video(tmp_path / "a.mp4"), spans)
    assert "caption" not in first
    assert (second["caption"], second["aesthetic_score"]) == ("a dog", 4.5)
    assert "video_text_score" not in second
    named = {entry["column"]: entry["model"] for entry in second["provenance"]}
    assert named == {"start_ms": "given", "caption": "given", "aesthetic_score": "given"}


def test_spans_that_no_frame_belongs_to_are_dropped_by_name(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    good, twice, outside = clips(path, _spans((0, 1000), (9000, 9500), (1, 1001)))
    assert good["clip_id"] == "v_0_1000"
    assert twice["_drop"]["reason"] == "span_repeated"
    assert outside["_drop"]["reason"] == "span_outside_video"
    assert outside["clip_id"] == "v_9000_9500"
    outcome = run(path, _spans((9000, 9500)))
    assert isinstance(outcome, Drop)
    assert outcome.reason == "no_clips"
    assert "span_outside_video" in outcome.detail


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.avi", "long.ts"])
def test_seeking_between_spans_changes_nothing(name, tmp_path, monkeypatch):
    path = make_video(tmp_path / name, shot_frames=(100,) * 12)  # 48 s
    spans = _spans(
        (1000, 2000), (20_000, 21_000), (21_500, 24_500), (44_000, 46_000), (99_000, 1e6)
    )
    decoded = []
    measure = segment._GivenSpans.measure
    monkeypatch.setattr(
        segment._GivenSpans,
        "measure",
        lambda self, frame, px: (decoded.append(frame.time_us), measure(self, frame, px))[1],
    )
    sought = clips(path, spans)
    assert len(decoded) < 600
    monkeypatch.setattr(segment, "SEEK_GAP_US", 10**12)
    monkeypatch.setattr(segment, "_LEAD_US", 10**12)
    whole = clips(path, spans)
    assert [row["clip_id"] for row in sought] == [row["clip_id"] for row in whole]
    for a, b in zip(sought[:-1], whole[:-1], strict=True):
        assert a["_frame_us"] == b["_frame_us"]
        assert numbers(a) == numbers(b)
        assert a["motion_score"] == pytest.approx(b["motion_score"])


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
    monkeypatch.setattr(SegmentStage, "_refuse", lambda self, info, has_spans: None)
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
