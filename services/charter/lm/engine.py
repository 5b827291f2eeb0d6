"""The embedded engine: continuous batching of concurrent requests in one worker thread, asyncio in front.

Requests of any number of event loops go to the current `Runner` (weights and cache); what one turn of a
loop submits arrives together, so that prompts that begin alike are read together. `reload` puts other
weights in force: requests made before it finish on the old ones.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from charter.errors import BackendError, BackendUnavailable, CharterError, Overloaded, RequestError
from charter.lm.base import Chunk, Completion, FinishReason, ModelVersion, Prompt, Samples, Sampling, Scored
from charter.lm.chat import EncodedPrompt
from charter.lm.checkpoint import Checkpoint, load_checkpoint
from charter.lm.engine_requests import Answer, AnswerText, Delivery, Inbox, Piece, Scoring, check_fits
from charter.lm.engine_runner import Limits, Outbox, Runner
from charter.lm.sampling import check_sampling
from charter.telemetry.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine is doing."""

    model: ModelVersion
    running: int
    """Answers being written, on all weights."""
    waiting: int
    """Requests whose turn has not come."""
    context_length: int
    tokens_generated: int
    uptime_seconds: float


class Engine:
    """Generates and scores with local weights. Methods may be called from any thread's event loop."""

    def __init__(self, checkpoint: Checkpoint, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._current = Runner(checkpoint, self._limits)
        self._runners = [self._current]
        self._wake = threading.Condition()
        self._closing = False
        self._reloading = threading.Lock()
        self._started = time.monotonic()
        self._retired_tokens = 0
        self._staged: dict[asyncio.AbstractEventLoop, list[tuple[Runner, Answer | Scoring]]] = {}
        self._thread = threading.Thread(target=self._work, name="charter-engine", daemon=True)
        self._thread.start()

    # What callers do.

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        """`n` whole answers; see `LanguageModel.generate`."""
        check_sampling(sampling)
        if n < 1:
            raise RequestError(f"n is {n}; ask for at least one answer")
        runner = self._current
        encoded = runner.codec.encode(prompt)
        answers = [self._answer(runner, encoded, sampling, i, streams=False) for i in range(n)]
        self._submit(runner, answers)
        try:
            completions = [await self._completion(runner, a) for a in answers]
        except BaseException:
            self._cancel(answers)
            raise
        return Samples(tuple(completions), encoded.token_ids, runner.version)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        """One answer as it is written; see `LanguageModel.stream`."""
        check_sampling(sampling)
        runner = self._current
        encoded = runner.codec.encode(prompt)
        answer = self._answer(runner, encoded, sampling, 0, streams=True)
        text, written = AnswerText(runner.codec, sampling), 0
        self._submit(runner, [answer])
        try:
            while True:
                for piece in _joined(await answer.inbox.take()):
                    new, tokens = text.add(piece)
                    written += len(piece.token_ids)
                    if piece.finish is not None:
                        length = len(encoded.token_ids)
                        yield Chunk(new, tokens, piece.finish, length, written, runner.version)
                        return
                    if new or tokens:
                        yield Chunk(new, tokens)
        finally:
            self._cancel([answer])

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        """Log-probs of the continuations; see `LanguageModel.score`."""
        runner = self._current
        encoded = runner.codec.encode(prompt)
        ids = tuple(
            runner.codec.continuation_ids(encoded.tail, encoded.tail_ids, text) for text in continuations
        )
        check_fits(len(encoded.token_ids), max(map(len, ids), default=0), runner.context_length)
        if not ids:
            return ()
        scoring = Scoring(encoded.token_ids, ids, Inbox(asyncio.get_running_loop()))
        self._submit(runner, [scoring])
        try:
            (logprobs,) = await scoring.inbox.take()
        except BaseException:
            self._cancel([scoring])
            raise
        assert isinstance(logprobs, list)
        return tuple(Scored(i, tuple(p)) for i, p in zip(ids, logprobs, strict=True))

    async def reload(self, source: str, *, version: str = "") -> tuple[ModelVersion, ModelVersion]:
        """Puts the weights in `source` in force; returns the versions before and after.

        Requests made so far finish on the old weights. Raises `CheckpointError`, and keeps the old weights
        in force, when the new ones cannot be used.
        """
        return await asyncio.to_thread(self._reload, source, version)

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        runners = list(self._runners)
        return EngineStatus(
            model=self._current.version,
            running=sum(r.running for r in runners),
            waiting=sum(r.waiting for r in runners),
            context_length=self._current.context_length,
            tokens_generated=self._retired_tokens + sum(r.tokens_generated for r in runners),
            uptime_seconds=time.monotonic() - self._started,
        )

    async def close(self) -> None:
        """Stops the worker; requests under way fail with `BackendUnavailable`. Safe to repeat."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    # From the callers to the worker.

    def _answer(
        self, runner: Runner, encoded: EncodedPrompt, sampling: Sampling, index: int, *, streams: bool
    ) -> Answer:
        length = len(encoded.token_ids)
        if not length:
            raise RequestError("the prompt has no tokens; give a message with some text")
        check_fits(length, 1, runner.context_length)
        return Answer(
            encoded.token_ids,
            sampling,
            min(sampling.max_tokens, runner.context_length - length),
            Inbox(asyncio.get_running_loop()),
            runner.codec,
            seed=None if sampling.seed is None else sampling.seed + index,
            streams=streams,
        )

    def _submit(self, runner: Runner, requests: Sequence[Answer | Scoring]) -> None:
        """Stages requests; they leave together when this turn of the loop ends."""
        loop = requests[0].inbox.loop
        with self._wake:
            if self._closing:
                raise BackendUnavailable("the engine was closed; open the model again")
            waiting = runner.waiting + sum(len(s) for s in self._staged.values())
            if waiting + len(requests) > self._limits.max_waiting:
                raise Overloaded(
                    f"{waiting} requests are waiting for the model, and it takes {self._limits.max_waiting}; "
                    "come back later, or raise max_waiting"
                )
            if loop not in self._staged:
                self._staged[loop] = []
                loop.call_soon(self._depart, loop)
            self._staged[loop] += [(runner, request) for request in requests]

    def _depart(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._wake:
            staged = self._staged.pop(loop, [])
            closed = self._closing
            if not closed:
                for runner, request in staged:
                    runner.submit(request)
                    if runner not in self._runners:  # retired between staging and departure
                        self._runners.append(runner)
                self._wake.notify()
        if closed:
            _deliver([(r.inbox, BackendUnavailable("the engine was closed")) for _, r in staged])

    def _cancel(self, requests: Sequence[Answer | Scoring]) -> None:
        for request in requests:
            request.cancelled = True
        with self._wake:
            self._wake.notify()

    async def _completion(self, runner: Runner, answer: Answer) -> Completion:
        (piece,) = await answer.inbox.take()
        assert isinstance(piece, Piece)
        text, tokens = AnswerText(runner.codec, answer.sampling).add(piece)
        return Completion(
            text,
            tokens,
            piece.finish or FinishReason.STOP,
            len(answer.prompt_ids),
            len(tokens),
            runner.version,
        )

    # The worker.

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or any(r.busy for r in self._runners)):
                    self._wake.wait()
                runners, closing = list(self._runners), self._closing
            outbox: Outbox = []
            for runner in runners:
                if closing:
                    runner.abandon(BackendUnavailable("the engine was closed"), outbox)
                elif runner.busy:
                    self._step(runner, outbox)
            self._post(outbox)
            if closing:
                return
            if len(runners) > 1:
                self._retire()

    def _step(self, runner: Runner, outbox: Outbox) -> None:
        try:
            runner.step(outbox)
        except Exception as e:  # the requests under way are lost, not the engine
            log.error("engine step failed", error=repr(e), model=runner.version.version)
            error = (
                e if isinstance(e, CharterError) else BackendError(f"the model failed while it ran: {e!r}")
            )
            runner.abandon(error, outbox)

    def _retire(self) -> None:
        with self._wake:
            for runner in self._runners[:]:
                if runner is not self._current and not runner.busy:
                    self._runners.remove(runner)
                    self._retired_tokens += runner.tokens_generated
                    runner.tokens_generated = 0

    @staticmethod
    def _post(outbox: Outbox) -> None:
        """One wake-up of each loop, however many deliveries it gets."""
        by_loop: dict[asyncio.AbstractEventLoop, Outbox] = {}
        for inbox, item in outbox:
            by_loop.setdefault(inbox.loop, []).append((inbox, item))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop is closed: nobody waits any more
                continue

    def _reload(self, source: str, version: str) -> tuple[ModelVersion, ModelVersion]:
        with self._reloading:
            old = self._current
            weights = next(iter(old.checkpoint.network.parameters()))
            checkpoint = load_checkpoint(
                source, version=version, dtype=weights.dtype, device=str(weights.device)
            )
            runner = Runner(checkpoint, self._limits)
            with self._wake:
                self._current = runner
                self._runners.append(runner)
            log.info("weights reloaded", previous=old.version.version, current=runner.version.version)
            self._retire()
            return old.version, runner.version


def _deliver(deliveries: Sequence[tuple[Inbox, Delivery]]) -> None:
    for inbox, item in deliveries:
        inbox.put(item)


def _joined(items: Sequence[Delivery]) -> list[Piece]:
    """The pieces that arrived since last asked, as one."""
    pieces = [i for i in items if isinstance(i, Piece)]
    if len(pieces) == 1:
        return pieces
    whole = Piece()
    for piece in pieces:
        if piece.kept or whole.kept:
            whole.kept += [0.0] * (len(whole.token_ids) - len(whole.kept)) + piece.kept
        whole.token_ids += piece.token_ids
        whole.logprobs += piece.logprobs
        whole.alternatives += piece.alternatives
        whole.finish = piece.finish
    return [whole]
