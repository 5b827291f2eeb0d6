"""`charter.v1.PolicyService` over any language model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry

from charter import rpc
from charter.errors import RequestError
from charter.lm.base import Chunk, LanguageModel, ModelVersion, Prompt
from charter.lm.sampling import check_sampling
from charter.policy.config import PolicyConfig
from charter.policy.locate import locate
from charter.policy.service import ModelInService
from charter.rpc import convert
from charter.telemetry.logs import get_logger
from charter.telemetry.metrics import ModelMetrics
from charter.v1 import policy_pb2, types_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server

log = get_logger(__name__)

NAME = "charter.v1.PolicyService"
Open = Callable[[str], LanguageModel]
"""Opens a model by its URI; may take seconds, and runs in a thread."""


def _open_model(uri: str) -> LanguageModel:
    from charter import lm

    return lm.open_model(uri)


async def serve(
    config: PolicyConfig, registry: CollectorRegistry, *, open_model: Open = _open_model
) -> rpc.RunningServer:
    """Opens the model and starts the server. Raises `ConfigError` or `CheckpointError`."""
    model = await asyncio.to_thread(open_model, config.model)
    try:
        service = ModelInService(model, await model.info())
        servicer = PolicyServicer(config, service, ModelMetrics.of(registry), open_model)
        served = rpc.Service(NAME, add_PolicyServiceServicer_to_server, servicer, service.close)
        return await rpc.serve([served], config.server, registry)
    except BaseException:
        await model.close()
        raise


class PolicyServicer(PolicyServiceServicer):
    """The methods of the service; errors leave as our own and the scaffolding turns them into statuses."""

    def __init__(
        self, config: PolicyConfig, service: ModelInService, metrics: ModelMetrics, open_model: Open
    ) -> None:
        self._config = config
        self._service = service
        self._metrics = metrics
        self._open_model = open_model
        self._defaults = config.defaults.sampling()
        check_sampling(self._defaults)
        metrics.running.set_function(lambda: service.load().running)
        metrics.waiting.set_function(lambda: service.load().waiting)
        metrics.served("policy", service.info.model.version, service.info.model.digest)

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: policy_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[policy_pb2.GenerateResponse]:
        """Streams one answer; a caller that cancels stops the work in the engine."""
        prompt, sampling = _prompt(request), convert.sampling_from_proto(request.sampling, self._defaults)
        started, first = time.monotonic(), None
        async with self._service.lease() as model, _closing(model.stream(prompt, sampling)) as chunks:
            async for chunk in chunks:
                first = first or time.monotonic()
                if chunk.finish_reason is not None:
                    version = chunk.model or (await model.info()).model
                    yield _chunk_to_proto(chunk, version)
                    counts = (chunk.prompt_tokens, chunk.completion_tokens)
                    self._record("chat", version, started, counts, first)
                    return
                yield _chunk_to_proto(chunk, None)

    async def Sample(  # noqa: N802 - gRPC's name
        self, request: policy_pb2.SampleRequest, context: Any
    ) -> policy_pb2.SampleResponse:
        """Samples n whole answers."""
        prompt, sampling = _prompt(request), convert.sampling_from_proto(request.sampling, self._defaults)
        n = request.n or 1
        if not 1 <= n <= self._config.max_samples:
            raise RequestError(f"n is {request.n}; give 1 to {self._config.max_samples}")
        started = time.monotonic()
        async with self._service.lease(n) as model:
            samples = await model.generate(prompt, sampling, n)
        usage = types_pb2.Usage(
            prompt_tokens=samples.completions[0].prompt_tokens,
            completion_tokens=sum(c.completion_tokens for c in samples.completions),
        )
        version = samples.completions[0].model
        self._record("sample", version, started, (usage.prompt_tokens, usage.completion_tokens))
        return policy_pb2.SampleResponse(
            completions=[convert.completion_to_proto(c, with_tokens=True) for c in samples.completions],
            prompt_token_ids=samples.prompt_token_ids,
            model=convert.version_to_proto(version),
            usage=usage,
        )

    async def Score(  # noqa: N802 - gRPC's name
        self, request: policy_pb2.ScoreRequest, context: Any
    ) -> policy_pb2.ScoreResponse:
        """Scores given continuations of one prompt."""
        prompt, limit = _prompt(request), self._config.max_continuations
        if not 1 <= len(request.continuations) <= limit:
            raise RequestError(f"{len(request.continuations)} continuations to score; give 1 to {limit}")
        if not all(request.continuations):
            raise RequestError("a continuation to score is empty; give at least one character")
        started = time.monotonic()
        async with self._service.lease(0) as model:
            scored = await model.score(prompt, tuple(request.continuations))
            version = (await model.info()).model
        self._record("score", version, started)
        return policy_pb2.ScoreResponse(
            scores=[
                policy_pb2.ScoredContinuation(token_ids=s.token_ids, logprobs=s.logprobs) for s in scored
            ],
            model=convert.version_to_proto(version),
        )

    async def Reload(  # noqa: N802 - gRPC's name
        self, request: policy_pb2.ReloadRequest, context: Any
    ) -> policy_pb2.ReloadResponse:
        """Puts another checkpoint in service; on `CheckpointError` the old one stays."""
        # A caller that goes away does not leave the reload half done.
        previous, current = await asyncio.shield(asyncio.ensure_future(self._reload(request.checkpoint)))
        return policy_pb2.ReloadResponse(
            previous=convert.version_to_proto(previous), current=convert.version_to_proto(current)
        )

    async def Status(  # noqa: N802 - gRPC's name
        self, request: policy_pb2.StatusRequest, context: Any
    ) -> policy_pb2.StatusResponse:
        """What is served, and how busy it is."""
        load, info = self._service.load(), self._service.info
        return policy_pb2.StatusResponse(
            model=convert.version_to_proto(info.model),
            running=load.running,
            waiting=load.waiting,
            context_length=info.context_length,
            tokens_generated=load.tokens_generated,
            uptime_seconds=load.uptime_seconds,
            defaults=convert.sampling_to_proto(self._defaults),
        )

    async def _reload(self, checkpoint: str) -> tuple[ModelVersion, ModelVersion]:
        try:
            previous, current = await self._service.replace(checkpoint, self._opened)
        except Exception as error:
            self._metrics.reloads.labels("refused").inc()
            log.error("checkpoint refused", checkpoint=checkpoint, error=str(error))
            raise
        self._metrics.reloads.labels("done").inc()
        self._metrics.served("policy", current.version, current.digest)
        log.info("checkpoint in service", previous=previous.version, current=current.version)
        return previous, current

    async def _opened(self, checkpoint: str) -> LanguageModel:
        # Reading the digests of large weights takes seconds.
        folder = await asyncio.to_thread(
            locate, checkpoint, self._config.registry, self._config.folders_allowed
        )
        return await asyncio.to_thread(self._open_model, f"local:{folder}")

    def _record(
        self,
        operation: str,
        model: ModelVersion,
        started: float,
        counts: tuple[int, int] = (0, 0),
        first: float | None = None,
    ) -> None:
        (read, written), now = counts, time.monotonic()
        metrics, version = self._metrics, self._metrics.versions.seen(model.version)
        metrics.duration.labels(operation, version).observe(now - started)
        metrics.tokens.labels("input", version).inc(read)
        metrics.tokens.labels("output", version).inc(written)
        if first is not None:
            metrics.first_token.labels(operation, version).observe(first - started)
            if written > 1:
                metrics.per_token.labels(operation, version).observe((now - first) / (written - 1))
        self._service.count_tokens(written)


def _prompt(
    request: policy_pb2.GenerateRequest | policy_pb2.SampleRequest | policy_pb2.ScoreRequest,
) -> Prompt:
    messages: Iterable[types_pb2.ChatMessage] = request.messages
    return Prompt(convert.messages_from_proto(messages), request.prefill)


def _chunk_to_proto(chunk: Chunk, version: ModelVersion | None) -> policy_pb2.GenerateResponse:
    message = policy_pb2.GenerateResponse(
        text=chunk.text,
        tokens=[convert.token_to_proto(t) for t in chunk.tokens],
        finish_reason=convert.finish_reason_to_proto(chunk.finish_reason),
    )
    if version is not None:
        message.usage.prompt_tokens = chunk.prompt_tokens
        message.usage.completion_tokens = chunk.completion_tokens
        message.model.CopyFrom(convert.version_to_proto(version))
    return message


@contextlib.asynccontextmanager
async def _closing(chunks: AsyncIterator[Chunk]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Closes the stream at the end, so that the engine stops when the caller is gone."""
    try:
        yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()
