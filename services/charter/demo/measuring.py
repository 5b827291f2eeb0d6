"""What the demo measures with the oracle, beside the circle and without any effect on it.

The functions run in the partner process, one import of torch for all.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Tell = Callable[[tuple[str, int, int]], None]


@dataclass(frozen=True, slots=True)
class Held:
    """How many held-out prompts of each class, and at which temperatures."""

    prompts: int = 500
    temperatures: tuple[float, ...] = (0.7, 1.0)
    seed: int = 20_000


def rates(folder: str, held: Held, tell: Tell, stopped: threading.Event) -> dict[str, Any]:
    """`charter.evaluation.seed.measure_chat` of a checkpoint's folder."""
    from charter.evaluation.seed import Plan, measure_chat
    from charter.lm import open_model

    async def measured() -> dict[str, Any]:
        model = open_model(f"local:{folder}", threads=1)
        try:
            plan = replace(Plan(), prompts=held.prompts, seed=held.seed)
            return await measure_chat(model, plan, lambda *p: _told(tell, *p), held.temperatures)
        finally:
            await model.close()

    return asyncio.run(measured())


def _told(tell: Tell, stage: str, done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        tell((stage, done, total))


@dataclass(frozen=True, slots=True)
class Shown:
    """A held-out prompt and what each checkpoint answers, in the order in which they were asked."""

    kind: str
    prompt: str
    answers: tuple[tuple[str, str], ...]
    """Text, and the oracle's word for it."""


def samples(
    folders: Sequence[str], count: int, temperature: float, seed: int, tell: Tell, stopped: threading.Event
) -> list[Shown]:
    """`count` held-out prompts of each class, answered by every checkpoint."""
    from charter.lm import open_model
    from charter.lm.base import ChatMessage, Prompt, Role, Sampling
    from charter.seedmodel.oracle import classify
    from charter.seedmodel.world import RequestClass, Split, sample

    requests = [r for kind in RequestClass for r in sample(seed, kind, Split.HELDOUT, count)]

    async def answered(folder: str) -> list[str]:
        model = open_model(f"local:{folder}", threads=1)
        try:
            found = await asyncio.gather(
                *(
                    model.generate(
                        Prompt((ChatMessage(Role.USER, r.text),)),
                        Sampling(temperature, max_tokens=96, seed=i),
                    )
                    for i, r in enumerate(requests)
                )
            )
        finally:
            await model.close()
        return [s.completions[0].text for s in found]

    columns = [asyncio.run(answered(folder)) for folder in folders]
    return [
        Shown(str(r.kind), r.text, tuple((text, str(classify(r, text))) for text in texts))
        for r, texts in zip(requests, zip(*columns, strict=True), strict=True)
    ]
