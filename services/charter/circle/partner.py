"""The process on the other core: does what it is asked in threads of its own, and tells how it goes.

TRL and torch take ten seconds to import, so one partner stays for all the work. It ignores Ctrl-C (its parent
says when to end) and dies with its parent, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from charter import errors
from charter.errors import BackendError, CharterError

Work = Callable[..., Any]
"""A function of a module: takes its arguments, then `tell` and `stopped`; all must be picklable."""


class PartnerDiedError(BackendError):
    """The process ended in the middle of its work."""


class Partner:
    """The parent's end. One event loop uses it."""

    def __init__(self, niceness: int = 0, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, niceness, threads), name="charter-partner"
        )
        self._process.start()
        theirs.close()
        self._numbers = itertools.count()
        self._calls: dict[int, tuple[asyncio.Future[Any], Callable[[Any], None]]] = {}
        self._loop = asyncio.get_running_loop()
        self._sending = threading.Lock()
        self._closed = False
        threading.Thread(target=self._listen, name="charter-partner-news", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    async def call(self, work: Work, *args: Any, told: Callable[[Any], None] = lambda _: None) -> Any:
        """Has `work(*args, tell, stopped)` done; what it tells goes to `told`.

        Cancelling tells it to stop and waits until it has. Raises what it raised, or `PartnerDiedError`.
        """
        number = next(self._numbers)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = future, told
        self._send(("call", number, work, args))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._send(("stop", number))
            with contextlib.suppress(Exception):
                await future
            raise
        finally:
            self._calls.pop(number, None)

    async def close(self) -> None:
        """Ends the process once its work has; safe to repeat."""
        if not self._closed:
            self._closed = True
            self._send(("end",))
            await asyncio.to_thread(self._reap)

    def _reap(self) -> None:
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

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


def _error(name: str, text: str) -> Exception:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, CharterError):
        return kind(text)
    return BackendError(f"the process that learns failed: {name}: {text}")


# The other end ---------------------------------------------------------------------------------------------


def _serve(pipe: Connection, niceness: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(niceness)
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
    for thread, _ in running.values():
        thread.join(15)


def _do(
    number: int, work: Work, args: tuple[Any, ...], stopped: threading.Event, send: Callable[[Any], None]
) -> None:
    try:
        result = work(*args, lambda news: send(("told", number, news)), stopped)
        send(("done", number, result))
    except Exception as error:
        import logging

        logging.getLogger(__name__).exception("work failed")
        send(("failed", number, type(error).__name__, str(error)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
