# SPDX-License-Identifier: Apache-2.0
"""How many actors of which stages, so that all of them can start on the cluster there is."""

from collections.abc import Sequence
from dataclasses import dataclass

from dataengine.errors import ConfigError
from dataengine.stage import Resources, Stage

WRITE_CPUS = 0.1
"""Cores reserved by a write task: it mostly waits for the disk."""

StageSpec = tuple[type[Stage], Stage.Config]


@dataclass(frozen=True)
class Pool:
    """An actor pool as it is asked of Ray: one or more stages in each actor."""

    stages: tuple[StageSpec, ...]
    num_cpus: float
    num_gpus: float
    memory_bytes: int | None
    min_actors: int
    max_actors: int
    batch_size: int


def plan_pools(
    stages: Sequence[StageSpec], num_cpus: float, num_gpus: float, *, of_clips: bool = False
) -> list[Pool]:
    """Returns the actor pools of a pipeline, small enough for a cluster to start all of them.

    ``of_clips`` says that the first stage is given clips already, not whole videos.

    Every stage must have an actor for anything to flow, so on a machine with fewer cores than the
    stages ask for, every pool's share is scaled down alike: actors then take turns on the cores
    instead of waiting for each other for ever.

    Raises:
        ConfigError: If the stages need more GPUs than there are.
    """
    groups: list[list[StageSpec]] = []
    for spec in stages:
        if groups and spec[1].resources.colocate:
            groups[-1].append(spec)
        else:
            groups.append([spec])
    asked = [_together([config.resources for _, config in group]) for group in groups]
    gpus = sum(need.num_gpus * need.min_actors for need in asked)
    if gpus > num_gpus:
        names = ", ".join(c.name for c, config in stages if config.resources.num_gpus)
        raise ConfigError(
            f"The pipeline needs {gpus:g} GPUs, the cluster has {num_gpus:g} (stages: {names})",
            "set a smaller resources.num_gpus, or run on a cluster with --address",
        )
    cpus = sum(need.num_cpus * need.min_actors for need in asked)
    scale = min(1.0, (num_cpus - 2 * WRITE_CPUS) / cpus)
    pools = []
    has_clips = of_clips
    for group, need in zip(groups, asked, strict=True):
        room = num_gpus / need.num_gpus if need.num_gpus else num_cpus / need.num_cpus
        most = need.max_actors or max(need.min_actors, int(room))
        # Until there are clips a row is a whole video, and a block must hold one video only.
        batch_size = need.batch_size if has_clips else 1
        has_clips = has_clips or any("clip_id" in cls.outputs.names for cls, _ in group)
        pools.append(
            Pool(
                stages=tuple(group),
                num_cpus=int(need.num_cpus * scale * 1000) / 1000,
                num_gpus=need.num_gpus,
                memory_bytes=int(need.memory_gb * 2**30) if need.memory_gb else None,
                min_actors=need.min_actors,
                max_actors=most,
                batch_size=batch_size,
            )
        )
    return pools


def _together(needs: Sequence[Resources]) -> Resources:
    """Returns what an actor needs that runs several stages one after the other."""
    memory = [need.memory_gb for need in needs if need.memory_gb]
    return needs[0].model_copy(
        update={
            "num_cpus": max(need.num_cpus for need in needs),
            "num_gpus": max(need.num_gpus for need in needs),
            "memory_gb": sum(memory) if memory else None,
        }
    )
