"""Who works under fire: stand-ins, which make much traffic, or the circle's own workers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.kafka.chaos_worker import ANSWERS

from charter.bus.broker import free_port


class StandIns:
    """Two samplers, two judges and a trainer whose work stands in for models; the bus around it is real."""

    pairs: Sequence[str] = tuple(f"{a}-{b}" for a, b in itertools.combinations(range(ANSWERS), 2))
    rate = 15.0
    company = 0
    stop_s = 9.0

    def __init__(self) -> None:
        self._manifest = Path()

    def prepare(self, folder: Path, uri: str) -> dict[str, list[str]]:
        self._manifest = folder / "manifest.json"
        names = ("sampler-0", "sampler-1", "judge-0", "judge-1", "trainer-0")
        return {
            name: ["tests.kafka.chaos_worker", name.partition("-")[0], uri, name, str(self._manifest)]
            for name in names
        }

    def counted(self) -> Counter[str]:
        if not self._manifest.exists():
            return Counter()
        return Counter(json.loads(self._manifest.read_text())["counts"])


class RealWorkers:
    """Two samplers, two judge workers, PPO, and the servers of policy and judge, with a tiny model."""

    pairs: Sequence[str] = ("0-1", "2-3")
    rate = 1.0
    company = 2
    stop_s = 14.0

    def __init__(self) -> None:
        self._checkpoints = Path()
        self._labels: dict[str, list[str]] = {}
        self._counted: tuple[int, Counter[str]] = (0, Counter())

    def prepare(self, folder: Path, uri: str) -> dict[str, list[str]]:
        from tests.feedback_fixtures import write_constitution
        from tests.tiny import make_tiny_model
        from tests.trainer.circle import world

        self._checkpoints = folder / "checkpoints"
        make_tiny_model(folder / "tiny", spread=0.1)
        world(folder, folder / "tiny", labels=0)
        write_constitution(folder / "c.yaml")
        site = folder / "site.json"
        site.write_text(
            json.dumps({"uri": uri, "folder": str(folder), "policy": free_port(), "judge": free_port()})
        )
        names = ("models", "trainer-0", "sampler-0", "sampler-1", "judge-0", "judge-1")
        return {
            name: ["tests.kafka.circle_worker", name.partition("-")[0], str(site), name] for name in names
        }

    def counted(self) -> Counter[str]:
        """In the lineage that survives: the labels of the newest checkpoint and of all before it."""
        changed = self._checkpoints.stat().st_mtime_ns
        if changed != self._counted[0]:
            self._counted = (changed, self._count())
        return self._counted[1]

    def _count(self) -> Counter[str]:
        from charter.registry import Registry
        from charter.trainer.service import newest_of_lineage

        registry = Registry(self._checkpoints)
        newest = newest_of_lineage(registry)
        counts: Counter[str] = Counter()
        for manifest in registry.lineage(newest.id) if newest else ():
            counts.update(self._labels_of(manifest.id))
        return counts

    def _labels_of(self, checkpoint: str) -> list[str]:
        if checkpoint not in self._labels:
            file = self._checkpoints / checkpoint / "trainer" / "labels.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            self._labels[checkpoint] = [json.loads(line)["preference_id"] for line in lines]
        return self._labels[checkpoint]
