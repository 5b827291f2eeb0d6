"""Which prompts the circle asks, and what becomes of the first pairs on the bus."""

from dataclasses import replace

import pytest

from charter.bus import Position, open_bus
from charter.bus.base import REPLAY_GROUP_HEADER
from charter.bus.messages import decode, encode
from charter.circle import first_pairs
from charter.circle.config import CircleConfig, PromptSources
from charter.circle.prompts import Feed, Supply
from charter.errors import ConfigError
from charter.sampler.config import SamplerConfig
from charter.sampler.pacing import Pacer
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


def test_the_feed_fills_the_backlog_once_and_waits_while_it_is_full(tmp_path):
    config = _config()
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        feed = Feed(bus, Supply(config), config)
        filled = [feed._fill() for _ in range(4)]
        assert filled == [True, True, False, False]
        prompts = [
            decode(r, events_pb2.PromptEvent)
            for p in bus.bounds("prompts")
            for r in bus.fetch("prompts", p, 0)
        ]
        assert len(prompts) == 2 * config.mixture.batch
        assert {p.source for p in prompts} == {
            events_pb2.PROMPT_SOURCE_RED_TEAM, events_pb2.PROMPT_SOURCE_HELPFUL,
        }  # fmt: skip


def _label(number, **headers):
    event = events_pb2.PreferenceEvent(preference_id=f"label-{number}", prompt_id=f"prompt-{number}")
    event.prompt_token_ids.extend([1, 2])
    for answer in (event.answer_a, event.answer_b):
        answer.token_ids.extend([3, 4])
        answer.logprobs.extend([-1.0, -1.0])
    message = encode("preferences", event.prompt_id, event)
    return replace(message, headers={**message.headers, **headers})


def test_first_pairs_neither_hold_the_sampler_back_nor_teach_the_policy(tmp_path):
    addressed = {REPLAY_GROUP_HEADER: b"reward"}
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        lies = bus.publish([_label(i, **addressed) for i in range(60)])
        assert all(isinstance(place, Position) for place in lies)
        pacer = Pacer(bus, SamplerConfig(batch_size=8, max_staleness=1), 8)
        assert not pacer.has_room()
        first_pairs.pass_over(bus, "trainer-0")
        assert pacer.under_way() == 0
        first_pairs.pass_over(bus, "trainer-0")  # a later start changes nothing
        bus.publish([_label(i) for i in range(100, 108)])
        assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 8
        taken = take(bus, {}, 8, Limits(vocabulary=10, context=10))
        assert {label.event.preference_id for label in taken.labels} == {
            f"label-{i}" for i in range(100, 108)
        }


@pytest.mark.parametrize(
    "options", [{"revisions": 0}, {"red_team_share": 2.0}, {"threads": 0}, {"steps": -1}]
)
def test_settings_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError):
        CircleConfig(**options)
