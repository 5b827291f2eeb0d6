"""Several answers written at the same time, read as one sequence of batches.

A task for each answer takes its chunks as they come; the reader gets all that came since it last looked, so
that a fast model costs one write to the client for many tokens, and a slow one loses no time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

from charter.lm.base import Chunk, LanguageModel, Prompt, Sampling

Batch = list[tuple[int, Chunk]]
"""(index of the answer, chunk), in the order of arrival."""


class Feed:
    """`n` answers to one prompt; answer i is drawn with seed + i. An async context manager."""

    def __init__(self, model: LanguageModel, prompt: Prompt, sampling: Sampling, n: int) -> None:
        self._model = model
        self._prompt = prompt
        self._samplings = _seeded(sampling, n)
        self._loop = asyncio.get_running_loop()
        self._batch: Batch = []
        self._failure: BaseException | None = None
        self._writing = n
        self._wake: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Feed:
        self._tasks = [self._loop.create_task(self._write(i, s)) for i, s in enumerate(self._samplings)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops what is still being written, down to the model."""
        for task in self._tasks:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def next(self, within_seconds: float) -> Batch | None:
        """What came since the last call; waits for it, and gives an empty batch when nothing came in time.

        None after the last. Raises what any of the answers raised.
        """
        if not self._batch and self._writing and self._failure is None:
            self._wake = self._loop.create_future()
            timer = self._loop.call_later(within_seconds, self._notify)
            try:
                await self._wake
            finally:
                timer.cancel()
                self._wake = None
        batch, self._batch = self._batch, []
        if batch:
            return batch
        if self._failure is not None:
            raise self._failure
        return batch if self._writing else None

    async def _write(self, index: int, sampling: Sampling) -> None:
        try:
            chunks = self._model.stream(self._prompt, sampling)
            try:
                async for chunk in chunks:
                    self._batch.append((index, chunk))
                    self._notify()
            finally:
                await _close(chunks)
        except Exception as error:  # handed to the reader, whatever it is
            self._failure = error
        finally:
            self._writing -= 1
            self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


async def _close(chunks: AsyncIterator[Chunk]) -> None:
    """Closes a stream, so that its work stops now and not when it is collected."""
    close = getattr(cast(Any, chunks), "aclose", None)
    if close is not None:
        await close()


def _seeded(sampling: Sampling, n: int) -> Sequence[Sampling]:
    if sampling.seed is None or n == 1:
        return [sampling] * n
    return [replace(sampling, seed=sampling.seed + i) for i in range(n)]
