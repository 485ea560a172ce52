# SPDX-License-Identifier: Apache-2.0
"""How long a cluster needs for work that is known, by what is scarcest: cores, GPUs or actors.

`ClusterTime` gives the least time; `WallTime` adds what a run takes beyond it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataengine.pools import Pool

WALL_NOISE = 0.4
"""Standard deviation of the logarithm of the time to start, load and wait, between two runs.

It is mostly other work on the machine: while that changed on two shared cores, runs of the quickstart
pipeline over the same 24 videos took 94, 125, 135 and 187 s.
"""


@dataclass(frozen=True)
class ClusterTime:
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
            bounds[pool_name(pool)] = seconds / self.most_actors(pool)
        return bounds


def pool_name(pool: Pool) -> str:
    """Returns how a pool is called where it is what decides."""
    return "actors of " + " + ".join(cls.name for cls, _ in pool.stages)


@dataclass(frozen=True)
class WallTime:
    """What a sample took beyond the least time of its work, and what that says of a whole run.

    Attributes:
        start_s: Until the first actor could work: paid once.
        overhead_s: The rest: pipelines fill and drain, actors load and wait for each other. How much of
            it is paid once and how much grows with the work, one sample cannot tell.
        bound_s: Least time of the sample's work, from `ClusterTime`.
    """

    start_s: float
    overhead_s: float
    bound_s: float

    @classmethod
    def of(cls, whole_s: float, start_s: float | None, bound_s: float) -> "WallTime":
        """Returns the parts of a sample's time; a start that was not seen takes all of the rest."""
        rest = max(0.0, whole_s - bound_s)
        start = rest if start_s is None else min(start_s, rest)
        return cls(start, rest - start, bound_s)

    def total(self, work_s: Any, growing: Any) -> Any:
        """Returns the seconds of a run.

        Args:
            work_s: Least time of its work, a number or an array of draws.
            growing: Share of the overhead that grows with the work, 0 to 1, the same.
        """
        growth = work_s / self.bound_s if self.bound_s > 0 else 1.0
        return self.start_s + work_s + self.overhead_s * (1 + growing * (growth - 1))

    def draws(self, work_s: np.ndarray, seed: int) -> np.ndarray:
        """Returns totals with every growing share alike, and the noise of waiting, for draws of the work."""
        rng = np.random.default_rng([seed, 2])
        waiting = self.total(work_s, rng.uniform(0, 1, len(work_s))) - work_s
        return work_s + waiting * np.exp(rng.normal(0, WALL_NOISE, len(work_s)))
