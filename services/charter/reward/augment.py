"""Pairs that nobody labelled: a preferred answer against a spoilt copy of itself. Pure.

See `AugmentConfig` for what each kind teaches. Answers are spoilt as text, part by part (what stands between
punctuation marks) or word by word, and tokenised again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from charter.reward.config import AugmentConfig

_PART = re.compile(r"[^.,;:!?\n。，；：！？、]+[.,;:!?\n。，；：！？、]*\s*")
_WORDS = re.compile(r"\S+")
_SPAN = 3
_TRIES = 8
_SAME_FORM = 0.4
"""Share of words in common, in their order, from which two answers have the same form."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and the answer to it that was preferred."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    answer: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A pair to learn from: the answer is better than its spoilt copy."""

    kind: str
    prompt_ids: tuple[int, ...]
    better: str
    worse: str


def augment(answers: Sequence[Answered], config: AugmentConfig, *, labels: int, seed: int) -> list[Spoilt]:
    """Pairs by the configured shares of `labels`; the same seed gives the same ones."""
    rng = random.Random(f"{seed}/augment")
    pool = _confident(answers, config.confident)
    if not pool:
        return []
    kinds: tuple[tuple[str, float, Callable[[Answered], str | None]], ...] = (
        ("mismatched", config.mismatched, lambda a: _mismatched(a, pool, config.candidates, rng)),
        ("grafted", config.grafted, lambda a: _grafted(a, pool, config.candidates, rng)),
        ("replaced", config.replaced, lambda a: replaced(a.answer, rng.choice(pool).answer, rng)),
        ("swapped", config.swapped, lambda a: swapped(a.answer, rng)),
        ("repeated", config.repeated, lambda a: repeated(a.answer, rng)),
        ("dropped", config.dropped, lambda a: dropped(a.answer, rng)),
    )
    made: list[Spoilt] = []
    for kind, share, spoil in kinds:
        for answered in _draws(pool, round(share * labels), rng):
            worse = _spoilt(answered, spoil)
            if worse is not None:
                made.append(Spoilt(kind, answered.prompt_ids, answered.answer, worse))
    return made


def _spoilt(answered: Answered, spoil: Callable[[Answered], str | None]) -> str | None:
    """A copy that differs; what was drawn may by chance put back the same words."""
    for _ in range(_TRIES):
        worse = spoil(answered)
        if worse is not None and worse.split() != answered.answer.split():
            return worse
    return None


def _confident(answers: Sequence[Answered], share: float) -> list[Answered]:
    """Those that the judge was surest of; an undecided label says of neither answer that it is good."""
    decided = sorted((a for a in answers if a.confidence > 0), key=lambda a: -a.confidence)
    return decided[: max(round(share * len(answers)), 1)]


def _draws(pool: Sequence[Answered], count: int, rng: random.Random) -> list[Answered]:
    """`count` of the pool, none a second time before all were drawn once."""
    drawn: list[Answered] = []
    while len(drawn) < count:
        drawn += rng.sample(pool, min(count - len(drawn), len(pool)))
    return drawn


def _mismatched(
    answered: Answered, pool: Sequence[Answered], candidates: int, rng: random.Random
) -> str | None:
    """The most similar answer among a few to other prompts, so that only what it is about gives it away."""
    others = [a for a in rng.sample(pool, min(candidates, len(pool))) if a.prompt_id != answered.prompt_id]
    words = set(answered.answer.split())
    others = [a for a in others if a.answer.split() != answered.answer.split()]
    if not others:
        return None
    return max(others, key=lambda a: len(words & set(a.answer.split())) / (len(a.answer.split()) or 1)).answer


def _grafted(answered: Answered, pool: Sequence[Answered], candidates: int, rng: random.Random) -> str | None:
    """A passage of any other answer of the same form: the most similar one would often be as right here."""
    words = answered.answer.split()
    for other in rng.sample(pool, min(candidates, len(pool))):
        if other.prompt_id == answered.prompt_id:
            continue
        if _compared(words, other.answer.split()).ratio() >= _SAME_FORM:
            return grafted(answered.answer, other.answer, rng)
    return None


def parts(text: str) -> list[str]:
    """What stands between punctuation marks, with the mark and the space behind it."""
    return _PART.findall(text)


def swapped(text: str, rng: random.Random) -> str | None:
    """Two parts changed places; half of the time each keeps its first word, so that the form stays."""
    pieces = [_split(p) for p in parts(text)]
    if len(pieces) < 2:
        return None
    i, j = rng.sample(range(len(pieces)), 2)
    keep_first = rng.random() < 0.5
    pieces[i], pieces[j] = _exchanged(pieces[i], pieces[j], keep_first)
    return "".join(word + rest + mark for word, rest, mark in pieces)


def repeated(text: str, rng: random.Random) -> str | None:
    """One part stands in the place of another, too."""
    pieces = [_split(p) for p in parts(text)]
    if len(pieces) < 2:
        return None
    i, j = rng.sample(range(len(pieces)), 2)
    pieces[i] = _exchanged(pieces[i], pieces[j], rng.random() < 0.5)[0]
    return "".join(word + rest + mark for word, rest, mark in pieces)


def dropped(text: str, rng: random.Random) -> str | None:
    """One part is missing."""
    pieces = parts(text)
    if len(pieces) < 2:
        return None
    gone = rng.randrange(len(pieces))
    return "".join(p for i, p in enumerate(pieces) if i != gone).strip()


def replaced(text: str, other: str, rng: random.Random) -> str | None:
    """A few words in a row come from about the same place of another text."""
    here, there = list(_WORDS.finditer(text)), list(_WORDS.finditer(other))
    count = rng.randint(1, _SPAN)
    if len(here) <= count or len(there) <= count:
        return None
    start = rng.randrange(len(here) - count + 1)
    near = round(start / len(here) * len(there)) + rng.randint(-1, 1)
    source = min(max(near, 0), len(there) - count)
    words = other[there[source].start() : there[source + count - 1].end()]
    return text[: here[start].start()] + words + text[here[start + count - 1].end() :]


def grafted(text: str, other: str, rng: random.Random) -> str | None:
    """One passage in which the texts differ is the other's: a reason, a thing, a step of another answer."""
    here, there = list(_WORDS.finditer(text)), list(_WORDS.finditer(other))
    compared = _compared([w.group() for w in here], [w.group() for w in there])
    differing = [rest for kind, *rest in compared.get_opcodes() if kind == "replace"]
    if not differing:
        return None
    start, end, first, last = rng.choice(differing)
    passage = other[there[first].start() : there[last - 1].end()]
    return text[: here[start].start()] + passage + text[here[end - 1].end() :]


def _compared(a: Sequence[str], b: Sequence[str]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, a, b, autojunk=False)


_Piece = tuple[str, str, str]
"""First word, the other words, and the mark with its space."""


def _split(part: str) -> _Piece:
    body = part.rstrip(".,;:!?\n。，；：！？、 \t")
    first = re.match(r"\s*\S+", body)
    end = first.end() if first else 0
    return body[:end], body[end:], part[len(body) :]


def _exchanged(a: _Piece, b: _Piece, keep_first: bool) -> tuple[_Piece, _Piece]:
    """Both with each other's words; the marks stay in their places."""
    if keep_first and a[1] and b[1]:
        return (a[0], b[1], a[2]), (b[0], a[1], b[2])
    return (b[0], b[1], a[2]), (a[0], a[1], b[2])
