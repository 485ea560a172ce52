# SPDX-License-Identifier: Apache-2.0
"""How long a cluster needs for work that is known, by what is scarcest: cores, GPUs or actors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataengine.pools import Pool


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
