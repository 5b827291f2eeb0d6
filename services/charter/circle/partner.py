"""The process on the other core: does what it is asked in threads of its own, and tells how it goes.

TRL and torch take ten seconds to import, so one partner stays for all the work. It ignores Ctrl-C (its parent
says when to end) and dies with its parent, however that ends.

Work that is told to stop has a short grace; then the process is killed, since nothing else ends a step of
torch. That loses nothing: what a partner writes is whole on the disk or not there, and work goes on from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from charter import children, errors
from charter.errors import BackendError, CharterError

GRACE_S = 1.0
"""How long work that is told to stop may still take."""

Work = Callable[..., Any]
"""A function of a module: takes its arguments, then `tell` and `stopped`; all must be picklable."""


class PartnerDiedError(BackendError):
    """The process ended in the middle of its work."""


class Partner:
    """The parent's end. One event loop uses it."""

    def __init__(
        self, niceness: int = 0, threads: int = 1, *, grace_s: float = GRACE_S, family: bool = False
    ) -> None:
        """`family`: it will have children of its own, which are killed with it."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._grace_s = grace_s
        self._family = family
        self._process = context.Process(
            target=_serve, args=(theirs, niceness, threads, grace_s, family), name="charter-partner"
        )
        with _no_interrupts():
            self._process.start()
        theirs.close()
        self._numbers = itertools.count()
        self._calls: dict[int, tuple[asyncio.Future[Any], Callable[[Any], None]]] = {}
        self._loop = asyncio.get_running_loop()
        self._sending = threading.Lock()
        self._closed = False
        self._deadline: float | None = None
        threading.Thread(target=self._listen, name="charter-partner-news", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    async def call(self, work: Work, *args: Any, told: Callable[[Any], None] = lambda _: None) -> Any:
        """Has `work(*args, tell, stopped)` done; what it tells goes to `told`.

        Cancelling tells it to stop; if it has not within the grace, the process is killed. Raises what it
        raised, or `PartnerDiedError`.
        """
        number = next(self._numbers)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = future, told
        self._send(("call", number, work, args))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._send(("stop", number))
            await self._stopped(future)
            raise
        finally:
            self._calls.pop(number, None)

    def _patience(self) -> float:
        """What is left of the grace, which begins when something is told to stop for the first time."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
        return max(self._deadline - time.monotonic(), 0.0)

    async def _stopped(self, future: asyncio.Future[Any]) -> None:
        """Waits for work that was told to stop, as long as the grace and the caller's patience allow."""
        try:
            await asyncio.wait({future}, timeout=self._patience())
        finally:
            if not future.done():
                self._kill()
                future.cancel()
            elif not future.cancelled():
                future.exception()  # seen: nobody waits for it any longer

    async def close(self) -> None:
        """Ends the process, and work that is still under way after the grace with it; safe to repeat."""
        if not self._closed:
            self._closed = True
            self._send(("end",))
            await asyncio.to_thread(self._reap)

    def _reap(self) -> None:
        self._process.join(self._patience())
        if self._process.is_alive():
            self._kill()
            self._process.join()
        self._pipe.close()

    def _kill(self) -> None:
        pid = self._process.pid
        if self._family and pid is not None:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        self._process.kill()

    def _send(self, message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._pipe.send(message)

    def _listen(self) -> None:
        try:
            while True:
                message = self._pipe.recv()
                self._loop.call_soon_threadsafe(self._heard, message)
        except (EOFError, OSError):
            with contextlib.suppress(RuntimeError):  # the loop has ended, too
                self._loop.call_soon_threadsafe(self._died)

    def _heard(self, message: Any) -> None:
        kind, number, *rest = message
        call = self._calls.get(number)
        if call is None or call[0].done():
            return
        future, told = call
        if kind == "told":
            told(rest[0])
        elif kind == "done":
            future.set_result(rest[0])
        else:
            future.set_exception(_error(*rest))

    def _died(self) -> None:
        for future, _ in self._calls.values():
            if not future.done():
                future.set_exception(
                    PartnerDiedError(
                        "the process that learns has ended; look for a lack of memory, and start again: it "
                        "goes on where it was"
                    )
                )


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C while a process begins would end it in a traceback, before it can ignore that."""
    resource_tracker.ensure_running()  # it would let them in again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _error(name: str, text: str) -> Exception:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, CharterError):
        return kind(text)
    return BackendError(f"the process that learns failed: {name}: {text}")


# The other end ---------------------------------------------------------------------------------------------


def _serve(pipe: Connection, niceness: int, threads: int, grace_s: float, family: bool) -> None:
    children.begin(niceness)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if family:
        os.setpgrp()
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the log is the terminal of another group now
    import torch

    torch.set_num_threads(threads)
    sending = threading.Lock()
    running: dict[int, tuple[threading.Thread, threading.Event]] = {}

    def send(message: Any) -> None:
        with sending, contextlib.suppress(OSError):
            pipe.send(message)

    with contextlib.suppress(EOFError, OSError):
        while (message := pipe.recv())[0] != "end":
            if message[0] == "call":
                _, number, work, args = message
                stopped = threading.Event()
                thread = threading.Thread(target=_do, args=(number, work, args, stopped, send), daemon=True)
                running[number] = thread, stopped
                thread.start()
            elif message[1] in running:
                running[message[1]][1].set()
    for _, stopped in running.values():
        stopped.set()
    deadline = time.monotonic() + grace_s
    for thread, _ in running.values():
        thread.join(max(deadline - time.monotonic(), 0.0))


def _do(
    number: int, work: Work, args: tuple[Any, ...], stopped: threading.Event, send: Callable[[Any], None]
) -> None:
    try:
        result = work(*args, lambda news: send(("told", number, news)), stopped)
        send(("done", number, result))
    except Exception as raised:
        error = _alone(raised)
        # Ours say all in the message, which whoever asked gets; and nobody asked who has told it to stop.
        if not isinstance(error, CharterError) and not stopped.is_set():
            logging.getLogger(__name__).exception("work failed")
        send(("failed", number, type(error).__name__, str(error)))


def _alone(error: Exception) -> Exception:
    """The one error that a task group failed of; the group where there are several."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
