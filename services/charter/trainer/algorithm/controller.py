"""The price of a nat: fixed, or steered so that the divergence stays near a target.

Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class FixedKL:
    """β stays as it is."""

    beta: float

    def updated(self, kl: float, answers: int) -> FixedKL:
        """The controller after a step; here, itself."""
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """β rises while the policy is farther from the reference than `target`, and falls while it is nearer."""

    beta: float
    target: float = 6.0
    """Nats per answer."""
    horizon: float = 10_000.0
    """Answers over which an error of one target is corrected."""
    max_error: float = 0.2
    """The relative error counts no more than this, either way."""

    def updated(self, kl: float, answers: int) -> AdaptiveKL:
        """The controller after a step that saw `answers` answers with a mean divergence of `kl` nats."""
        error = min(max(kl / self.target - 1.0, -self.max_error), self.max_error)
        return replace(self, beta=self.beta * (1.0 + error * answers / self.horizon))


KLController = FixedKL | AdaptiveKL
