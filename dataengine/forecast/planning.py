# SPDX-License-Identifier: Apache-2.0
"""From a pipeline and its sources to a forecast: a sample is run, scaled up, and given a cluster."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
from rich.console import Console

from dataengine.config import Pipeline
from dataengine.doctor import devices_of
from dataengine.errors import ConfigError, EngineError
from dataengine.forecast.bootstrap import COVERAGE, NUM_DRAWS, RUN_NOISE, SMALL_SAMPLE, Estimate
from dataengine.forecast.cluster_time import WALL_NOISE, ClusterTime, WallTime, pool_name
from dataengine.forecast.kept_plan import existing
from dataengine.forecast.result import Forecast, Range, StagePlan
from dataengine.forecast.sample_run import (
    COUNT,
    SampleTime,
    Sources,
    Workplace,
    draw,
    measure,
    run_sample,
    write_sample,
)
from dataengine.ingest import local_ledger, printable
from dataengine.plan import make_plan, write_listed
from dataengine.pools import Pool, plan_pools
from dataengine.progress import Snapshot


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
        target = existing(corpus_url)
        parts = local_ledger(target, folder) if target else []
        plan = make_plan(folder, parts, pipeline.fingerprint, pipeline.runtime.max_attempts)
        if plan.num_todo == plan.num_refused:
            return None
        with_gpus = any(config.resources.num_gpus for _, config in pipeline.stages)
        here = devices_of(address, with_gpus=with_gpus)
        own = (here.num_cpus, here.num_gpus)
        plan_pools(pipeline.stages, *own)  # that it fits is known before anything runs
        pools = plan_pools(pipeline.stages, *(cluster or own))
        sources = Sources.read(plan.todo)
        chosen = draw(len(sources.names), num_sample, seed)
        console.print(
            f"{plan.num_todo} sources to do, {len(chosen)} of them as a sample", highlight=False
        )
        sample = write_sample(plan, {sources.names[i] for i in chosen}, folder)
        with Workplace(folder, corpus_url, address) as place:
            snapshot, sample_time = run_sample(pipeline, sample, place, console, address)
            measured = measure(place, snapshot, [sources.names[i] for i in chosen])
    if not sum(measured["clips"]):
        raise _no_clips(measured, len(chosen))
    estimate = Estimate.of(measured, sources, chosen, seed)
    return _forecast(
        pipeline, snapshot, estimate, sources, sample_time, seed,
        pools=pools, own_pools=plan_pools(pipeline.stages, *own),
        cluster=cluster or own, own=own, num_refused=plan.num_refused,
    )  # fmt: skip


def _no_clips(measured: Mapping[str, Sequence[float]], num_sampled: int) -> EngineError:
    """Returns what is said of a sample that nothing came out of: there is nothing to scale up."""
    losses = {
        name.removeprefix("loss "): int(sum(values))
        for name, values in measured.items()
        if name.startswith("loss ")
    }
    listed = sorted(losses.items(), key=lambda loss: (-loss[1], loss[0]))
    reasons = "; ".join(f"{name} {count}" for name, count in listed)
    return EngineError(
        f"No clip came out of the sample of {num_sampled} source{'s' * (num_sampled != 1)}: {reasons}",
        "if that is not what the sources are like, draw others with --seed or more with --sample",
    )


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


def _forecast(
    pipeline: Pipeline,
    snapshot: Snapshot,
    estimate: Estimate,
    sources: Sources,
    sample_time: SampleTime,
    seed: int,
    *,
    pools: Sequence[Pool],
    own_pools: Sequence[Pool],
    cluster: tuple[float, float],
    own: tuple[float, float],
    num_refused: int,
) -> Forecast:
    names = [cls.name for cls, _ in pipeline.stages]
    zeros = np.zeros(NUM_DRAWS)
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
    own_bound = max(ClusterTime(own_pools, *own).bounds(own_work["cpu_s"], own_busy).values())
    wall = WallTime.of(sample_time.whole_s, sample_time.start_s, own_bound)

    speed = ClusterTime(pools, *cluster)
    bounds = speed.bounds(values["cpu_s"], values["busy_s"])
    binding = max(bounds, key=lambda name: bounds[name])
    work_s = bounds[binding]
    drawn = speed.bounds(draws["cpu_s"], draws["busy_s"])
    drawn_s = np.max([np.broadcast_to(d, NUM_DRAWS) for d in drawn.values()], axis=0)

    stages = []
    scale = estimate.num_sources / estimate.num_sampled
    total_setup_s = total_setup_gpu_s = least_setup_s = most_setup_s = 0.0
    for pool in pools:
        most = speed.most_actors(pool)
        pool_busy = sum(values["busy_s"][cls.name] for cls, _ in pool.stages)
        actors = min(most, max(pool.min_actors, math.ceil(pool_busy / max(work_s, 1e-9))))
        for cls, _ in pool.stages:
            name, counts = cls.name, snapshot.stages[cls.name]
            once = setup_s.get(name, 0.0)
            total_setup_s += once * actors
            total_setup_gpu_s += once * actors * pool.num_gpus
            least_setup_s += once * pool.min_actors
            most_setup_s += once * most
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
    slack = math.exp(WALL_NOISE * NormalDist().inv_cdf((1 + COVERAGE) / 2))
    totals = {
        "cpu_s": estimate.spread(
            sum(values["cpu_s"].values()), sum(draws["cpu_s"].values(), zeros)
        ),
        "gpu_s": estimate.spread(
            sum(values["gpu_s"].values()) + total_setup_gpu_s,
            sum(draws["gpu_s"].values(), zeros) + total_setup_gpu_s,
        ),
        # Between the fewest and the most actors, slow to load or fast.
        "setup_s": Range(total_setup_s, least_setup_s / slack, most_setup_s * slack),
        "wall_s": estimate.spread(wall.total(work_s, 0.5), wall.draws(drawn_s, seed)),
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
        sample_s=round(sample_time.whole_s, 1),
        num_cpus=cluster[0],
        num_gpus=cluster[1],
        stages=tuple(stages),
        totals=totals,
        losses=losses,
        bottleneck=_bottleneck(binding, pools, values),
        assumptions=_assumptions(estimate, sources, wall, cluster != own),
    )


def _bottleneck(
    binding: str, pools: Sequence[Pool], values: Mapping[str, Mapping[str, float]]
) -> str:
    """Returns the stage that decides, and what it is short of."""
    kind = {"CPUs": "cpu_s", "GPUs": "gpu_s"}.get(binding, "busy_s")
    inside = [pool for pool in pools if pool_name(pool) == binding] or pools
    stages = [cls.name for pool in inside for cls, _ in pool.stages]
    stage = max(stages, key=lambda name: values[kind][name])
    return f"{stage} (short of {binding})"


def _assumptions(
    estimate: Estimate, sources: Sources, wall: WallTime, is_elsewhere: bool
) -> tuple[str, ...]:
    used = set(estimate.scaled_by.values()) - {COUNT}
    lines = []
    noise = f"{RUN_NOISE:.0%} from run to run for CPU and GPU time"
    if estimate.num_sampled == estimate.num_sources:
        lines.append(f"the sample is the whole list: ranges hold only what differs, {noise}")
    else:
        lines.append(
            f"sources not drawn are like those drawn; ranges aim at {COVERAGE:.0%} of cases "
            f"(bootstrap over the sampled videos, and {noise})"
        )
    if estimate.num_sampled == 1 < estimate.num_sources:
        lines.append("one video gives no range: raise --sample")
    if estimate.num_sampled < min(SMALL_SAMPLE, estimate.num_sources):
        lines.append(
            f"{estimate.num_sampled} of {estimate.num_sources:,} sources are a small sample: "
            f"--sample {min(SMALL_SAMPLE, estimate.num_sources)} or more narrows the ranges"
        )
    if used:
        lines.append(
            f"scaled by {' and '.join(sorted(used))} where that explains a cost, else by {COUNT}"
        )
    else:
        why = "" if sources.sizes else " (their sizes are not known)"
        lines.append(f"scaled by {COUNT}{why}")
    lines.append(
        f"{wall.start_s:.0f} s to start; of {wall.overhead_s:.0f} s of filling, loading and waiting "
        "in the sample none to all grows with the work; other work on the machine as in the sample"
    )
    if is_elsewhere:
        lines.append("cores, GPUs, disks and network there are as fast as where the sample ran")
    lines.append("without the CPU of Ray itself and of the process that fetches URLs")
    return tuple(lines)
