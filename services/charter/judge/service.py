"""Comparing two answers by a constitution, with any language model.

The labels of Constitutional AI's second phase (arXiv 2212.08073, section 4.1): the log-probs of the
options' letters, normalised, are the probability that an answer is better. Judges favour a position, so
both orders are asked and averaged; a judge that thinks aloud is too sure, so the label is clamped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from charter.constitution.model import Constitution, Phase, PreferenceExample, Principle
from charter.feedback import asking, prompts
from charter.feedback.records import Opinion
from charter.judge.config import Judging
from charter.lm.base import Conversation, LanguageModel


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one conversation."""

    conversation: Conversation
    answer_a: str
    answer_b: str


@dataclass(frozen=True, slots=True)
class Weighted:
    """A principle that is asked about a pair, and how much its opinion counts."""

    principle: Principle
    weight: float


def panel(constitution: Constitution, ids: Sequence[str], count: int, seed: int) -> tuple[Weighted, ...]:
    """The principles that judge a pair: those named, or `count` drawn by weight, or all for 0.

    Principles that were drawn by weight count alike: their weight has had its effect already. Raises
    `RequestError` for an id that the constitution lacks or that does not serve the preference phase.
    """
    pool = asking.chosen(constitution, Phase.PREFERENCE, ids)
    if ids or count == 0 or count >= len(pool):
        alike = not any(p.weight for p in pool)
        return tuple(Weighted(p, 1.0 if alike else p.weight) for p in pool)
    return tuple(Weighted(p, 1.0) for p in _drawn(pool, count, seed))


def _drawn(pool: Sequence[Principle], count: int, seed: int) -> list[Principle]:
    # Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted draw without repetition. In logs,
    # log(u)/w; principles of weight 0 come after all others, in random order.
    uniform = random.Random(seed).random
    keys = {p.id: (p.weight > 0, math.log1p(-uniform()) / (p.weight or 1.0)) for p in pool}
    return sorted(pool, key=lambda p: keys[p.id], reverse=True)[:count]


async def compare(
    model: LanguageModel,
    pair: Pair,
    principles: Sequence[Weighted],
    *,
    judging: Judging,
    examples: Sequence[PreferenceExample],
    seed: int,
) -> tuple[Opinion, ...]:
    """What each principle prefers; all principles and both orders are asked at once.

    With the same seed, swapping the answers swaps the two probabilities of each opinion exactly.
    """
    shots = examples[: judging.examples]
    swapped = Pair(pair.conversation, pair.answer_b, pair.answer_a)
    answers = await asking.concurrently(
        [
            _asked(model, order, w.principle, judging, shots, seed=asking.derived_seed(seed, w.principle.id))
            for w in principles
            for order in (pair, swapped)
        ]
    )
    return tuple(
        Opinion(
            w.principle.id, w.weight, first.probability, 1.0 - second.probability, first.note, second.note
        )
        for w, first, second in zip(principles, answers[::2], answers[1::2], strict=True)
    )


def label(opinions: Sequence[Opinion], lowest: float, highest: float) -> float:
    """Probability that A is better: opinions averaged by weight, then clamped. At least one opinion."""
    return min(max(unclamped(opinions), lowest), highest)


def unclamped(opinions: Sequence[Opinion]) -> float:
    """Opinions averaged by weight. At least one opinion, with weights that are not all 0."""
    total = sum(o.weight for o in opinions)
    return sum(o.weight * o.probability for o in opinions) / total


@dataclass(frozen=True, slots=True)
class _Asked:
    probability: float
    """That the first of the two answers is better, averaged over the notes."""
    note: str
    """The first note."""


async def _asked(
    model: LanguageModel,
    pair: Pair,
    principle: Principle,
    judging: Judging,
    shots: Sequence[PreferenceExample],
    *,
    seed: int,
) -> _Asked:
    """One order, one principle."""
    notes: list[str | None] = [None]
    if judging.notes.count:
        prompt = prompts.compare(
            pair.conversation, pair.answer_a, pair.answer_b, principle, with_note=True, examples=shots
        )
        sampling = judging.notes.sampling(prompts.VERDICT, seed)
        samples = await model.generate(prompt, sampling, judging.notes.count)
        notes = [c.text.strip() for c in samples.completions]
    values = await asking.concurrently(
        [
            asking.probability(
                model,
                prompts.compare(
                    pair.conversation, pair.answer_a, pair.answer_b, principle, note=note, examples=shots
                ),
                prompts.OPTION_A,
                prompts.OPTION_B,
            )
            for note in notes
        ]
    )
    return _Asked(sum(values) / len(values), notes[0] or "")
