"""What travels between the callers' event loops and the engine's worker thread, and how answers are read.

The worker sees token ids only; text is made where it is wanted, in the caller's loop (`AnswerText`),
while the worker computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from charter.errors import ContextOverflow
from charter.lm.base import Alternative, FinishReason, Sampling, Token
from charter.lm.chat import ChatCodec
from charter.lm.detokenise import StopStrings
from charter.lm.engine_sampler import uniforms


@dataclass(slots=True)
class Piece:
    """Some tokens of an answer, or its end, or its failure."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """Empty when none were asked for."""
    finish: FinishReason | None = None


Delivery = Piece | list[list[float]] | BaseException
"""To an answer: pieces. To a scoring: log-probs of each continuation. To either: what went wrong."""


class Inbox:
    """Where a request's deliveries arrive, in the loop that asked."""

    __slots__ = ("_items", "_waiter", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: list[Delivery] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Delivery) -> None:
        """Called in the loop's own thread."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Delivery]:
        """All that has arrived since last asked; waits for at least one. Raises what went wrong."""
        if not self._items:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return items


class Answer:
    """One answer being written; belongs to the worker after it was submitted."""

    __slots__ = (
        "cancelled",
        "inbox",
        "limit",
        "piece",
        "position",
        "prompt_ids",
        "sampling",
        "streams",
        "uniform",
        "watch",
        "written",
    )

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        limit: int,
        inbox: Inbox,
        codec: ChatCodec,
        *,
        seed: int | None,
        streams: bool,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.limit = limit
        self.inbox = inbox
        self.streams = streams
        self.uniform: Callable[[], float] = uniforms(seed).random
        self.watch = StopWatch(codec, sampling.stop) if sampling.stop else None
        self.piece = Piece()
        self.written = 0
        self.position = len(prompt_ids)
        """Where the token sampled last will be read in."""
        self.cancelled = False

    @property
    def reserve(self) -> int:
        """Cache columns that it may come to need."""
        return len(self.prompt_ids) + self.limit


@dataclass(slots=True, eq=False)
class Scoring:
    """Continuations of one prompt to score."""

    prompt_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    inbox: Inbox
    cancelled: bool = False

    @property
    def size(self) -> int:
        """Tokens to read, at most."""
        return len(self.prompt_ids) + sum(map(len, self.continuations))


class StopWatch:
    """Tells the worker when a stop string is complete."""

    __slots__ = ("_decoder", "_stops")

    def __init__(self, codec: ChatCodec, stop: Sequence[str]) -> None:
        self._decoder = codec.detokeniser.decoder()
        self._stops = StopStrings(stop)

    def completed_by(self, token_id: int) -> bool:
        """Takes a token; whether the text now contains a stop string."""
        self._stops.push(self._decoder.push(token_id))
        return self._stops.stopped


class AnswerText:
    """Makes text and token records of pieces; holds back what a stop string may yet swallow.

    A token comes out with the text that it completes. When a stop string ends the answer its text never
    comes out; its tokens come with the last piece, since they were sampled.
    """

    def __init__(self, codec: ChatCodec, sampling: Sampling) -> None:
        self._codec = codec
        self._decoder = codec.detokeniser.decoder()
        self._stops = StopStrings(sampling.stop)
        self._pending: list[tuple[int, Token]] = []
        self._decoded = 0
        self._released = 0

    def add(self, piece: Piece) -> tuple[str, tuple[Token, ...]]:
        """The text and the tokens that may be shown now."""
        texts = []
        for at, token_id in enumerate(piece.token_ids):
            text = self._decoder.push(token_id)
            self._decoded += len(text)
            self._pending.append((self._decoded, self._token(piece, at)))
            texts.append(self._stops.push(text))
        if piece.finish is not None and not self._stops.stopped:
            texts += [self._stops.push(self._decoder.flush()), self._stops.flush()]
        text = "".join(texts)
        self._released += len(text)
        ready = len(self._pending)
        if piece.finish is None:
            ready = next((n for n, (end, _) in enumerate(self._pending) if end > self._released), ready)
        tokens = tuple(token for _, token in self._pending[:ready])
        del self._pending[:ready]
        return text, tokens

    def _token(self, piece: Piece, at: int) -> Token:
        codec, token_id = self._codec, piece.token_ids[at]
        alternatives = piece.alternatives[at] if piece.alternatives else ()
        return Token(
            token_id,
            codec.token_text(token_id),
            piece.logprobs[at],
            tuple(Alternative(i, codec.token_text(i), p) for i, p in alternatives),
            piece.kept[at] if piece.kept else 0.0,
        )


def check_fits(prompt: int, answer: int, context: int) -> None:
    """Raises `ContextOverflow` unless a prompt and at least `answer` more tokens fit the context."""
    if prompt + answer > context:
        raise ContextOverflow(
            f"the prompt has {prompt} tokens and needs room for {answer} more, but the model's context is "
            f"{context} tokens; shorten the conversation by at least {prompt + answer - context} tokens"
        )
