"""Ctrl-C and SIGTERM, turned into an event; a second one, later, ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from types import TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPATIENT_AFTER_S = 1.0
"""One stop can arrive twice: make forwards SIGTERM to what it runs. Later than this, it is a second."""


class StopSignal:
    """While entered, SIGINT and SIGTERM set it. For the main thread's event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._first = 0.0

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._received, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Signals stay handled to the end: one that comes during the last steps changes nothing."""

    async def wait(self) -> None:
        """Returns when the process was told to stop."""
        await self._event.wait()

    def _received(self, number: int) -> None:
        if not self._event.is_set():
            self._first = time.monotonic()
            self._event.set()
        elif time.monotonic() - self._first > IMPATIENT_AFTER_S:
            print("stopped at once; requests in flight are lost", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(128 + number)
