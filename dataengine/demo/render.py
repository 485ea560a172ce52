# SPDX-License-Identifier: Apache-2.0
"""Renders a demo corpus: videos, sidecar subtitles and the truth about them."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataengine.demo.draw import VideoPainter
from dataengine.demo.encode import lead_ticks, write_video
from dataengine.demo.plan import plan_video
from dataengine.demo.scene import Cue, Plan, Sound
from dataengine.demo.sound import SPEECH_DELAY_MS, Wave, find_synthesiser, render_sound, speak
from dataengine.demo.truth import video_truth
from dataengine.errors import ConfigError

DEMO_VERSION = 2
"""Changes whenever the same seed gives other videos."""


def render_demo(
    directory: Path,
    num_videos: int = 24,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Returns the path of ``truth.json``, after rendering what is not there yet.

    A video is committed by its own truth file, ``truth/<name>.json``, so a demo that was stopped
    goes on where it was; ``truth.json`` comes last. Video i is the same in a demo of any size.

    Args:
        directory: Where ``videos/``, ``truth/`` and ``truth.json`` go.
        num_videos: At least 1.
        seed: At least 0. The same seed gives the same bytes on the same machine and versions.
        workers: Processes; None means one per core, 1 renders in this process.
        progress: Called with (videos done, videos in all) after each video.

    Raises:
        ConfigError: If the directory holds the demo of another seed, or a bigger one.
    """
    if num_videos < 1 or seed < 0:
        raise ConfigError(
            f"not a demo: num_videos {num_videos}, seed {seed}", "Use 1 and 0 or more"
        )
    directory = Path(directory)
    path = directory / "truth.json"
    header = {"version": DEMO_VERSION, "seed": seed, "num_videos": num_videos}
    old = _read(path)
    if old is not None and old.get("seed") == seed and old.get("version") == DEMO_VERSION:
        present = all((directory / "videos" / name).exists() for name in old["videos"])
        if old["num_videos"] == num_videos and present:
            return path
    _refuse_other_demo(directory, seed, num_videos)

    synthesiser = find_synthesiser()
    (directory / "videos").mkdir(parents=True, exist_ok=True)
    (directory / "truth").mkdir(exist_ok=True)
    marks = {"version": DEMO_VERSION, "seed": seed, "synthesiser": synthesiser is not None}
    missing = [i for i in range(num_videos) if not _is_complete(directory, i, marks)]
    render = partial(render_video, directory, seed, synthesiser=synthesiser)
    for done in _each_done(render, missing, workers or os.cpu_count() or 1):
        if progress is not None:
            progress(num_videos - len(missing) + done, num_videos)
    videos: dict[str, Any] = {}
    for index in range(num_videos):
        part = _read(_part_path(directory, index))
        assert part is not None
        videos[f"{part['name']}.mp4"] = part["video"]
    _write(path, json.dumps(header | {"synthesiser": synthesiser is not None, "videos": videos}))
    return path


def render_video(directory: Path, seed: int, index: int, synthesiser: str | None) -> None:
    """Writes one video, its subtitles and, last, its truth."""
    cv2.setNumThreads(1)  # one process per core is already all the machine has
    plan = plan_video(seed, index)
    videos = directory / "videos"
    for stale in videos.glob(f"{plan.name}.*.srt"):
        stale.unlink()
    lead_ms = plan.ms(lead_ticks(plan))
    sounds, waves = _render_sounds(plan, lead_ms, synthesiser)
    painter = VideoPainter(plan)
    temporary = videos / f"{plan.name}.mp4.part"
    audio = np.concatenate(waves) if plan.has_audio else None
    write_video(temporary, plan, map(painter.frame, plan.ticks), audio)
    temporary.replace(videos / f"{plan.name}.mp4")
    for language, cues in plan.subtitles.items():
        _write(videos / f"{plan.name}.{language}.srt", format_srt(cues, lead_ms))
    rng = np.random.default_rng([seed, index, 99])
    part = {
        "version": DEMO_VERSION,
        "seed": seed,
        "synthesiser": synthesiser is not None,
        "name": plan.name,
        "video": video_truth(plan, painter, sounds, waves, lead_ms, rng),
    }
    _write(_part_path(directory, index), json.dumps(part, ensure_ascii=False))


def format_srt(cues: tuple[Cue, ...], lead_ms: int) -> str:
    """Returns cues as SubRip text, on the container's clock."""

    def clock(ms: int) -> str:
        seconds, ms = divmod(ms, 1000)
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d},{ms:03d}"

    blocks = [
        f"{i}\n{clock(cue.start_ms + lead_ms)} --> {clock(cue.end_ms + lead_ms)}\n{cue.text}\n"
        for i, cue in enumerate(cues, start=1)
    ]
    return "\n".join(blocks)


def _render_sounds(
    plan: Plan, lead_ms: int, synthesiser: str | None
) -> tuple[list[Sound], list[Wave]]:
    """Returns the sounds really heard and their samples, from the container's start on."""
    sounds: list[Sound] = []
    waves: list[Wave] = []
    for sound in plan.sounds:
        first = {"start_ms": sound.start_ms - lead_ms} if not sounds else {}
        spoken = None
        if sound.kind == "speech" and synthesiser is not None:
            spoken = speak(synthesiser, sound.text, sound.voice, plan.sample_rate)
            room_ms = sound.end_ms - sound.start_ms - SPEECH_DELAY_MS
            if len(spoken) * 1000 > room_ms * plan.sample_rate:
                spoken = None
        if sound.kind == "speech" and spoken is None:
            assert sound.fallback is not None
            sound = sound.fallback
        sound = replace(sound, **first)
        sounds.append(sound)
        waves.append(render_sound(sound, plan.sample_rate, spoken))
    return sounds, waves


def _each_done(render: Callable[..., None], missing: list[int], workers: int) -> Iterator[int]:
    """Yields the number of videos done, after each."""
    if workers == 1 or len(missing) < 2:
        for number, index in enumerate(missing, start=1):
            render(index=index)
            yield number
        return
    # A forked child of a process with threads can hang; spawned ones start clean.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
        futures = [pool.submit(render, index=index) for index in missing]
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            yield number


def _part_path(directory: Path, index: int) -> Path:
    return directory / "truth" / f"demo_{index:04d}.json"


def _is_complete(directory: Path, index: int, marks: dict[str, Any]) -> bool:
    part = _read(_part_path(directory, index))
    video = directory / "videos" / f"demo_{index:04d}.mp4"
    return part is not None and video.exists() and marks.items() <= part.items()


def _refuse_other_demo(directory: Path, seed: int, num_videos: int) -> None:
    """Raises ConfigError rather than mix two demos, or delete videos."""
    hint = "Choose another directory, or empty this one"
    for part_path in sorted((directory / "truth").glob("demo_*.json")):
        part = _read(part_path)
        if part is not None and part["seed"] != seed:
            raise ConfigError(
                f"{directory} holds the demo of seed {part['seed']}, not {seed}", hint
            )
        if int(part_path.stem.removeprefix("demo_")) >= num_videos:
            raise ConfigError(f"{directory} holds a demo of more than {num_videos} videos", hint)


def _read(path: Path) -> dict[str, Any] | None:
    """Returns a JSON file; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, text: str) -> None:
    """Writes a text file so that it is there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
