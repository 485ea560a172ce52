# SPDX-License-Identifier: Apache-2.0
"""How well still_score and jump_score tell stills and strobes from everything else.

    python -m dataengine demo out/demo --num-videos 80
    python benchmarks/activity.py out/demo [--videos DIR]

Cuts each demo video at its known boundaries, so that no detector is in play, and scores the known
shots. With --videos, also lists the most still and the most restless clips of other footage, to look at.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2

from dataengine import media
from dataengine.activity import ActivityMeter
from dataengine.sources import VIDEO_SUFFIXES
from dataengine.stage import Kept
from dataengine.stages.segment import SegmentConfig, SegmentStage

MAX_STILL, MAX_JUMPS = 0.9, 4.0
"""As in pipelines/internvid_clips.yaml."""


def main() -> None:
    """Prints what is scored how; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("demo", type=Path)
    parser.add_argument("--videos", type=Path)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    shots = list(score_demo(given.demo))
    result = {
        "still": summary(shots, "still_score", "still", MAX_STILL),
        "strobe": summary(shots, "jump_score", "strobe", MAX_JUMPS),
    }
    if given.videos:
        clips = score_videos(given.videos)
        for name, limit in (("still_score", MAX_STILL), ("jump_score", MAX_JUMPS)):
            ranked = sorted(clips, key=lambda clip: -clip[name])
            print(
                f"\n{sum(clip[name] > limit for clip in clips)} of {len(clips)} clips over {limit}:"
            )
            for clip in ranked[:12]:
                print(f"  {clip[name]:7.3f}  {clip['clip_id']}")
    print(json.dumps(result))


def score_demo(demo: Path) -> Iterator[dict[str, float]]:
    """Yields every shot of the truth with its scores."""
    truth = json.loads((demo / "truth.json").read_text())["videos"]
    for name, video in truth.items():
        meter = ActivityMeter()
        with media.VideoReader(str(demo / "videos" / name)) as reader:
            for frame in reader:
                meter.push(frame.time_us, media.small_bgr(frame.picture, reader.info.rotation))
        soft = [t for t in video["transitions"] if t["kind"] != "cut"]
        for shot in video["shots"]:
            # Inside a dissolve nothing is still.
            start = max(
                [shot["start_ms"], *(t["end_ms"] for t in soft if t["cut_ms"] == shot["start_ms"])]
            )
            end = min(
                [shot["end_ms"], *(t["start_ms"] for t in soft if t["cut_ms"] == shot["end_ms"])]
            )
            inside = [i for i, t in enumerate(meter.times_us) if start <= media.floor_ms(t) < end]
            first, after = inside[0], inside[-1] + 1
            yield {
                "still": shot["still"],
                "strobe": shot["strobe"],
                "still_score": meter.still_score(first, after),
                "jump_score": meter.jump_score(first, after, end * 1000),
            }


def summary(
    shots: Sequence[dict[str, float]], score: str, truth: str, limit: float
) -> dict[str, float]:
    """Returns how the shots that should pass the limit lie to it, and those that should not."""
    ones = [shot[score] for shot in shots if shot[truth]]
    others = [shot[score] for shot in shots if not shot[truth]]
    return {
        "num": len(ones),
        "found": int(sum(value > limit for value in ones)),
        "lowest": round(min(ones), 3),
        "num_others": len(others),
        "wrong": int(sum(value > limit for value in others)),
        "highest_other": round(max(others), 3),
    }


def score_videos(folder: Path) -> list[dict[str, Any]]:
    """Returns the clips that content detection gives, with their scores."""
    stage = SegmentStage(SegmentConfig(num_frames=1, frame_short_side=64, min_clip_ms=500))
    stage.setup()
    clips = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            row = {"video_id": path.name, "_video": {}, "_path": str(path), "_spans": None}
            (outcome,) = stage.process([row])
            if isinstance(outcome, Kept):
                clips += [row for row in outcome.rows if "_drop" not in row]
    return clips


if __name__ == "__main__":
    main()
