# SPDX-License-Identifier: Apache-2.0
"""The demo's truth, measured again from its files."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.frame import PictureType

from dataengine.demo import render, render_demo, soundtrack
from dataengine.demo.draw import outline
from dataengine.demo.plan import plan_video
from dataengine.demo.render import render_video
from dataengine.demo.scene import (
    ACTIONS,
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    SHAPES,
    STAYS,
    Background,
    Plan,
    Shot,
)
from dataengine.demo.shots import contrast
from dataengine.demo.sound import find_synthesiser
from dataengine.errors import ConfigError

SEED = 7
SYNTHESISER = find_synthesiser()
needs_voice = pytest.mark.skipif(SYNTHESISER is None, reason="no ffmpeg with flite")


@dataclass
class Seen:
    """A demo video as decoded: times on the container's clock, frames shrunk to a quarter."""

    name: str
    truth: dict[str, Any]
    path: Path
    times_ms: np.ndarray
    frames: np.ndarray
    audio: np.ndarray | None
    sample_rate: int

    @property
    def jumps(self) -> np.ndarray:
        """Mean absolute difference of each frame to the one before; 0 for the first."""
        small = self.frames.astype(np.int16)
        return np.concatenate([[0.0], np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))])

    def during(self, span: dict[str, Any]) -> np.ndarray:
        """Which frames lie inside a span, its first frame left out."""
        return (self.times_ms > span["start_ms"] + 5) & (self.times_ms < span["end_ms"] - 5)

    def heard(self, start_ms: int, end_ms: int) -> np.ndarray:
        """The samples of a span, less 30 ms at either end, where the coder smears."""
        assert self.audio is not None
        rate = self.sample_rate
        return self.audio[(start_ms + 30) * rate // 1000 : (end_ms - 30) * rate // 1000]


def decode(directory: Path, index: int) -> Seen:
    name = f"demo_{index:04d}"
    path = directory / "videos" / f"{name}.mp4"
    truth = json.loads((directory / "truth" / f"{name}.json").read_text())["video"]
    times, frames, audio, rate = [], [], None, 0
    with av.open(str(path)) as container:
        assert container.start_time is not None
        start = container.start_time / 1e6
        for frame in container.decode(video=0):
            assert frame.time is not None
            times.append((frame.time - start) * 1000)
            picture = frame.to_ndarray(format="rgb24")
            frames.append(cv2.resize(picture, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA))
    with av.open(str(path)) as container:
        if container.streams.audio:
            blocks, first_ms = [], None
            for frame in container.decode(audio=0):
                assert frame.time is not None
                first_ms = (frame.time - start) * 1000 if first_ms is None else first_ms
                rate = frame.sample_rate
                blocks.append(frame.to_ndarray()[0])
            assert first_ms == pytest.approx(0, abs=1)
            audio = np.concatenate(blocks)
    return Seen(name, truth, path, np.array(times), np.stack(frames), audio, rate)


def plans(first: int = 0, count: int = 24, seed: int = SEED) -> list[Plan]:
    return [plan_video(seed, index) for index in range(first, first + count)]


def oddities(plan: Plan) -> set[str]:
    """What is special about a video."""
    kinds = {change.kind for change in plan.transitions} | {sound.kind for sound in plan.sounds}
    kinds |= {plan.trait, f"subtitles {len(plan.subtitles)}"}
    kinds |= {f"strobe {bool(shot.strobe_hz)}" for shot in plan.shots}
    kinds |= {f"still {shot.still}" for shot in plan.shots}
    return kinds


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    (path / "videos").mkdir()
    (path / "truth").mkdir()
    return path


@pytest.fixture(scope="module")
def corpus(directory) -> list[Seen]:
    """A few videos that have every oddity between them."""
    kinds = {plan.index: oddities(plan) for plan in plans()}
    missing = set().union(*kinds.values())
    indices: list[int] = []
    while missing:
        indices.append(max(kinds, key=lambda index: len(kinds[index] & missing)))
        missing -= kinds[indices[-1]]
    assert len(indices) <= 9
    for index in indices:
        render_video(directory, SEED, index, SYNTHESISER)
    return [decode(directory, index) for index in indices]


@pytest.mark.parametrize("kind", ["first", "b_frames"])
def test_same_seed_gives_same_bytes(kind, directory, corpus, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "truth").mkdir()
    index = int(corpus[0].name.removeprefix("demo_"))
    if kind == "b_frames":
        index = next(
            int(video.name.removeprefix("demo_"))
            for video in corpus
            if plan_video(SEED, int(video.name.removeprefix("demo_"))).trait == "b_frames"
        )
    render_video(tmp_path, SEED, index, SYNTHESISER)
    again = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(again) >= 2
    for path in again:
        assert path.read_bytes() == (directory / path.relative_to(tmp_path)).read_bytes()
    assert plan_video(SEED + 1, index) != plan_video(SEED, index)


def test_frames_are_shown_when_truth_says(corpus):
    for seen in corpus:
        truth = seen.truth
        assert len(seen.times_ms) == truth["num_frames"], seen.name
        assert truth["shots"][0]["start_ms"] == pytest.approx(seen.times_ms[0], abs=0.51)
        last_ms = seen.times_ms[-1] + 1000 / truth["fps"]
        assert truth["duration_ms"] == pytest.approx(last_ms, abs=0.51), seen.name
        for before, after in pairwise(truth["shots"]):
            assert before["end_ms"] == after["start_ms"]
            assert np.abs(seen.times_ms - after["start_ms"]).min() <= 0.51, seen.name
        steps = np.diff(seen.times_ms) * truth["fps"] / 1000
        assert np.allclose(steps, np.round(steps), atol=0.01)
        assert (steps.max() > 1.5) == (truth["trait"] == "vfr"), seen.name


def test_traits_are_in_the_files(corpus):
    traits = {seen.truth["trait"]: seen for seen in corpus}
    assert set(traits) == {None, "vfr", "b_frames", "late_start", "late_video"}
    assert traits["late_video"].times_ms[0] >= 400
    with av.open(str(traits["late_start"].path)) as container:
        assert container.start_time is not None
        assert container.start_time >= 1_200_000
    with av.open(str(traits["b_frames"].path)) as container:
        assert any(frame.pict_type == PictureType.B for frame in container.decode(video=0))


def test_hard_cuts_stand_out_and_nothing_else_does(corpus):
    num_cuts = 0
    for seen in corpus:
        cuts = [t["cut_ms"] for t in seen.truth["transitions"] if t["kind"] == "cut"]
        at_cut = np.array([np.abs(seen.times_ms - cut).argmin() for cut in cuts], int)
        steady = np.ones(len(seen.times_ms), bool)
        steady[at_cut] = False
        for shot in seen.truth["shots"]:
            steady &= ~(seen.during(shot) & shot["strobe"])
        assert seen.jumps[at_cut].min() > 25, seen.name
        assert seen.jumps[steady].max() < 0.6 * seen.jumps[at_cut].min(), seen.name
        num_cuts += len(cuts)
    assert num_cuts > 20


def test_dissolves_and_fades_blend_two_shots(corpus):
    kinds = Counter()
    for seen in corpus:
        for change in seen.truth["transitions"]:
            if change["kind"] == "cut":
                continue
            kinds[change["kind"]] += 1
            first, last = (
                int(np.abs(seen.times_ms - change[key]).argmin()) for key in ("start_ms", "end_ms")
            )
            middle = seen.frames[int(np.abs(seen.times_ms - change["cut_ms"]).argmin())]
            ends = seen.frames[[first - 1, last]].astype(float)
            assert np.abs(ends[0] - ends[1]).mean() > 25
            if change["kind"] == "dissolve":
                # Both shots go on moving, so only large areas can be expected to be half and half.
                between = cv2.resize(ends.mean(axis=0), (3, 3), interpolation=cv2.INTER_AREA)
                really = cv2.resize(middle, (3, 3), interpolation=cv2.INTER_AREA)
                assert np.abs(really - between).mean() < 12
            else:
                target = 255 if change["kind"] == "fade_white" else 0
                assert np.abs(middle.astype(float) - target).mean() < 8
    assert set(kinds) == {"dissolve", "fade_black", "fade_white"}


def test_still_shots_do_not_move_and_others_do(corpus):
    num_still = 0
    for seen in corpus:
        for shot in seen.truth["shots"]:
            inside = seen.during(shot)
            # The coder first refines what the cut left rough, so only the second half counts.
            frames = seen.frames[inside][inside.sum() // 2 :].astype(int)
            change = np.abs(frames - frames[0]).max()
            if shot["still"]:
                num_still += 1
                assert seen.jumps[inside].mean() < 0.3, (seen.name, shot["caption"])
                assert change < 12, (seen.name, shot["caption"])
            else:
                assert change > 40, (seen.name, shot["caption"])
    assert num_still >= 1


def test_strobe_flashes(corpus):
    strobes = [(seen, shot) for seen in corpus for shot in seen.truth["shots"] if shot["strobe"]]
    assert len(strobes) == 1
    seen, shot = strobes[0]
    luma = seen.frames[seen.during(shot)].mean(axis=(1, 2, 3))
    flips = np.count_nonzero(np.diff(luma > luma.mean()))
    assert 15 <= flips / ((shot["end_ms"] - shot["start_ms"]) / 1000) <= 25


def test_objects_and_backgrounds_have_the_named_colours(corpus):
    num_objects = 0
    for seen in corpus:
        for shot in seen.truth["shots"]:
            if shot["strobe"]:
                continue
            at = int(np.abs(seen.times_ms - shot["middle_ms"]).argmin())
            if seen.truth["trait"] == "vfr" and abs(seen.times_ms[at] - shot["middle_ms"]) > 1:
                continue
            frame = seen.frames[at]
            for thing in shot["objects"]:
                if thing["action"] == "blinks":
                    continue
                left, top, right, bottom = np.array(thing["middle_box_px"]) / 4
                box = frame[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
                near = np.array(
                    [contrast(tuple(pixel), thing["rgb"]) for pixel in box.reshape(-1, 3)]
                )
                assert (near < 16).mean() > 0.08, (seen.name, shot["caption"], thing)
                assert contrast(thing["rgb"], COLOURS[thing["colour"]]) < 16
                num_objects += 1
            background = shot["background"]
            if background["kind"] in ("plain", "checkered", "striped"):
                luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean()
                assert luma == pytest.approx(background["mean_luma"], abs=28)
    assert num_objects > 40


def test_captions_name_every_object(corpus):
    for seen in corpus:
        for shot in seen.truth["shots"]:
            words = set(re.findall(r"[a-z]+", shot["caption"].lower()))
            for thing in shot["objects"]:
                assert {thing["shape"], thing["colour"]} <= words, shot["caption"]
            assert set(shot["background"]["colours"]) - {"white"} <= words, shot["caption"]
            assert shot["caption"].endswith(".")
            assert " a orange" not in shot["caption"]


def test_sounds_are_as_loud_as_truth_says(corpus):
    kinds = set()
    for seen in corpus:
        assert (seen.audio is not None) == seen.truth["has_audio"] == bool(seen.truth["sounds"])
        for sound in seen.truth["sounds"]:
            kinds.add(sound["kind"])
            heard = seen.heard(sound["start_ms"], sound["end_ms"])
            level = 20 * np.log10(max(float(np.sqrt(np.mean(heard**2))), 1e-6))
            if sound["kind"] == "silence":
                assert level < -70
            else:
                assert level == pytest.approx(sound["level_dbfs"], abs=1.5), sound
    assert kinds >= {"silence", "tone", "chord", "melody", "noise", "rhythm"}


def test_tones_have_their_pitch(corpus):
    num_tones = 0
    for seen in corpus:
        for sound in seen.truth["sounds"]:
            if sound["kind"] == "tone":
                heard = seen.heard(sound["start_ms"], sound["end_ms"])
                peak = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))).argmax()
                pitch_hz = peak * seen.sample_rate / len(heard)
                assert pitch_hz == pytest.approx(sound["parameters"]["pitch_hz"], rel=0.01)
                num_tones += 1
    assert num_tones >= 3


@needs_voice
def test_speech_is_where_truth_says(corpus):
    num_sentences = 0
    for seen in corpus:
        for shot in seen.truth["shots"]:
            speech = shot["speech"]
            if speech is None:
                continue
            assert shot["start_ms"] < speech["start_ms"] < speech["end_ms"] <= shot["end_ms"]
            heard = seen.heard(shot["start_ms"], shot["end_ms"])
            audible = np.flatnonzero(np.abs(heard) > 0.02 * np.abs(heard).max())
            start_ms, end_ms = audible[[0, -1]] * 1000 / seen.sample_rate + shot["start_ms"] + 30
            assert start_ms == pytest.approx(speech["start_ms"], abs=60)
            assert end_ms == pytest.approx(speech["end_ms"], abs=60)
            num_sentences += 1
    assert num_sentences >= 2


def test_without_a_synthesiser_nothing_is_spoken(directory, corpus, tmp_path):
    index = next(
        plan.index for plan in plans() if any(sound.kind == "speech" for sound in plan.sounds)
    )
    (tmp_path / "videos").mkdir()
    (tmp_path / "truth").mkdir()
    render_video(tmp_path, SEED, index, None)
    seen = decode(tmp_path, index)
    assert all(shot["speech"] is None for shot in seen.truth["shots"])
    assert all(sound["kind"] != "speech" for sound in seen.truth["sounds"])
    assert seen.truth["sounds"][-1]["end_ms"] == seen.truth["duration_ms"]


def test_subtitles_match_their_files_and_stay_in_shots(directory, corpus):
    pattern = r"\d+\n(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})\n(.+)\n"
    num_cues = 0
    for seen in corpus:
        files = {path.suffixes[0][1:]: path for path in directory.glob(f"videos/{seen.name}.*.srt")}
        assert set(files) == set(seen.truth["subtitles"])
        for language, path in files.items():
            cues = []
            for match in re.findall(pattern, path.read_text(encoding="utf-8")):
                numbers = [int(part) for part in match[:8]]
                start_ms, end_ms = (
                    ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms
                    for hours, minutes, seconds, ms in (numbers[:4], numbers[4:])
                )
                cues.append({"start_ms": start_ms, "end_ms": end_ms, "text": match[8]})
            assert cues == seen.truth["subtitles"][language]
            for cue in cues:
                num_cues += 1
                assert any(
                    shot["start_ms"] <= cue["start_ms"] < cue["end_ms"] <= shot["end_ms"]
                    for shot in seen.truth["shots"]
                )
    assert num_cues > 10


def test_translations_are_of_one_length_and_speakable_text_is_plain():
    texts = soundtrack.sentences()
    assert len(texts["subtitles"]) >= 11
    for language, lines in texts["subtitles"].items():
        assert len(set(lines)) == len(texts["meanings"]), language
    assert len(set(texts["spoken"])) >= 60
    for sentence in texts["spoken"]:
        assert re.fullmatch(r"[A-Za-z, ]+\.", sentence), sentence


@pytest.mark.parametrize("first", [0, 5, 17, 100])
def test_any_period_holds_every_oddity(first):
    window = plans(first)
    changes = Counter(change.kind for plan in window for change in plan.transitions)
    assert changes["dissolve"] >= 6
    assert changes["fade_black"] >= 2
    assert changes["fade_white"] >= 2
    assert sum(bool(shot.strobe_hz) for plan in window for shot in plan.shots) == 1
    assert sum(shot.still for plan in window for shot in plan.shots) >= 3
    assert sum(not plan.has_audio for plan in window) >= 2
    assert sum(any(sound.kind == "speech" for sound in plan.sounds) for plan in window) >= 4
    assert sum(bool(plan.subtitles) for plan in window) >= 6
    assert len({language for plan in window for language in plan.subtitles}) >= 6
    assert Counter(plan.trait for plan in window)["b_frames"] == 3


@pytest.mark.parametrize("first", [0, 13])
def test_any_period_holds_every_word_about_evenly(first):
    shots = [shot for plan in plans(first) for shot in plan.shots]
    things = [thing for shot in shots for thing in shot.things]
    assert {shot.camera for shot in shots} == set(CAMERAS)
    for seen, all_of_them in (
        ([thing.shape for thing in things], SHAPES),
        ([thing.colour for thing in things], COLOURS),
        ([thing.action for thing in things if thing.action != STAYS], ACTIONS),
        ([shot.background.kind for shot in shots], BACKGROUNDS),
        ([colour for shot in shots for colour in shot.background.colours], COLOURS),
    ):
        counts = Counter(seen)
        assert set(counts) == set(all_of_them)
        assert min(counts.values()) > 0.25 * len(seen) / len(counts), counts


def test_outlines_fill_the_unit_circle():
    for shape in SHAPES:
        reach = max(float(np.hypot(*polygon.T).max()) for polygon in outline(shape))
        assert 0.9 < reach < 1.2, shape


def test_still_needs_all_to_rest():
    background = Background("plain", ("red", "red"), ((1, 1, 1), (1, 1, 1)), "", "vertical", 0)
    assert Shot(0, 0, 9, 9, background, (), "still", 0.0).still
    assert not Shot(0, 0, 9, 9, background, (), "zoom in", 0.0).still
    assert not Shot(0, 0, 9, 9, background, (), "still", 8.0).still


def test_a_stopped_demo_goes_on_and_a_finished_one_is_left_alone(tmp_path):
    calls: list[tuple[int, int]] = []
    truth_path = render_demo(tmp_path, 2, SEED, workers=2, progress=lambda *now: calls.append(now))
    assert calls == [(1, 2), (2, 2)]
    truth = json.loads(truth_path.read_text())
    assert list(truth["videos"]) == ["demo_0000.mp4", "demo_0001.mp4"]
    assert (truth["seed"], truth["num_videos"]) == (SEED, 2)
    assert truth["synthesiser"] == (SYNTHESISER is not None)
    first, second = (tmp_path / "videos" / name for name in truth["videos"])
    stamps = first.stat().st_mtime_ns, truth_path.stat().st_mtime_ns
    content = second.read_bytes()

    render_demo(tmp_path, 2, SEED, workers=1, progress=lambda *now: calls.append(now))
    assert len(calls) == 2
    assert (first.stat().st_mtime_ns, truth_path.stat().st_mtime_ns) == stamps

    # As if killed while the second was being written.
    truth_path.unlink()
    (tmp_path / "truth" / "demo_0001.json").unlink()
    second.rename(second.with_name("demo_0001.mp4.part"))
    render_demo(tmp_path, 2, SEED, workers=1, progress=lambda *now: calls.append(now))
    assert calls[2:] == [(2, 2)]
    assert second.read_bytes() == content
    assert first.stat().st_mtime_ns == stamps[0]
    assert json.loads(truth_path.read_text()) == truth
    assert not list(tmp_path.rglob("*.part"))


def test_another_demo_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "write_video", lambda path, *_: path.write_bytes(b""))
    render_demo(tmp_path, 3, SEED, workers=1)
    render_demo(tmp_path, 4, SEED, workers=1)
    with pytest.raises(ConfigError, match="seed 7, not 8"):
        render_demo(tmp_path, 4, SEED + 1, workers=1)
    with pytest.raises(ConfigError, match="more than 2 videos"):
        render_demo(tmp_path, 2, SEED, workers=1)
    with pytest.raises(ConfigError, match="num_videos 0"):
        render_demo(tmp_path, 0, SEED)
