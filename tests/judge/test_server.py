import asyncio
import contextlib
import dataclasses
import math

import pytest
from prometheus_client import CollectorRegistry
from tests.feedback_fixtures import ASKED, CONSTITUTION, write_constitution
from tests.scripted import Scripted

from charter.errors import RequestError
from charter.feedback import prompts
from charter.judge.config import JudgeConfig, Judging, Notes
from charter.judge.server import serve
from charter.rpc.clients import JudgeClient


def prefers_good(prompt, continuation):
    first = "<answer_a>good" in prompt.messages[-1].content
    return math.log(0.9 if first == (continuation == prompts.OPTION_A) else 0.1)


@contextlib.asynccontextmanager
async def judge(tmp_path, model, registry=None, **judging):
    write_constitution(tmp_path / "c.yaml")
    config = JudgeConfig("scripted:", str(tmp_path / "c.yaml"), 0.02, Judging(**judging))
    async with (
        await serve(config, registry or CollectorRegistry(), open_model=lambda uri: model) as server,
        JudgeClient(server.target) as client,
    ):
        yield client


async def test_compare_gives_label_opinions_and_what_they_rest_on(tmp_path):
    model = Scripted(lambda p, s: "A short note.", prefers_good)
    async with judge(tmp_path, model, principles=0) as client:
        compared = await client.compare(ASKED, "good", "bad", seed=1)
    assert compared.probability == pytest.approx(0.6)
    assert [(o.principle_id, o.weight) for o in compared.opinions] == [
        ("kind", 1),
        ("honest", 3),
        ("brave", 1),
    ]
    assert all(o.probability_first == pytest.approx(0.9) for o in compared.opinions)
    assert compared.opinions[0].note_first == "A short note."
    assert compared.source.constitution_digest == CONSTITUTION.digest
    assert compared.source.model == model.version


async def test_the_same_seed_draws_the_same_principle_and_named_ones_are_all_asked(tmp_path):
    model = Scripted(lambda p, s: f"note {s.seed}", prefers_good)
    async with judge(tmp_path, model, notes=Notes(1, 1.0), lowest=0, highest=1) as client:
        first, again = [await client.compare(ASKED, "good", "bad", seed=9) for _ in range(2)]
        drawn = {(await client.compare(ASKED, "good", "bad")).opinions[0].principle_id for _ in range(30)}
        named = await client.compare(ASKED, "bad", "good", ["kind", "brave"])
    assert first == again
    assert len(first.opinions) == 1
    assert len(drawn) > 1
    assert [o.principle_id for o in named.opinions] == ["kind", "brave"]
    assert named.probability == pytest.approx(0.1)


async def test_a_principle_that_does_not_judge_is_refused(tmp_path):
    async with judge(tmp_path, Scripted()) as client:
        with pytest.raises(
            RequestError, match="'calm' of constitution tests does not serve the phase preference"
        ):
            await client.compare(ASKED, "good", "bad", ["calm"])
        with pytest.raises(RequestError, match="the conversation is empty"):
            await client.compare((), "good", "bad")


async def test_flips_and_confidence_are_counted(tmp_path):
    registry = CollectorRegistry()
    leaning = Scripted(weigh=lambda p, c: -0.1 if c == prompts.OPTION_A else -2.0)
    async with judge(tmp_path, leaning, registry, principles=0, notes=Notes(0)) as client:
        await client.compare(ASKED, "good", "bad")
    assert registry.get_sample_value("charter_judge_flips_total", {"principle": "kind"}) == 1
    assert registry.get_sample_value("charter_judge_comparisons_total", {"principle": "kind"}) == 1
    assert registry.get_sample_value("charter_judge_confidence_bucket", {"le": "0.01"}) == 1


async def test_a_caller_that_goes_away_stops_the_work_in_the_model(tmp_path):
    model = Scripted(gate=asyncio.Event())
    async with judge(tmp_path, model, principles=0) as client:
        asked = asyncio.ensure_future(client.compare(ASKED, "good", "bad"))
        while model.running < 6:
            await asyncio.sleep(0.01)
        asked.cancel()
        while model.running:
            await asyncio.sleep(0.01)


async def test_a_changed_constitution_is_in_force_without_a_restart(tmp_path):
    other = dataclasses.replace(CONSTITUTION, version="2")
    async with judge(tmp_path, Scripted()) as client:
        write_constitution(tmp_path / "c.yaml", other)
        while (await client.compare(ASKED, "good", "bad")).source.constitution_digest != other.digest:
            await asyncio.sleep(0.01)
