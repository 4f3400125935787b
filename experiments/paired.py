"""Paired statistics over seeds: a difference for each seed, their mean, and a bootstrap interval."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
EXACT_UP_TO = 6  # seeds: all their 46,656 resamples are looked at; of more, DRAWS at random
DRAWS = 20_000


@dataclass(frozen=True)
class Difference:
    """Of two arms, over the seeds that both have. low, high: 95 % interval of the mean."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Is zero outside the interval?"""
        return self.seeds > 1 and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        mark = " *" if self.clear else ""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{mark}"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Ours minus theirs, seed by seed; None without a seed that both have."""
    seeds = sorted(set(ours) & set(theirs))
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def interval(values: Sequence[float]) -> Difference:
    """The mean with its percentile bootstrap interval; with few seeds that is narrower than its level promises."""
    means = _resampled_means(np.asarray(values, np.float64))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Difference(float(np.mean(values)), float(low), float(high), len(values))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    count = len(values)
    if count <= EXACT_UP_TO:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    means: np.ndarray = values[chosen].mean(axis=1)
    return means
