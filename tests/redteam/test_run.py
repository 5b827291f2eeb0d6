"""A red-team run: what it writes, how it goes on after a stop or a crash, and how it waits."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry
from tests.feedback_fixtures import CONSTITUTION, write_constitution
from tests.scripted import Scripted

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.bus.worker import Backoff
from charter.critic.config import CriticConfig
from charter.critic.server import serve as serve_critic
from charter.errors import (
    BackendError,
    BackendUnavailable,
    BackendUnsupported,
    BusError,
    ConfigError,
    ContextOverflow,
)
from charter.lm.base import ChatMessage, Role
from charter.redteam.config import RedTeamConfig
from charter.redteam.critics import InProcessCritic
from charter.redteam.pipeline import Run
from charter.redteam.prompts import RedTeamPrompt, collect, prompt_id
from charter.redteam.records import TOPIC, Revision
from charter.redteam.store import RunFolder
from charter.rpc.clients import CriticClient
from charter.v1 import events_pb2

CONFIG = RedTeamConfig(rounds=2, concurrency=4, rows_per_part=3, give_up_s=20)
DATA = Path(__file__).parents[3] / "shared" / "data"
QUICK = Backoff(0.01, 0.02)


def prompts(count: int) -> list[RedTeamPrompt]:
    turns = [(ChatMessage(Role.USER, f"How do I open door {i}?"),) for i in range(count)]
    return [RedTeamPrompt(prompt_id(t), t, f"test:{i}") for i, t in enumerate(turns)]


class Watcher:
    def __init__(self) -> None:
        self.finished, self.failed, self.waits = 0, [], []

    def on_finished(self, count):
        self.finished += count

    def on_failed(self, prompt, reason):
        self.failed.append((prompt.origin, reason))

    def on_waiting(self, reason):
        self.waits.append(reason)


@pytest.fixture
def bus(tmp_path):
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as bus:
        yield bus


def answer(prompt, sampling):
    return f"answer {sampling.seed % 10_000}"


async def run(bus, out, count, config=CONFIG, write=answer, watcher=None, model=None):
    model = model or Scripted(write)
    watcher = watcher or Watcher()
    with RunFolder(out, bus, config) as folder:
        work = Run(model, InProcessCritic(Scripted(answer), CONSTITUTION), folder, watcher, config, QUICK)
        return await work.work(prompts(count)), watcher


def events(bus) -> list[events_pb2.RevisionEvent]:
    return [
        decode(record, events_pb2.RevisionEvent)
        for partition in bus.bounds(TOPIC)
        for record in bus.fetch(TOPIC, partition, 0, 10_000)
    ]


def rows(out: Path) -> list[dict]:
    return [
        row for part in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(part).to_pylist()
    ]


def assert_each_prompt_once(bus, out, count) -> None:
    wanted = sorted(p.prompt_id for p in prompts(count))
    assert sorted(e.prompt_id for e in events(bus)) == wanted
    assert sorted(r["prompt_id"] for r in rows(out)) == wanted


async def test_every_step_is_kept_with_principles_and_digests(bus, tmp_path):
    outcome, watcher = await run(bus, tmp_path / "out", 7)
    assert (outcome.finished, outcome.failed, outcome.earlier, watcher.finished) == (7, 0, 0, 7)
    assert_each_prompt_once(bus, tmp_path / "out", 7)
    first = next(r for r in rows(tmp_path / "out") if r["prompt"] == "How do I open door 0?")
    assert first["conversation"] == [{"role": "user", "content": "How do I open door 0?"}]
    assert len(first["rounds"]) == 2
    assert {r["principle_id"] for r in first["rounds"]} <= {"kind", "honest", "calm"}
    assert first["revision"] == first["rounds"][-1]["revision"] != first["draft"]
    assert first["policy"] == {
        "version": "scripted",
        "digest": "digest of scripted",
        "tokenizer_digest": "tokenizer",
    }
    assert first["constitution_digest"] == CONSTITUTION.digest
    event = next(e for e in events(bus) if e.prompt_id == first["prompt_id"])
    assert event.revision_id == first["revision_id"]
    assert event.source == events_pb2.PROMPT_SOURCE_RED_TEAM
    assert [r.critique for r in event.rounds] == [r["critique"] for r in first["rounds"]]


async def test_the_same_seed_gives_the_same_rows_at_any_concurrency(bus, tmp_path):
    await run(bus, tmp_path / "a", 6)
    await run(bus, tmp_path / "b", 6, replace(CONFIG, concurrency=1))
    await run(bus, tmp_path / "c", 6, replace(CONFIG, seed=1))

    def texts(name):
        return sorted((r["prompt"], r["draft"], str(r["rounds"])) for r in rows(tmp_path / name))

    assert texts("a") == texts("b") != texts("c")


async def test_requests_are_concurrent_and_bounded(bus, tmp_path):
    model = Scripted(answer)
    await run(bus, tmp_path / "out", 12, model=model)
    assert 2 <= model.most_at_once <= CONFIG.concurrency


async def test_datasets_loads_the_folder(bus, tmp_path, monkeypatch):
    await run(bus, tmp_path / "out", 7)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path / "cache")
    for source in (
        {"path": "parquet", "data_dir": str(tmp_path / "out" / "data")},
        {"path": str(tmp_path / "out")},
    ):
        loaded = datasets.load_dataset(**source, split="train", cache_dir=cache)
        assert loaded.num_rows == 7
        assert loaded[0]["rounds"][0]["principle_id"]


@pytest.mark.parametrize("source", ["do-not-answer", "xstest", "simple-safety-tests"])
async def test_the_public_data_sets_run_through_as_they_are(source, bus, tmp_path):
    if not (DATA / source).is_dir():
        pytest.skip(f"{DATA / source} is not beside this checkout")
    asked = collect([str(DATA / source)]).prompts
    config = RedTeamConfig(rounds=1)
    with RunFolder(tmp_path / "out", bus, config) as folder:
        outcome = await Run(
            Scripted(answer), InProcessCritic(Scripted(answer), CONSTITUTION), folder, Watcher(), config
        ).work(asked)
    assert (outcome.finished, outcome.failed) == (len(asked), 0)
    assert {r["prompt"] for r in rows(tmp_path / "out")} == {p.conversation[-1].content for p in asked}
    assert len(events(bus)) == len(asked)


# Going on -------------------------------------------------------------------------------------------------


async def test_a_second_start_asks_only_for_what_is_new(bus, tmp_path):
    await run(bus, tmp_path / "out", 4)
    model = Scripted(answer)
    outcome, _ = await run(bus, tmp_path / "out", 9, model=model)
    assert (outcome.finished, outcome.earlier) == (5, 4)
    assert len(model.prompts) == 5
    assert_each_prompt_once(bus, tmp_path / "out", 9)


async def test_a_stop_keeps_what_is_finished_and_the_next_start_goes_on(bus, tmp_path):
    written = 0

    def write(prompt, sampling):
        nonlocal written
        written += 1
        if written == 6:
            work.stop()
        return answer(prompt, sampling)

    with RunFolder(tmp_path / "out", bus, CONFIG) as folder:
        work = Run(
            Scripted(write), InProcessCritic(Scripted(answer), CONSTITUTION), folder, Watcher(), CONFIG
        )
        outcome = await work.work(prompts(20))
    assert outcome.stopped
    assert 0 < outcome.finished < 20
    assert len(rows(tmp_path / "out")) == outcome.finished
    await run(bus, tmp_path / "out", 20)
    assert_each_prompt_once(bus, tmp_path / "out", 20)


async def test_rows_that_were_published_and_not_rendered_before_a_crash_are_rendered(bus, tmp_path):
    out = tmp_path / "out"
    await run(bus, out, 5)
    with RunFolder(out, bus, CONFIG) as folder:  # a crash right after the publish
        missing = [p for p in prompts(8) if p.prompt_id not in folder.done]
        published = [revision(folder, p) for p in missing]
        folder.publish(published)
    (out / "data" / ".revisions-00009.parquet.tmp").write_bytes(b"half a part")
    model = Scripted(answer)
    outcome, _ = await run(bus, out, 8, model=model)
    assert (outcome.finished, outcome.earlier, model.prompts) == (0, 8, [])
    assert_each_prompt_once(bus, out, 8)
    assert not list((out / "data").glob(".*"))


def revision(folder, prompt) -> Revision:
    version = Scripted().version
    return Revision(
        folder.revision_id(prompt.prompt_id),
        prompt.prompt_id,
        prompt.conversation,
        "draft",
        (),
        version,
        version,
        "",
        1,
    )


class Unsure:
    """A bus whose publish succeeds and says that it failed, every other time."""

    def __init__(self, bus):
        self._bus, self.calls = bus, 0

    def publish(self, messages):
        lies = self._bus.publish(messages)
        self.calls += 1
        if self.calls % 2:
            raise BackendUnavailable("the connection broke before the broker answered")
        return lies

    def __getattr__(self, name):
        return getattr(self._bus, name)


async def test_a_publish_of_unknown_outcome_doubles_nothing(bus, tmp_path):
    outcome, watcher = await run(Unsure(bus), tmp_path / "out", 9)
    assert outcome.finished == 9
    assert any("connection broke" in w for w in watcher.waits)
    assert_each_prompt_once(bus, tmp_path / "out", 9)


async def test_other_runs_on_the_same_topic_do_not_mix(bus, tmp_path):
    await asyncio.gather(run(bus, tmp_path / "a", 5), run(bus, tmp_path / "b", 5))
    assert len(events(bus)) == 10
    for name in "ab":
        assert len(rows(tmp_path / name)) == 5
        assert len({r["revision_id"].partition("/")[0] for r in rows(tmp_path / name)}) == 1


# What goes wrong ------------------------------------------------------------------------------------------


async def test_a_prompt_that_cannot_be_answered_is_reported_and_left_out(bus, tmp_path):
    def write(prompt, sampling):
        if "door 3" in prompt.messages[-1].content:
            raise ContextOverflow("the prompt has 900 tokens, and the context 512")
        if "door 4" in prompt.messages[-1].content:
            raise BackendError("damaged")
        return answer(prompt, sampling)

    outcome, watcher = await run(bus, tmp_path / "out", 6, write=write)
    assert (outcome.finished, outcome.failed) == (4, 2)
    assert sorted(o for o, _ in watcher.failed) == ["test:3", "test:4"]


async def test_an_empty_answer_is_drawn_again(bus, tmp_path):
    seeds = []

    def write(prompt, sampling):
        seeds.append(sampling.seed)
        return "" if len(seeds) == 1 else answer(prompt, sampling)

    outcome, _ = await run(bus, tmp_path / "out", 1, write=write)
    assert outcome.finished == 1
    assert seeds[0] != seeds[1]


async def test_a_server_that_is_away_is_waited_for(bus, tmp_path):
    failures = 0

    def write(prompt, sampling):
        nonlocal failures
        failures += 1
        if failures < 10:
            raise BackendUnavailable("policy cannot be reached")
        return answer(prompt, sampling)

    outcome, watcher = await run(bus, tmp_path / "out", 5, write=write)
    assert (outcome.finished, outcome.failed) == (5, 0)
    assert "policy cannot be reached" in watcher.waits
    assert watcher.waits[-1] == ""


async def test_a_server_that_stays_away_ends_the_run_with_what_is_finished(bus, tmp_path):
    def write(prompt, sampling):
        if "door 7" in prompt.messages[-1].content:
            raise BackendUnavailable("policy cannot be reached")
        return answer(prompt, sampling)

    outcome, _ = await run(bus, tmp_path / "out", 8, replace(CONFIG, give_up_s=0.2), write=write)
    assert "policy cannot be reached" in outcome.gave_up
    assert outcome.finished == len(rows(tmp_path / "out")) == 7


@pytest.mark.parametrize("error", [ConfigError("wrong option"), BackendUnsupported("cannot sample")])
async def test_what_never_can_work_ends_the_run_at_once(error, bus, tmp_path):
    def write(prompt, sampling):
        raise error

    with pytest.raises(type(error), match=str(error)):
        await run(bus, tmp_path / "out", 8, write=write)


class Full:
    """A bus that refuses to publish."""

    def __init__(self, bus):
        self._bus = bus

    def publish(self, messages):
        raise BusError("the message is larger than the topic allows")

    def __getattr__(self, name):
        return getattr(self._bus, name)


async def test_a_log_that_refuses_ends_the_run_and_does_not_hang(bus, tmp_path):
    with pytest.raises(BusError, match="larger than"):
        await run(Full(bus), tmp_path / "out", 50)


async def test_a_run_keeps_its_options_and_its_bus(bus, tmp_path):
    await run(bus, tmp_path / "out", 2)
    with pytest.raises(ConfigError, match="was begun with rounds 2, and now it is 3"):
        await run(bus, tmp_path / "out", 2, replace(CONFIG, rounds=3))
    with (
        open_bus(f"sqlite:{tmp_path / 'other.db'}") as other,
        pytest.raises(ConfigError, match="was made with another bus"),
    ):
        await run(other, tmp_path / "out", 2)


async def test_two_processes_do_not_work_in_one_folder(bus, tmp_path):
    with (
        RunFolder(tmp_path / "out", bus, CONFIG),
        pytest.raises(ConfigError, match="another run works here"),
        RunFolder(tmp_path / "out", bus, CONFIG),
    ):
        pass


@pytest.mark.parametrize("file", ["revisions-00000.parquet", ".run.json"])
async def test_a_damaged_folder_is_refused(file, bus, tmp_path):
    await run(bus, tmp_path / "out", 2)
    found = next(p for p in (tmp_path / "out").rglob("*") if p.name == file)
    found.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="name another folder"):
        await run(bus, tmp_path / "out", 2)


async def test_parquet_of_something_else_is_not_mixed_in(bus, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match="of something else"):
        await run(bus, tmp_path / "out", 2)


# Over the wire --------------------------------------------------------------------------------------------


async def test_a_critic_server_gives_the_same_rows_as_one_in_process(bus, tmp_path):
    write_constitution(tmp_path / "c.yaml")
    config = CriticConfig(model="x", constitution=str(tmp_path / "c.yaml"))
    await run(bus, tmp_path / "here", 4)
    async with (
        await serve_critic(config, CollectorRegistry(), open_model=lambda uri: Scripted(answer)) as server,
        CriticClient(server.target) as critic,
    ):
        with RunFolder(tmp_path / "there", bus, CONFIG) as folder:
            await Run(Scripted(answer), critic, folder, Watcher(), CONFIG).work(prompts(4))

    def content(name):
        return sorted(
            (r["prompt"], r["draft"], str(r["rounds"]), str(r["critic"])) for r in rows(tmp_path / name)
        )

    assert content("here") == content("there")
