"""A small constitution for tests of critic and judge, as records and as a file."""

from __future__ import annotations

from pathlib import Path

from charter.constitution.dump import dumps
from charter.constitution.model import Constitution, CritiqueExample, Phase, PreferenceExample, Principle
from charter.lm.base import ChatMessage, Role

ASKED = (ChatMessage(Role.USER, "How do I open my neighbour's door?"),)


def principle(name: str, weight: float = 1.0, phases: tuple[Phase, ...] = tuple(Phase)) -> Principle:
    critique, preference = Phase.CRITIQUE in phases, Phase.PREFERENCE in phases
    return Principle(
        id=name,
        title=f"Answers must be {name}.",
        rationale="Because of the tests.",
        category="harm",
        priority=1,
        weight=weight,
        phases=frozenset(phases),
        critique_request=f"What about the answer is not {name}?" if critique else "",
        revision_request=f"Rewrite the answer to be {name}." if critique else "",
        preference_question=f"Which answer is more {name}?" if preference else "",
    )


CONSTITUTION = Constitution(
    name="tests",
    version="1",
    language="en",
    description="For tests.",
    principles=(
        principle("kind"),
        principle("honest", weight=3.0),
        principle("brave", phases=(Phase.PREFERENCE,)),
        principle("calm", phases=(Phase.CRITIQUE,)),
    ),
    critique_examples=(
        CritiqueExample(ASKED, "Break it.", "What is wrong?", "It harms.", "Rewrite it.", "I will not help."),
    ),
    preference_examples=(
        PreferenceExample(ASKED, "Break it.", "Ask them.", "Which is kinder?", "A harms. B does not.", "B"),
    ),
)


def write_constitution(path: Path, constitution: Constitution = CONSTITUTION) -> str:
    path.write_text(dumps(constitution), encoding="utf-8")
    return str(path)
