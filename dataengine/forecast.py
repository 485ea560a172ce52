# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, from a sample of its sources: measured, scaled up, with a range.

The sample goes through the real engine into a temporary corpus. Per-video measurements make the
ranges: videos are drawn again and again from the sample (bootstrap), and every total is computed
each time.

A total over all sources is the sample's mean times their number, or, where the size of a source is
known and explains the cost, the sample's ratio of cost to size times the size of all. The ratio is
the better of the two where its correlation exceeds half the quotient of the coefficients of
variation (Cochran, Sampling Techniques, 3rd ed., section 6.6).
"""

import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from dataengine import records
from dataengine.config import Pipeline
from dataengine.corpus import Corpus
from dataengine.doctor import devices_of
from dataengine.errors import ConfigError, CorpusError
from dataengine.ingest import local_ledger, printable
from dataengine.plan import Plan, make_plan, write_listed
from dataengine.pools import Pool, plan_pools
from dataengine.prefetch import size_text
from dataengine.progress import ProgressDisplay, Snapshot, duration
from dataengine.stages.download import DownloadStage

_NUM_DRAWS = 1000
_COVERAGE = 0.9
"""Share of cases in which a range should hold the truth."""

COUNT, BYTES, LISTED = "number of sources", "size of the files", "length that the list gives"
"""What a total may be scaled by."""

_SHARES = ("videos_", "loss ")
"""Beginnings of the quantities that say how many sources something happens to."""


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate; ``low`` and ``high`` are None where one video alone was measured."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage will take.

    Attributes:
        stage: Its name.
        cpu_s: CPU seconds of the work itself.
        gpu_s: GPU seconds: time at work times the GPUs its actor holds.
        busy_s: Seconds of actors at work, without waiting for a core.
        eta_s: Seconds that it needs with as many actors as the cluster has room for, all others waiting.
        setup_s: Seconds that one actor needs before it can work.
        num_actors: Actors expected while the run is at full speed.
        dropped: Videos and clips that will end there.
        bytes_in: Rows that go in, media included.
        bytes_out: Rows that come out.
    """

    stage: str
    cpu_s: Range
    gpu_s: Range
    busy_s: Range
    eta_s: Range
    setup_s: float
    num_actors: int
    dropped: Range
    bytes_in: float
    bytes_out: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run over all sources will take and give.

    Attributes:
        pipeline: Its name.
        fingerprint: Of the pipeline; what the forecast is kept under.
        made: When, UTC.
        seed: Of the draw.
        num_sources: Sources that a run would work on.
        num_refused: Further ones that the plan of a run refuses; they cost nothing.
        num_sampled: Sources that were run.
        sample_s: Seconds that the sample took.
        num_cpus: Of the cluster that is planned for.
        num_gpus: The same.
        stages: In order.
        totals: Name -> what all stages together take or give: ``cpu_s``, ``gpu_s``, ``setup_s``,
            ``wall_s``, ``videos_kept``, ``videos_dropped``, ``videos_failed``, ``clips``,
            ``clips_s``, ``shard_bytes``, ``download_bytes``.
        losses: ``stage: reason`` -> sources that will end so.
        bottleneck: What decides how long it takes.
        assumptions: What has to hold for all of this, in a few words each.
    """

    pipeline: str
    fingerprint: str
    made: str
    seed: int
    num_sources: int
    num_refused: int
    num_sampled: int
    sample_s: float
    num_cpus: float
    num_gpus: float
    stages: tuple[StagePlan, ...]
    totals: Mapping[str, Range]
    losses: Mapping[str, Range]
    bottleneck: str
    assumptions: tuple[str, ...]


# -------------------------------------------------------------------------------------- planning


def make_forecast(
    pipeline: Pipeline,
    words: Sequence[str],
    console: Console,
    *,
    num_sample: int,
    seed: int = 0,
    corpus_url: str | None = None,
    address: str | None = None,
    cluster: tuple[float, float] | None = None,
    limit: int | None = None,
) -> Forecast | None:
    """Runs a sample of the sources and says what all of them will take.

    Args:
        pipeline: What to run.
        words: What the user named; see `sources.expand`.
        console: Where progress goes.
        num_sample: Sources to draw; all of them if there are no more.
        seed: Another one draws others.
        corpus_url: Where the real run will go. What has ended in it is not planned again; the
            forecast is kept with it, see `store`.
        address: Of a Ray cluster that runs the sample; None uses ``RAY_ADDRESS``, or this machine.
        cluster: (CPUs, GPUs) of the cluster to plan for; None takes the one that runs the sample.
        limit: Takes only the first so many sources.

    Returns:
        None if nothing is left to do.

    Raises:
        EngineError: If something is wrong that the user can mend.
    """
    with tempfile.TemporaryDirectory(prefix="dataengine-plan-") as temporary:
        folder = Path(temporary)
        with console.status("Listing the sources"):
            num_rows = write_listed(words, pipeline.sources, folder, limit)
        if not num_rows:
            raise ConfigError(f"No videos in: {' '.join(map(printable, words))}")
        target = _existing(corpus_url)
        parts = local_ledger(target, folder) if target else []
        plan = make_plan(folder, parts, pipeline.fingerprint, pipeline.runtime.max_attempts)
        if plan.num_todo == plan.num_refused:
            return None
        with_gpus = any(config.resources.num_gpus for _, config in pipeline.stages)
        here = devices_of(address, with_gpus=with_gpus)
        own = (here.num_cpus, here.num_gpus)
        plan_pools(pipeline.stages, *own)  # that it fits is known before anything runs
        pools = plan_pools(pipeline.stages, *(cluster or own))
        sources = _Sources.read(plan.todo)
        chosen = _draw(len(sources.names), num_sample, seed)
        console.print(
            f"{plan.num_todo} sources to do, {len(chosen)} of them as a sample", highlight=False
        )
        sample = _write_sample(plan, {sources.names[i] for i in chosen}, folder)
        with _Workplace(folder, corpus_url, address) as place:
            snapshot, seconds = _run_sample(pipeline, sample, place, console, address)
            measured = _measure(place, snapshot, [sources.names[i] for i in chosen])
    estimate = _Estimate.of(measured, sources, chosen, seed)
    return _forecast(
        pipeline, snapshot, estimate, sources, seconds, seed,
        pools=pools, own_pools=plan_pools(pipeline.stages, *own),
        cluster=cluster or own, own=own, num_refused=plan.num_refused,
    )  # fmt: skip


def parse_cluster(text: str) -> tuple[float, float]:
    """Returns (CPUs, GPUs) of ``cpus=128,gpus=8``.

    Raises:
        ConfigError: If it is written otherwise.
    """
    values = {"cpus": 0.0, "gpus": 0.0}
    try:
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in values:
                raise ValueError
            values[name] = float(value)
    except ValueError:
        raise ConfigError(f"Not a cluster: {text}", "write --cluster cpus=128,gpus=8") from None
    if not (1 <= values["cpus"] < math.inf and 0 <= values["gpus"] < math.inf):
        raise ConfigError(f"Not a cluster: {text}", "it needs one CPU at least")
    return values["cpus"], values["gpus"]


def _existing(url: str | None) -> Corpus | None:
    """Returns a corpus if it is there already.

    Raises:
        CorpusError: If it cannot be opened.
    """
    if url is None:
        return None
    corpus = Corpus(_absolute(url))
    return Corpus.open(url) if corpus.fs.exists(corpus.path("corpus.json")) else None


@dataclass(frozen=True)
class _Sources:
    """What is known of the sources that would be worked on, before they are.

    Attributes:
        names: One per source.
        sizes: What a total may be scaled by -> one number per source, where all have one.
    """

    names: list[str]
    sizes: dict[str, np.ndarray]

    @classmethod
    def read(cls, todo: Path) -> "_Sources":
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


def _draw(num_sources: int, num_sample: int, seed: int) -> list[int]:
    """Returns which sources are the sample, in their order."""
    count = min(num_sources, num_sample)
    return sorted(random.Random(seed).sample(range(num_sources), count))


def _write_sample(plan: Plan, chosen: set[str], folder: Path) -> Plan:
    """Returns the plan of a run over the chosen sources alone."""
    path = folder / "sample.parquet"
    with pq.ParquetFile(plan.todo) as file, pq.ParquetWriter(path, file.schema_arrow) as writer:
        for batch in file.iter_batches():
            mask = [source in chosen for source in batch["source"].to_pylist()]
            if any(mask):
                writer.write_batch(batch.filter(pa.array(mask)))
    return replace(plan, todo=path, num_todo=len(chosen))


class _Workplace:
    """A temporary corpus, gone when the ``with`` block ends; on a cluster, where all nodes see it."""

    def __init__(self, folder: Path, corpus_url: str | None, address: str | None) -> None:
        self._url = str(folder / "corpus")
        if address or os.environ.get("RAY_ADDRESS"):
            if corpus_url is None:
                raise ConfigError(
                    "On a cluster the sample's clips need a place that every node sees",
                    "name the corpus of the real run with --corpus: the sample goes beside it",
                )
            self._url = f"{_absolute(corpus_url)}.sample-{os.getpid()}"

    def __enter__(self) -> Corpus:
        self._corpus = Corpus.create(self._url)
        return self._corpus

    def __exit__(self, *exc: object) -> None:
        if self._corpus.is_local:
            shutil.rmtree(self._corpus.root, ignore_errors=True)
        else:
            self._corpus.fs.rm(self._corpus.root, recursive=True)


def _run_sample(
    pipeline: Pipeline, sample: Plan, corpus: Corpus, console: Console, address: str | None
) -> tuple[Snapshot, float]:
    """Runs the sample; returns what every stage has done, and the seconds it took."""
    from dataengine.runner import execute

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
    start = time.monotonic()
    with ProgressDisplay(console, names, sample.num_todo) as display:
        snapshot = execute(working, corpus, run_id, sample, address=address, display=display)
    return snapshot, time.monotonic() - start


def _measure(corpus: Corpus, snapshot: Snapshot, sources: Sequence[str]) -> dict[str, list[float]]:
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


# ------------------------------------------------------------------------------------ estimation


@dataclass(frozen=True)
class _Estimate:
    """Totals over all sources.

    Attributes:
        values: Quantity -> best estimate.
        draws: Quantity -> estimates of the bootstrap, widened for small samples.
        scaled_by: Quantity -> what it was scaled by.
        num_sampled: Sources measured.
        num_sources: All.
    """

    values: dict[str, float]
    draws: dict[str, np.ndarray]
    scaled_by: dict[str, str]
    num_sampled: int
    num_sources: int

    @classmethod
    def of(
        cls,
        measured: Mapping[str, Sequence[float]],
        sources: _Sources,
        chosen: Sequence[int],
        seed: int,
    ) -> "_Estimate":
        count, whole = len(chosen), len(sources.names)
        draws = np.random.default_rng(seed).integers(0, count, (_NUM_DRAWS, count))
        values, estimates, scaled_by = {}, {}, {}
        for name, numbers in measured.items():
            y = np.array(numbers)
            by, sizes = COUNT, np.ones(whole)
            for kind, known in sources.sizes.items():
                # Outcomes are counted: scaled apart, they would not add up to the sources.
                if not name.startswith(_SHARES) and _explains(known[list(chosen)], y):
                    by, sizes = kind, known
                    break
            x = sizes[list(chosen)]
            values[name] = float(y.sum() / x.sum() * sizes.sum())
            again = y[draws].sum(axis=1) / x[draws].sum(axis=1) * sizes.sum()
            spread = _widening(count) * math.sqrt(1 - count / whole)
            estimates[name] = np.maximum(0, values[name] + (again - values[name]) * spread)
            scaled_by[name] = by
        return cls(values, estimates, scaled_by, count, whole)

    def range(self, name: str) -> Range:
        """Returns a quantity's total; one that was never measured is 0."""
        return self.spread(self.values.get(name, 0.0), self.draws.get(name, np.zeros(_NUM_DRAWS)))

    def spread(self, value: float, draws: np.ndarray) -> Range:
        """Returns an estimate with the range of its draws."""
        if self.num_sampled < 2 and self.num_sampled < self.num_sources:
            return Range(value, None, None)
        tail = (1 - _COVERAGE) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Range(value, min(value, float(low)), max(value, float(high)))

    def share(self, name: str) -> Range:
        """Returns how many of the sources something happens to.

        Where it happens to none, or to all, of the sample, a bootstrap sees no doubt; the range then
        is that of the exact binomial test.
        """
        total = self.range(name)
        if total.low is None or total.high is None or self.num_sampled == self.num_sources:
            return total
        left = self.num_sources - self.num_sampled
        doubt = left * (1 - ((1 - _COVERAGE) / 2) ** (1 / self.num_sampled))
        if total.value == 0:
            return Range(0.0, 0.0, doubt)
        if math.isclose(total.value, self.num_sources):
            return Range(total.value, self.num_sources - doubt, self.num_sources)
        return Range(total.value, total.low, min(total.high, self.num_sources))


def _explains(sizes: np.ndarray, costs: np.ndarray) -> bool:
    """Returns whether scaling by size beats scaling by number; see the module's docstring."""
    if len(sizes) < 3 or not costs.any():
        return False
    cv_size, cv_cost = sizes.std() / sizes.mean(), costs.std() / costs.mean()
    if not cv_size or not cv_cost:
        return False
    return bool(np.corrcoef(sizes, costs)[0, 1] > cv_size / (2 * cv_cost))


def _widening(count: int) -> float:
    """Returns the factor that makes percentiles of a bootstrap cover what Student's t would.

    Percentile intervals of few values are too narrow by sqrt((n-1)/n) and by the quotient of the
    normal and the t quantile (Hesterberg, What Teachers Should Know About the Bootstrap, 2015,
    section 5.3). The t quantile is the Cornish-Fisher expansion, within 3 % from 3 degrees on.
    """
    if count < 2:
        return 0.0
    z = NormalDist().inv_cdf((1 + _COVERAGE) / 2)
    free = count - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return t / z * math.sqrt(count / free)


# -------------------------------------------------------------------------------- time and pools


@dataclass(frozen=True)
class _Speed:
    """How fast a cluster is with a pipeline.

    Attributes:
        pools: Its actor pools.
        num_cpus: Of the cluster.
        num_gpus: The same.
    """

    pools: Sequence[Pool]
    num_cpus: float
    num_gpus: float

    def most_actors(self, pool: Pool) -> int:
        """Returns how many actors of a pool fit beside one full set of the others."""
        spare = self.num_cpus - sum(p.num_cpus * p.min_actors for p in self.pools)
        most = pool.min_actors + max(0, int(spare / pool.num_cpus))
        if pool.num_gpus:
            held = sum(p.num_gpus * p.min_actors for p in self.pools)
            most = min(most, pool.min_actors + int((self.num_gpus - held) / pool.num_gpus + 1e-9))
        return max(pool.min_actors, min(most, pool.max_actors))

    def bounds(self, cpu_s: Mapping[str, Any], busy_s: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the seconds below which the work cannot be done, by what makes it so.

        Args:
            cpu_s: Stage -> CPU seconds, a number or an array of draws.
            busy_s: Stage -> seconds of actors at work, the same.
        """
        work = [sum(busy_s[cls.name] for cls, _ in pool.stages) for pool in self.pools]
        pairs = list(zip(self.pools, work, strict=True))
        bounds = {
            "CPUs": sum(cpu_s.values()) / self.num_cpus,
            "reserved CPUs": sum(pool.num_cpus * w for pool, w in pairs) / self.num_cpus,
        }
        if any(pool.num_gpus for pool in self.pools):
            bounds["GPUs"] = sum(pool.num_gpus * w for pool, w in pairs) / self.num_gpus
        for pool, seconds in pairs:
            bounds[_pool_name(pool)] = seconds / self.most_actors(pool)
        return bounds


def _pool_name(pool: Pool) -> str:
    return "actors of " + " + ".join(cls.name for cls, _ in pool.stages)


def _forecast(
    pipeline: Pipeline,
    snapshot: Snapshot,
    estimate: _Estimate,
    sources: _Sources,
    sample_s: float,
    seed: int,
    *,
    pools: Sequence[Pool],
    own_pools: Sequence[Pool],
    cluster: tuple[float, float],
    own: tuple[float, float],
    num_refused: int,
) -> Forecast:
    names = [cls.name for cls, _ in pipeline.stages]
    zeros = np.zeros(_NUM_DRAWS)
    values = {
        kind: {name: estimate.values.get(f"{kind} {name}", 0.0) for name in names}
        for kind in ("cpu_s", "busy_s", "gpu_s")
    }
    draws = {
        kind: {name: estimate.draws.get(f"{kind} {name}", zeros) for name in names}
        for kind in ("cpu_s", "busy_s", "gpu_s")
    }
    setup_s = {
        name: counts.setup_s / max(1, counts.num_actors) for name, counts in snapshot.stages.items()
    }
    # What the sample took beyond its own work: starting Ray, loading models, filling and draining.
    own_work = {
        kind: {
            name: sum(
                getattr(costs[name], kind) for costs in snapshot.videos.values() if name in costs
            )
            for name in names
        }
        for kind in ("cpu_s", "busy_s", "wait_s")
    }
    own_busy = {n: max(0.0, own_work["busy_s"][n] - own_work["wait_s"][n]) for n in names}
    own_bound = max(_Speed(own_pools, *own).bounds(own_work["cpu_s"], own_busy).values())
    start_s = max(0.0, sample_s - own_bound)

    speed = _Speed(pools, *cluster)
    bounds = speed.bounds(values["cpu_s"], values["busy_s"])
    binding = max(bounds, key=lambda name: bounds[name])
    work_s = bounds[binding]
    drawn = speed.bounds(draws["cpu_s"], draws["busy_s"])
    drawn_s = np.max([np.broadcast_to(d, _NUM_DRAWS) for d in drawn.values()], axis=0)

    stages = []
    scale = estimate.num_sources / estimate.num_sampled
    total_setup_s = total_setup_gpu_s = 0.0
    for pool in pools:
        most = speed.most_actors(pool)
        pool_busy = sum(values["busy_s"][cls.name] for cls, _ in pool.stages)
        actors = min(most, max(pool.min_actors, math.ceil(pool_busy / max(work_s, 1e-9))))
        for cls, _ in pool.stages:
            name, counts = cls.name, snapshot.stages[cls.name]
            once = setup_s.get(name, 0.0)
            total_setup_s += once * actors
            total_setup_gpu_s += once * actors * pool.num_gpus
            busy = values["busy_s"][name]
            stages.append(
                StagePlan(
                    stage=name,
                    cpu_s=estimate.range(f"cpu_s {name}"),
                    gpu_s=estimate.range(f"gpu_s {name}"),
                    busy_s=estimate.range(f"busy_s {name}"),
                    eta_s=estimate.spread(once + busy / most, once + draws["busy_s"][name] / most),
                    setup_s=once,
                    num_actors=actors,
                    dropped=estimate.range(f"dropped {name}"),
                    bytes_in=counts.bytes_in * scale,
                    bytes_out=counts.bytes_out * scale,
                )
            )
    totals = {
        "cpu_s": estimate.spread(
            sum(values["cpu_s"].values()), sum(draws["cpu_s"].values(), zeros)
        ),
        "gpu_s": estimate.spread(
            sum(values["gpu_s"].values()) + total_setup_gpu_s,
            sum(draws["gpu_s"].values(), zeros) + total_setup_gpu_s,
        ),
        "setup_s": Range(total_setup_s, total_setup_s, total_setup_s),
        "wall_s": estimate.spread(start_s + work_s, start_s + drawn_s),
        **{
            name: estimate.share(name)
            for name in ("videos_kept", "videos_dropped", "videos_failed")
        },
        **{
            name: estimate.range(name)
            for name in ("clips", "clips_s", "shard_bytes", "download_bytes")
        },
    }
    losses = {
        name.removeprefix("loss "): estimate.share(name)
        for name in estimate.values
        if name.startswith("loss ")
    }
    return Forecast(
        pipeline=pipeline.name,
        fingerprint=pipeline.fingerprint,
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seed=seed,
        num_sources=estimate.num_sources,
        num_refused=num_refused,
        num_sampled=estimate.num_sampled,
        sample_s=round(sample_s, 1),
        num_cpus=cluster[0],
        num_gpus=cluster[1],
        stages=tuple(stages),
        totals=totals,
        losses=losses,
        bottleneck=_bottleneck(binding, pools, values),
        assumptions=_assumptions(estimate, sources, start_s, cluster != own),
    )


def _bottleneck(
    binding: str, pools: Sequence[Pool], values: Mapping[str, Mapping[str, float]]
) -> str:
    """Returns the stage that decides, and what it is short of."""
    kind = {"CPUs": "cpu_s", "GPUs": "gpu_s"}.get(binding, "busy_s")
    inside = [pool for pool in pools if _pool_name(pool) == binding] or pools
    stages = [cls.name for pool in inside for cls, _ in pool.stages]
    stage = max(stages, key=lambda name: values[kind][name])
    return f"{stage} (short of {binding})"


def _assumptions(
    estimate: _Estimate, sources: _Sources, start_s: float, is_elsewhere: bool
) -> tuple[str, ...]:
    used = set(estimate.scaled_by.values()) - {COUNT}
    lines = []
    if estimate.num_sampled == estimate.num_sources:
        lines.append(
            "the sample is the whole list: ranges are empty, and a run would do the same again"
        )
    else:
        lines.append(
            f"sources not drawn are like those drawn; ranges hold in {_COVERAGE:.0%} of cases "
            "(bootstrap over the sampled videos)"
        )
    if estimate.num_sampled == 1 < estimate.num_sources:
        lines.append("one video gives no range: raise --sample")
    if used:
        lines.append(
            f"scaled by {' and '.join(sorted(used))} where that explains a cost, else by {COUNT}"
        )
    else:
        why = "" if sources.sizes else " (their sizes are not known)"
        lines.append(f"scaled by {COUNT}{why}")
    lines.append(f"{start_s:.0f} s to start, load and drain, as in the sample; load shared evenly")
    if is_elsewhere:
        lines.append("cores, GPUs, disks and network there are as fast as where the sample ran")
    lines.append("without the CPU of Ray itself and of the process that fetches URLs")
    return tuple(lines)


# --------------------------------------------------------------------------------------- storing


def store(forecast: Forecast, corpus_url: str) -> str:
    """Keeps a forecast for `compare` and returns where.

    It becomes ``plans/<fingerprint>.json`` in the corpus. Where there is none yet, ``ingest`` has to
    find an empty place, and it becomes ``<corpus>.plans/<fingerprint>.json`` beside it.
    """
    data = json.dumps(asdict(forecast), indent=1, ensure_ascii=False).encode()
    corpus = _existing(corpus_url)
    if corpus:
        name = f"plans/{forecast.fingerprint}.json"
        corpus.publish(name, lambda file: file.write(data))
        return corpus.path(name)
    fs, root = fsspec.core.url_to_fs(_absolute(corpus_url))
    folder = f"{root.rstrip('/')}.plans"
    fs.makedirs(folder, exist_ok=True)
    path = f"{folder}/{forecast.fingerprint}.json"
    fs.pipe_file(path, data)
    return path


def load(corpus: Corpus, fingerprint: str) -> Forecast | None:
    """Returns the forecast that was kept for a pipeline, the one in the corpus before the one beside."""
    for path in (
        corpus.path("plans", f"{fingerprint}.json"),
        f"{corpus.root}.plans/{fingerprint}.json",
    ):
        try:
            return _from_json(json.loads(cast(bytes, corpus.fs.cat_file(path))))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            continue  # there is none, or one that another version wrote
    return None


def _from_json(content: dict[str, Any]) -> Forecast:
    def ranges(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: Range(**value) if isinstance(value, dict) else value
            for name, value in mapping.items()
        }

    return Forecast(
        **{
            **content,
            "stages": tuple(StagePlan(**ranges(stage)) for stage in content["stages"]),
            "totals": ranges(content["totals"]),
            "losses": ranges(content["losses"]),
            "assumptions": tuple(content["assumptions"]),
        }
    )


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).expanduser().absolute())


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


# ---------------------------------------------------------------------------------------- output

_LABELS = {
    "cpu_s": "CPU",
    "gpu_s": "GPU",
    "setup_s": "set-up of actors",
    "wall_s": "time on that cluster",
    "videos_kept": "videos kept",
    "videos_dropped": "videos dropped",
    "videos_failed": "videos failed",
    "clips": "clips",
    "clips_s": "hours of video kept",
    "shard_bytes": "shards",
    "download_bytes": "downloads",
}


def show(forecast: Forecast, console: Console) -> None:
    """Prints a forecast as two tables and what it rests on."""
    stages = Table(box=None, pad_edge=False, header_style="bold")
    stages.add_column("stage")
    for name in ("CPU", "GPU", "actors", "set-up", "dropped", "bytes out", "time alone"):
        stages.add_column(name, justify="right")
    for stage in forecast.stages:
        stages.add_row(
            stage.stage,
            range_text(stage.cpu_s, "cpu_s"),
            range_text(stage.gpu_s, "gpu_s") if stage.gpu_s.value else "-",
            str(stage.num_actors),
            f"{stage.setup_s:.1f} s",
            range_text(stage.dropped, "clips") if stage.dropped.value else "-",
            size_text(round(stage.bytes_out)),
            range_text(stage.eta_s, "wall_s"),
        )
    console.print(stages)
    console.print()
    totals = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    for name, total in forecast.totals.items():
        if total.value or total.high:
            totals.add_row(_LABELS[name], range_text(total, name))
    for name, total in forecast.losses.items():
        totals.add_row(f"  ended at {name}", range_text(total, "videos_dropped"))
    console.print(totals)
    refused = f", {forecast.num_refused:,} more refused" if forecast.num_refused else ""
    console.print(
        f"\n{forecast.num_sources:,} sources{refused}; {forecast.num_sampled:,} were run in "
        f"{duration(forecast.sample_s)} (seed {forecast.seed})\n"
        f"Cluster: {forecast.num_cpus:g} CPUs, {forecast.num_gpus:g} GPUs. "
        f"Bottleneck: {forecast.bottleneck}.",
        highlight=False,
    )
    for line in forecast.assumptions:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)


def range_text(total: Range, quantity: str) -> str:
    """Returns a range as a person reads it, in units that fit the quantity."""

    def text(value: float) -> str:
        if quantity.endswith("bytes"):
            return size_text(round(value))
        if quantity == "wall_s":
            return duration(value)
        if quantity.endswith("_s"):
            return f"{value / 3600:,.3g} h" if value >= 360 else f"{value:,.3g} s"
        return f"{value:,.0f}"

    if total.low is None or total.high is None:
        return text(total.value)
    return f"{text(total.value)} ({text(total.low)} to {text(total.high)})"
