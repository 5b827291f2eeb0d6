"""Conversations given for training: only with consent, without personal data, never in an answer's way."""

import asyncio
import re
import threading

import pytest
from prometheus_client import CollectorRegistry
from tests.gateway.deployment import deployed

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.errors import BackendUnavailable
from charter.gateway.contributions import Contribution, Contributions
from charter.gateway.guard import GuardMode
from charter.gateway.metrics import GatewayMetrics
from charter.lm.base import ChatMessage, ModelVersion, Role
from charter.v1.events_pb2 import ConversationEvent

GIVE = {"charter": {"train": True}}


def written(uri):
    with open_bus(uri) as bus:
        records = [r for p in bus.bounds("conversations") for r in bus.fetch("conversations", p, 0)]
    return [decode(r, ConversationEvent) for r in records]


async def test_a_given_conversation_reaches_the_bus_without_personal_data(tmp_path):
    uri = f"sqlite:{tmp_path / 'bus.db'}"
    messages = [{"role": "user", "content": "Write to jane.doe@example.org about the harm."}]
    async with deployed(tmp_path, bus=uri) as made:
        body = {"charter": {"train": True, "conversation": "talk-1"}}
        done = await made.ask("some harm", messages=messages, extra_body=body)
    assert done.charter["training"] == {"recorded": True}
    (event,) = written(uri)
    assert event.conversation_id == "talk-1"
    assert "jane.doe" not in str(event)
    assert sum(event.redactions.values()) == 1
    assert event.conversation[-1].content == "a good answer"
    assert list(event.principle_ids) == ["no-harm"]
    assert event.constitution_digest == done.charter["constitution"]
    assert event.policy.version == "scripted"


async def test_silence_is_no_consent_and_the_body_outweighs_the_header(tmp_path):
    uri = f"sqlite:{tmp_path / 'bus.db'}"
    async with deployed(tmp_path, bus=uri) as made:
        silent = await made.ask("fine")
        no = await made.ask(
            "fine", extra_headers={"X-Charter-Train": "yes"}, extra_body={"charter": {"train": False}}
        )
        yes = await made.ask("fine", extra_headers={"X-Charter-Train": "yes"}, n=2)
    assert "training" not in silent.charter
    assert "training" not in no.charter
    assert yes.charter["training"] == {"recorded": True}
    assert len(written(uri)) == 2


async def test_an_endpoint_without_bus_says_that_it_records_nothing(tmp_path):
    async with deployed(tmp_path, guard=GuardMode.OFF) as made:
        done = await made.ask("fine", extra_body=GIVE)
        chunks = [c async for c in await made.ask("fine", extra_body=GIVE, stream=True)]
    assert done.charter["training"] == {"recorded": False, "reason": "this endpoint records no conversations"}
    assert chunks[-1].charter["training"]["recorded"] is False


def contribution(text="call 555-1234"):
    turns = (ChatMessage(Role.USER, text), ChatMessage(Role.ASSISTANT, "yes"))
    return Contribution("c", turns, ModelVersion("v"), "digest", ())


def without_numbers(text):
    kept, count = re.subn(r"[\d-]+", "[number]", text)
    return kept, {"number": count} if count else {}


class Bus:
    """A fake whose failures the test decides."""

    def __init__(self, *failures, hold=None):
        self.failures, self.hold, self.published = list(failures), hold, []

    def publish(self, messages):
        if self.hold is not None:
            self.hold.wait()
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.published += messages


@pytest.fixture
def metrics():
    return GatewayMetrics.of(CollectorRegistry())


def count(metrics, outcome):
    return metrics.contributions.labels(outcome)._value.get()


async def test_a_bus_that_is_away_for_a_while_loses_nothing(metrics):
    bus = Bus(BackendUnavailable("away"), BackendUnavailable("away"))
    writer = Contributions(bus, without_numbers, metrics, 10, pauses=(0.0, 0.0))
    assert writer.offer([contribution()])
    await writer.stop(5)
    (message,) = bus.published
    assert b"[number]" in message.value
    assert b"555" not in message.value
    assert count(metrics, "written") == 1


async def test_a_bus_that_stays_away_is_given_up_and_counted(metrics):
    bus = Bus(*[BackendUnavailable("away")] * 2)
    writer = Contributions(bus, without_numbers, metrics, 10, pauses=(0.0,))
    writer.offer([contribution()])
    await writer.stop(5)
    assert (bus.published, count(metrics, "failed")) == ([], 1)


async def test_what_cannot_be_redacted_is_never_written(metrics):
    def fails(text):
        raise ValueError("cannot read this")

    bus = Bus()
    writer = Contributions(bus, fails, metrics, 10)
    writer.offer([contribution()])
    await writer.stop(5)
    assert (bus.published, count(metrics, "failed")) == ([], 1)


async def test_a_slow_bus_fills_a_bounded_queue_and_blocks_nobody(metrics):
    hold = threading.Event()
    bus = Bus(hold=hold)
    writer = Contributions(bus, without_numbers, metrics, 2)
    assert writer.offer([contribution()])
    assert writer.offer([contribution()])
    await asyncio.sleep(0.02)
    assert not writer.offer([contribution()])
    hold.set()
    await writer.stop(5)
    assert len(bus.published) == 2
    assert count(metrics, "full") == 1
    assert not writer.offer([contribution()]), "after the stop nothing is taken"
