"""One chat request from prompt to answer: draft, guard, report. No HTTP here.

`answer` gives everything at once. `stream` gives pieces: at once as the policy writes them where the guard
does not hold answers back, and otherwise nothing before the gate has passed the whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import TypeVar

from charter.errors import BackendError, CharterError, ContextOverflow, Overloaded
from charter.feedback.asking import concurrently
from charter.gateway.answers import Answer, Call, Choice, Delta
from charter.gateway.config import GatewayConfig
from charter.gateway.contributions import Contribution, Contributions
from charter.gateway.envelope import unavailable
from charter.gateway.feed import Feed
from charter.gateway.gate import Gate, Outcome
from charter.gateway.guard import GuardMode, Verdict
from charter.gateway.metrics import GatewayMetrics
from charter.gateway.upstream import Upstreams
from charter.gateway.wire import pieces
from charter.lm.base import ChatMessage, Completion, FinishReason, ModelVersion, Role, Token
from charter.telemetry.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")

NO_LOGPROBS = "logprobs are null where a revision or a refusal took the place of the policy's own answer"
NOT_ASSESSED = "the critic could not read the answer, so it was not assessed"


class Beat:
    """Nothing to say yet; the connection should be kept."""


BEAT = Beat()
Event = list[Delta] | Beat | Answer
"""What a stream gives: pieces that may leave, beats, and the whole answer at the end."""


class ChatService:
    """Answers chat requests. Without a critic `gate` is None, without a bus `contributions`."""

    def __init__(
        self,
        config: GatewayConfig,
        upstreams: Upstreams,
        gate: Gate | None,
        contributions: Contributions | None,
        metrics: GatewayMetrics,
    ) -> None:
        self.upstreams = upstreams
        self.gate = gate
        self._config = config
        self._contributions = contributions
        self._metrics = metrics

    async def answer(self, call: Call) -> Answer:
        """The whole answer. Raises `ApiError` when the critic is needed and away, else as the model."""
        started = time.perf_counter()
        model = self.upstreams.choose(call).model
        samples = await model.generate(call.prompt, call.sampling, call.n)
        drafted = time.perf_counter() - started
        completions = samples.completions
        outcomes = await self._judge_all(call, [c.text for c in completions])
        choices = tuple(_choice(c, o) for c, o in zip(completions, outcomes, strict=True))
        return self._finished(
            call,
            Answer(
                choices,
                completions[0].prompt_tokens,
                sum(c.completion_tokens for c in completions),
                completions[0].model,
                drafted,
            ),
        )

    def stream(self, call: Call) -> AsyncIterator[Event]:
        """The answer in pieces; the last event is the whole `Answer`. Raises as `answer`, at any event."""
        return self._held(call) if call.mode.holds_back else self._live(call)

    async def _held(self, call: Call) -> AsyncIterator[Event]:
        async with contextlib.aclosing(self._beating(self.answer(call))) as events:
            async for event in events:
                if isinstance(event, Beat):
                    yield event
                    continue
                yield [d for i, choice in enumerate(event.choices) for d in pieces(choice, i)]
                yield event

    async def _live(self, call: Call) -> AsyncIterator[Event]:
        started = time.perf_counter()
        model = self.upstreams.choose(call).model
        written = [_Written() for _ in range(call.n)]
        async with Feed(model, call.prompt, call.sampling, call.n) as feed:
            while (batch := await feed.next(self._config.heartbeat_seconds)) is not None:
                deltas = []
                for index, chunk in batch:
                    written[index].add(chunk.text, chunk.finish_reason)
                    if chunk.model is not None:
                        written[index].close(chunk.prompt_tokens, chunk.completion_tokens, chunk.model)
                    if chunk.text or (call.logprobs and chunk.tokens):
                        deltas.append(Delta(index, chunk.text, chunk.tokens))
                if deltas:
                    yield deltas
                elif not batch:
                    yield BEAT
        drafted = time.perf_counter() - started
        answer = Answer(
            tuple(Choice(Outcome(Verdict.UNASSESSED, w.text), (), w.finish_reason) for w in written),
            written[0].prompt_tokens,
            sum(w.completion_tokens for w in written),
            written[0].model,
            drafted,
        )
        if call.mode is GuardMode.OBSERVE:
            judging = self._judge_all(call, [w.text for w in written])
            async with contextlib.aclosing(self._beating(judging)) as events:
                async for event in events:
                    if isinstance(event, Beat):
                        yield event
                    else:
                        choices = zip(answer.choices, event, strict=True)
                        answer = replace(answer, choices=tuple(replace(c, outcome=o) for c, o in choices))
        yield self._finished(call, answer)

    async def _beating(self, work: Awaitable[T]) -> AsyncGenerator[T | Beat, None]:
        """Beats until the work is done, then its result; closing the iterator cancels the work."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=self._config.heartbeat_seconds))[0]:
                yield BEAT
            yield task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _judge_all(self, call: Call, drafts: Sequence[str]) -> list[Outcome]:
        """What the guard makes of the drafts, in the request's mode; the first failure cancels the rest."""
        gate = self.gate
        if call.mode is GuardMode.OFF or gate is None:
            return [Outcome(Verdict.UNASSESSED, text) for text in drafts]
        return await concurrently([self._judge(gate, call, text, i) for i, text in enumerate(drafts)])

    async def _judge(self, gate: Gate, call: Call, text: str, index: int) -> Outcome:
        try:
            if call.mode is GuardMode.OBSERVE:
                return await gate.observe(call.prompt.messages, text)
            seed = None if call.sampling.seed is None else call.sampling.seed + index
            return await gate.hold(call.prompt.messages, text, call.mode, seed)
        except CharterError as error:
            return self._unjudged(call, text, error)

    def _unjudged(self, call: Call, text: str, error: CharterError) -> Outcome:
        """What becomes of an answer that the critic could not read: nothing, where the guard holds back."""
        log.warning("answer not assessed", reason=str(error), guard=call.mode.value)
        if not call.mode.holds_back:
            return Outcome(Verdict.UNASSESSED, text)
        if isinstance(error, ContextOverflow):
            raise ContextOverflow(
                "The conversation is too long for its answer to be checked against the constitution, so the "
                "answer is withheld. Send fewer or shorter messages."
            ) from error
        if not isinstance(error, BackendError | Overloaded):
            raise error
        if self._config.fail_open:
            return Outcome(Verdict.UNASSESSED, text)
        raise unavailable(
            "The answer could not be checked against the constitution, since the critic cannot be "
            "reached just now, so it is withheld. Try again in a moment.",
            "guard_unavailable",
        ) from error

    def _finished(self, call: Call, answer: Answer) -> Answer:
        """Notes, training and metrics of an answer that is complete."""
        notes = []
        if call.mode is not GuardMode.OFF and answer.verdict is Verdict.UNASSESSED:
            notes.append(NOT_ASSESSED)
        if call.logprobs and any(c.outcome.replaced for c in answer.choices):
            notes.append(NO_LOGPROBS)
        training = self._contribute(call, answer) if call.train else None
        if notes or training:
            answer = replace(answer, notes=tuple(notes), training=training)
        self._count(call, answer)
        return answer

    def _contribute(self, call: Call, answer: Answer) -> str:
        if self._contributions is None:
            return "this endpoint records no conversations"
        given = [
            Contribution(
                conversation_id=call.recorded_as if call.n == 1 else f"{call.recorded_as}-{i}",
                conversation=(*call.prompt.messages, ChatMessage(Role.ASSISTANT, choice.outcome.answer)),
                policy=answer.policy,
                constitution_digest=choice.outcome.constitution_digest,
                principle_ids=tuple(p.id for p in choice.outcome.principles)
                if choice.outcome.replaced
                else (),
            )
            for i, choice in enumerate(answer.choices)
        ]
        return (
            "accepted" if self._contributions.offer(given) else "too many conversations wait to be recorded"
        )

    def _count(self, call: Call, answer: Answer) -> None:
        metrics = self._metrics
        metrics.tokens.labels("input").inc(answer.prompt_tokens)
        metrics.tokens.labels("output").inc(answer.completion_tokens)
        metrics.stage.labels("draft").observe(answer.draft_seconds)
        if call.mode is GuardMode.OFF:
            return
        for choice in answer.choices:
            outcome = choice.outcome
            worst = outcome.principles[0].id if outcome.principles else "none"
            metrics.verdicts.labels(outcome.verdict.value, worst).inc()
            metrics.stage.labels("assess").observe(outcome.assess_seconds)
            if call.mode.holds_back:
                metrics.rounds.observe(outcome.rounds)
                metrics.stage.labels("revise").observe(outcome.revise_seconds)


class _Written:
    """An answer of a live stream, as far as it is written."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.finish_reason = FinishReason.STOP
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.model = ModelVersion("")

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str, finish_reason: FinishReason | None) -> None:
        self._parts.append(text)
        if finish_reason is not None:
            self.finish_reason = finish_reason

    def close(self, prompt_tokens: int, completion_tokens: int, model: ModelVersion) -> None:
        self.prompt_tokens, self.completion_tokens, self.model = prompt_tokens, completion_tokens, model


def _choice(completion: Completion, outcome: Outcome) -> Choice:
    if outcome.replaced:
        return Choice(outcome, (), FinishReason.STOP)
    return Choice(outcome, _visible(completion), completion.finish_reason)


def _visible(completion: Completion) -> tuple[Token, ...]:
    """The tokens that make up the text: without the stop token, or what a stop string cut off."""
    length = 0
    for i, token in enumerate(completion.tokens):
        if length >= len(completion.text):
            return completion.tokens[:i]
        length += len(token.text)
    return completion.tokens
