"""Shares with intervals, ranking quality, calibration: pure functions, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Share:
    """A share with its 95 % Wilson interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share itself, 0 where nothing was counted."""
        return self.hits / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (Wilson 1927, eq. 4); honest near 0 and 1, where rates here live."""
        if not self.count:
            return 0.0, 1.0
        n, p, z2 = self.count, self.value, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # At 0 and 1 the bounds meet the share but for rounding.
        return max(min(centre - half, p), 0.0), min(max(centre + half, p), 1.0)

    def as_record(self) -> dict[str, float]:
        """For JSON."""
        low, high = self.interval
        return {"value": round(self.value, 5), "low": round(low, 5), "high": round(high, 5), "n": self.count}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f}–{100 * high:.1f}, n={self.count})"


def share(hits: Sequence[bool]) -> Share:
    """The share of true values."""
    return Share(sum(hits), len(hits))


def auc(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a true case scores above a false one. NaN without both."""
    positives = sum(truths)
    negatives = len(truths) - positives
    if not positives or not negatives:
        return math.nan
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    rank_sum, i = 0.0, 0
    while i < len(order):
        j = i
        while j < len(order) and scores[order[j]] == scores[order[i]]:
            j += 1
        mean_rank = (i + j + 1) / 2
        rank_sum += mean_rank * sum(truths[k] for k in order[i:j])
        i = j
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def calibration_error(probabilities: Sequence[float], truths: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015) over equal-width bins; truths may be soft, 0 to 1."""
    totals = [[0.0, 0.0, 0] for _ in range(bins)]
    for p, t in zip(probabilities, truths, strict=True):
        cell = totals[min(int(p * bins), bins - 1)]
        cell[0] += p
        cell[1] += t
        cell[2] += 1
    n = max(len(probabilities), 1)
    return sum(abs(p - t) for p, t, c in totals if c) / n
