"""Whether a round's model comes into force: never a worse one. Pure.

Both models are measured on the same held-out labels. Accuracies further apart than the margin, and than the
standard error of their difference, decide alone. Closer ones are a tie, since a few hundred labels say no
more: then the held-out loss decides, so that small losses of accuracy cannot add up over many rounds while
nothing else improves.
"""

from __future__ import annotations

from dataclasses import dataclass

from charter.reward.config import PromotionConfig
from charter.reward.measure import Quality


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a candidate, and why."""

    promoted: bool
    reason: str


def decide(candidate: Quality, in_force: Quality | None, error: float, config: PromotionConfig) -> Verdict:
    """Compares a candidate with the model in force (None: there is none).

    `error` is the standard error of the difference of their accuracies (`measure.difference_error`).
    """
    told = f"held-out accuracy {candidate.accuracy:.3f} on {candidate.labels} labels"
    if not candidate.accuracy >= config.min_accuracy:
        return Verdict(
            False, f"{told} is below the {config.min_accuracy:.2f} that a model needs to be of any use"
        )
    if in_force is None:
        return Verdict(True, f"{told}; the first model")
    before = f"{in_force.accuracy:.3f} of the model in force"
    gain = candidate.accuracy - in_force.accuracy
    margin = max(config.margin, config.errors * error)
    if gain > margin:
        return Verdict(True, f"{told}, better than the {before}")
    if gain < -margin:
        return Verdict(False, f"{told}, worse than the {before}")
    losses = f"loss {candidate.loss:.4f} against {in_force.loss:.4f}"
    if candidate.loss <= in_force.loss:
        return Verdict(True, f"{told}, a tie with the {before}; {losses}")
    return Verdict(False, f"{told}, a tie with the {before}, and no better {losses}")
