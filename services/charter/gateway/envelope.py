"""Failures as OpenAI's clients expect them: a status and {"error": {message, type, param, code}}.

Messages for the caller say what happened and what to do; addresses and details of our own servers go to
the log and not into the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from charter.errors import (
    BackendUnavailable,
    BackendUnsupported,
    CharterError,
    ContextOverflow,
    Overloaded,
    RequestError,
)

_NONE: Mapping[str, str] = MappingProxyType({})


class ApiError(CharterError):
    """A failure with the HTTP status and the fields of the envelope that tell it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type_: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] = _NONE,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type_
        self.param = param
        self.headers = headers

    def body(self) -> bytes:
        """The envelope as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def retry_after(seconds: float) -> dict[str, str]:
    """The header that tells a client when to come back; whole seconds, at least one."""
    return {"Retry-After": str(max(1, -int(-seconds // 1)))}


def unavailable(message: str, code: str) -> ApiError:
    """A 503 for something that may come back soon."""
    return ApiError(503, message, code=code, type_="server_error", headers=retry_after(1))


def api_error(error: Exception) -> ApiError:
    """How any failure is told to a caller."""
    match error:
        case ApiError():
            return error
        case ContextOverflow():
            return ApiError(400, str(error), code="context_length_exceeded", param="messages")
        case RequestError():
            return ApiError(400, str(error), code="invalid_request")
        case Overloaded():
            return unavailable("The model is at its limit of requests; come back in a moment.", "overloaded")
        case BackendUnavailable():
            return unavailable(
                "The model cannot be reached just now. It comes back by itself; try again in a moment.",
                "backend_unavailable",
            )
        case BackendUnsupported():
            return ApiError(
                400, f"The model behind this endpoint cannot do this: {error}", code="unsupported"
            )
        case TimeoutError():
            return ApiError(
                504,
                "The answer took longer than this endpoint allows; ask for fewer tokens, or try again.",
                code="timeout",
                type_="server_error",
            )
        case _:
            return ApiError(
                500,
                "This endpoint failed to answer; its log says more under the request id.",
                code="internal_error",
                type_="server_error",
            )
