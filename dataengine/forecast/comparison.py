# SPDX-License-Identifier: Apache-2.0
"""A finished run against the forecast of its pipeline."""

import json
import math
from dataclasses import dataclass
from typing import cast

import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from dataengine.forecast.kept_plan import load
from dataengine.forecast.result import Range


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of plan against actual.

    Attributes:
        stage: Its name; ``all`` for the whole run.
        quantity: ``cpu_s``, ``gpu_s``, or a total of `Forecast`.
        planned: Scaled to what the run was given to do, if that is not what was planned.
        actual: What the run took or gave.
        ratio: Actual by planned; None where nothing was planned.
    """

    stage: str
    quantity: str
    planned: Range
    actual: float
    ratio: float | None


def compare(corpus: Corpus, run_id: str) -> list[Comparison]:
    """Returns a run against the forecast of its pipeline, stage by stage and in all.

    Args:
        corpus: Where the run is.
        run_id: A finished run.

    Returns:
        Nothing where there is no forecast of that pipeline.

    Raises:
        CorpusError: If the run did not finish.
    """
    folder = corpus.path("runs", run_id)
    try:
        record = json.loads(cast(bytes, corpus.fs.cat_file(f"{folder}/run.json")))
        metrics = json.loads(cast(bytes, corpus.fs.cat_file(f"{folder}/metrics.json")))
    except FileNotFoundError:
        raise CorpusError(f"Run {run_id} of {corpus.url} did not finish") from None
    plan = load(corpus, record.get("fingerprint", ""))
    if plan is None:
        return []
    done, actual = _actual(corpus, run_id)
    scale = done / plan.num_sources
    rows = []
    for stage in plan.stages:
        counts = metrics.get(stage.stage, {})
        for quantity in ("cpu_s", "gpu_s"):
            planned = getattr(stage, quantity)
            if quantity in counts and (planned.value or counts[quantity]):
                rows.append(_row(stage.stage, quantity, planned, scale, counts[quantity]))
    for quantity in ("cpu_s", "gpu_s"):
        actual[quantity] = sum(counts.get(quantity, 0.0) for counts in metrics.values())
    actual["setup_s"] = sum(counts.get("setup_s", 0.0) for counts in metrics.values())
    if math.isclose(scale, 1):
        actual["wall_s"] = record.get("seconds", 0.0)
    for quantity, planned in plan.totals.items():
        if quantity in actual and (planned.value or planned.high or actual[quantity]):
            factor = 1.0 if quantity == "setup_s" else scale
            rows.append(_row("all", quantity, planned, factor, actual[quantity]))
    return rows


def _row(stage: str, quantity: str, planned: Range, scale: float, actual: float) -> Comparison:
    low = None if planned.low is None else planned.low * scale
    high = None if planned.high is None else planned.high * scale
    value = planned.value * scale
    ratio = actual / value if value else None
    return Comparison(stage, quantity, Range(value, low, high), float(actual), ratio)


def _actual(corpus: Corpus, run_id: str) -> tuple[int, dict[str, float]]:
    """Returns how many sources a run worked on, and what came of them."""
    with corpus.fs.open(corpus.path("runs", run_id, "sources.parquet"), "rb") as file:
        refusals = pq.read_table(file, columns=["source", "refusal"])
    refused = set(refusals.filter(refusals["refusal"].is_valid())["source"].to_pylist())
    totals: dict[str, float] = dict.fromkeys(
        ("videos_kept", "videos_dropped", "videos_failed", "clips", "clips_s", "download_bytes"),
        0.0,
    )
    shards: set[str] = set()
    columns = ["source", "status", "num_clips", "clips_ms", "file_bytes", "shard"]
    for path in corpus.video_parts():
        if not path.rsplit("/", 1)[-1].startswith(f"{run_id}-"):
            continue
        with corpus.fs.open(path, "rb") as file:
            rows = pq.read_table(file, columns=columns).to_pylist()
        for row in rows:
            if row["source"] in refused or row["status"] == records.REMOVED:
                continue
            totals[f"videos_{row['status']}"] += 1
            totals["clips"] += row["num_clips"]
            totals["clips_s"] += row["clips_ms"] / 1000
            if records.is_url(row["source"]) or records.is_object(row["source"]):
                totals["download_bytes"] += row["file_bytes"] or 0
            shards |= {row["shard"]} - {None}
    totals["shard_bytes"] = sum(
        corpus.fs.size(corpus.path("shards", f"{shard}.parquet")) or 0 for shard in shards
    )
    return refusals.num_rows - len(refused), totals
