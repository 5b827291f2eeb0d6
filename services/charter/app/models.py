"""Opens models for services: torch is imported once, and the frozen model is shared by critic and judge.

A service closes its model when it stops; a shared one is closed when the last of its users has.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from charter.lm.base import Chunk, LanguageModel, ModelInfo, Prompt, Samples, Sampling, Scored

Open = Callable[[str], LanguageModel]


class SharedModels:
    """Gives the same open model to everybody who asks for the same URI. Thread-safe."""

    def __init__(self, open_model: Open) -> None:
        self._open_model = open_model
        self._lock = threading.Lock()
        self._users: dict[str, _Shared] = {}

    def open(self, uri: str) -> LanguageModel:
        """The model of `uri`, opened when it is first asked for; every user closes what it got."""
        with self._lock:
            shared = self._users.get(uri)
            if shared is None:
                shared = self._users[uri] = _Shared(self._open_model(uri))
            shared.users += 1
            return _Use(shared, lambda: self._drop(uri))

    def _drop(self, uri: str) -> bool:
        """One user less; whether it was the last."""
        with self._lock:
            shared = self._users[uri]
            shared.users -= 1
            if shared.users == 0:
                del self._users[uri]
                return True
            return False


@dataclass(slots=True)
class _Shared:
    model: LanguageModel
    users: int = 0


class _Use:
    """One user's handle on a shared model."""

    def __init__(self, shared: _Shared, drop: Callable[[], bool]) -> None:
        self._model = shared.model
        self._drop = drop
        self._closed = False

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        return await self._model.generate(prompt, sampling, n)

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        return self._model.stream(prompt, sampling)

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        return await self._model.score(prompt, continuations)

    async def info(self) -> ModelInfo:
        return await self._model.info()

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._drop():
                await self._model.close()
