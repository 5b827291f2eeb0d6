"""How good a reward model is, and how far the policy has moved from where its scores were scaled. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from charter.evaluation.statistics import calibration_error


@dataclass(frozen=True, slots=True)
class Quality:
    """A reward model on held-out labels."""

    accuracy: float
    """Share of the labels whose leaning it shares, each weighted by how sure the label is; ties half."""
    loss: float
    """Cross-entropy with the soft labels, in nats, less the entropy of the labels themselves."""
    calibration_error: float
    """Expected difference between its probability and the label, pairs taken both ways round."""
    labels: int


def quality(margins: Sequence[float], probabilities: Sequence[float]) -> Quality:
    """From score(A) − score(B) and the soft label of each pair.

    Labels of exactly one half count in loss and calibration, and not in the accuracy.
    """
    pairs = list(zip(margins, probabilities, strict=True))
    weights = [abs(2 * p - 1) for _, p in pairs]
    agreed = [_agreement(m, p) * w for (m, p), w in zip(pairs, weights, strict=True)]
    total = math.fsum(weights)
    excess = [_cross_entropy(m, p) - _entropy(p) for m, p in pairs]
    predicted = [_sigmoid(m) for m, _ in pairs]
    both = [*predicted, *(1 - p for p in predicted)], [p for _, p in pairs] + [1 - p for _, p in pairs]
    return Quality(
        accuracy=math.fsum(agreed) / total if total else 0.5,
        loss=math.fsum(excess) / len(pairs) if pairs else math.nan,
        calibration_error=calibration_error(*both),
        labels=len(pairs),
    )


def difference_error(
    candidate: Sequence[float], in_force: Sequence[float], probabilities: Sequence[float]
) -> float:
    """Standard error of the difference between two models' accuracies on the same labels.

    Args:
        candidate, in_force: score(A) − score(B) of each pair, by each model.
        probabilities: the soft label of each pair.

    The difference is a mean over labels, weighted as accuracy is: only labels on which the models disagree
    tell them apart, which makes it much surer than two accuracies taken for themselves. Infinite where fewer
    than two labels count.
    """
    labels = [
        (abs(2 * p - 1), _agreement(a, p) - _agreement(b, p))
        for a, b, p in zip(candidate, in_force, probabilities, strict=True)
        if p != 0.5
    ]
    if len(labels) < 2:
        return math.inf
    total = math.fsum(w for w, _ in labels)
    mean = math.fsum(w * d for w, d in labels) / total
    spread = math.fsum((w * (d - mean)) ** 2 for w, d in labels)
    return math.sqrt(spread * len(labels) / (len(labels) - 1)) / total


def drift(scores: Sequence[float], reference: Sequence[float]) -> float:
    """How far two sets of scores lie apart: Wasserstein's distance W₁, in the scores' own unit.

    0 for the same distribution; a shift of all scores by d gives d.
    """
    if not scores or not reference:
        return 0.0
    a, b = sorted(scores), sorted(reference)
    points = sorted({i / len(a) for i in range(1, len(a) + 1)} | {i / len(b) for i in range(1, len(b) + 1)})
    total, before = 0.0, 0.0
    for point in points:
        middle = (point + before) / 2
        total += (point - before) * abs(a[int(middle * len(a))] - b[int(middle * len(b))])
        before = point
    return total


def _agreement(margin: float, probability: float) -> float:
    if margin == 0:
        return 0.5
    return float((margin > 0) == (probability > 0.5))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _cross_entropy(margin: float, probability: float) -> float:
    # −p log σ(m) − (1−p) log σ(−m) = log(1 + e^−|m|) + max(m, 0) − p m
    return math.log1p(math.exp(-abs(margin))) + max(margin, 0.0) - probability * margin


def _entropy(probability: float) -> float:
    return -sum(p * math.log(p) for p in (probability, 1 - probability) if p > 0)
