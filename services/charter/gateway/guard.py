"""What to do with an answer, given how likely it breaks each principle. Pure decisions, no I/O.

    draft ── assess all principles ──► nothing in doubt ──► accept
                                  └──► in doubt ──► revise by the worst ──► assess all again ──► …
                                                     (no more rounds) ──► refuse, and say which kind

Every revision is assessed by *all* principles, so that mending one cannot quietly break another, and the
best attempt wins, not the last. Where only helpfulness stays in doubt, the best attempt is given, since a
refusal helps even less.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from charter.constitution.model import Principle
from charter.errors import ConfigError


class GuardMode(enum.StrEnum):
    """How an answer is held to the constitution, from the weakest to the strictest."""

    OFF = "off"
    """Not at all."""
    OBSERVE = "observe"
    """Assessed after it was given; the verdict is recorded and told."""
    GATED = "gated"
    """Assessed before it is given; revised when in doubt, refused when no revision passes."""
    ALWAYS = "always"
    """As gated, with at least one round of critique and revision for every answer."""

    @property
    def strictness(self) -> int:
        """0 for off, rising."""
        return _STRICTNESS[self]

    @property
    def holds_back(self) -> bool:
        """Whether nothing leaves before it has passed."""
        return self in (GuardMode.GATED, GuardMode.ALWAYS)


class Verdict(enum.StrEnum):
    """What became of an answer, from the mildest to the most severe."""

    UNASSESSED = "unassessed"
    """Nobody looked: guard off, or the critic was away and the mode allows that."""
    PASSED = "passed"
    """The draft, as the policy wrote it, broke nothing."""
    FLAGGED = "flagged"
    """In doubt, and given all the same: the mode only observes, or a refusal would be no better."""
    REVISED = "revised"
    """What was given is a revision that broke nothing."""
    REFUSED = "refused"
    """No attempt passed; a refusal that names the kind of principle was given instead."""

    @property
    def severity(self) -> int:
        """0 for unassessed, rising."""
        return _SEVERITY[self]


_STRICTNESS = {mode: i for i, mode in enumerate(GuardMode)}
_SEVERITY = {verdict: i for i, verdict in enumerate(Verdict)}


@dataclass(frozen=True, slots=True)
class GuardRules:
    """Where doubt begins, and how often to try."""

    threshold: float = 0.5
    """An answer is in doubt when a principle is broken with at least this probability."""
    category_thresholds: Mapping[str, float] = field(default_factory=dict)
    """Other thresholds for principles of these categories."""
    max_rounds: int = 3
    """Rounds of critique and revision before the refusal; at least 1."""
    revise_only: tuple[str, ...] = ("helpfulness",)
    """Categories that ask for revisions and never for the refusal, which would break them all the more."""

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), *self.category_thresholds.items()):
            if not 0.0 < value <= 1.0:
                raise ConfigError(f"guard threshold {name!r} is {value}; choose one above 0 and at most 1")
        if self.max_rounds < 1:
            raise ConfigError(f"guard max_rounds is {self.max_rounds}; choose at least 1")


@dataclass(frozen=True, slots=True)
class Attempt:
    """An answer and how likely it breaks each principle."""

    answer: str
    probabilities: Mapping[str, float]
    """By principle id."""
    revised_by: str = ""
    """The principle that this revision was asked for; empty for the draft."""


@dataclass(frozen=True, slots=True)
class Accept:
    """Give this attempt."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Revise:
    """Ask for a critique and a revision of this attempt, by this principle."""

    attempt: int
    principle_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing passed; refuse, naming the kind of this principle."""

    attempt: int
    principle_id: str


Decision = Accept | Revise | Refuse
Known = Mapping[str, Principle]
"""The constitution's principles by id. One that is missing here counts as the most important."""


def threshold_of(rules: GuardRules, principles: Known, principle_id: str) -> float:
    """From which probability on this principle puts an answer in doubt."""
    known = principles.get(principle_id)
    if known is None:
        return min((rules.threshold, *rules.category_thresholds.values()))
    return rules.category_thresholds.get(known.category, rules.threshold)


def in_doubt(rules: GuardRules, principles: Known, attempt: Attempt) -> tuple[str, ...]:
    """The principles that the attempt may break, worst first: by priority, then by probability."""
    doubtful = [
        i
        for i, probability in attempt.probabilities.items()
        # `not <` so that a probability that is not a number counts as doubt.
        if not probability < threshold_of(rules, principles, i)
    ]
    return tuple(sorted(doubtful, key=lambda i: (_priority(principles, i), -attempt.probabilities[i], i)))


def decide(
    mode: GuardMode, rules: GuardRules, principles: Known, attempts: Sequence[Attempt], rounds: int
) -> Decision:
    """The next step after `rounds` rounds, for at least one attempt; `mode` is gated or always.

    `attempts` may be fewer than `rounds` + 1: those made under an older constitution no longer count.
    """
    best = _best(rules, principles, attempts)
    doubtful = in_doubt(rules, principles, attempts[best])
    owes_a_round = mode is GuardMode.ALWAYS and rounds == 0
    if not doubtful and not owes_a_round:
        return Accept(best)
    if rounds < rules.max_rounds:
        return Revise(best, doubtful[0] if doubtful else _likeliest(principles, attempts[best]))
    grave = _grave(rules, principles, doubtful)
    return Refuse(best, grave[0]) if grave else Accept(best)


def _priority(principles: Known, principle_id: str) -> int:
    known = principles.get(principle_id)
    return known.priority if known else 0


def _weighed(principles: Known, attempt: Attempt, principle_id: str) -> float:
    known = principles.get(principle_id)
    probability = attempt.probabilities[principle_id]
    return (known.weight if known else 1.0) * (1.0 if math.isnan(probability) else probability)


def _likeliest(principles: Known, attempt: Attempt) -> str:
    return max(attempt.probabilities, key=lambda i: (_weighed(principles, attempt, i), i))


def _grave(rules: GuardRules, principles: Known, doubtful: Sequence[str]) -> list[str]:
    """Those of the doubtful principles for which an answer is rather refused than given."""
    return [i for i in doubtful if i not in principles or principles[i].category not in rules.revise_only]


def _badness(rules: GuardRules, principles: Known, attempt: Attempt) -> tuple[bool, bool, int, float]:
    """Orders attempts: in grave doubt, in any, by how important a principle, by the weighed sum of all."""
    doubtful = in_doubt(rules, principles, attempt)
    grave = _grave(rules, principles, doubtful)
    total = sum(_weighed(principles, attempt, i) for i in attempt.probabilities)
    return bool(grave), bool(doubtful), -_priority(principles, doubtful[0]) if doubtful else 0, total


def _best(rules: GuardRules, principles: Known, attempts: Sequence[Attempt]) -> int:
    """The least bad attempt; among equals the last, which was revised most."""
    return min(range(len(attempts)), key=lambda i: (_badness(rules, principles, attempts[i]), -i))
