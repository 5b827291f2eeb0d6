"""The constitution in force, read again when its file changes or the process gets SIGHUP.

A file that cannot be used changes nothing: the old constitution stays in force, the reason is logged, and
`charter_constitution_reloads_total{outcome="refused"}` counts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

from charter.constitution.loader import load, resolve
from charter.constitution.model import Constitution
from charter.errors import CharterError, ConstitutionError
from charter.telemetry.logs import get_logger
from charter.telemetry.metrics import ConstitutionMetrics

log = get_logger(__name__)

Check = Callable[[Constitution], None]
"""Raises `ConstitutionError` when a service cannot work by this constitution."""


class ConstitutionInForce:
    """Gives each request the constitution that it keeps to its end: read `current` once for each."""

    def __init__(self, name: str, service: str, metrics: ConstitutionMetrics, check: Check) -> None:
        """Loads the constitution; raises `ConstitutionError` when there is none to begin with."""
        self._name = name
        self._service = service
        self._metrics = metrics
        self._check = check
        self._stamp = _stamp(name)
        self._current = self._load()
        self._show()

    @property
    def current(self) -> Constitution:
        """The constitution in force."""
        return self._current

    def reload(self) -> bool:
        """Reads the file; true when another constitution is in force now."""
        try:
            loaded = self._load()
        except (CharterError, OSError) as error:
            self._metrics.reloads.labels(self._service, "refused").inc()
            log.error(
                "constitution refused; the old one stays in force",
                file=self._name,
                in_force=self._current.digest[:16],
                error=str(error),
            )
            return False
        changed = loaded.digest != self._current.digest
        self._current = loaded
        self._metrics.reloads.labels(self._service, "done").inc()
        self._show()
        log.info("constitution in force", name=loaded.name, version=loaded.version, digest=loaded.digest[:16])
        return changed

    async def watch(self, every_s: float) -> None:
        """Reloads on SIGHUP, and when the file changed; runs until it is cancelled."""
        with _on_hangup(self.reload):
            while True:
                await asyncio.sleep(every_s)
                self.refresh()

    def refresh(self) -> None:
        """Reads the file if it changed."""
        stamp = _stamp(self._name)
        if stamp != self._stamp:
            self._stamp = stamp
            self.reload()

    def _load(self) -> Constitution:
        try:
            constitution = load(self._name)
        except OSError as error:
            raise ConstitutionError(
                f"{self._name}: cannot be read ({error}); name a readable YAML file"
            ) from error
        self._check(constitution)
        return constitution

    def _show(self) -> None:
        now = self._current
        self._metrics.in_force(self._service, now.name, now.version, now.digest)


def _stamp(name: str) -> tuple[int, int, int] | None:
    # Follows links: a ConfigMap that is mounted changes by turning a link, with a new inode.
    try:
        status = os.stat(Path(resolve(name)))
    except (OSError, CharterError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


_HANGUPS: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Callable[[], object]]] = WeakKeyDictionary()


@contextlib.contextmanager
def _on_hangup(action: Callable[[], object]) -> Iterator[None]:
    """Runs `action` on SIGHUP, beside those of the other services in this event loop."""
    loop = asyncio.get_running_loop()
    actions = _HANGUPS.setdefault(loop, [])
    actions.append(action)
    # Outside of the main thread there are no signals; the file is watched all the same.
    with contextlib.suppress(ValueError, RuntimeError):
        loop.add_signal_handler(signal.SIGHUP, lambda: [a() for a in [*actions]])
    try:
        yield
    finally:
        actions.remove(action)
        if not actions:
            with contextlib.suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(signal.SIGHUP)
