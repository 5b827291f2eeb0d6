"""The constitution as the gateway needs it; read again when its file changes, unless that is broken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from charter import constitution as constitutions
from charter.constitution import Constitution, Principle
from charter.errors import ConfigError
from charter.telemetry.logs import get_logger
from charter.telemetry.metrics import ConstitutionMetrics

log = get_logger(__name__)


class ConstitutionFile:
    """The constitution in force. The first load raises `ConfigError`; if a later one fails, the old stays."""

    def __init__(self, path: Path, metrics: ConstitutionMetrics, check_seconds: float = 1.0) -> None:
        self._path = path
        self._metrics = metrics
        self._check_seconds = check_seconds
        self._checked = time.monotonic()
        self._stamp = _stamp(path)
        self._take(constitutions.load(path))

    @property
    def current(self) -> Constitution:
        """The constitution in force."""
        self._refresh()
        return self._current

    def principles(self, digest: str) -> Mapping[str, Principle]:
        """The principles by id. With another `digest` than ours, the file is looked at at once."""
        self._refresh(now=digest != self._current.digest)
        return self._principles

    def _take(self, constitution: Constitution) -> None:
        self._current = constitution
        self._principles = {p.id: p for p in constitution.principles}
        self._metrics.in_force("gateway", constitution.name, constitution.version, constitution.digest)

    def _refresh(self, now: bool = False) -> None:
        clock = time.monotonic()
        if not now and clock - self._checked < self._check_seconds:
            return
        self._checked = clock
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(constitutions.load(self._path))
        except (ConfigError, OSError) as error:
            self._metrics.reloads.labels("gateway", "refused").inc()
            log.error("constitution not loaded; the one before stays in force", reason=str(error))
        else:
            self._metrics.reloads.labels("gateway", "done").inc()
            log.info("constitution loaded", name=self._current.name, digest=self._current.digest)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
