"""Bootstrap intervals over episodes: queries that share a context are not independent, so they are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % percentile interval (Efron 1979)."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Resamples of the same episodes for every figure, so that differences between methods are paired.

    `weights` (n,): how many units each episode counts (its queries, or its target tokens).
    """

    def __init__(self, weights: Sequence[float], *, resamples: int = 1000, seed: int = 0):
        self.weights = np.asarray(weights, dtype=float)
        n = len(self.weights)
        self.counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)

    def mean(self, sums: Sequence[float]) -> Interval:
        """The mean over units of sums (n,) per episode."""
        values = np.asarray(sums, dtype=float)
        drawn = (self.counts @ values) / (self.counts @ self.weights)
        return _interval(values.sum() / self.weights.sum(), drawn)

    def difference(self, sums: Sequence[float], others: Sequence[float]) -> Interval:
        """The mean over units of one method minus that of another, on the same resamples."""
        return self.mean(np.asarray(sums, dtype=float) - np.asarray(others, dtype=float))

    def recovered(self, method: Sequence[float], nothing: Sequence[float], everything: Sequence[float]) -> Interval | None:
        """The share of the gain of `everything` over `nothing` that a method recovers; None where there is no clear gain."""
        gain = self.difference(everything, nothing)
        if not gain.excludes_zero():
            return None
        part = np.asarray(method, dtype=float) - np.asarray(nothing, dtype=float)
        whole = np.asarray(everything, dtype=float) - np.asarray(nothing, dtype=float)
        return _interval(part.sum() / whole.sum(), (self.counts @ part) / (self.counts @ whole))


def _interval(estimate: float, drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(estimate), float(low), float(high))
