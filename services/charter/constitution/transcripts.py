"""Reads the transcripts that the paper's authors wrote their examples as.

    Human: …  Assistant: …  CritiqueRequest: …  Critique: …  RevisionRequest: …  Revision: …  Human:

for a critique and revision (several rounds may follow each other), and

    Human: Consider the following conversation …: H: … A: …  {}  (A) [[[…]]]  (B) [[[…]]]
    Assistant: Let's think step by step: …  Human: So the answer is: (B)

for a comparison with its reasoning. A reader raises `Unreadable` with a sentence about what is odd.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from charter.constitution.model import CritiqueExample, PreferenceExample
from charter.lm.base import ChatMessage, Conversation, Role

_LABEL = re.compile(
    r"(?:\A|\n)[ \t]*(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):[ \t]*"
)
_SHORT = re.compile(r"(?:\A|\n)[ \t]*([HA]):[ \t]*")
_ROLES = {"Human": Role.USER, "Assistant": Role.ASSISTANT, "H": Role.USER, "A": Role.ASSISTANT}
_ROUND = ["CritiqueRequest", "Critique", "RevisionRequest", "Revision"]
_OPTION = re.compile(r"\n[ \t]*\(([AB])\)[ \t]*(?:\[\[\[)?")
_ANSWER = re.compile(r"answer is:?\s*\(?([AB])\)?\W*\Z")
_STEPS = re.compile(r"\A\s*Let's think step by step:?\s*")

Segment = tuple[str, str]


class Unreadable(Exception):  # noqa: N818 - says what it is; never leaves the import
    """A text does not follow the form it seems to have."""


def segments(text: str, label: re.Pattern[str] = _LABEL) -> list[Segment]:
    """The text cut at its labels, as (label, text); `Unreadable` when something stands before the first."""
    marks = list(label.finditer(text))
    before = text[: marks[0].start()] if marks else text
    if before.strip():
        raise Unreadable(f'begins with "{_short(before)}" instead of a label such as "Human:"')
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return [(m.group(1), text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)]


def conversation(parts: Sequence[Segment]) -> Conversation:
    """Turns as messages; `Unreadable` unless a person's turn comes last and none is empty."""
    for label, body in parts:
        if label not in _ROLES:
            raise Unreadable(f'has "{label}:" inside the conversation')
        if not body:
            raise Unreadable(f"has an empty turn of {label}")
    if not parts or _ROLES[parts[-1][0]] is not Role.USER:
        raise Unreadable("has no person's turn before the answer")
    return tuple(ChatMessage(_ROLES[label], body) for label, body in parts)


def prompt(text: str) -> Conversation:
    """The conversation of a transcript that ends where the assistant is to speak."""
    parts = segments(text)
    if parts and parts[-1] == ("Assistant", ""):
        parts = parts[:-1]
    return conversation(parts)


def critique_examples(text: str) -> list[CritiqueExample]:
    """The rounds of critique and revision in a transcript; each revision is the next round's answer."""
    parts = segments(text)
    if parts and parts[-1] == ("Human", ""):  # where the paper's prompt goes on
        parts = parts[:-1]
    start = next((i for i, (label, _) in enumerate(parts) if label == "CritiqueRequest"), None)
    if not start or parts[start - 1][0] != "Assistant":
        raise Unreadable('has no "CritiqueRequest:" right after an answer of the assistant')
    turns, answer = conversation(parts[: start - 1]), parts[start - 1][1]
    rounds = parts[start:]
    examples = []
    for i in range(0, len(rounds), len(_ROUND)):
        labels = [label for label, _ in rounds[i : i + len(_ROUND)]]
        bodies = [body for _, body in rounds[i : i + len(_ROUND)]]
        if labels != _ROUND:
            raise Unreadable(f"goes {', '.join(labels)} where {', '.join(_ROUND)} is expected")
        if not all((answer, *bodies)):
            raise Unreadable("has an empty part")
        examples.append(CritiqueExample(turns, answer, *bodies))
        answer = bodies[-1]
    return examples


def reasoned_comparison(text: str, question: str) -> PreferenceExample:
    """A comparison that the assistant reasons about before it decides; `question` replaces `{}`."""
    parts = segments(text)
    if [label for label, _ in parts] != ["Human", "Assistant", "Human"]:
        raise Unreadable("is not a question, the reasoning and the answer")
    asked, note, answer = (body for _, body in parts)
    better = _ANSWER.search(answer)
    if not better:
        raise Unreadable('does not end with "So the answer is: (A)" or "(B)"')
    marks = list(_OPTION.finditer(asked))
    if [m.group(1) for m in marks] != ["A", "B"]:
        raise Unreadable("does not offer the options (A) and (B) once each")
    turns = _short_turns(asked[: marks[0].start()])
    first = asked[marks[0].end() : marks[1].start()].strip().removesuffix("]]]").strip()
    second = asked[marks[1].end() :].strip().removesuffix("]]]").strip()
    if not (first and second):
        raise Unreadable("has an empty option")
    return PreferenceExample(turns, first, second, question, _STEPS.sub("", note), better.group(1))


def _short_turns(text: str) -> Conversation:
    """`Consider …: H: … A: … {}` as messages."""
    _, _, turns = text.partition(":")
    return conversation(segments(turns.replace("{}", "").strip(), _SHORT))


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 40 else f"{words[:40]}…"
