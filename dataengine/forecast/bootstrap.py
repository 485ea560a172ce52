# SPDX-License-Identifier: Apache-2.0
"""Totals over all sources from a sample of them, with ranges.

Videos are drawn again and again from the sample (bootstrap), and every total is computed each time.

A total over all sources is the sample's mean times their number, or, where the size of a source is
known and explains the cost, the sample's ratio of cost to size times the size of all. The ratio is
the better of the two where its correlation exceeds half the quotient of the coefficients of
variation (Cochran, Sampling Techniques, 3rd ed., section 6.6).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dataengine.forecast.result import Range
from dataengine.forecast.sample_run import COUNT, Sources

NUM_DRAWS = 1000
COVERAGE = 0.9
"""Share of cases in which a range should hold the truth."""

_SHARES = ("videos_", "loss ")
"""Beginnings of the quantities that say how many sources something happens to."""

_TIMES = ("cpu_s ", "gpu_s ", "busy_s ")
"""Beginnings of the quantities that differ from run to run with the same videos."""

RUN_NOISE = 0.15
"""Standard deviation of the logarithm of CPU and busy seconds between two runs over the same videos.

Cores are shared with other work, clocks and caches change: with the quickstart pipeline over the same
videos, on two cores under changing load, the root mean square was 0.11 (18 pairs of runs, the most
0.24). Media bytes and clips came out the same every time.
"""

SMALL_SAMPLE = 12
"""Sources below which `plan` advises more: a range of fewer rests on the tail of Student's t."""


@dataclass(frozen=True)
class Estimate:
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
        sources: Sources,
        chosen: Sequence[int],
        seed: int,
    ) -> "Estimate":
        """Returns the totals of everything that was measured.

        Args:
            measured: Quantity -> one number per sampled source.
            sources: All of them.
            chosen: Places in ``sources`` of those that were sampled.
            seed: Of the bootstrap.
        """
        count, whole = len(chosen), len(sources.names)
        draws = np.random.default_rng(seed).integers(0, count, (NUM_DRAWS, count))
        # One pace for all stages: a machine that is slow today is slow at all of them.
        pace = np.exp(np.random.default_rng([seed, 1]).normal(0, RUN_NOISE, NUM_DRAWS))
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
            if name.startswith(_TIMES):
                estimates[name] = estimates[name] * pace
            scaled_by[name] = by
        return cls(values, estimates, scaled_by, count, whole)

    def range(self, name: str) -> Range:
        """Returns a quantity's total; one that was never measured is 0."""
        return self.spread(self.values.get(name, 0.0), self.draws.get(name, np.zeros(NUM_DRAWS)))

    def spread(self, value: float, draws: np.ndarray) -> Range:
        """Returns an estimate with the range of its draws."""
        if self.num_sampled < 2 and self.num_sampled < self.num_sources:
            return Range(value, None, None)
        tail = (1 - COVERAGE) / 2
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
        doubt = left * (1 - ((1 - COVERAGE) / 2) ** (1 / self.num_sampled))
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
    z = NormalDist().inv_cdf((1 + COVERAGE) / 2)
    free = count - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return t / z * math.sqrt(count / free)
