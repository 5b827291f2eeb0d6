"""What the gate meets and cannot change: it says so, waits or passes on, and what serves goes on."""

import asyncio
import contextlib
import errno
import re

import pytest
from prometheus_client import CollectorRegistry
from tests.publisher.lives import GATE, Arena, Critic, Judge
from tests.registry.conftest import filler

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.publisher.config import PublisherConfig
from charter.publisher.metrics import PublisherMetrics
from charter.publisher.worker import Publisher
from charter.registry import Facts, Kind, Registry, Status
from charter.registry.events import announcement
from charter.v1 import events_pb2


@pytest.fixture
def registry(tmp_path):
    made = Registry(tmp_path / "checkpoints")
    made.set_status(made.write(Facts(Kind.SEED), filler(0.5)).id, Status.SERVING)
    return made


@pytest.fixture
def bus(tmp_path):
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as opened:
        yield opened


def _candidate(registry, bus, step=1):
    manifest = registry.write(Facts(Kind.RL, registry.serving().id, step=step), filler(step))
    change = registry.set_status(manifest.id, Status.CANDIDATE)
    bus.publish([announcement(manifest, registry.root, change)])
    return manifest.id


@contextlib.asynccontextmanager
async def _publishing(registry, bus, critic=None):
    publisher = Publisher(
        PublisherConfig(registry=registry.root, gate=GATE, converge_s=0.05),
        bus,
        registry,
        PublisherMetrics.of(CollectorRegistry()),
        policies=[],
        learners=[],
        arena=Arena(registry),
        critic=critic or Critic(),
        judge=Judge(),
    )
    running = asyncio.create_task(publisher.run())
    try:
        yield running
    finally:
        publisher.stop()
        await running


async def _until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_disk_too_full_for_the_verdict_is_waited_for(registry, bus, monkeypatch, caplog):
    """The registry's file system refuses the entry, as a full disk does; later there is room."""
    seed, name, full = registry.serving().id, _candidate(registry, bus), [True]
    write = registry._storage.add_entry

    def add_entry(entry, content):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(entry, content)

    monkeypatch.setattr(registry._storage, "add_entry", add_entry)
    async with _publishing(registry, bus) as running:
        await _until(lambda: "work failed and is tried again" in caplog.text)
        error = next(r.charter_fields["error"] for r in caplog.records if "tried again" in r.getMessage())
        assert re.search(rf"promoting of {name} cannot be written to .*No space left .*make room", error)
        assert registry.serving().id == seed
        assert not running.done()
        full[0] = False
        await _until(lambda: registry.serving().id == name)


async def test_a_candidate_that_nobody_knows_is_buried_and_the_next_is_measured(registry, bus, tmp_path):
    elsewhere = Registry(tmp_path / "elsewhere")
    elsewhere.set_status(elsewhere.write(Facts(Kind.SEED), filler(0.5)).id, Status.SERVING)
    stranger = _candidate(elsewhere, bus, step=9)
    async with _publishing(registry, bus):
        name = _candidate(registry, bus)
        await _until(lambda: registry.serving().id == name)
    [letter] = [decode(r, events_pb2.DeadLetterEvent) for r in bus.fetch("dead-letters", 0, 0)]
    assert f"has no checkpoint '{stranger}'; see `charter checkpoints list`" in letter.error


async def test_a_critic_with_a_stale_constitution_decides_nothing(registry, bus, caplog):
    class Stale(Critic):
        digest = "0" * 64

        async def assess(self, conversation, answer):
            assessed = await super().assess(conversation, answer)
            if not self.digest:
                return assessed
            return type(assessed)(
                assessed.assessments, type(assessed.source)(self.digest, assessed.source.model)
            )

    seed, name, critic = registry.serving().id, _candidate(registry, bus), Stale()
    async with _publishing(registry, bus, critic):
        await _until(lambda: "work failed and is tried again" in caplog.text)
        error = next(r.charter_fields["error"] for r in caplog.records if "tried again" in r.getMessage())
        assert "the critic reads constitution 000000000000, the gate " in error
        assert "give both the same file, then the gate goes on by itself" in error
        assert registry.serving().id == seed
        assert registry.status(name).status is Status.CANDIDATE
        critic.digest = ""
        await _until(lambda: registry.serving().id == name)
