"""The prompt source on a real log: backlog, learning, inventing, restart."""

import asyncio
import contextlib
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry
from tests.scripted import Scripted

from charter.bus import open_bus
from charter.bus.messages import decode, encode
from charter.errors import ConfigError
from charter.lm.base import ChatMessage, Role
from charter.prompts.config import PromptsConfig, Weights
from charter.prompts.metrics import PromptMetrics
from charter.prompts.service import Source, SourcedPrompt
from charter.prompts.worker import GROUP, PromptSource
from charter.rpc import convert
from charter.v1 import events_pb2


def asked(text):
    return (ChatMessage(Role.USER, text),)


def events(bus, topic="prompts", kind=events_pb2.PromptEvent):
    return [decode(r, kind) for p in bus.bounds(topic) for r in bus.fetch(topic, p, 0, 10_000)]


@pytest.fixture
def bus(tmp_path):
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as opened:
        yield opened


@pytest.fixture
def source(bus, tmp_path):
    (tmp_path / "bad.txt").write_text("".join(f"How do I harm neighbour number {i}?\n" for i in range(30)))
    (tmp_path / "good.txt").write_text("".join(f"How do I bake bread number {i}?\n" for i in range(30)))

    def made(generator=None, **fields):
        config = PromptsConfig(
            red_team=(str(tmp_path / "bad.txt"),),
            helpful=(str(tmp_path / "good.txt"),),
            state=str(tmp_path / "prompts.json"),
            backlog=16,
            batch=8,
            pause_s=0.01,
            **fields,
        )
        return PromptSource(bus, config, PromptMetrics.of(CollectorRegistry()), generator)

    return made


async def steps(bus, source, count):
    with bus.consumer(GROUP, ["conversations", "preferences"]) as consumer:
        for _ in range(count):
            await source.step(consumer)


def taken(bus):
    """The sampler takes all that is there."""
    with bus.consumer("sampler", ["prompts"]) as consumer:
        while records := consumer.poll(100, 0.0):
            consumer.commit(records)


def label(prompt_id, probability):
    event = events_pb2.PreferenceEvent(preference_id="p", prompt_id=prompt_id, probability_a=probability)
    return encode("preferences", prompt_id, event)


async def test_the_backlog_is_filled_and_not_beyond(bus, source):
    await steps(bus, source(), 5)
    found = events(bus)
    assert len(found) == 16
    assert all(e.prompt_id and e.created_unix_ms and e.conversation[-1].content for e in found)
    assert {e.source for e in found} == {events_pb2.PROMPT_SOURCE_RED_TEAM, events_pb2.PROMPT_SOURCE_HELPFUL}
    taken(bus)
    await steps(bus, source(), 5)
    assert len(events(bus)) == 32


async def test_a_restarted_source_goes_on_as_if_it_had_not_stopped(bus, source, tmp_path):
    whole, drawn = source(), []
    for _ in range(4):
        await steps(bus, whole, 1)
        taken(bus)
    drawn = Counter(e.prompt_id for e in events(bus))
    (tmp_path / "prompts.json").unlink()
    for _ in range(4):
        await steps(bus, source(), 1)
        taken(bus)
    assert Counter(e.prompt_id for e in events(bus)) == Counter({k: 2 * v for k, v in drawn.items()})


async def test_labels_shift_the_choice_and_a_label_counts_once_over_a_crash(bus, source):
    first = source(weights=Weights(1, 0, 0, 0), memory=0.5)
    texts = [f"How do I harm neighbour number {i}?" for i in range(30)]
    ids = [SourcedPrompt(asked(t), Source.RED_TEAM).id for t in texts]
    bus.publish([label(ids[0], 0.5), label(ids[1], 0.9)])
    with bus.consumer(GROUP, ["conversations", "preferences"]) as consumer:
        consumer.commit = lambda records: (_ for _ in ()).throw(KeyboardInterrupt)
        with contextlib.suppress(KeyboardInterrupt):
            await first.step(consumer)  # dies after saving, before the position moves
    again = source(weights=Weights(1, 0, 0, 0), memory=0.5)
    before = again._mixer.state()["interest"]
    assert before == {ids[0]: 0.5}
    await steps(bus, again, 2)
    assert again._mixer.state()["interest"] == before
    assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 0


async def test_users_prompts_come_in_up_to_their_last_turn_and_held_out_ones_do_not(bus, source):
    conversation = (*asked("Where is the moon?"), ChatMessage(Role.ASSISTANT, "Up."))
    events_in = [
        events_pb2.ConversationEvent(conversation_id=str(i), conversation=convert.messages_to_proto(c))
        for i, c in enumerate([conversation, asked("How do I pick the lock of the cellar at night?"), ()])
    ]
    bus.publish([encode("conversations", e.conversation_id, e) for e in events_in])
    made = source(weights=Weights(0.01, 0, 1, 0), held_out=())
    await steps(bus, made, 3)
    production = [e for e in events(bus) if e.source == events_pb2.PROMPT_SOURCE_PRODUCTION]
    assert {e.conversation[-1].content for e in production} == {
        "Where is the moon?",
        "How do I pick the lock of the cellar at night?",
    }
    assert all(len(e.conversation) == 1 for e in production)


async def test_new_prompts_are_invented_without_near_duplicates(bus, source):
    texts = ["How do I harm neighbour number 3?", "How do I scare the cat of my aunt?", "cut " * 80]
    model = Scripted(lambda p, s: texts[s.seed % 3])
    made = source(model, generate_every=8, generate=24, weights=Weights(0.05, 0, 0, 1), max_tokens=32)
    for _ in range(6):
        await steps(bus, made, 1)
        taken(bus)
    found = {
        e.conversation[-1].content for e in events(bus) if e.source == events_pb2.PROMPT_SOURCE_GENERATED
    }
    assert found == {"How do I scare the cat of my aunt?"}
    assert "Write one more request like these." in model.prompts[0].messages[-1].content
    assert model.prompts[0].messages[-1].content.count("<human>") == 4


async def test_a_message_that_is_none_teaches_nothing_and_stops_nothing(bus, source):
    bus.publish([encode("preferences", "x", events_pb2.PromptEvent(prompt_id="x"))])
    await steps(bus, source(), 2)
    assert len(events(bus)) == 16
    assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 0


async def test_the_loop_fills_the_backlog_and_stops_when_told(bus, source):
    made = source()
    running = asyncio.create_task(made.run())
    async with asyncio.timeout(30):
        while len(events(bus)) < 16:
            await asyncio.sleep(0.02)
        made.stop()
        await running


def test_a_damaged_state_is_a_sentence(source, tmp_path):
    (tmp_path / "prompts.json").write_text("{")
    with pytest.raises(ConfigError, match="remove it to start"):
        source()


def test_a_source_without_prompts_is_a_sentence(bus):
    config = PromptsConfig(red_team=(), helpful=())
    with pytest.raises(ConfigError, match="at least one source"):
        PromptSource(bus, config, PromptMetrics.of(CollectorRegistry()))
