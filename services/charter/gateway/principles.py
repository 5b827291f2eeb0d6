"""The constitution as the guard needs it: the same file that the critic reads, by the critic's digest."""

from __future__ import annotations

import time
from collections.abc import Mapping

from charter.constitution import Constitution, Principle
from charter.constitution.watch import ConstitutionInForce
from charter.telemetry.metrics import ConstitutionMetrics

WATCH_SECONDS = 2.0
"""How often the file is looked at."""


class Principles:
    """Priorities, weights, categories and titles by principle id."""

    def __init__(self, name: str, metrics: ConstitutionMetrics) -> None:
        """Loads the constitution; raises `ConstitutionError`."""
        self._in_force = ConstitutionInForce(name, "gateway", metrics, lambda _: None)
        self._looked = 0.0
        self._of: Constitution | None = None
        self._by_id: dict[str, Principle] = {}

    @property
    def language(self) -> str:
        """The constitution's language, in which refusals are given."""
        return self._in_force.current.language

    def by_digest(self, digest: str) -> Mapping[str, Principle]:
        """The principles, for a critic that works by the constitution with this digest.

        With another digest than ours the critic has read the file since we did, so it is read now (once a
        second at most, since a critic may also read another file). A principle that we still do not know is
        treated as the most important one.
        """
        now = time.monotonic()
        if digest != self._in_force.current.digest and now - self._looked > 1.0:
            self._looked = now
            self._in_force.reload()
        if self._of is not self._in_force.current:
            self._of = self._in_force.current
            self._by_id = {p.id: p for p in self._of.principles}
        return self._by_id

    async def watch(self) -> None:
        """Follows changes of the file; runs until it is cancelled."""
        await self._in_force.watch(WATCH_SECONDS)
