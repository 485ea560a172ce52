# SPDX-License-Identifier: Apache-2.0
"""Runs a sample of the sources through the real engine into a temporary corpus, and measures it."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from dataengine import records
from dataengine.config import Pipeline
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError
from dataengine.forecast.kept_plan import absolute
from dataengine.plan import Plan
from dataengine.progress import ProgressDisplay, Snapshot
from dataengine.stages.download import DownloadStage

COUNT, BYTES, LISTED = "number of sources", "size of the files", "length that the list gives"
"""What a total may be scaled by."""
"""What a total may be scaled by."""


@dataclass(frozen=True)
class Sources:
    """What is known of the sources that would be worked on, before they are.

    Attributes:
        names: One per source.
        sizes: What a total may be scaled by -> one number per source, where all have one.
    """

    names: list[str]
    sizes: dict[str, np.ndarray]

    @classmethod
    def read(cls, todo: Path) -> "Sources":
        """Returns the sources of a todo list that are not refused."""
        names: list[str] = []
        file_bytes: list[float] = []
        listed_ms: list[float] = []
        with pq.ParquetFile(todo) as file:
            columns = ["source", "file_bytes", "spans", "refusal"]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    if row["refusal"] is not None:
                        continue
                    names.append(row["source"])
                    file_bytes.append(row["file_bytes"] or 0)
                    spans = row["spans"] or ()
                    listed_ms.append(sum(span["end_ms"] - span["start_ms"] for span in spans))
        known = {LISTED: np.array(listed_ms), BYTES: np.array(file_bytes, dtype=float)}
        return cls(names, {name: sizes for name, sizes in known.items() if np.all(sizes > 0)})


def draw(num_sources: int, num_sample: int, seed: int) -> list[int]:
    """Returns which sources are the sample, in their order."""
    count = min(num_sources, num_sample)
    return sorted(random.Random(seed).sample(range(num_sources), count))


def write_sample(plan: Plan, chosen: set[str], folder: Path) -> Plan:
    """Returns the plan of a run over the chosen sources alone."""
    path = folder / "sample.parquet"
    with pq.ParquetFile(plan.todo) as file, pq.ParquetWriter(path, file.schema_arrow) as writer:
        for batch in file.iter_batches():
            mask = [source in chosen for source in batch["source"].to_pylist()]
            if any(mask):
                writer.write_batch(batch.filter(pa.array(mask)))
    return replace(plan, todo=path, num_todo=len(chosen))


class Workplace:
    """A temporary corpus, gone when the ``with`` block ends; on a cluster, where all nodes see it."""

    def __init__(self, folder: Path, corpus_url: str | None, address: str | None) -> None:
        self._url = str(folder / "corpus")
        if address or os.environ.get("RAY_ADDRESS"):
            if corpus_url is None:
                raise ConfigError(
                    "On a cluster the sample's clips need a place that every node sees",
                    "name the corpus of the real run with --corpus: the sample goes beside it",
                )
            self._url = f"{absolute(corpus_url)}.sample-{os.getpid()}"

    def __enter__(self) -> Corpus:
        self._corpus = Corpus.create(self._url)
        return self._corpus

    def __exit__(self, *exc: object) -> None:
        if self._corpus.is_local:
            shutil.rmtree(self._corpus.root, ignore_errors=True)
        else:
            self._corpus.fs.rm(self._corpus.root, recursive=True)


class _StartClock(ProgressDisplay):
    """Progress that notes when the first actor was ready."""

    ready: float | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Draws a state."""
        if self.ready is None and snapshot.stages:
            self.ready = time.monotonic()
        super().show(snapshot)


@dataclass(frozen=True)
class SampleTime:
    """Seconds of the wall that a sample took.

    Attributes:
        whole_s: In all.
        start_s: Until the first actor could work; None where that was not seen.
    """

    whole_s: float
    start_s: float | None


def run_sample(
    pipeline: Pipeline, sample: Plan, corpus: Corpus, console: Console, address: str | None
) -> tuple[Snapshot, SampleTime]:
    """Runs the sample; returns what every stage has done, and the seconds it took."""
    start = time.monotonic()
    from dataengine.runner import execute  # a run waits for this import as well

    cache = corpus.path("cache") if corpus.is_local else ""
    stages = tuple(
        (cls, config.model_copy(update={"cache_dir": cache}))
        if cache and isinstance(config, DownloadStage.Config) and not config.cache_dir
        else (cls, config)
        for cls, config in pipeline.stages
    )
    working = replace(pipeline, stages=stages)
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-plan"
    corpus.take_over(run_id)
    names = [cls.name for cls, _ in pipeline.stages]
    clock = _StartClock(console, names, sample.num_todo)
    with clock as display:
        snapshot = execute(working, corpus, run_id, sample, address=address, display=display)
    ready_s = None if clock.ready is None else clock.ready - start
    return snapshot, SampleTime(time.monotonic() - start, ready_s)


def measure(corpus: Corpus, snapshot: Snapshot, sources: Sequence[str]) -> dict[str, list[float]]:
    """Returns every measured quantity, with one number per sampled source."""
    with tempfile.TemporaryDirectory() as temporary:
        media = _media_bytes(corpus, Path(temporary))
    ledger = {row["source"]: row for row in corpus.videos().to_pylist()}
    rows: list[dict[str, float]] = []
    for source in sources:
        video = ledger[source]
        kept = video["status"] == records.KEPT
        remote = records.is_url(source) or records.is_object(source)
        row: dict[str, float] = {
            "videos_kept": kept,
            "videos_dropped": video["status"] == records.DROPPED,
            "videos_failed": video["status"] == records.FAILED,
            "clips": video["num_clips"],
            "clips_s": video["clips_ms"] / 1000,
            "shard_bytes": media.get(video["video_id"], 0) if kept else 0,
            "download_bytes": (video["file_bytes"] or 0) if remote else 0,
        }
        if not kept:
            row[f"loss {video['stage']}: {video['reason']}"] = 1
            row[f"dropped {video['stage']}"] = 1
        for loss in video["dropped_clips"] or ():
            name = f"dropped {loss['stage']}"
            row[name] = row.get(name, 0) + loss["num_clips"]
        for stage, cost in snapshot.videos.get(source, {}).items():
            row[f"cpu_s {stage}"] = cost.cpu_s
            row[f"gpu_s {stage}"] = cost.gpu_s
            # Waiting for a core is this machine's business, not the video's.
            row[f"busy_s {stage}"] = max(0.0, cost.busy_s - cost.wait_s)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [float(row.get(name, 0)) for row in rows] for name in names}


def _media_bytes(corpus: Corpus, folder: Path) -> dict[str, float]:
    """Returns the bytes that each video has in the shards, its share of the rest included."""
    result: dict[str, float] = {}
    for shard in corpus.names("catalog"):
        path = corpus.path("shards", f"{shard}.parquet")
        local = path
        if not corpus.is_local:
            local = str(folder / "shard.parquet")
            corpus.fs.get(path, local)
        with duckdb.connect() as db:
            rows = db.execute(
                "select video_id, sum(1 + coalesce(octet_length(video.bytes), 0) "
                "+ coalesce(list_sum(list_transform(frames, lambda f: octet_length(f))), 0)) "
                "from read_parquet(?) where video_id is not null group by 1",
                [local],
            ).fetchall()
        whole = Path(local).stat().st_size
        total = sum(float(size) for _, size in rows)
        for video_id, size in rows:
            result[video_id] = result.get(video_id, 0) + float(size) * whole / total
    return result
