import asyncio
import contextlib
import dataclasses
import os
import signal

import pytest
from prometheus_client import CollectorRegistry
from tests.feedback_fixtures import ASKED, CONSTITUTION, write_constitution
from tests.scripted import Scripted

from charter.critic.config import CriticConfig, Writing
from charter.critic.server import serve
from charter.errors import ConstitutionError, RequestError
from charter.rpc.clients import CriticClient

REVISED = dataclasses.replace(CONSTITUTION, version="2", principles=CONSTITUTION.principles[:1])


@contextlib.asynccontextmanager
async def critic(path, model, registry=None, **fields):
    config = CriticConfig(model="scripted:", constitution=str(path), watch_s=0.02, **fields)
    registry = registry or CollectorRegistry()
    async with (
        await serve(config, registry, open_model=lambda uri: model) as server,
        CriticClient(server.target) as client,
    ):
        yield client


@pytest.fixture
def path(tmp_path):
    write_constitution(tmp_path / "c.yaml")
    return tmp_path / "c.yaml"


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def test_assess_reads_all_critique_principles_or_those_named_and_says_by_what(path):
    async with critic(path, Scripted(weigh=lambda p, c: -1.0 if c == "Yes" else -3.0)) as client:
        everything = await client.assess(ASKED, "Break it.")
        named = await client.assess(ASKED, "Break it.", ["honest"])
    assert [a.principle_id for a in everything.assessments] == ["kind", "honest", "calm"]
    assert [a.principle_id for a in named.assessments] == ["honest"]
    assert everything.worst.probability == pytest.approx(0.880797, abs=1e-6)
    assert everything.source.constitution_digest == CONSTITUTION.digest
    assert everything.source.model == Scripted().version


async def test_critique_writes_by_one_principle(path):
    model = Scripted(lambda p, s: "It is not kind.")
    async with critic(path, model) as client:
        said = await client.critique(ASKED, "Break it.", "kind", seed=3)
        with pytest.raises(RequestError, match="principle_id is empty"):
            await client.critique(ASKED, "Break it.", "")
    assert said.critique == "It is not kind."
    assert said.source.constitution_digest == CONSTITUTION.digest
    assert "not kind?" in model.prompts[0].messages[-1].content


async def test_revise_returns_every_step_and_the_same_seed_gives_the_same_revision(path):
    def write(prompt, sampling):
        return f"text {sampling.seed % 1000}"

    async with critic(path, Scripted(write), rounds=3) as client:
        first = await client.revise(ASKED, "draft", seed=11)
        again = await client.revise(ASKED, "draft", seed=11)
        other = await client.revise(ASKED, "draft", seed=12)
        one = await client.revise(ASKED, "draft", ["calm"], rounds=1)
    assert first == again != other
    assert len(first.steps) == 3
    assert first.answer == first.steps[-1].revision
    assert {s.principle_id for s in first.steps} <= {"kind", "honest", "calm"}
    assert [s.principle_id for s in one.steps] == ["calm"]
    assert first.source.constitution_digest == CONSTITUTION.digest


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: c.assess(ASKED, "x", ["rude"]), "no principle 'rude'"),
        (lambda c: c.assess(ASKED, "x", ["brave"]), "does not serve the phase critique"),
        (lambda c: c.assess((), "x"), "the conversation is empty"),
        (lambda c: c.revise(ASKED, "x", rounds=99), "rounds is 99; give 1 to 16"),
        (lambda c: c.revise(ASKED, "x", rounds=-1), "rounds is -1"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_with_a_sentence(path, call, sentence):
    async with critic(path, Scripted()) as client:
        with pytest.raises(RequestError, match=sentence):
            await call(client)


async def test_a_changed_constitution_is_in_force_without_a_restart(path):
    async with critic(path, Scripted()) as client:
        write_constitution(path, REVISED)
        while (await client.assess(ASKED, "x")).source.constitution_digest != REVISED.digest:
            await asyncio.sleep(0.01)
        assert len((await client.assess(ASKED, "x")).assessments) == 1


async def test_sighup_reads_the_constitutions_of_all_services_in_the_process(path):
    first, second = CollectorRegistry(), CollectorRegistry()
    done = {"service": "critic", "outcome": "done"}
    async with critic(path, Scripted(), first):
        async with critic(path, Scripted(), second):
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGHUP)
            for registry in (first, second):
                await until(
                    lambda r=registry: r.get_sample_value("charter_constitution_reloads_total", done) == 1
                )
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: first.get_sample_value("charter_constitution_reloads_total", done) == 2)
    assert second.get_sample_value("charter_constitution_reloads_total", done) == 1


@pytest.mark.parametrize("damage", ["no yaml: [", "name: tests\n", "gone", "no critique principle"])
async def test_an_unreadable_constitution_on_reload_leaves_the_old_one_in_force(path, damage, caplog):
    registry = CollectorRegistry()
    async with critic(path, Scripted(), registry) as client:
        if damage == "gone":
            path.unlink()
        elif damage == "no critique principle":
            brave = dataclasses.replace(CONSTITUTION, principles=CONSTITUTION.principles[2:3])
            write_constitution(path, brave)
        else:
            path.write_text(damage)
        labels = {"service": "critic", "outcome": "refused"}
        await until(lambda: registry.get_sample_value("charter_constitution_reloads_total", labels))
        assert (await client.assess(ASKED, "x")).source.constitution_digest == CONSTITUTION.digest
        assert "constitution refused; the old one stays in force" in caplog.text
        write_constitution(path, REVISED)
        while (await client.assess(ASKED, "x")).source.constitution_digest != REVISED.digest:
            await asyncio.sleep(0.01)


async def test_a_request_keeps_the_constitution_that_it_began_with(path):
    model = Scripted(gate=asyncio.Event())
    registry = CollectorRegistry()
    async with critic(path, model, registry) as client:
        asked = asyncio.ensure_future(client.revise(ASKED, "draft", rounds=2, seed=1))
        await until(lambda: model.running == 1)
        write_constitution(path, REVISED)
        labels = {"service": "critic", "outcome": "done"}
        await until(lambda: registry.get_sample_value("charter_constitution_reloads_total", labels))
        model.gate.set()
        assert (await asked).source.constitution_digest == CONSTITUTION.digest


async def test_a_constitution_that_is_wrong_at_the_start_stops_the_start(tmp_path):
    (tmp_path / "c.yaml").write_text("name: tests\n")
    model = Scripted()
    with pytest.raises(ConstitutionError, match=r"c\.yaml"):
        async with critic(tmp_path / "c.yaml", model):
            pass


async def test_a_caller_that_goes_away_stops_the_work_in_the_model(path):
    model = Scripted(gate=asyncio.Event())
    async with critic(path, model) as client:
        asked = asyncio.ensure_future(client.assess(ASKED, "x"))
        await until(lambda: model.running == 3)
        asked.cancel()
        await until(lambda: model.running == 0)


async def test_findings_are_counted_by_principle(path):
    registry = CollectorRegistry()
    async with critic(path, Scripted(lambda p, s: "new"), registry, writing=Writing(examples=0)) as client:
        await client.assess(ASKED, "x", ["kind"])
        await client.revise(ASKED, "draft", ["kind"], rounds=2)
    value = registry.get_sample_value
    assert value("charter_critic_assessments_total", {"principle": "kind", "verdict": "breaks"}) is None
    assert value("charter_critic_assessments_total", {"principle": "kind", "verdict": "keeps"}) == 1
    assert value("charter_critic_revisions_total", {"principle": "kind", "changed": "yes"}) == 1
    assert value("charter_critic_revisions_total", {"principle": "kind", "changed": "no"}) == 1


async def test_the_model_is_closed_with_the_server(path):
    model = Scripted()
    async with critic(path, model):
        assert not model.closed
    assert model.closed
