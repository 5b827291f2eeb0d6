"""Which model answers a request.

Today there is one. Whoever chooses between several (a canary, sticky by conversation) implements
`Upstreams` and nothing else changes: the service asks `choose` once for each request, and uses what it gets
for all of that request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from charter.gateway.answers import Call
from charter.lm.base import LanguageModel, ModelInfo


@dataclass(frozen=True, slots=True)
class Upstream:
    """A model that answers, and the name by which metrics call it."""

    name: str
    model: LanguageModel


class Upstreams(Protocol):
    """Chooses an upstream for each request."""

    def choose(self, call: Call) -> Upstream:
        """The upstream for this request; those of one `call.conversation` keep theirs."""
        ...

    async def info(self) -> ModelInfo:
        """What the main upstream says about itself, at most a second old."""
        ...

    async def close(self) -> None:
        """Closes all upstreams; safe to repeat."""
        ...


class SingleUpstream:
    """One model for everybody."""

    def __init__(self, model: LanguageModel, name: str = "main", info_seconds: float = 1.0) -> None:
        self._upstream = Upstream(name, model)
        self._info_seconds = info_seconds
        self._info: ModelInfo | None = None
        self._asked = 0.0

    def choose(self, call: Call) -> Upstream:
        """See `Upstreams.choose`."""
        return self._upstream

    async def info(self) -> ModelInfo:
        """See `Upstreams.info`."""
        now = time.monotonic()
        if self._info is None or now - self._asked > self._info_seconds:
            self._info = await self._upstream.model.info()
            self._asked = now
        return self._info

    async def close(self) -> None:
        """See `Upstreams.close`."""
        await self._upstream.model.close()
