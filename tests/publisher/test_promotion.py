"""Promotion and roll-back: crash-safe, over several policy servers, under load."""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry
from tests.registry.conftest import filler
from tests.scripted import Scripted
from typer.testing import CliRunner

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.cli import app
from charter.errors import BackendUnavailable, CharterError, CheckpointError, ConfigError
from charter.lm.base import ChatMessage, ModelInfo, ModelVersion, Prompt, Role, Sampling
from charter.lm.policy_client import PolicyModel
from charter.policy.config import PolicyConfig
from charter.policy.server import serve
from charter.publisher.cli import previous
from charter.publisher.promotion import ROLLS_BACK, Promoter, register_initial
from charter.registry import Facts, Kind, Registry, Status
from charter.v1 import events_pb2

ASKED = Prompt((ChatMessage(Role.USER, "How do I open the door?"),))


class Policy:
    """A policy server as the promoter sees it; fails when it is told to."""

    def __init__(self, version=""):
        self.version, self.failure, self.reloads = version, None, []

    async def info(self):
        if isinstance(self.failure, BackendUnavailable):
            raise self.failure
        return ModelInfo(ModelVersion(self.version), 512, can_score=True, has_token_ids=True)

    async def reload(self, source):
        if self.failure:
            raise self.failure
        self.reloads.append(source)
        before, self.version = self.version, source
        return ModelVersion(before), ModelVersion(source)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "checkpoints")


@pytest.fixture
def checkpoints(registry):
    made = [registry.write(Facts(Kind.RL, step=i), filler(i)).id for i in range(1, 4)]
    registry.set_status(made[0], Status.SERVING, "first")
    return made


@pytest.fixture
def bus(tmp_path):
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as opened:
        yield opened


def announced(bus):
    records = bus.fetch("checkpoints", 0, 0, 1000)
    events = [decode(r, events_pb2.CheckpointEvent) for r in records]
    return {e.checkpoint_id: e.status for e in events}


async def test_a_promotion_reaches_every_server_the_history_and_the_bus(registry, checkpoints, bus):
    one, two, _ = checkpoints
    policies = [Policy(one), Policy(one)]
    change = await Promoter(registry, policies, bus).promote(two, "better", {"harm": 0.1})
    assert change.status is Status.SERVING
    assert [p.version for p in policies] == [two, two]
    assert registry.serving().id == two
    assert [c.status for c in registry.history(two)] == [Status.PROMOTING, Status.SERVING]
    assert announced(bus) == {two: "serving", one: "retired"}


async def test_a_promotion_that_a_server_interrupts_is_finished_by_whoever_comes_next(registry, checkpoints):
    one, two, _ = checkpoints
    policies = [Policy(one), Policy(one)]
    policies[1].failure = BackendUnavailable("away")
    with pytest.raises(BackendUnavailable):
        await Promoter(registry, policies, None).promote(two, "better", {"harm": 0.1})
    assert registry.serving().id == one, "not in force until all are told"
    policies[1].failure = None
    await Promoter(Registry(registry.root), policies, None).recover()
    assert [p.version for p in policies] == [two, two]
    assert registry.serving().id == two
    assert registry.status(two).measurements == {"harm": 0.1}
    await Promoter(registry, policies, None).recover()
    assert len(registry.history(two)) == 2, "there is nothing left to finish"


async def test_a_checkpoint_that_a_server_refuses_is_undone_everywhere_and_rejected(registry, checkpoints):
    one, two, _ = checkpoints
    policies = [Policy(one), Policy(one)]
    policies[1].failure = CheckpointError("weights do not fit")
    change = await Promoter(registry, policies, None).promote(two, "better", {})
    assert change.status is Status.REJECTED
    assert "weights do not fit" in change.reason
    assert policies[0].version == one
    assert registry.serving().id == one


async def test_a_checkpoint_that_was_damaged_meanwhile_reaches_no_server(registry, checkpoints, tmp_path):
    (tmp_path / "checkpoints" / checkpoints[1] / "config.json").write_text("{}")
    policy = Policy(checkpoints[0])
    change = await Promoter(Registry(registry.root), [policy], None).promote(checkpoints[1], "better", {})
    assert change.status is Status.REJECTED
    assert policy.reloads == []


async def test_a_restarted_server_is_told_what_is_in_force(registry, checkpoints):
    policies = [Policy(checkpoints[0]), Policy("seed")]
    promoter = Promoter(registry, policies, None)
    assert await promoter.converge() == 1
    assert policies[1].version == checkpoints[0]
    assert await promoter.converge() == 0


async def test_a_server_that_is_away_does_not_keep_the_others_from_being_told(registry, checkpoints):
    policies = [Policy("seed"), Policy("seed")]
    policies[0].failure = BackendUnavailable("away")
    with pytest.raises(BackendUnavailable):
        await Promoter(registry, policies, None).converge()
    assert policies[1].version == checkpoints[0]


async def test_a_rollback_interrupted_at_any_point_ends_the_same(registry, checkpoints):
    one, two, three = checkpoints
    registry.set_status(two, Status.SERVING)
    registry.set_status(three, Status.SERVING)
    policy = Policy(three)
    policy.failure = BackendUnavailable("away")
    promoter = Promoter(registry, [policy], None)
    with pytest.raises(BackendUnavailable):
        await promoter.promote(two, "complaints", {ROLLS_BACK: three})
    policy.failure = None
    registry.set_status(three, Status.ROLLED_BACK, "complaints")  # as if killed right after this
    await promoter.recover()
    assert registry.serving().id == two
    assert registry.status(three).status is Status.ROLLED_BACK
    assert registry.status(three).reason == "complaints"
    assert registry.status(one).status is Status.RETIRED
    assert policy.version == two


def test_the_one_before_is_never_one_that_was_taken_out(registry, checkpoints):
    one, two, three = checkpoints
    for name in (two, three, two):
        registry.set_status(name, Status.SERVING)
    registry.set_status(three, Status.ROLLED_BACK)
    assert previous(registry).id == one
    registry.set_status(one, Status.ROLLED_BACK)
    with pytest.raises(ConfigError, match="served before"):
        previous(registry)


def test_the_first_model_is_registered_once_and_never_over_another(registry, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    filler(5.0)(folder)
    (folder / "README.md").write_text("left out")
    first = register_initial(registry, str(folder))
    assert registry.serving() == first
    assert "README.md" not in first.files
    assert register_initial(registry, "no such folder") == first
    assert len(registry.history()) == 1


# Commands --------------------------------------------------------------------------------------------------


def charter(*args):
    return CliRunner().invoke(app, list(args))


@contextlib.asynccontextmanager
async def policy_server(registry, models):
    config = PolicyConfig(model=f"local:{registry.root}", registry=registry.root)
    opener = lambda uri: models[uri.rpartition("/")[2]]  # noqa: E731
    models["checkpoints"] = Scripted(version="seed")
    async with await serve(config, CollectorRegistry(), open_model=opener) as server:
        yield server.target


async def test_promote_and_rollback_from_the_command_line(registry, checkpoints):
    one, two, _ = checkpoints
    models = {name: Scripted(version=name) for name in checkpoints}
    async with policy_server(registry, models) as target:
        common = ["--registry", registry.root, "--policy", target]
        done = await asyncio.to_thread(charter, "promote", two[:9], "--reason", "looks good", *common)
        assert done.exit_code == 0, done.output
        assert registry.serving().id == two
        assert registry.status(two).reason == "looks good"
        models[one] = Scripted(version=one)
        done = await asyncio.to_thread(charter, "rollback", "--reason", "too blunt", *common)
        assert done.exit_code == 0, done.output
        assert f"{two} was rolled back" in done.output
        model = PolicyModel(target)
        assert (await model.info()).model.version == one
        await model.close()
    assert registry.status(two).reason == "too blunt"


def test_without_a_publisher_the_decision_stays_and_is_said(registry, checkpoints):
    done = charter("promote", checkpoints[1], "--registry", registry.root, "--wait", "0.3")
    assert isinstance(done.exception, BackendUnavailable)
    assert "no publisher carried it out" in str(done.exception)
    assert registry.status(checkpoints[1]).status is Status.PROMOTING


def test_a_reward_model_is_not_promoted(registry, checkpoints):
    reward = registry.write(Facts(Kind.REWARD, step=1), filler(9))
    done = charter("promote", reward.id, "--registry", registry.root)
    assert isinstance(done.exception, CharterError)
    assert "reward model" in str(done.exception)


# Under load ------------------------------------------------------------------------------------------------


async def test_promotion_under_load_drops_no_request_and_mixes_no_versions(registry, checkpoints):
    models = {name: Scripted(lambda p, s, n=name: f"{n} " * 8, version=name) for name in checkpoints}
    async with policy_server(registry, models) as target:
        policy = PolicyModel(target)
        promoter = Promoter(registry, [policy], None)
        await promoter.converge()
        answers, stop = [], asyncio.Event()

        async def user():
            while not stop.is_set():
                answers.append((await policy.generate(ASKED, Sampling())).completions[0])

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(user())
            for name in checkpoints[1:]:
                while not answers or answers[-1].model.version == name:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                await promoter.promote(name, "better", {})
            count = len(answers)
            while len(answers) < count + 16:
                await asyncio.sleep(0.01)
            stop.set()
        await policy.close()
    assert {a.model.version for a in answers} == set(checkpoints)
    assert all(a.text == f"{a.model.version} " * 8 for a in answers)
