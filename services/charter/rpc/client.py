"""Channels to other services: round robin, keepalive, retries on UNAVAILABLE only, our errors.

`Channel` is what generated stubs need of a channel (`unary_unary`, `unary_stream`), around `grpc.aio`'s
own. Wrapping calls here, rather than by grpc.aio's interceptors, keeps cancellation exact: cancelling
the task that awaits a call, or closing a stream, cancels the call on the wire.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Generator
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from charter.errors import BackendUnavailable, CharterError
from charter.rpc.config import ClientConfig
from charter.rpc.context import ERROR, REQUEST_ID, remaining_seconds
from charter.rpc.errors import error_of
from charter.telemetry.logs import request_id

Serialise = Callable[[Any], bytes]
Parse = Callable[[bytes], Any]


def _service_config(config: ClientConfig) -> str:
    retry = {
        "maxAttempts": config.max_attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            "methodConfig": [{"name": [{}], "retryPolicy": retry}],
            # A service that is down must not be asked four times as often as one that is up.
            "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
        }
    )


def _options(config: ClientConfig) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.service_config", _service_config(config)),
        ("grpc.enable_retries", 1),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", int(config.max_reconnect_s * 1000)),
        ("grpc.dns_min_time_between_resolutions_ms", 2000),
        ("grpc.enable_http_proxy", 0),  # services of one deployment are never behind a web proxy
        # Two channels of one process to one target are two connections: a closed one takes no other along.
        ("grpc.use_local_subchannel_pool", 1),
    ]


class Channel:
    """A connection to a service, for generated stubs. Made by `channel`."""

    def __init__(self, target: str, config: ClientConfig) -> None:
        self.target = target
        """`host:port` of the service."""
        self.config = config
        """How it is called."""
        self._inner = grpc.aio.insecure_channel(target, options=_options(config))

    def unary_unary(
        self, method: str, request_serializer: Serialise, response_deserializer: Parse, **_: Any
    ) -> Callable[..., _Call]:
        """For stubs: the call of a method that answers once."""
        inner = self._inner.unary_unary(method, request_serializer, response_deserializer)

        def start(request: Any, *, timeout: float | None = None, metadata: Any = None) -> _Call:
            return _Call(self, inner(request, timeout=self._timeout(timeout), metadata=_metadata(metadata)))

        return start

    def unary_stream(
        self, method: str, request_serializer: Serialise, response_deserializer: Parse, **_: Any
    ) -> Callable[..., _Stream]:
        """For stubs: the call of a method that answers with a stream."""
        inner = self._inner.unary_stream(method, request_serializer, response_deserializer)

        def start(request: Any, *, timeout: float | None = None, metadata: Any = None) -> _Stream:
            return _Stream(self, inner(request, timeout=self._timeout(timeout), metadata=_metadata(metadata)))

        return start

    def stream_unary(self, method: str, *_: Any, **__: Any) -> Callable[..., Any]:
        """For stubs: no service of ours takes a stream."""
        return _no_request_stream(method)

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Callable[..., Any]:
        """For stubs: no service of ours takes a stream."""
        return _no_request_stream(method)

    async def ready(self, within_s: float) -> None:
        """Waits until the service can be reached; raises `BackendUnavailable` after `within_s`."""
        try:
            await asyncio.wait_for(self._inner.channel_ready(), within_s)
        except TimeoutError:
            raise BackendUnavailable(
                f"{self.target} cannot be reached after {within_s:g} s; is the service running there?"
            ) from None

    async def close(self) -> None:
        """Cancels calls in flight and closes the connection; safe to repeat."""
        await self._inner.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _timeout(self, own: float | None) -> float:
        left = remaining_seconds()
        limits = [t for t in (own, left) if t is not None]
        return min(limits) if limits else self.config.timeout_s

    def error(self, error: grpc.aio.AioRpcError) -> CharterError:
        """What `error` means in our tree."""
        names = dict(error.trailing_metadata() or ())
        name = names.get(ERROR, "")
        return error_of(error.code(), error.details() or "", str(name), self.target)


def channel(target: str, config: ClientConfig | None = None) -> Channel:
    """A channel to `host:port`. It connects when first used, and again whenever the server is back."""
    return Channel(target, config or ClientConfig())


def _metadata(given: Any) -> grpc.aio.Metadata:
    pairs = [*(given or ())]
    if (current := request_id.get()) and not any(k == REQUEST_ID for k, _ in pairs):
        pairs.append((REQUEST_ID, current))
    return grpc.aio.Metadata(*pairs)


def _no_request_stream(method: str) -> Callable[..., Any]:
    def start(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{method} takes a stream; charter.rpc.Channel offers calls with one request"
        )

    return start


class _Call:
    """A call that answers once: await it."""

    def __init__(self, owner: Channel, inner: Any) -> None:
        self._owner, self._inner = owner, inner

    def cancel(self) -> bool:
        """Cancels the call on the wire; true if it was still under way."""
        return bool(self._inner.cancel())

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._inner.__await__())
        except grpc.aio.AioRpcError as error:
            raise self._owner.error(error) from None


class _Stream:
    """A call that answers with a stream: iterate over it; `aclose` or `cancel` ends it early."""

    def __init__(self, owner: Channel, inner: Any) -> None:
        self._owner, self._inner = owner, inner
        self._messages: AsyncIterator[Any] = inner.__aiter__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._messages.__anext__()
        except grpc.aio.AioRpcError as error:
            raise self._owner.error(error) from None

    def cancel(self) -> bool:
        """Cancels the call on the wire; true if it was still under way."""
        return bool(self._inner.cancel())

    async def aclose(self) -> None:
        """Cancels the call if it is still under way; safe to repeat."""
        self._inner.cancel()
