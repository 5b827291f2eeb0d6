"""Prompts in, rollouts out, on a real log; paced by staleness; the version that answered is in each."""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry
from tests.registry.conftest import filler
from tests.scripted import Scripted

from charter import rpc
from charter.bus import open_bus
from charter.bus.messages import decode, encode
from charter.bus.worker import Backoff, WorkerOptions
from charter.errors import BackendUnavailable, BackendUnsupported, ConfigError
from charter.lm import open_model
from charter.lm.base import ModelVersion, Samples
from charter.policy.config import PolicyConfig
from charter.policy.server import serve
from charter.registry import Facts, Kind, Registry, Status
from charter.registry.events import announcement
from charter.sampler.config import SamplerConfig
from charter.sampler.pacing import Pacer
from charter.sampler.worker import worker
from charter.v1 import events_pb2, policy_pb2, types_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceStub

OPTIONS = WorkerOptions(
    max_records=4, poll_timeout_s=0.05, room_interval_s=0.02, backoff=Backoff(0.01, 0.05), drain_s=5.0
)


@pytest.fixture
def bus(tmp_path):
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as opened:
        yield opened


def ask(bus, count, start=0):
    for i in range(start, start + count):
        message = types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content=f"What is {i}?")
        event = events_pb2.PromptEvent(prompt_id=f"p{i}", conversation=[message], created_unix_ms=5)
        bus.publish([encode("prompts", event.prompt_id, event)])


def rollouts(bus):
    topic = "rollouts"
    records = [r for p in bus.bounds(topic) for r in bus.fetch(topic, p, 0, 10_000)]
    return [decode(r, events_pb2.RolloutEvent) for r in records]


@contextlib.asynccontextmanager
async def sampling(bus, policy, **fields):
    work = worker(bus, policy, SamplerConfig(**{"batch_size": 1000, **fields}), options=OPTIONS)
    running = asyncio.create_task(work.run())
    try:
        yield running
    finally:
        work.stop()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition, seconds=120):
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)


async def test_every_prompt_gets_k_answers_with_ids_logprobs_and_version(bus):
    model = Scripted(lambda p, s: f"answer {s.seed}", version="rl-000003-abc")
    ask(bus, 6)
    async with sampling(bus, model, answers=4, temperature=0.9, max_tokens=7):
        await until(lambda: len(rollouts(bus)) == 6)
    found = rollouts(bus)
    assert sorted(r.prompt_id for r in found) == [f"p{i}" for i in range(6)]
    one = found[0]
    assert len(one.answers) == 4
    assert list(one.prompt_token_ids) == [1, 2, 3]
    assert list(one.answers[0].logprobs) == [-0.5] * len(one.answers[0].token_ids)
    assert one.policy.version == "rl-000003-abc"
    assert one.temperature == pytest.approx(0.9)
    assert one.prompt_created_unix_ms == 5
    assert {(s.temperature, s.top_p, s.top_k, s.max_tokens) for s in model.samplings} == {(0.9, 1.0, 0, 7)}
    assert len({s.seed for s in model.samplings}) == 6


async def test_a_rollout_says_how_many_updates_are_behind_its_policy(bus, tmp_path):
    registry = Registry(tmp_path / "checkpoints")
    written = registry.write(Facts(Kind.RL, step=12), filler(1.0))
    bus.publish([announcement(written, registry.root, registry.set_status(written.id, Status.CANDIDATE))])
    ask(bus, 1)
    async with sampling(bus, Scripted(version=written.id)):
        await until(lambda: len(rollouts(bus)) == 1)
    assert rollouts(bus)[0].policy_step == 12


async def test_the_sampler_waits_when_the_trainer_is_behind_and_drops_nothing(bus):
    """Bound: (0 + 1) · 8 rollouts; the trainer then consumes 8, which makes room for 8 more."""
    ask(bus, 30)
    async with sampling(bus, Scripted(), max_staleness=0, batch_size=8):
        await until(lambda: len(rollouts(bus)) == 8)
        await asyncio.sleep(0.3)
        assert len(rollouts(bus)) == 8
        with bus.consumer("judge", ["rollouts"]) as judge:
            records = judge.poll(100, 1.0)
            judge.commit(
                records, [encode("preferences", r.key, events_pb2.PreferenceEvent()) for r in records]
            )
        await asyncio.sleep(0.3)
        assert len(rollouts(bus)) == 8, "labelled is not yet trained on"
        with bus.consumer("trainer", ["preferences"]) as trainer:
            trainer.commit(trainer.poll(100, 1.0))
        await until(lambda: len(rollouts(bus)) == 16)
        await asyncio.sleep(0.3)
        assert len(rollouts(bus)) == 16
    assert sum(lag.records for lag in bus.lag("sampler", ["prompts"])) == 14


async def test_several_samplers_leave_room_for_each_others_batches(bus):
    one = Pacer(bus, SamplerConfig(max_staleness=0, batch_size=8), 4)
    two = Pacer(bus, SamplerConfig(max_staleness=0, batch_size=8, samplers=2), 4)
    bus.publish([encode("rollouts", str(i), events_pb2.RolloutEvent()) for i in range(4)])
    assert one.has_room()
    assert not two.has_room()
    with pytest.raises(ConfigError, match="at least 1"):
        SamplerConfig(samplers=0)


async def test_a_policy_that_is_away_is_waited_for(bus):
    class Away(Scripted):
        left = 3

        async def generate(self, prompt, sampling, n=1):
            self.left -= 1
            if self.left > 0:
                raise BackendUnavailable("policy is away")
            return await super().generate(prompt, sampling, n)

    ask(bus, 1)
    async with sampling(bus, Away()):
        await until(lambda: len(rollouts(bus)) == 1)


async def test_a_policy_without_token_ids_stops_the_sampler_with_a_sentence(bus):
    class Blind(Scripted):
        async def generate(self, prompt, sampling, n=1):
            samples = await super().generate(prompt, sampling, n)
            return Samples(samples.completions, (), ModelVersion("remote"))

    ask(bus, 1)
    async with sampling(bus, Blind()) as running:
        with pytest.raises(BackendUnsupported, match="gives no token ids"):
            await asyncio.wait_for(running, 30)
    assert sum(lag.records for lag in bus.lag("sampler", ["prompts"])) == 1


async def test_a_prompt_that_is_sampled_again_after_a_crash_gets_the_same_rollout(bus):
    """The seed derives from the rollout's name: made again, it is drawn again with the same numbers."""
    ask(bus, 1)
    model = Scripted()
    hanging = Scripted(gate=asyncio.Event())
    work = worker(bus, hanging, SamplerConfig(batch_size=1000), member="one", options=OPTIONS)
    killed = asyncio.create_task(work.run())
    await until(lambda: hanging.samplings)
    killed.cancel()
    await asyncio.gather(killed, return_exceptions=True)
    async with sampling(bus, model):
        await until(lambda: len(rollouts(bus)) == 1)
    assert [s.seed for s in model.samplings] == [s.seed for s in hanging.samplings]


async def test_rollouts_carry_the_version_that_made_them_over_a_reload_under_load(bus, tmp_path):
    """A real policy server over gRPC: nothing is lost, and no rollout has answers of two versions."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    models = {
        name: Scripted(lambda p, s, name=name: f"{name} says so", version=name) for name in ("one", "two")
    }
    ask(bus, 60)
    config = PolicyConfig(model=f"local:{tmp_path / 'one'}", registry=str(tmp_path))
    opener = lambda uri: models[uri.rpartition("/")[2]]  # noqa: E731
    async with await serve(config, CollectorRegistry(), open_model=opener) as server:
        policy = open_model(f"grpc://{server.target}")
        async with sampling(bus, policy, answers=4):
            await until(lambda: len(rollouts(bus)) >= 8)
            async with rpc.channel(server.target) as channel:
                await PolicyServiceStub(channel).Reload(policy_pb2.ReloadRequest(checkpoint="two"))
            await until(lambda: len(rollouts(bus)) == 60)
        await policy.close()
    found = rollouts(bus)
    assert len({r.rollout_id for r in found}) == 60
    assert {r.policy.version for r in found} == {"one", "two"}
    for r in found:
        assert {a.text for a in r.answers} == {f"{r.policy.version} says so"}
