"""The `grpc:` backend: another process's model behind charter.v1.PolicyService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from charter import rpc
from charter.errors import BackendError, RequestError
from charter.lm.base import Chunk, ModelInfo, ModelVersion, Prompt, Samples, Sampling, Scored
from charter.lm.sampling import check_sampling
from charter.rpc import convert
from charter.v1 import policy_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceStub


class PolicyModel:
    """A `LanguageModel` at the other end of a wire.

    Made anywhere; the channel opens in the event loop that first uses it.
    """

    def __init__(self, target: str, *, timeout_s: float | None = None) -> None:
        """`target` is host:port; `timeout_s` bounds each call where no deadline is set from outside."""
        config = rpc.ClientConfig() if timeout_s is None else rpc.ClientConfig(timeout_s=timeout_s)
        self._target, self._config = target, config
        self._channel: rpc.Channel | None = None
        self._made: Any = None

    @property
    def _stub(self) -> Any:
        if self._channel is None:
            self._channel = rpc.channel(self._target, self._config)
            self._made = PolicyServiceStub(self._channel)
        return self._made

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        """See `LanguageModel`."""
        check_sampling(sampling)
        if n < 1:
            raise RequestError(f"n is {n}; ask for at least one answer")
        response = await self._stub.Sample(
            policy_pb2.SampleRequest(
                messages=convert.messages_to_proto(prompt.messages),
                sampling=convert.sampling_to_proto(sampling),
                n=n,
                prefill=prompt.prefill,
            )
        )
        version = convert.version_from_proto(response.model)
        read = response.usage.prompt_tokens
        completions = tuple(convert.completion_from_proto(c, version, read) for c in response.completions)
        return Samples(completions, tuple(response.prompt_token_ids), version)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        """See `LanguageModel`."""
        check_sampling(sampling)
        request = policy_pb2.GenerateRequest(
            messages=convert.messages_to_proto(prompt.messages),
            sampling=convert.sampling_to_proto(sampling),
            prefill=prompt.prefill,
        )
        async with contextlib.aclosing(self._stub.Generate(request)) as responses:
            async for response in responses:
                chunk = _chunk(response)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        raise BackendError(f"{self._target} ended the stream without a finish reason")

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        """See `LanguageModel`."""
        if not continuations:
            return ()
        response = await self._stub.Score(
            policy_pb2.ScoreRequest(
                messages=convert.messages_to_proto(prompt.messages),
                prefill=prompt.prefill,
                continuations=list(continuations),
            )
        )
        return tuple(Scored(tuple(s.token_ids), tuple(s.logprobs)) for s in response.scores)

    async def info(self) -> ModelInfo:
        """See `LanguageModel`; a short call, since the weights may change at any time."""
        status = await self._stub.Status(policy_pb2.StatusRequest())
        return ModelInfo(
            convert.version_from_proto(status.model),
            status.context_length,
            can_score=True,
            has_token_ids=True,
        )

    async def reload(self, source: str) -> tuple[ModelVersion, ModelVersion]:
        """Asks the server for other weights; returns the versions before and after."""
        response = await self._stub.Reload(policy_pb2.ReloadRequest(checkpoint=source))
        return convert.version_from_proto(response.previous), convert.version_from_proto(response.current)

    async def close(self) -> None:
        """See `LanguageModel`."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def _chunk(response: policy_pb2.GenerateResponse) -> Chunk:
    reason = convert.finish_reason_from_proto(response.finish_reason)
    return Chunk(
        response.text,
        tuple(convert.token_from_proto(t) for t in response.tokens),
        reason,
        response.usage.prompt_tokens,
        response.usage.completion_tokens,
        convert.version_from_proto(response.model) if reason is not None else None,
    )
