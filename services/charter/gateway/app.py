"""The HTTP surface: routes, and OpenAI's envelope around everything that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from charter import __version__
from charter.errors import CharterError
from charter.gateway.admission import Doorkeeper
from charter.gateway.answers import Call
from charter.gateway.config import GatewayConfig
from charter.gateway.envelope import ApiError, api_error
from charter.gateway.exchange import Exchange, origin
from charter.gateway.limits import Places
from charter.gateway.metrics import GatewayMetrics
from charter.gateway.requests import CharterOptions, ChatRequest, parse
from charter.gateway.service import ChatService
from charter.telemetry.logs import bind_request_id, get_logger

log = get_logger(__name__)

_READY_SECONDS = 2.0
_READ_SECONDS = 30.0
"""How long a client may take to send its request."""
_DESCRIPTION = """OpenAI's chat completions, held to a written constitution."""


class Gateway:
    """What the routes share. `draining` makes `/readyz` say no while requests in flight finish."""

    def __init__(
        self,
        config: GatewayConfig,
        service: ChatService,
        doorkeeper: Doorkeeper,
        registry: CollectorRegistry,
    ) -> None:
        self.config = config
        self.service = service
        self.doorkeeper = doorkeeper
        self.registry = registry
        self.metrics = GatewayMetrics.of(registry)
        self.places = Places(config.max_running, config.max_waiting, config.queue_seconds)
        self.metrics.waiting.set_function(lambda: self.places.waiting)
        self.draining = False

    async def chat(self, request: Request) -> Exchange:
        """`POST /v1/chat/completions`."""
        headers = request.headers
        access = self.doorkeeper.admit(headers)
        body = parse(await _read(request, self.config.max_body_bytes))
        if body.model != self.config.model:
            raise ApiError(
                404,
                f"There is no model {body.model!r} here; ask for {self.config.model!r}.",
                code="model_not_found",
                param="model",
            )
        n = body.n or 1
        if n > self.config.max_n:
            raise ApiError(400, f"n is at most {self.config.max_n} here.", code="invalid_value", param="n")
        mode = self.doorkeeper.mode(access, headers, body.guard)
        sampling = body.sampling(self.config.default_max_tokens, self.config.default_temperature)
        options = body.charter or CharterOptions()
        call = Call(
            request_id=request.scope["charter.request_id"],
            model=body.model,
            prompt=body.prompt(),
            sampling=sampling,
            n=n,
            logprobs=bool(body.logprobs),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            mode=mode,
            key_id=access.key_id,
            named=options.conversation or "",
            train=_given_for_training(headers, options),
        )
        reservation = self.doorkeeper.reserve(access, sampling.max_tokens * n)
        return Exchange(
            call=call,
            reservation=reservation,
            service=self.service,
            places=self.places,
            metrics=self.metrics,
            config=self.config,
        )

    async def models(self, request: Request) -> dict[str, Any]:
        """`GET /v1/models`."""
        self.doorkeeper.admit(request.headers)
        return {"object": "list", "data": [await self._model()]}

    async def model(self, request: Request, name: str) -> dict[str, Any]:
        """`GET /v1/models/{name}`."""
        self.doorkeeper.admit(request.headers)
        if name != self.config.model:
            raise ApiError(404, f"There is no model {name!r} here.", code="model_not_found", param="model")
        return await self._model()

    async def _model(self) -> dict[str, Any]:
        info = await self.service.upstreams.info()
        return {
            "id": self.config.model,
            "object": "model",
            "created": 0,
            "owned_by": "charter",
            "charter": {
                "policy_version": info.model.version,
                "policy_digest": info.model.digest or None,
                "context_length": info.context_length or None,
                "guard": self.config.guard.value,
            },
        }

    async def ready(self) -> tuple[bool, dict[str, str]]:
        """Whether requests would be answered now, and by what."""
        if self.draining:
            return False, {"gateway": "stopping"}
        parts = {"policy": _state(self.service.upstreams.info())}
        if self.service.gate is not None:
            parts["critic"] = _state(self.service.gate.critic.channel.ready(_READY_SECONDS))
        states = dict(zip(parts, await asyncio.gather(*parts.values()), strict=True))
        return all(s == "ok" for s in states.values()), states


async def _state(check: Awaitable[object]) -> str:
    try:
        await asyncio.wait_for(check, _READY_SECONDS)
    except (CharterError, TimeoutError):
        return "cannot be reached"
    return "ok"


def _given_for_training(headers: Mapping[str, str], options: CharterOptions) -> bool:
    """The body decides where it says something; silence is no consent."""
    if options.train is not None:
        return options.train
    return headers.get("x-charter-train", "").strip().lower() in ("yes", "true", "1")


async def _read(request: Request, limit: int) -> bytes:
    """The body, never holding more than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(_READ_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        message = f"The request did not arrive whole within {_READ_SECONDS:g} s; send it again."
        raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request is larger than the {limit} bytes taken here; send fewer or shorter messages.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def build_app(gateway: Gateway) -> FastAPI:
    """The ASGI application."""
    # The interactive pages would load scripts from another site; /openapi.json says the same.
    app = FastAPI(
        title="Charter", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None
    )

    @app.post(
        "/v1/chat/completions",
        openapi_extra={
            "requestBody": {"content": {"application/json": {"schema": _schema()}}, "required": True}
        },
    )
    async def chat_completions(request: Request) -> Response:
        return await gateway.chat(request)

    app.get("/v1/models")(gateway.models)
    app.get("/v1/models/{name:path}")(gateway.model)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        ready, parts = await gateway.ready()
        body = json.dumps({"status": "ready" if ready else "not ready", **parts})
        return Response(body, 200 if ready else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.registry), media_type=CONTENT_TYPE_LATEST)

    async def refused(request: Request, error: Exception) -> Response:
        failure = _http_error(request, error) if isinstance(error, HTTPException) else api_error(error)
        gateway.metrics.requests.labels("-", "-", failure.code).inc()
        reason = str(error) if failure.status >= 500 else failure.code
        log.info("refused", status=failure.status, reason=reason)
        return _response(failure)

    app.add_exception_handler(CharterError, refused)
    app.add_exception_handler(HTTPException, refused)
    app.add_middleware(_RequestId)
    return app


def _schema() -> dict[str, Any]:
    return ChatRequest.model_json_schema()


def _response(error: ApiError) -> Response:
    return Response(error.body(), error.status, dict(error.headers), "application/json")


def _http_error(request: Request, error: HTTPException) -> ApiError:
    path, method = request.url.path[:200], request.method
    if error.status_code == 404:
        message, code = f"There is nothing at {path}; chat is at /v1/chat/completions.", "not_found"
    elif error.status_code == 405:
        message, code = f"{path} does not take {method}.", "method_not_allowed"
    else:
        message, code = str(error.detail), "http_error"
    return ApiError(error.status_code, message, code=code, headers=error.headers or {})


class _RequestId:
    """Gives each request an id (the client's, where that is plain), and unforeseen failures an envelope."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((v for k, v in scope["headers"] if k == b"x-request-id"), None)
        request_id = bind_request_id(given.decode("latin-1") if given is not None else None)
        scope["charter.request_id"] = request_id
        started = False

        async def tagged(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not any(k == b"x-request-id" for k, _ in message["headers"]):
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except ClientDisconnect:
            return  # it went while it was still sending; nobody is left to be told
        except Exception as error:
            if started:
                raise
            log.error("request failed", error=type(error).__name__, where=origin(error))
            await _response(api_error(error))(scope, receive, tagged)
