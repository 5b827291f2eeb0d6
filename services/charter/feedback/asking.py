"""How a feedback model is asked: options scored, texts written, principles drawn, all from one seed."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from charter.constitution.model import Constitution, Phase, Principle
from charter.errors import BackendError, ConstitutionError, RequestError
from charter.feedback import prompts
from charter.lm.base import LanguageModel, Prompt, Sampling

T = TypeVar("T")


async def probability(model: LanguageModel, prompt: Prompt, first: str, second: str) -> float:
    """Normalised probability that the model continues with `first` rather than `second`.

    Raises `BackendError` when the model's log-probs are not numbers.
    """
    a, b = await model.score(prompt, (first, second))
    value = prompts.normalised(a.total, b.total)
    if math.isnan(value):
        raise BackendError(
            f"the feedback model gave {first!r} and {second!r} the log-probs {a.total} and {b.total}; "
            "its weights are damaged, or its arithmetic overflows"
        )
    return value


async def write(model: LanguageModel, prompt: Prompt, sampling: Sampling) -> str:
    """What the model writes, without white space around it."""
    samples = await model.generate(prompt, sampling)
    return samples.completions[0].text.strip()


async def concurrently(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order, asked for at the same time so that the engine batches them.

    The first failure cancels the rest and is raised as it is.
    """
    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(w) for w in work]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [t.result() for t in tasks]


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def derived_seed(seed: int, *parts: object) -> int:
    """A seed for one part of a request: the same for the same parts, unrelated for others."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def fresh_seed() -> int:
    """A seed for a request that has none."""
    return random.SystemRandom().getrandbits(62)


def draw(principles: Sequence[Principle], count: int, seed: int) -> tuple[Principle, ...]:
    """`count` principles at random by their weights, each independently of the others.

    As in the paper (arXiv 2212.08073, 3.1 and 4.1), where every round of revision, and every comparison,
    draws one principle. Where all weights are 0, each is as likely as the others.
    """
    weights = [p.weight for p in principles]
    if not any(weights):
        weights = [1.0] * len(principles)
    return tuple(random.Random(seed).choices(principles, weights, k=count))


def chosen(constitution: Constitution, phase: Phase, ids: Sequence[str]) -> tuple[Principle, ...]:
    """The principles with these ids, or all that serve `phase` when there are none; in the given order.

    Raises `RequestError` for an id that the constitution lacks or that does not serve the phase.
    """
    if not ids:
        return constitution.serving(phase)
    found = []
    for principle_id in dict.fromkeys(ids):
        try:
            principle = constitution.principle(principle_id)
        except ConstitutionError as error:
            raise RequestError(str(error)) from None
        if phase not in principle.phases:
            raise RequestError(
                f"principle {principle_id!r} of constitution {constitution.name} does not serve the phase "
                f"{phase}; choose among {', '.join(p.id for p in constitution.serving(phase))}"
            )
        found.append(principle)
    return tuple(found)


def checked_for(constitution: Constitution, phase: Phase) -> None:
    """Raises `ConstitutionError` when no principle serves `phase`."""
    if not constitution.serving(phase):
        raise ConstitutionError(
            f"constitution {constitution.name} {constitution.version} has no principle that serves the phase "
            f"{phase}; add {phase!s} to the phases of at least one"
        )
