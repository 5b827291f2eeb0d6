"""The one interface for whatever generates and scores text.

A model is named by a URI (see `charter.lm.open_model`):

    local:<folder or hub id>      transformers, in this process (the embedded engine)
    grpc://host:port              a Charter policy server
    tgi+http://host:port          text-generation-inference
    openai+http://host:port/v1#m  any OpenAI-compatible server: vLLM, `transformers serve`, KServe's runtime

The records are frozen; nothing here imports torch or grpc.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


class Role(enum.StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model's stop token, or one of the caller's stop strings."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""
    CANCELLED = "cancelled"
    """The caller went away."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str


Conversation = tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model continues: a conversation, and how its own turn begins."""

    messages: Conversation
    prefill: str = ""
    """The assistant's turn begins with this text, which is not part of the answer."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample an answer."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keeps the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = 0
    """Keeps this many tokens; 0 keeps all."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """The answer ends before any of these strings."""
    seed: int | None = None
    """The same seed, prompt and weights give the same answer."""
    top_logprobs: int = 0
    """Alternatives reported per token, 0 to 20."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been drawn."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token and its log-probability under exactly the distribution that it was drawn from."""

    token_id: int
    text: str
    logprob: float
    alternatives: tuple[Alternative, ...] = ()
    kept_log_mass: float = 0.0
    """Log of the mass that top_k and top_p kept; 0 when nothing was truncated."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """Which weights spoke."""

    version: str
    """The registry's checkpoint id, or the model's name."""
    digest: str = ""
    """SHA-256 of the weights, or empty where a remote server does not tell."""
    tokenizer_digest: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a backend says about itself."""

    model: ModelVersion
    context_length: int
    """Tokens of prompt and answer together; 0 where a remote server does not tell."""
    can_score: bool
    """Whether `score` works."""
    has_token_ids: bool
    """Whether completions carry token ids and log-probs (rollouts need them)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer."""

    text: str
    tokens: tuple[Token, ...]
    """Every sampled token, the stop token included; empty where the backend has no token ids."""
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    model: ModelVersion

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the sampled tokens."""
        return tuple(t.token_id for t in self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The log-probs of the sampled tokens."""
        return tuple(t.logprob for t in self.tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer as it is written. The last one carries a finish reason and the counts."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: ModelVersion | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probability of a given continuation, token by token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return sum(self.logprobs)


@dataclass(frozen=True, slots=True)
class Samples:
    """n answers to one prompt, and the prompt as the model read it."""

    completions: tuple[Completion, ...]
    prompt_token_ids: tuple[int, ...] = ()
    model: ModelVersion = field(default_factory=lambda: ModelVersion(""))


@runtime_checkable
class LanguageModel(Protocol):
    """Something that generates and scores.

    Every method may raise `ContextOverflow`, `BackendUnavailable` or `BackendUnsupported`. Cancelling the
    task that awaits a method, or closing the iterator of `stream`, stops the work in the backend.
    """

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        """Samples `n` whole answers; with a seed, answer i is drawn with seed + i."""
        ...

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        """Yields one answer as it is written; the last chunk has `finish_reason`."""
        ...

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        """Log-probs at temperature 1 of each continuation right after the prompt (and its prefill)."""
        ...

    async def info(self) -> ModelInfo:
        """Name, version and abilities; cheap enough to call for every request."""
        ...

    async def close(self) -> None:
        """Releases what the backend holds; safe to repeat."""
        ...
