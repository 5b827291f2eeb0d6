"""The state folder: everything that a running Charter keeps, and who may use it now.

A lock for each target, held by the operating system (flock), so that it is gone when its process is, however
that ended. Two processes may share a state folder as long as they run different targets.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from charter.errors import ConfigError


class StateFolder:
    """A state folder that this process uses for `targets`. Opened by `with`; raises `ConfigError`."""

    def __init__(self, path: Path, targets: Iterable[str]) -> None:
        self.path = path.expanduser().absolute()
        self._targets = sorted(targets)
        self._locks: list[IO[str]] = []

    def __enter__(self) -> Self:
        folder = self.path / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for target in self._targets:
                self._lock(folder / f"{target}.lock", target)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"the state folder {self.path} cannot be used ({error.strerror}); name another with --state "
                "(make run STATE=...)"
            ) from error
        except ConfigError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def note_address(self, address: str) -> None:
        """Tells whoever tries to start a second instance where this one answers."""
        for lock in self._locks:
            lock.seek(0)
            lock.truncate()
            json.dump({"pid": os.getpid(), "address": address}, lock)
            lock.flush()

    def close(self) -> None:
        """Lets the folder go; safe to repeat."""
        while self._locks:
            self._locks.pop().close()

    def _lock(self, path: Path, target: str) -> None:
        lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(lock)
            lock.close()
            raise ConfigError(
                f"another Charter{owner} already runs its {target} on the state folder {self.path}; stop "
                "that one, or name another folder with --state (make run STATE=...)"
            ) from None
        self._locks.append(lock)


def _owner(lock: IO[str]) -> str:
    lock.seek(0)
    try:
        noted = json.load(lock)
        return (
            f" (process {noted['pid']}, {noted['address']})"
            if noted["address"]
            else f" (process {noted['pid']})"
        )
    except (ValueError, KeyError, TypeError):
        return ""
