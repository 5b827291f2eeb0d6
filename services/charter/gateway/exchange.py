"""One chat request over ASGI, after it was let in: a place to work, the answer, and what is told of it.

The client's connection is watched all the while; when it goes, the task that does the work is cancelled,
which cancels the calls to critic and policy, down to the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, cast

from starlette.responses import Response

from charter import rpc
from charter.errors import CharterError
from charter.gateway.answers import Answer, Call, charter_field, charter_headers
from charter.gateway.config import GatewayConfig
from charter.gateway.envelope import ApiError, api_error
from charter.gateway.limits import Places, Reservation
from charter.gateway.metrics import GatewayMetrics
from charter.gateway.service import Beat, ChatService
from charter.gateway.wire import HEARTBEAT, EventWriter, completion, failure_event
from charter.telemetry.logs import get_logger

log = get_logger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_SSE = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would otherwise collect the stream
}
_CANCELLED = "cancelled"


class ClientGone(CharterError):  # noqa: N818 - not an error, an end
    """The client hung up before its answer was complete; nobody is left to be told."""


@contextlib.asynccontextmanager
async def cancelled_by_hangup(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs inside when the client hangs up, and raises `ClientGone` then."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone("the client hung up") from None
        raise
    finally:
        watcher.cancel()


class Exchange(Response):
    """A response that does the work when it is sent; made for one request by the app.

    Of its base it has only the name, by which FastAPI knows that it needs no conversion.
    """

    background = None

    def __init__(
        self,
        *,
        call: Call,
        reservation: Reservation,
        service: ChatService,
        places: Places,
        metrics: GatewayMetrics,
        config: GatewayConfig,
    ) -> None:
        # Nothing of Starlette's own response is used, so it is not initialised.
        self._call = call
        self._reservation = reservation
        self._service = service
        self._places = places
        self._metrics = metrics
        self._config = config
        self._begun = time.perf_counter()
        self._status = 0
        self._used_tokens = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers; every failure becomes an envelope, or the last event of a stream."""
        outcome = "ok"
        try:
            with rpc.time_limit(self._config.request_seconds):
                async with cancelled_by_hangup(receive), asyncio.timeout(self._config.request_seconds):
                    await self._work(send)
        except ClientGone:
            outcome = _CANCELLED
        except asyncio.CancelledError:
            outcome = _CANCELLED
            raise
        except Exception as error:  # the caller gets an envelope, whatever went wrong
            failure = api_error(error)
            outcome = failure.code
            self._log_failure(error, failure)
            await self._fail(send, failure)
        finally:
            self._reservation.settle(self._used_tokens)
            self._tell(outcome)

    async def _work(self, send: Send) -> None:
        await self._places.enter()
        self._observe("queue")
        self._metrics.running.inc()
        try:
            await (self._stream(send) if self._call.stream else self._whole(send))
        finally:
            self._metrics.running.dec()
            self._places.leave()

    async def _whole(self, send: Send) -> None:
        answer = await self._service.answer(self._call)
        body = completion(self._call, answer, self._report(answer))
        await self._start(
            send, 200, {"content-type": "application/json"} | charter_headers(answer), len(body)
        )
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        """Sends pieces as they may leave; headers wait for the first, to carry a verdict or a failure."""
        writer = EventWriter(self._call)
        events = self._service.stream(self._call)
        waiting = b""
        spoken = False
        try:
            async for event in events:
                if isinstance(event, Beat):
                    await self._begin(send, None)
                    await send(_more(HEARTBEAT))
                    continue
                if not spoken:
                    spoken = True
                    waiting = writer.start()
                if isinstance(event, Answer):
                    await self._begin(send, event)
                    last = waiting + writer.finish(event, self._report(event))
                    await send({"type": "http.response.body", "body": last})
                    return
                waiting += writer.deltas(event)
                if not self._call.mode.holds_back:
                    await self._begin(send, None)
                    await send(_more(waiting))
                    waiting = b""
        finally:
            await cast(Any, events).aclose()

    def _report(self, answer: Answer) -> dict[str, Any]:
        self._used_tokens = answer.prompt_tokens + answer.completion_tokens
        return charter_field(self._call, answer, time.perf_counter() - self._begun)

    async def _begin(self, send: Send, answer: Answer | None) -> None:
        """Sends a stream's headers once, with the verdict where it is known."""
        if not self._status:
            await self._start(send, 200, _SSE | (charter_headers(answer) if answer else {}))

    async def _start(
        self, send: Send, status: int, headers: Mapping[str, str], length: int | None = None
    ) -> None:
        self._status = status
        self._observe("first")
        named = {**headers, **self._reservation.remaining, "X-Request-Id": self._call.request_id}
        raw = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in named.items()]
        if length is not None:
            raw.append((b"content-length", str(length).encode()))
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def _fail(self, send: Send, failure: ApiError) -> None:
        if self._status:
            await send({"type": "http.response.body", "body": failure_event(failure)})
            return
        body = failure.body()
        await self._start(
            send, failure.status, {"content-type": "application/json", **failure.headers}, len(body)
        )
        await send({"type": "http.response.body", "body": body})

    def _log_failure(self, error: Exception, failure: ApiError) -> None:
        """Why, for whoever runs this; the type only where a message of foreign code might quote the user."""
        if failure.status == 500:
            where = origin(error)
            log.error("request failed", error=type(error).__name__, where=where, code=failure.code)
        elif failure.status > 500:
            cause = error.__cause__ or error
            log.warning("request not served", reason=str(cause), code=failure.code)

    def _observe(self, stage: str) -> None:
        self._metrics.stage.labels(stage).observe(time.perf_counter() - self._begun)

    def _tell(self, outcome: str) -> None:
        call = self._call
        seconds = time.perf_counter() - self._begun
        self._metrics.requests.labels(call.mode.value, "yes" if call.stream else "no", outcome).inc()
        self._metrics.stage.labels("total").observe(seconds)
        log.info(
            "answered" if outcome == "ok" else "not answered",
            outcome=outcome,
            status=self._status,
            guard=call.mode.value,
            stream=call.stream,
            tokens=self._used_tokens,
            seconds=round(seconds, 4),
            key=call.key_id,
        )


def _more(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def origin(error: BaseException) -> str:
    """File and line where an error was raised: enough to look for it, without the words of its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
