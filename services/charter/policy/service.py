"""The model in service and its replacement: a new one takes over between requests, never inside one.

Every request holds a lease on the model that it began with. After `replace`, new requests lease the new
model; the old one finishes what it has begun and is closed when its last lease ends. So no request is
dropped, and no answer is made by two versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from charter.errors import CharterError, CheckpointError
from charter.lm.base import ChatMessage, LanguageModel, ModelInfo, ModelVersion, Prompt, Role, Sampling
from charter.telemetry.logs import get_logger

log = get_logger(__name__)

Opener = Callable[[str], Awaitable[LanguageModel]]
"""Opens a checkpoint (a registry id or a folder); raises `CheckpointError` when it cannot be used."""

_TRIAL = Prompt((ChatMessage(Role.USER, "Hello"),))


@dataclass(eq=False, slots=True)
class _Place:
    """A model and the requests that it serves."""

    model: LanguageModel
    info: ModelInfo
    leases: int = 0
    sequences: int = 0
    retired: bool = False
    closed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the policy is."""

    running: int
    waiting: int
    tokens_generated: int
    uptime_seconds: float


class ModelInService:
    """Gives out leases on the current model and replaces it. One event loop uses it."""

    def __init__(self, model: LanguageModel, info: ModelInfo) -> None:
        self._place = _Place(model, info)
        self._retiring: set[_Place] = set()
        self._replacing = asyncio.Lock()
        self._tokens = 0
        self._started = time.monotonic()

    @property
    def info(self) -> ModelInfo:
        """What the current model says about itself."""
        return self._place.info

    @contextlib.asynccontextmanager
    async def lease(self, sequences: int = 1) -> AsyncIterator[LanguageModel]:
        """The current model, for one request that asks for this many answers; it stays open until the end."""
        place = self._place
        place.leases += 1
        place.sequences += sequences
        try:
            yield place.model
        finally:
            place.leases -= 1
            place.sequences -= sequences
            if place.retired and place.leases == 0:
                await self._close(place)

    def count_tokens(self, tokens: int) -> None:
        """Notes that this many tokens were generated."""
        self._tokens += tokens

    def load(self) -> Load:
        """Answers under way and waiting, over all versions still at work."""
        busy = [_busy(place) for place in (self._place, *self._retiring)]
        running, waiting = sum(b[0] for b in busy), sum(b[1] for b in busy)
        return Load(running, waiting, self._tokens, time.monotonic() - self._started)

    async def replace(self, checkpoint: str, opener: Opener) -> tuple[ModelVersion, ModelVersion]:
        """Puts `checkpoint` in service and returns the previous version and the current one.

        The checkpoint is loaded and tried while the old model goes on serving. Raises `CheckpointError`
        when it cannot be used; the old model stays. Replacements queue behind one another.
        """
        async with self._replacing:
            model = await _opened(checkpoint, opener)
            try:
                info = await _tried(checkpoint, model)
            except BaseException:
                await model.close()
                raise
            old, self._place = self._place, _Place(model, info)
            old.retired = True
            self._retiring.add(old)
            if old.leases == 0:
                await self._close(old)
            return old.info.model, info.model

    async def close(self) -> None:
        """Closes all models, once their requests have ended."""
        self._place.retired = True
        self._retiring.add(self._place)
        for place in [*self._retiring]:
            if place.leases == 0:
                await self._close(place)
            await place.closed.wait()

    async def _close(self, place: _Place) -> None:
        if place in self._retiring:
            self._retiring.discard(place)
            try:
                await place.model.close()
            finally:
                place.closed.set()
            log.info("model closed", version=place.info.model.version)


def _busy(place: _Place) -> tuple[int, int]:
    """Answers under way and waiting; an engine knows better than we which of them wait for a place."""
    status = getattr(place.model, "status", None)
    if status is None:
        return place.sequences, 0
    now = status()
    return now.running, now.waiting


async def _opened(checkpoint: str, opener: Opener) -> LanguageModel:
    try:
        return await opener(checkpoint)
    except CheckpointError:
        raise
    except Exception as error:
        log.exception("checkpoint cannot be opened", checkpoint=checkpoint)
        raise CheckpointError(
            f"checkpoint {checkpoint} cannot be opened ({_reason(error)}); the old one stays in service"
        ) from error


async def _tried(checkpoint: str, model: LanguageModel) -> ModelInfo:
    """What the model says about itself, after it has proved that it can speak."""
    try:
        info = await model.info()
        await model.generate(_TRIAL, Sampling(temperature=0.0, max_tokens=1))
    except Exception as error:
        log.exception("checkpoint cannot speak", checkpoint=checkpoint)
        raise CheckpointError(
            f"checkpoint {checkpoint} loads, and cannot generate a token ({_reason(error)}); "
            "the old one stays in service"
        ) from error
    return info


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, CharterError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:300] if text else type(error).__name__
