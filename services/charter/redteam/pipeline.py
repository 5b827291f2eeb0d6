"""The run itself: many prompts at once, one writer, and patience with servers that are away.

A server or a log that is away is waited for, with backoff; a prompt that cannot be answered (longer than the
context, say) is reported and left out; whatever else fails is tried three times. Stopping throws away what is
in flight and keeps all that is finished.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from charter.bus.worker import Backoff
from charter.errors import (
    BackendError,
    BackendUnavailable,
    BackendUnsupported,
    CharterError,
    Overloaded,
    RequestError,
)
from charter.feedback import asking
from charter.lm.base import LanguageModel, Prompt, Sampling
from charter.redteam.config import RedTeamConfig
from charter.redteam.critics import Critic
from charter.redteam.prompts import RedTeamPrompt
from charter.redteam.records import Revision

T = TypeVar("T")

ATTEMPTS = 3
"""Attempts at a prompt whose failure may pass."""
_BATCH = 64
_STOPPED_S = 5.0
"""After a stop, how long the log may be away before what is finished is given up (and made again later)."""


class Folder(Protocol):
    """What a run needs of its folder (`charter.redteam.store.RunFolder`)."""

    @property
    def done(self) -> frozenset[str]:
        """Ids of the prompts that have their row."""
        ...

    def revision_id(self, prompt_id: str) -> str:
        """The name of a prompt's row."""
        ...

    def publish(self, revisions: Sequence[Revision]) -> None:
        """Makes rows durable."""
        ...

    def render(self, finish: bool = False) -> None:
        """Writes Parquet."""
        ...


class Watcher(Protocol):
    """Who is told how the run goes; the terminal's progress bar."""

    def on_finished(self, count: int) -> None:
        """So many more rows are in the log."""
        ...

    def on_failed(self, prompt: RedTeamPrompt, reason: str) -> None:
        """A prompt gets no row in this run."""
        ...

    def on_waiting(self, reason: str) -> None:
        """Something is away and is waited for; empty when it is back."""
        ...


@dataclass
class Outcome:
    """What a run did."""

    finished: int = 0
    failed: int = 0
    earlier: int = 0
    """Prompts that had their row before."""
    stopped: bool = False
    gave_up: str = ""
    """Why the run stopped by itself; empty when it did not."""


@dataclass
class _Clock:
    """When something last went well."""

    at: float = field(default_factory=time.monotonic)

    def well(self) -> None:
        self.at = time.monotonic()

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self.at


class _GaveUp(Exception):  # noqa: N818 - how a run ends, and not an error of ours
    pass


class Run:
    """One start of a run. `stop` may be called at any time, from the event loop."""

    def __init__(
        self,
        model: LanguageModel,
        critic: Critic,
        folder: Folder,
        watcher: Watcher,
        config: RedTeamConfig,
        backoff: Backoff | None = None,
    ) -> None:
        self._model, self._critic, self._folder, self._watcher = model, critic, folder, watcher
        self._config = config
        self._backoff = backoff or Backoff(0.2, 3.0)
        self._clock = _Clock()
        self._outcome = Outcome()
        self._working: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Ends the run soon; what is finished is kept."""
        self._outcome.stopped = True
        if self._working is not None:
            self._working.cancel()

    async def work(self, prompts: Sequence[RedTeamPrompt]) -> Outcome:
        """Makes a row for each prompt that has none.

        Raises what says that the run is set up wrongly (`ConfigError`, `BackendUnsupported`, …); rows that
        were finished before are kept.
        """
        done = self._folder.done
        waiting = [p for p in prompts if p.prompt_id not in done]
        self._outcome.earlier = len(prompts) - len(waiting)
        finished: asyncio.Queue[Revision | None] = asyncio.Queue(2 * self._config.concurrency)
        writer = asyncio.create_task(self._write(finished))
        try:
            self._working = asyncio.create_task(self._revise_all(waiting, finished, writer))
            if self._outcome.stopped:
                self._working.cancel()
            await self._working
        except asyncio.CancelledError:
            if not self._outcome.stopped:
                writer.cancel()
                raise
        except _GaveUp as reason:
            self._outcome.gave_up = str(reason)
        finally:
            end = asyncio.create_task(finished.put(None))
            await asyncio.wait([end, writer], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(writer, return_exceptions=True)
            end.cancel()  # it waits for room for ever when the writer ended before
        try:
            await writer
        except _GaveUp as reason:
            self._outcome.gave_up = str(reason)
        return self._outcome

    async def _revise_all(
        self,
        prompts: Sequence[RedTeamPrompt],
        finished: asyncio.Queue[Revision | None],
        writer: asyncio.Task[None],
    ) -> None:
        todo = iter(prompts)
        workers = [
            asyncio.create_task(self._revise_some(todo, finished))
            for _ in range(min(self._config.concurrency, len(prompts)))
        ]
        everything: set[asyncio.Task[None]] = {*workers, writer}
        try:
            while not all(worker.done() for worker in workers):
                ended, _ = await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
                everything -= ended
                for task in ended:
                    task.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _revise_some(
        self, todo: Iterator[RedTeamPrompt], finished: asyncio.Queue[Revision | None]
    ) -> None:
        for prompt in todo:
            revision = await self._patiently(prompt)
            if revision is not None:
                await finished.put(revision)

    async def _patiently(self, prompt: RedTeamPrompt) -> Revision | None:
        """The row; None for a prompt that gets none."""
        failures = 0
        while True:
            try:
                return await self._available(functools.partial(self._revise, prompt, failures))
            except RequestError as error:
                self._failed(prompt, error)
                return None
            except BackendUnsupported:
                raise
            except BackendError as error:
                failures += 1
                if failures == ATTEMPTS:
                    self._failed(prompt, error)
                    return None
                await asyncio.sleep(self._backoff.delay(failures))

    def _failed(self, prompt: RedTeamPrompt, error: CharterError) -> None:
        self._outcome.failed += 1
        self._clock.well()
        self._watcher.on_failed(prompt, str(error))

    async def _available(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result, called again for as long as something is away; `_GaveUp` after `give_up_s`."""
        failures, away = 0, _Clock()
        while True:
            try:
                result = await call()
            except (BackendUnavailable, Overloaded) as error:
                away = away if failures else _Clock()
                failures += 1
                reason = str(error)
            else:
                if failures:
                    self._watcher.on_waiting("")
                return result
            limit = min(self._config.give_up_s, _STOPPED_S if self._outcome.stopped else math.inf)
            if min(away.silence_s, self._clock.silence_s) > limit:
                raise _GaveUp(f"nothing was finished for {limit:g} s: {reason}")
            self._watcher.on_waiting(reason)
            await asyncio.sleep(self._backoff.delay(failures))

    async def _revise(self, prompt: RedTeamPrompt, attempt: int) -> Revision:
        # Another attempt must draw another answer: an empty one would be empty again.
        seed = asking.derived_seed(self._config.seed, prompt.prompt_id, attempt)
        sampling = Sampling(
            self._config.temperature,
            max_tokens=self._config.max_tokens,
            seed=asking.derived_seed(seed, "draft"),
        )
        samples = await self._model.generate(Prompt(prompt.conversation), sampling)
        draft = samples.completions[0]
        text = draft.text.strip()
        if not text:
            raise BackendError("the model wrote an empty answer")
        revised = await self._critic.revise(
            prompt.conversation, text, rounds=self._config.rounds, seed=asking.derived_seed(seed, "revise")
        )
        return Revision(
            revision_id=self._folder.revision_id(prompt.prompt_id),
            prompt_id=prompt.prompt_id,
            conversation=prompt.conversation,
            draft=text,
            rounds=revised.steps,
            policy=draft.model,
            critic=revised.source.model,
            constitution_digest=revised.source.constitution_digest,
            created_unix_ms=int(time.time() * 1000),
        )

    # The writer --------------------------------------------------------------------------------------

    async def _write(self, finished: asyncio.Queue[Revision | None]) -> None:
        """Publishes rows as they come, many in one act, until None comes."""
        more = True
        while more:
            batch = [await finished.get()]
            while len(batch) < _BATCH and not finished.empty():
                batch.append(finished.get_nowait())
            more = None not in batch
            rows = [row for row in batch if row is not None]
            if rows:
                await self._available(functools.partial(asyncio.to_thread, self._folder.publish, rows))
                self._clock.well()
                self._outcome.finished += len(rows)
                self._watcher.on_finished(len(rows))
            await asyncio.to_thread(self._folder.render, not more)
