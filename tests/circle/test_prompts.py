"""Which prompts the circle asks, and what becomes of the first pairs on the bus."""

import asyncio
import json
from dataclasses import replace

import pytest
from tests.circle.labels import label

from charter.bus import Position, open_bus
from charter.bus.base import REPLAY_GROUP_HEADER
from charter.bus.messages import decode
from charter.circle import first_pairs
from charter.circle.config import CircleConfig, PromptSources
from charter.circle.prompts import Supply, prompt_source
from charter.errors import ConfigError
from charter.prompts.config import PromptsConfig, Weights
from charter.sampler.config import SamplerConfig
from charter.sampler.pacing import Pacer
from charter.sampler.worker import GROUP as SAMPLER
from charter.trainer.labels import GROUP, Limits, take
from charter.v1 import events_pb2

SOURCES = PromptSources(("seed:30:harmful",), ("seed:40:plain",))


def _config(**options):
    return CircleConfig(prompts=SOURCES, **options)


def test_prompts_keep_their_number_however_many_are_asked_for():
    supply = Supply(_config())
    whole = supply.part(0, 50)
    assert supply.part(10, 20) == whole[10:30]
    assert len({p.prompt_id for p in whole}) == 50


def test_red_team_and_helpful_prompts_come_by_their_share():
    supply = Supply(_config(red_team_share=0.25))
    red = {p.prompt_id for p in Supply(replace(_config(), red_team_share=1.0)).part(0, 30)}
    asked = supply.part(0, 40)
    assert sum(p.prompt_id in red for p in asked) == 10


def test_another_seed_asks_in_another_order():
    assert Supply(_config(seed=1)).part(0, 20) != Supply(_config(seed=2)).part(0, 20)


def _drawn(bus):
    records = [r for p in bus.bounds("prompts") for r in bus.fetch("prompts", p, 0)]
    return [decode(r, events_pb2.PromptEvent) for r in records]


async def _until(condition):
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)


async def test_the_source_fills_the_backlog_from_what_was_read_and_a_later_start_goes_on(tmp_path):
    config = _config(mixture=PromptsConfig(Weights(0.5, 0.5), backlog=24, batch=8, pause_s=0.02))
    supply = Supply(config)
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:

        async def run(count):
            source = prompt_source(bus, supply, config, tmp_path)
            running = asyncio.create_task(source.run())
            await _until(lambda: len(_drawn(bus)) >= count)
            source.stop()
            await running

        await run(24)
        with bus.consumer(SAMPLER, ["prompts"]) as sampler:
            while taken := sampler.poll(100, 0.0):
                sampler.commit(taken)
        await run(48)
        drawn = _drawn(bus)
        assert len(drawn) == 48
        assert {p.prompt_id for p in drawn} <= {p.id for p in supply.sourced()}
        assert {p.source for p in drawn} == {
            events_pb2.PROMPT_SOURCE_RED_TEAM, events_pb2.PROMPT_SOURCE_HELPFUL,
        }  # fmt: skip
    state = json.loads((tmp_path / "prompts.json").read_text())
    assert state["published"] == 48


def test_first_pairs_neither_hold_the_sampler_back_nor_teach_the_policy(tmp_path):
    addressed = {REPLAY_GROUP_HEADER: b"reward"}
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        lies = bus.publish([label(i, **addressed) for i in range(60)])
        assert all(isinstance(place, Position) for place in lies)
        pacer = Pacer(bus, SamplerConfig(batch_size=8, max_staleness=1), 8)
        assert not pacer.has_room()
        first_pairs.pass_over(bus, "trainer-0")
        assert pacer.under_way() == 0
        first_pairs.pass_over(bus, "trainer-0")  # a later start changes nothing
        bus.publish([label(i) for i in range(100, 108)])
        assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 8
        taken = take(bus, {}, 8, Limits(vocabulary=10, context=10))
        assert {label.event.preference_id for label in taken.labels} == {
            f"label-{i}" for i in range(100, 108)
        }


@pytest.mark.parametrize(
    "options", [{"revisions": 0}, {"red_team_share": 2.0}, {"threads": 0}, {"steps": -1}, {"keep": -1}]
)
def test_settings_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError):
        CircleConfig(**options)
