"""A constitution as frozen records, with a digest that depends on meaning and not on formatting."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
from dataclasses import asdict, dataclass

from charter.errors import ConstitutionError
from charter.lm.base import Conversation


class Phase(enum.StrEnum):
    """What a principle is used for."""

    CRITIQUE = "critique"
    """Assessing, criticising and revising answers."""
    PREFERENCE = "preference"
    """Choosing the better of two answers."""


@dataclass(frozen=True, slots=True)
class Principle:
    """One rule of the constitution."""

    id: str
    """Lower-case words joined by hyphens; unique, and never reused for another meaning."""
    title: str
    """The rule in one short sentence. The critic reads it when it assesses."""
    rationale: str
    """Why the rule exists, for people."""
    category: str
    """harm, illegality, discrimination, privacy, self-harm, deception, honesty, helpfulness, …"""
    priority: int
    """1 is the most important: among broken principles, the lowest number is revised first."""
    weight: float
    """How often the principle is drawn, and how much its opinion counts, relative to the others."""
    phases: frozenset[Phase]
    critique_request: str = ""
    """Asks for a critique of the answer; empty when the principle does not serve that phase."""
    revision_request: str = ""
    """Asks for a better answer; empty when the principle does not serve that phase."""
    preference_question: str = ""
    """Asks which of two answers is better; empty when the principle does not serve that phase."""


@dataclass(frozen=True, slots=True)
class CritiqueExample:
    """A worked critique and revision, shown to the critic before the real one."""

    conversation: Conversation
    answer: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A worked comparison, shown to the judge before the real one."""

    conversation: Conversation
    answer_a: str
    answer_b: str
    question: str
    note: str
    """What the judge should write before it decides; may be empty."""
    better: str
    """"A" or "B"."""


@dataclass(frozen=True)
class Constitution:
    """A named, versioned set of principles and examples."""

    name: str
    version: str
    language: str
    """BCP 47, for example "en" or "zh"."""
    description: str
    principles: tuple[Principle, ...]
    critique_examples: tuple[CritiqueExample, ...] = ()
    preference_examples: tuple[PreferenceExample, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of all fields; the same for any formatting of the file."""
        record = asdict(self)
        for principle in record["principles"]:
            principle["phases"] = sorted(principle["phases"])
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def serving(self, phase: Phase) -> tuple[Principle, ...]:
        """The principles that serve `phase`, in the file's order."""
        return tuple(p for p in self.principles if phase in p.phases)

    def principle(self, principle_id: str) -> Principle:
        """The principle with this id; raises `ConstitutionError` when there is none."""
        for principle in self.principles:
            if principle.id == principle_id:
                return principle
        raise ConstitutionError(
            f"constitution {self.name} {self.version} has no principle {principle_id!r}; "
            f"it has {', '.join(p.id for p in self.principles)}"
        )
