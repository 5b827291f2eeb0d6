"""What travels with a request beside its message: the deadline (and `telemetry.request_id`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
"""Metadata key of the request id."""
ERROR = "x-charter-error"
"""Trailing metadata key of the error's class in `charter.errors`."""

_deadline: ContextVar[float | None] = ContextVar("charter_deadline", default=None)


def remaining_seconds() -> float | None:
    """Seconds left for the current request (0 when none are left), or None without a deadline."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def bind_deadline(seconds: float | None) -> None:
    """Gives the current task, and the tasks that it starts, this many seconds; None: no deadline."""
    _deadline.set(None if seconds is None else time.monotonic() + seconds)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Calls made inside share these seconds, or what is left of an earlier deadline if that is less.

    For whoever starts a request without serving a gRPC one: the gateway, a worker.
    """
    left = remaining_seconds()
    token = _deadline.set(time.monotonic() + (seconds if left is None else min(seconds, left)))
    try:
        yield
    finally:
        _deadline.reset(token)
