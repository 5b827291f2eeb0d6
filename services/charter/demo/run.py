"""The bounded circle, measured from outside: what each stage took, and what the oracle says of its models."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from charter.circle.circle import Circle, Finished
from charter.circle.config import CircleConfig, Places
from charter.circle.news import Kind, News, Phase, Tell
from charter.circle.partner import Partner
from charter.demo import measuring
from charter.demo.measuring import Held, Shown
from charter.registry import Kind as CheckpointKind
from charter.registry import Registry

GATED_PROMPTS = 100
"""Held-out prompts of each class on which the oracle looks at every candidate that the gate decided on."""


@dataclass
class Record:
    """All that a demo found."""

    stages: dict[str, float] = field(default_factory=dict)
    """Phase: seconds of wall time."""
    cpu: dict[str, float] = field(default_factory=dict)
    """Phase: seconds of processor time in all processes; says more than wall time on a shared machine."""
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    """The trainer's metrics."""
    reward: list[Mapping[str, Any]] = field(default_factory=list)
    gate: list[dict[str, Any]] = field(default_factory=list)
    """Candidates that were decided on; `oracle` has the oracle's rates at 0.7."""
    busy: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {"sampling": [], "judging": []}
    )
    """While PPO ran: when the engine that samples, and the one that judges, had work."""
    bus: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """While PPO ran, of sampler and judge: seconds of their batches' phases."""
    rates: dict[str, Any] = field(default_factory=dict)
    """Stage (seed, after_sl, after_rl): rates of `measure_chat`."""
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Shown] = field(default_factory=list)
    seconds: float = 0.0


class _Clock:
    """Wall and processor time of each phase."""

    def __init__(self, record: Record, partner: Partner) -> None:
        self._record, self._partner = record, partner
        self._phase = ""
        self._wall, self._cpu = time.monotonic(), self._used()

    def begin(self, phase: str) -> None:
        wall, cpu = time.monotonic(), self._used()
        if self._phase:
            stages, used = self._record.stages, self._record.cpu
            stages[self._phase] = stages.get(self._phase, 0.0) + wall - self._wall
            used[self._phase] = used.get(self._phase, 0.0) + cpu - self._cpu
        self._phase, self._wall, self._cpu = phase, wall, cpu

    def _used(self) -> float:
        return sum(_cpu_seconds(pid) for pid in _family(os.getpid()))


def _family(pid: int) -> list[int]:
    """The process and its descendants; the process alone where the system does not tell."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task")
        children = [int(c) for t in tasks.iterdir() for c in (t / "children").read_text().split()]
        return [pid, *(grandchild for child in children for grandchild in _family(child))]
    return [pid]


def _cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


async def run(config: CircleConfig, places: Places, held: Held, tell: Tell) -> Record:
    """Goes round once. Raises what the circle raises."""
    record, began = Record(), time.monotonic()
    partner = Partner(config.niceness, config.threads)
    clock = _Clock(record, partner)
    measured: dict[str, asyncio.Task[Any]] = {}
    registry = Registry(places.registry)

    def measure(stage: str, folder: str) -> None:
        measured[stage] = asyncio.create_task(
            partner.call(measuring.rates, folder, held, told=lambda p: None)
        )

    def on(news: News) -> None:
        tell(news)
        match news.kind:
            case Kind.PHASE:
                phase = news.values["phase"]
                clock.begin(phase.value)
                if phase is Phase.STARTING:
                    measure("seed", places.model)
                elif phase in (Phase.COMPARING, Phase.REINFORCING) and "after_sl" not in measured:
                    tuned = next(m for m in registry.list() if m.facts.kind is CheckpointKind.SFT)
                    measure("after_sl", str(registry.resolve(tuned.id)))
            case Kind.STEP:
                record.steps.append({**news.values, "at": news.at})
            case Kind.REWARD:
                record.reward.append({**news.values, "at": news.at})
            case Kind.BUSY:
                record.busy[news.values["who"]].append((news.values["begin"], news.values["end"]))
            case Kind.BUS:
                record.bus = news.values
            case Kind.GATE if news.values["measurements"]:
                decided = dict(news.values)  # told again when it serves: the last word on each counts
                record.gate = [g for g in record.gate if g["checkpoint"] != decided["checkpoint"]]
                record.gate.append(decided)
            case _:
                pass

    try:
        # Every candidate is measured at the end, so none may be pruned.
        finished = await Circle(replace(config, keep=0), places, on, partner).run()
        clock.begin("measuring")
        for stage in ("seed", "after_sl"):
            record.rates[stage] = await measured[stage]
        await _measure_the_end(record, finished, registry, partner, held, tell)
        clock.begin("")
    finally:
        for task in measured.values():
            task.cancel()
        await partner.close()
    record.seconds = time.monotonic() - began
    return record


async def _measure_the_end(
    record: Record, finished: Finished, registry: Registry, partner: Partner, held: Held, tell: Tell
) -> None:
    ids = {"seed": finished.seed, "after_sl": finished.supervised, "after_rl": finished.serving}
    for stage, name in ids.items():
        manifest = registry.get(name)
        record.checkpoints[stage] = {
            "id": name,
            "weights_digest": manifest.weights_digest,
            "step": manifest.facts.step,
            "kind": manifest.facts.kind.value,
        }
    record.checkpoints["last"] = {"id": finished.last, "step": finished.step}

    def told(progress: tuple[str, int, int]) -> None:
        what, done, total = progress
        tell(News(Kind.PROGRESS, {"what": what, "done": done, "total": total, "remark": ""}))

    folders = {stage: str(registry.resolve(name)) for stage, name in ids.items()}
    record.rates["after_rl"] = await partner.call(measuring.rates, folders["after_rl"], held, told=told)
    few = Held(min(GATED_PROMPTS, held.prompts), (0.7,), held.seed)
    for decided in record.gate:
        folder = str(registry.resolve(decided["checkpoint"]))
        decided["oracle"] = (await partner.call(measuring.rates, folder, few, told=told))["0.7"]
    record.samples = await partner.call(
        measuring.samples, [folders[s] for s in ("seed", "after_sl", "after_rl")], 12, 0.7, held.seed + 1
    )
