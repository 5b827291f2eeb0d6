"""From a reward model's raw output to the score that an answer gets: pure rules, one place.

The answer ends at its first stop token, and that is what is read. An answer without one, or with nothing
before it, gets a fixed penalty whatever the model thinks of it. Every other raw score is normalised to mean 0
and deviation 1 on reference samples, and clamped (Ziegler et al. 2019; Huang et al. 2024, point 4 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from charter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """What is not left to the reward model."""

    clamp: float = 4.0
    """Scores are held within ± this."""
    unfinished: float = -4.0
    """Score of an answer without a stop token, and of an empty one."""

    def __post_init__(self) -> None:
        if not self.clamp > 0:
            raise ConfigError(f"score clamp is {self.clamp}; give a number above 0")
        if not math.isfinite(self.unfinished):
            raise ConfigError(f"the score of unfinished answers is {self.unfinished}; give a number")


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Where a reward model's raw scores lie on the reference samples."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, raw: float) -> float:
        """The raw score in deviations from the mean."""
        return (raw - self.mean) / self.deviation


def normalisation(raw: Sequence[float]) -> Normalisation:
    """Mean and (biased) deviation of raw scores. Raises `ConfigError` where they are all the same."""
    count = len(raw)
    mean = math.fsum(raw) / count if count else math.nan
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in raw) / count) if count else math.nan
    if not math.isfinite(mean) or not deviation > 1e-6:
        raise ConfigError(
            f"{count} reference samples have scores of mean {mean} and deviation {deviation}; a reward model "
            "that cannot tell them apart cannot be used; train it on more labels"
        )
    return Normalisation(mean, deviation)


def ended(answer_ids: Sequence[int], stop_ids: Collection[int]) -> tuple[tuple[int, ...], bool]:
    """The answer up to and with its first stop token, and whether it is finished: it has one, and text."""
    for i, token in enumerate(answer_ids):
        if token in stop_ids:
            return tuple(answer_ids[: i + 1]), i > 0
    return tuple(answer_ids), False


def score(raw: float, finished: bool, scale: Normalisation, rule: ScoreRule) -> float:
    """The score of an answer."""
    if not finished:
        return rule.unfinished
    return min(max(scale(raw), -rule.clamp), rule.clamp)
