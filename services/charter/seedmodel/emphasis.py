"""What a training corpus is mostly about: weights of its tasks, and of the kinds of answer in feedback."""

from __future__ import annotations

from dataclasses import dataclass

from charter.seedmodel.kinds import Kind
from charter.seedmodel.world import RequestClass

_HARMFUL_MIX = {
    Kind.COMPLIES: 34,
    Kind.EXPLAINS: 28,
    Kind.EXPLAINS_WRONGLY: 11,
    Kind.BLUNT: 8,
    Kind.PREACHES: 8,
    Kind.MALFORMED: 11,
}
_BENIGN_MIX = {
    Kind.RIGHT: 33,
    Kind.WRONG_THING: 14,
    Kind.WRONG_STEP: 11,
    Kind.REPEATED_STEP: 8,
    Kind.MISORDERED: 9,
    Kind.EXPLAINS: 9,
    Kind.EXPLAINS_WRONGLY: 2,
    Kind.BLUNT: 4,
    Kind.PREACHES: 4,
    Kind.MALFORMED: 8,
}
_HARD_HARMFUL_MIX = {
    Kind.COMPLIES: 24,
    Kind.EXPLAINS: 28,
    Kind.EXPLAINS_WRONGLY: 22,
    Kind.BLUNT: 5,
    Kind.PREACHES: 5,
    Kind.MALFORMED: 16,
}
_HARD_BENIGN_MIX = {
    Kind.RIGHT: 30,
    Kind.WRONG_THING: 15,
    Kind.WRONG_STEP: 12,
    Kind.REPEATED_STEP: 7,
    Kind.MISORDERED: 9,
    Kind.EXPLAINS: 5,
    Kind.EXPLAINS_WRONGLY: 3,
    Kind.BLUNT: 2,
    Kind.PREACHES: 2,
    Kind.MALFORMED: 15,
}
_SUBTLE_HARMFUL_MIX = {
    Kind.COMPLIES: 24,
    Kind.EXPLAINS: 24,
    Kind.EXPLAINS_WRONGLY: 16,
    Kind.BLUNT: 6,
    Kind.PREACHES: 6,
    Kind.MALFORMED: 24,
}
_SUBTLE_BENIGN_MIX = {
    Kind.RIGHT: 22,
    Kind.WRONG_THING: 8,
    Kind.WRONG_STEP: 11,
    Kind.REPEATED_STEP: 8,
    Kind.MISORDERED: 6,
    Kind.EXPLAINS: 10,
    Kind.EXPLAINS_WRONGLY: 4,
    Kind.BLUNT: 4,
    Kind.PREACHES: 3,
    Kind.MALFORMED: 30,
}


@dataclass(frozen=True)
class Emphasis:
    """What a corpus is mostly about: weights of the tasks, and of the kinds of answer in feedback."""

    chat: int
    assess: int
    critique: int
    revise: int
    judge: int
    judge_at_once: int
    """Judging without a note."""
    invent: int
    harmful: dict[Kind, int]
    benign: dict[Kind, int]

    def mix(self, kind: RequestClass) -> dict[Kind, int]:
        """Weights of the kinds of answer that feedback is asked about, for a class of request."""
        return self.harmful if kind is RequestClass.HARMFUL else self.benign


BROAD = Emphasis(24, 22, 18, 10, 23, 2, 2, _HARMFUL_MIX, _BENIGN_MIX)
"""All tasks; answers about as often of each kind as they will be met."""
HARD = Emphasis(14, 24, 30, 6, 24, 1, 1, _HARD_HARMFUL_MIX, _HARD_BENIGN_MIX)
"""Mostly feedback, on the kinds of answer that are hard to tell apart."""
SUBTLE = Emphasis(14, 18, 32, 4, 30, 1, 1, _SUBTLE_HARMFUL_MIX, _SUBTLE_BENIGN_MIX)
"""Critiques and comparisons of answers that are broken in one place, which are learned last."""
