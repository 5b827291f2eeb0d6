"""What critic and judge are served with: a frozen model, and a constitution that may change under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

from prometheus_client import CollectorRegistry

from charter.constitution.model import Constitution, Phase
from charter.constitution.watch import ConstitutionInForce
from charter.feedback.asking import checked_for
from charter.feedback.records import Source
from charter.lm.base import LanguageModel
from charter.telemetry.metrics import ConstitutionMetrics

OpenModel = Callable[[str], LanguageModel]
"""Opens a model by its URI; may take seconds, and runs in a thread."""


def open_model(uri: str) -> LanguageModel:
    """`charter.lm.open_model`, imported when it is first needed."""
    from charter import lm

    return lm.open_model(uri)


class FeedbackSources:
    """Holds both; made by `open`, released by `close`."""

    def __init__(self, model: LanguageModel, in_force: ConstitutionInForce, watch_s: float) -> None:
        self.model = model
        """The feedback model."""
        self._in_force = in_force
        self._watching = asyncio.get_running_loop().create_task(in_force.watch(watch_s))

    @classmethod
    async def open(
        cls,
        service: str,
        phase: Phase,
        *,
        model: str,
        constitution: str,
        watch_s: float,
        registry: CollectorRegistry,
        opener: OpenModel,
    ) -> Self:
        """Loads the constitution, which must serve `phase`, and opens the model.

        Raises `ConstitutionError`, `ConfigError` or `CheckpointError`.
        """
        metrics = ConstitutionMetrics.of(registry)
        in_force = ConstitutionInForce(constitution, service, metrics, lambda c: checked_for(c, phase))
        return cls(await asyncio.to_thread(opener, model), in_force, watch_s)

    @property
    def constitution(self) -> Constitution:
        """The constitution in force; a request reads it once and keeps it to its end."""
        return self._in_force.current

    async def source(self, constitution: Constitution) -> Source:
        """What an opinion by `constitution` rests on."""
        return Source(constitution.digest, (await self.model.info()).model)

    async def close(self) -> None:
        """Stops watching and closes the model; safe to repeat."""
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self.model.close()
