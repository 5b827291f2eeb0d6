"""What critic and judge say, as records: the same on both sides of the wire."""

from __future__ import annotations

from dataclasses import dataclass

from charter.lm.base import ModelVersion


@dataclass(frozen=True, slots=True)
class Source:
    """What an opinion rests on."""

    constitution_digest: str
    """Digest of the constitution that was in force for the whole request."""
    model: ModelVersion
    """The feedback model."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """How likely an answer breaks a principle."""

    principle_id: str
    probability: float


@dataclass(frozen=True, slots=True)
class Assessed:
    """An answer, read against several principles."""

    assessments: tuple[Assessment, ...]
    source: Source

    @property
    def worst(self) -> Assessment | None:
        """The assessment with the highest probability; None when there is none."""
        return max(self.assessments, key=lambda a: a.probability, default=None)


@dataclass(frozen=True, slots=True)
class Critiqued:
    """What is wrong with an answer by one principle."""

    critique: str
    source: Source


@dataclass(frozen=True, slots=True)
class RevisionStep:
    """One round: a principle was drawn, the answer criticised, and rewritten."""

    principle_id: str
    critique: str
    revision: str
    """The answer after this round."""


@dataclass(frozen=True, slots=True)
class Revised:
    """An answer after all rounds, and every step on the way."""

    answer: str
    steps: tuple[RevisionStep, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Opinion:
    """Which of two answers one principle prefers, asked in both orders."""

    principle_id: str
    weight: float
    """How much the opinion counts, relative to the others."""
    probability_first: float
    """That A is better, asked as (A, B); unclamped."""
    probability_swapped: float
    """That A is better, asked as (B, A); unclamped."""
    note_first: str = ""
    """The judge's first note on (A, B); empty without notes."""
    note_swapped: str = ""

    @property
    def probability(self) -> float:
        """Both orders averaged: the judge's leaning to a position cancels out."""
        return (self.probability_first + self.probability_swapped) / 2

    @property
    def flips(self) -> bool:
        """Whether the order alone changed which answer the judge prefers."""
        return (self.probability_first > 0.5) != (self.probability_swapped > 0.5)


@dataclass(frozen=True, slots=True)
class Compared:
    """A soft label: the probability that A is the better answer."""

    probability: float
    """Averaged over orders and principles, then clamped."""
    opinions: tuple[Opinion, ...]
    source: Source
