"""What every call to a server of ours goes through: limit, request id, deadline, errors, log, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from charter.errors import CharterError, Overloaded
from charter.rpc.context import ERROR, REQUEST_ID, bind_deadline
from charter.rpc.errors import status_of
from charter.telemetry.logs import bind_request_id, get_logger
from charter.telemetry.metrics import RpcMetrics

log = get_logger(__name__)

_INFRASTRUCTURE = ("/grpc.health.", "/grpc.reflection.")


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps the methods of our services; health and reflection pass untouched."""

    def __init__(self, metrics: RpcMetrics, max_concurrent_calls: int) -> None:
        self._metrics = metrics
        self._limit = max_concurrent_calls
        self.active = 0
        """Calls being served."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Called by gRPC for each call: the handler that serves it."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_INFRASTRUCTURE):
            return handler
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(details, handler.unary_stream), *codec
            )
        return grpc.unary_unary_rpc_method_handler(self._unary(details, handler.unary_unary), *codec)

    def _unary(self, details: Any, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def serve(request: Any, context: Any) -> Any:
            async with self._call(details, context):
                return await inner(request, context)

        return serve

    def _streaming(
        self, details: Any, inner: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._call(details, context):
                messages = inner(request, context)
                async with contextlib.aclosing(messages):  # type: ignore[type-var]
                    async for message in messages:
                        yield message

        return serve

    @contextlib.asynccontextmanager
    async def _call(self, details: Any, context: Any) -> AsyncIterator[None]:
        service, method = details.method.lstrip("/").split("/", 1)
        metadata = dict(details.invocation_metadata or ())
        request_id = bind_request_id(str(metadata.get(REQUEST_ID, "")))
        bind_deadline(context.time_remaining())
        started = time.monotonic()
        code, active = grpc.StatusCode.OK, self._metrics.active.labels(service, method)
        self.active += 1
        active.inc()
        try:
            if self.active > self._limit:
                self._metrics.rejected.labels(service, method).inc()
                raise Overloaded(
                    f"{service} serves {self._limit} calls at once and is full; try again later, "
                    "or raise max_concurrent_calls"
                )
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = grpc.StatusCode.UNKNOWN
            raise
        except Exception as error:
            code = status_of(error)[0]
            self._log_failure(error, details.method, code)
            await _abort(context, error, request_id)
        finally:
            self.active -= 1
            active.dec()
            seconds = time.monotonic() - started
            self._metrics.duration.labels(service, method, code.name).observe(seconds)
            log.debug("call served", method=details.method, status=code.name, seconds=seconds)

    @staticmethod
    def _log_failure(error: Exception, method: str, code: grpc.StatusCode) -> None:
        if isinstance(error, CharterError):
            log.warning("call refused", method=method, status=code.name, error=str(error))
        else:
            log.exception("call failed", method=method, status=code.name)


async def _abort(context: Any, error: Exception, request_id: str) -> NoReturn:
    code, sentence, name = status_of(error)
    metadata = [(REQUEST_ID, request_id)]
    if name:
        metadata.append((ERROR, name))
        # The service itself is here, and what it depends on was tried already: don't multiply retries.
        metadata.append(("grpc-retry-pushback-ms", "-1"))
    await context.abort(code, sentence, tuple(metadata))
    raise AssertionError("context.abort returned")
