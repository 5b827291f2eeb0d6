"""Our errors as gRPC statuses, and back.

The class travels in trailing metadata (`x-charter-error`) and the sentence in the status details, so a
client of ours raises what the server raised. Other clients have the status code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import grpc

from charter import errors
from charter.errors import CharterError

Code: TypeAlias = grpc.StatusCode
MAX_DETAILS = 1500
"""Longest sentence on the wire: statuses travel in headers, which gRPC limits to 8 KiB."""

# The most specific class of an error decides.
_CODES: dict[type[CharterError], Code] = {
    errors.CharterError: Code.INTERNAL,
    errors.ConfigError: Code.FAILED_PRECONDITION,
    errors.CheckpointError: Code.FAILED_PRECONDITION,
    errors.RequestError: Code.INVALID_ARGUMENT,
    errors.ContextOverflow: Code.OUT_OF_RANGE,
    errors.BackendError: Code.INTERNAL,
    errors.BackendUnavailable: Code.UNAVAILABLE,
    errors.BackendUnsupported: Code.UNIMPLEMENTED,
    errors.BusError: Code.INTERNAL,
    errors.Fenced: Code.ABORTED,
    errors.Overloaded: Code.RESOURCE_EXHAUSTED,
}

# For statuses that no server of ours made: gRPC itself, a proxy, another implementation.
_CLASSES: dict[Code, type[CharterError]] = {
    Code.INVALID_ARGUMENT: errors.RequestError,
    Code.NOT_FOUND: errors.RequestError,
    Code.OUT_OF_RANGE: errors.RequestError,
    Code.FAILED_PRECONDITION: errors.BackendError,
    Code.UNAVAILABLE: errors.BackendUnavailable,
    Code.DEADLINE_EXCEEDED: errors.BackendUnavailable,
    Code.CANCELLED: errors.BackendUnavailable,
    Code.ABORTED: errors.BackendUnavailable,
    Code.UNIMPLEMENTED: errors.BackendUnsupported,
    Code.RESOURCE_EXHAUSTED: errors.Overloaded,
}


def _tree(root: type[CharterError] = CharterError) -> Iterator[type[CharterError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def status_of(error: BaseException) -> tuple[Code, str, str]:
    """Status code, sentence, and class name (empty for an error that is not ours) of `error`."""
    if not isinstance(error, CharterError):
        return Code.INTERNAL, "an internal error; the server's log has it under this request id", ""
    code = next(_CODES[c] for c in type(error).__mro__ if c in _CODES)
    text = str(error)
    if len(text.encode()) > MAX_DETAILS:
        text = text.encode()[: MAX_DETAILS - 4].decode(errors="ignore") + " …"
    return code, text, type(error).__name__


def error_of(code: Code, details: str, name: str = "", target: str = "the server") -> CharterError:
    """The error that a client raises for a status; `name` is the class that the server told, if any."""
    if name:
        for error in _tree():
            if error.__name__ == name:
                return error(details)
    if code is Code.RESOURCE_EXHAUSTED and "larger than max" in details:
        return errors.RequestError(f"a message to or from {target} is too large: {details}")
    if code is Code.DEADLINE_EXCEEDED:
        return errors.BackendUnavailable(f"{target} did not answer before the deadline")
    if code is Code.UNAVAILABLE:
        return errors.BackendUnavailable(f"{target} cannot be reached: {details}")
    return _CLASSES.get(code, errors.BackendError)(f"{target} answered {code.name}: {details}")
