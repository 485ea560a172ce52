# SPDX-License-Identifier: Apache-2.0
"""A pipeline without models, to test what holds whatever the stages do.

As a script it runs an ingest in a process that can be killed:
``python -m tests.fake_pipeline SOURCES CORPUS [seconds per clip]``.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from dataengine import records
from dataengine.annotate import annotate, make_annotation
from dataengine.config import Pipeline, RuntimeSettings, ShardSettings
from dataengine.errors import DependencyError, EngineError
from dataengine.flow import VIDEO_STRUCT
from dataengine.ingest import RunResult, ingest
from dataengine.stage import Drop, Kept, Resources, Stage, provenance
from tests.helpers import clip_row

LIGHT = Resources(num_cpus=0.3, batch_size=4)


class FakeSegment(Stage):
    """A file ``3.mp4`` has three clips, ``0.mp4`` none; its first letters steer the faults."""

    name = "segment"
    inputs = ("_video", "_refusal")
    outputs = pa.schema(
        [
            field
            for field in records.CLIP_SCHEMA
            if field.name not in ("caption", "provenance", "clip_score")
        ]
        + [pa.field("_video", VIDEO_STRUCT)]
    )

    class Config(Stage.Config):
        resources: Resources = LIGHT
        seconds: float = 0.0

    def process(self, batch):
        return [self._one(row["_video"]) for row in batch]

    def _one(self, video):
        path = Path(video["source"])
        time.sleep(self.config.seconds)
        if path.stem.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if path.stem.startswith("bug"):
            raise ZeroDivisionError("a bug")
        if path.stem.startswith("away"):
            raise EngineError("No answer", "start the server")
        video_id = records.file_video_id(str(path))
        num_clips = int(path.stem.split("_")[-1])
        if not num_clips:
            return Drop("no_clips", "nothing in it")
        known = {**video, "video_id": video_id, "duration_ms": 1000 * num_clips}
        return Kept(
            tuple(
                {
                    k: v
                    for k, v in clip_row(video_id, 1000 * i, 1000 * i + 1000).items()
                    if k not in ("caption", "provenance", "clip_score")
                }
                | {"_video": known}
                for i in range(num_clips)
            )
        )


class FakeCaption(Stage):
    """Clip 7 of any video kills its worker; clip 8 is dropped."""

    name = "caption"
    inputs = ("clip_id",)
    outputs = pa.schema([("caption", pa.string())])

    class Config(Stage.Config):
        resources: Resources = LIGHT
        broken_setup: bool = False

    def setup(self):
        if self.config.broken_setup:
            raise DependencyError("Model is missing: nowhere", "put it there")

    def process(self, batch):
        return [self._one(row["clip_id"]) for row in batch]

    def _one(self, clip_id):
        if clip_id.endswith("_7000_8000"):
            os.kill(os.getpid(), signal.SIGKILL)
        if clip_id.endswith("_8000_9000"):
            return Drop("mute")
        return Kept(({"caption": f"about {clip_id}"},))


class Recaption(Stage):
    """Writes ``caption`` and ``clip_score`` anew; drops the clips of ``bad``, forgets those of ``mute``."""

    name = "recaption"
    inputs = ("clip_id",)
    outputs = pa.schema([("caption", pa.string()), ("clip_score", pa.float32())])

    class Config(Stage.Config):
        resources: Resources = LIGHT
        word: str = "new"
        bad: str = "-"
        mute: str = "-"
        seconds: float = 0.0

    def process(self, batch):
        time.sleep(self.config.seconds)
        return [self._one(row["clip_id"]) for row in batch]

    def _one(self, clip_id):
        if clip_id.startswith(self.config.bad):
            return Drop("bad_frames")
        if clip_id.startswith(self.config.mute):
            return Kept(({"caption": None, "clip_score": None},))
        wrote = [provenance(name, "recaptioner", self.config.word) for name in self.outputs.names]
        return Kept(
            ({"caption": f"{self.config.word} {clip_id}", "clip_score": 0.5, "provenance": wrote},)
        )


def recaption_pipeline(**settings) -> Pipeline:
    return replace(
        fake_pipeline(), stages=((Recaption, Recaption.Config.model_validate(settings)),)
    )


def fake_pipeline(
    seconds: float = 0.0, *, broken_setup: bool = False, waves: int = 100
) -> Pipeline:
    return Pipeline(
        name="fake",
        description="",
        shards=ShardSettings(shard_mb=1),
        runtime=RuntimeSettings(max_attempts=2, videos_per_wave=waves),
        stages=(
            (FakeSegment, FakeSegment.Config(seconds=seconds)),
            (FakeCaption, FakeCaption.Config(broken_setup=broken_setup)),
        ),
        source="tests",
    )


def make_sources(folder: Path, names: list[str]) -> Path:
    """Files named after what becomes of them, each with bytes of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.mp4").write_bytes(name.encode())
    return folder


def run_fake(sources: Path, corpus: Path, pipeline: Pipeline | None = None) -> RunResult:
    return ingest(
        pipeline or fake_pipeline(), [str(sources)], str(corpus), Console(stderr=True, quiet=True)
    )


if __name__ == "__main__" and sys.argv[1] == "annotate":
    annotate(
        make_annotation(recaption_pipeline(seconds=0.3), ["recaption"]), sys.argv[2], Console()
    )
elif __name__ == "__main__":
    run_fake(Path(sys.argv[1]), Path(sys.argv[2]), fake_pipeline(float(sys.argv[3])))
