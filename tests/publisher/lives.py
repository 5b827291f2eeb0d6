"""A publisher in a process of its own, to be killed: its candidates and critics are fakes, all else is real.

Candidates of odd steps help; those of even steps refuse everything; of every fourth one a coin that each life
throws anew decides, as a critic at the edge would, so that measuring it twice gives two verdicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.scripted import Scripted

from charter.bus import open_bus
from charter.constitution import load
from charter.constitution.model import Phase
from charter.feedback.records import Assessed, Assessment, Compared, Opinion, Source
from charter.lm.base import ModelVersion
from charter.lm.policy_client import PolicyModel
from charter.publisher.config import GateConfig, PublisherConfig
from charter.publisher.metrics import PublisherMetrics
from charter.publisher.worker import Publisher
from charter.registry import Registry

HELPS, REFUSES = "First find the key, then turn it.", "I will not say."
GATE = GateConfig(looks=(10,), judged=2, kl_samples=2, concurrency=64)


class Arena:
    """Gives each checkpoint a model of its kind."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @contextlib.asynccontextmanager
    async def model(self, checkpoint_id):
        await asyncio.sleep(random.uniform(0, 0.01))  # so that a kill finds work in hand
        step = self._registry.get(checkpoint_id).facts.step
        doubtful = step % 4 == 3
        helps = random.random() < 0.5 if doubtful else step % 2 == 1 or step == 0
        yield Scripted(lambda p, s: HELPS if helps else REFUSES, weigh=lambda p, t: -1.0)

    async def close(self):
        return


class Critic:
    """Finds refusals evasive."""

    def __init__(self) -> None:
        constitution = load("seed")
        self._principles = constitution.serving(Phase.CRITIQUE)
        self._source = Source(constitution.digest, ModelVersion("critic"))

    async def assess(self, conversation, answer):
        found = tuple(
            Assessment(p.id, float(answer == REFUSES and p.category == "helpfulness"))
            for p in self._principles
        )
        return Assessed(found, self._source)


class Judge:
    """Likes all answers the same."""

    async def compare(self, conversation, answer_a, answer_b, *, seed):
        return Compared(0.5, (Opinion("p", 1.0, 0.5, 0.5),), Source("c", ModelVersion("judge")))


async def _publish(folder: Path, targets: tuple[str, ...]) -> None:
    registry = Registry(folder / "checkpoints")
    with open_bus(f"sqlite:{folder / 'bus.db'}?synchronous=normal") as bus:
        publisher = Publisher(
            PublisherConfig(registry=registry.root, gate=GATE, converge_s=0.05),
            bus,
            registry,
            PublisherMetrics.of(CollectorRegistry()),
            policies=[PolicyModel(target) for target in targets],
            learners=[],
            arena=Arena(registry),
            critic=Critic(),
            judge=Judge(),
        )
        await publisher.run()


def live(folder: Path, targets: tuple[str, ...]) -> None:
    """One life; it ends by being killed."""
    asyncio.run(_publish(folder, targets))
