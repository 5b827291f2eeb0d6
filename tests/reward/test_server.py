"""The reward service over loopback: real bus, real learner process, real gRPC."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.reward.conftest import make_event, make_pair

from charter import rpc
from charter.bus import open_bus
from charter.bus.messages import encode
from charter.errors import BackendUnavailable, RequestError
from charter.finetune.checkpoints import Vocabulary
from charter.finetune.run import Progress, Stopped
from charter.registry import Registry, Status
from charter.registry.registry import REWARD
from charter.reward import server
from charter.reward.config import RewardConfig
from charter.reward.learner import LearnerDiedError, Tell
from charter.reward.promotion import Verdict
from charter.reward.rounds import Job, run
from charter.reward.scorer import Answer, open_scorer
from charter.v1 import reward_pb2
from charter.v1.reward_pb2_grpc import RewardServiceStub


def publish(bus: str, vocabulary: Vocabulary, count: int, start: int = 0) -> None:
    with open_bus(bus) as opened:
        events = [make_event(vocabulary, n) for n in range(start, start + count)]
        opened.publish([encode("preferences", e.prompt_id, e) for e in events])


class InProcess:
    """Does rounds in this process, where TRL is imported once for all tests; `test_kill` has the real one."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._stopped = False
        self.deaths = 0
        """How often it is to die in the middle of a round."""

    def arm(self) -> None:
        self._stopped = False

    def train(self, job: Job, target: Path, tell: Tell) -> bool:
        def report(progress: Progress) -> None:
            if self._stopped:
                raise Stopped
            if self.deaths and progress.step == 2:
                self.deaths -= 1
                raise LearnerDiedError("killed")
            tell("training", progress.step, progress.steps, progress.loss)

        try:
            run(job, self._config, target, report=report, evaluating=lambda: tell("evaluating", 0, 0, 0.0))
        except Stopped:
            return False
        return True

    def stop(self) -> None:
        self._stopped = True

    close = stop


class Served:
    """A server with a client."""

    def __init__(self, config: RewardConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.registry = CollectorRegistry()

    async def __aenter__(self) -> Served:
        self.learner = InProcess(self.config)
        self._running = await server.serve(self.config, self.registry, learner=self.learner)
        self._channel = rpc.channel(self._running.target)
        self.stub = RewardServiceStub(await self._channel.__aenter__())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.__aexit__(None, None, None)
        await self._running.drain()

    async def status(self) -> reward_pb2.RewardServiceStatusResponse:
        return await self.stub.Status(reward_pb2.RewardServiceStatusRequest())

    async def labels(self, count: int) -> None:
        """Waits until so many labels are stored."""
        while (await self.status()).labels_seen < count:
            await asyncio.sleep(0.05)

    async def round(self, follow_only: bool = True) -> list[reward_pb2.TrainResponse]:
        """The news of the round under way, or of one that is asked for."""
        return [n async for n in self.stub.Train(reward_pb2.TrainRequest(follow_only=follow_only))]

    async def ended(self, rounds: int) -> None:
        """Waits until so many rounds have ended."""
        while f"charter_reward_round {float(rounds)}" not in generate_latest(self.registry).decode():
            await asyncio.sleep(0.05)

    async def score(self, *answers: tuple[tuple[int, ...], tuple[int, ...]], digest: str | None = None):
        return await self.stub.Score(
            reward_pb2.RewardServiceScoreRequest(
                answers=[reward_pb2.ScoredAnswer(prompt_token_ids=p, answer_token_ids=a) for p, a in answers],
                tokenizer_digest=self.vocabulary.digest if digest is None else digest,
            )
        )


@pytest.fixture
def bus(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path / 'bus.db'}"


@pytest.fixture(scope="module")
def trained(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> RewardConfig:
    """A folder in which a first round has ended."""
    from tests.reward.conftest import small_config

    folder = tmp_path_factory.mktemp("trained")
    bus = f"sqlite:{folder / 'bus.db'}"
    config = replace(small_config(folder / "reward", str(vocabulary.folder)), bus=bus)
    publish(bus, vocabulary, 160)

    async def first_round() -> None:
        async with Served(config, vocabulary) as served:
            await served.ended(1)

    asyncio.run(first_round())
    return config


@pytest.fixture
async def served(trained: RewardConfig, vocabulary: Vocabulary) -> AsyncIterator[Served]:
    async with Served(trained, vocabulary) as opened:
        yield opened


async def test_before_the_first_round_scores_are_unavailable_and_say_what_is_missing(
    config: RewardConfig, vocabulary: Vocabulary
) -> None:
    async with Served(config, vocabulary) as served:
        with pytest.raises(BackendUnavailable, match="0 labels so far"):
            await served.score(((5, 6), (7, 4)))
        assert [n.state for n in await served.round(follow_only=False)] == ["collecting"]
        status = await served.status()
        assert (status.state, status.labels_seen, status.model.version) == ("collecting", 0, "")


async def test_labels_on_the_bus_make_a_model_that_scores_better_answers_higher(
    served: Served, vocabulary: Vocabulary
) -> None:
    status = await served.status()
    assert status.heldout_accuracy > 0.9
    assert status.labels_seen == 160
    pairs = [make_pair(vocabulary, n) for n in range(5000, 5060)]
    scores = (
        await served.score(*[(p.prompt_ids, a) for p in pairs for a in (p.answer_a, p.answer_b)])
    ).scores
    right = [
        (a > b) == (p.probability > 0.5) for p, a, b in zip(pairs, scores[::2], scores[1::2], strict=True)
    ]
    assert sum(right) >= 54
    assert abs(sum(scores) / len(scores)) < 0.5
    assert max(map(abs, scores)) <= 4


async def test_scores_name_the_model_and_the_registry_has_it(served: Served, vocabulary: Vocabulary) -> None:
    pair = make_pair(vocabulary, 9)
    version = (await served.score((pair.prompt_ids, pair.answer_a))).model
    manifest = Registry(served.config.folder / "models").serving(REWARD)
    assert version.version == manifest.id
    assert version.digest == manifest.weights_digest
    assert version.tokenizer_digest == vocabulary.digest
    assert manifest.facts.labels.by_judge == {"judge": manifest.facts.labels.count}
    assert (served.config.folder / "current").resolve().name == manifest.id


async def test_an_answer_ends_at_its_first_stop_token(served: Served, vocabulary: Vocabulary) -> None:
    pair, end = make_pair(vocabulary, 9), vocabulary.end_id
    whole, longer, cut, empty = (
        await served.score(
            (pair.prompt_ids, pair.answer_a),
            (pair.prompt_ids, (*pair.answer_a, 9, 9, end)),
            (pair.prompt_ids, pair.answer_a[:-1]),
            (pair.prompt_ids, (end,)),
        )
    ).scores
    assert longer == pytest.approx(whole, abs=1e-5)
    assert cut == empty == served.config.rule.unfinished


async def test_what_cannot_be_scored_is_refused_with_a_sentence(
    served: Served, vocabulary: Vocabulary
) -> None:
    fine = ((5, 6), (7, vocabulary.end_id))
    with pytest.raises(RequestError, match="tokenizer 0123"):
        await served.score(fine, digest="0123")
    with pytest.raises(RequestError, match="not named"):
        await served.score(fine, digest="")
    with pytest.raises(RequestError, match="answer 1 has no prompt"):
        await served.score(fine, ((), (7,)))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        await served.score(((5, 999_999), (7,)))
    with pytest.raises(RequestError, match="the reward model reads 512"):
        await served.score(((5,) * 600, (7,)))
    assert list((await served.score()).scores) == []


async def test_a_restart_scores_the_same_without_training_again(
    served: Served, vocabulary: Vocabulary
) -> None:
    pairs = [make_pair(vocabulary, n) for n in range(8)]
    answers = [(p.prompt_ids, p.answer_a) for p in pairs]
    before = list((await served.score(*answers)).scores)
    async with Served(replace(served.config, bus=""), vocabulary) as again:
        assert list((await again.score(*answers)).scores) == before
        assert (await again.status()).heldout_accuracy > 0.9


async def test_scores_are_given_while_a_round_trains_and_its_news_are_streamed(
    config: RewardConfig, vocabulary: Vocabulary, bus: str
) -> None:
    config = replace(config, bus=bus)
    publish(bus, vocabulary, 160)
    async with Served(config, vocabulary) as served:
        await served.ended(1)
        publish(bus, vocabulary, 70, start=160)
        await served.labels(230)
        news = asyncio.create_task(served.round(follow_only=False))
        pair = make_pair(vocabulary, 9)
        given, versions = 0, set()
        while not news.done():
            versions = {
                (await served.score((pair.prompt_ids, pair.answer_a))).model.version for _ in range(3)
            }
            given += 1
            await asyncio.sleep(0.02)
        assert given > 5
        states = [n.state for n in await news]
        assert states[0] == "training"
        assert "evaluating" in states
        assert states[-1] in ("in_force", "kept_old")
        last = (await news)[-1]
        assert last.heldout_accuracy > 0.8
        assert "held-out accuracy" in last.message
        steps = [n.step for n in await news if n.state == "training" and n.steps]
        assert steps == sorted(steps)
        assert versions <= {m.id for m in Registry(config.folder / "models").list()}


async def test_a_worse_model_does_not_come_into_force(
    trained: RewardConfig, vocabulary: Vocabulary, tmp_path: Path, bus: str
) -> None:
    """The labels turn round, but only those that are trained on; held-out ones say that this is worse."""
    import shutil

    from charter.reward.window import is_heldout

    shutil.copytree(trained.folder, tmp_path / "reward", symlinks=True)
    shutil.copyfile(Path(trained.bus.removeprefix("sqlite:")), tmp_path / "bus.db")
    with open_bus(bus) as opened:
        events = [make_event(vocabulary, n) for n in range(160, 240)]
        for event in events:
            if not is_heldout(event.prompt_id, trained.window.heldout_share):
                event.probability_a = 1 - event.probability_a
        opened.publish([encode("preferences", e.prompt_id, e) for e in events])
    window = replace(trained.window, newest=56, replay=0)
    tuning = replace(trained.tuning, epochs=12)
    config = replace(trained, folder=tmp_path / "reward", bus=bus, window=window, tuning=tuning)
    async with Served(config, vocabulary) as served:
        before = (await served.status()).model.version
        await served.ended(2)
        status = await served.status()
        assert status.state == "kept_old"
        assert status.model.version == before
        assert status.heldout_accuracy > 0.8
        assert (
            'charter_reward_rounds_total{outcome="kept_old"} 1.0' in generate_latest(served.registry).decode()
        )
    assert Registry(config.folder / "models").serving(REWARD).id == before


async def test_a_round_can_be_stopped_and_asked_for_again(
    config: RewardConfig, vocabulary: Vocabulary, bus: str
) -> None:
    config = replace(config, bus=bus, tuning=replace(config.tuning, epochs=400))
    publish(bus, vocabulary, 160)
    async with Served(config, vocabulary) as served:
        await served.labels(160)
        assert not [n async for n in _until_step(served)]
        assert (await served.stub.Stop(reward_pb2.StopRequest())).was_training
        while (await served.status()).state != "collecting":
            await asyncio.sleep(0.05)
        assert not (await served.stub.Stop(reward_pb2.StopRequest())).was_training
        publish(bus, vocabulary, 80, start=160)
        await served.labels(240)
        assert (await served.status()).state == "collecting"
        asked = served.stub.Train(reward_pb2.TrainRequest())
        async for item in asked:
            if item.steps:
                break
        asked.cancel()
        assert (await served.stub.Stop(reward_pb2.StopRequest())).was_training
    assert Registry(config.folder / "models").list() == ()


async def _until_step(served: Served):
    while True:
        async for item in served.stub.Train(reward_pb2.TrainRequest(follow_only=True)):
            if item.steps:
                return
        await asyncio.sleep(0.05)
    yield


async def test_a_round_is_begun_again_when_the_learner_dies(
    config: RewardConfig, vocabulary: Vocabulary, bus: str
) -> None:
    async with Served(replace(config, bus=bus), vocabulary) as served:
        served.learner.deaths = 2
        publish(bus, vocabulary, 160)
        await served.ended(1)
        assert (await served.status()).state == "in_force"
        assert served.learner.deaths == 0


async def test_a_round_that_fails_for_good_is_given_up_and_the_reason_is_told(
    config: RewardConfig, vocabulary: Vocabulary, bus: str
) -> None:
    tuning = replace(config.tuning, learning_rate=1e30, warmup_share=0.0, log_every=1)
    async with Served(replace(config, bus=bus, tuning=tuning), vocabulary) as served:
        publish(bus, vocabulary, 160)
        while (await served.status()).state != "kept_old":
            await asyncio.sleep(0.05)
        assert "not finite" in (await served.round())[-1].message
        with pytest.raises(BackendUnavailable):
            await served.score(((5, 6), (7, 4)))


async def test_a_full_disk_leaves_the_old_model_in_force_and_the_round_is_done_when_there_is_room(
    trained: RewardConfig, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import shutil

    from charter.reward import store

    shutil.copytree(trained.folder, tmp_path / "reward", symlinks=True)
    learner = replace(trained.learner, patience_s=0.2)
    config = replace(trained, folder=tmp_path / "reward", bus="", learner=learner)

    def full(source: Path, into: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with Served(config, vocabulary) as served:
        before = (await served.status()).model.version
        with monkeypatch.context() as patched:
            patched.setattr(store, "_copy", full)
            patched.setattr("charter.reward.service.decide", lambda *_: Verdict(True, "better"))
            news = await served.round(follow_only=False)
            assert "No space left on device" in news[-1].message
            assert (await served.status()).model.version == before
            assert Registry(config.folder / "models").serving(REWARD).id == before
        await served.ended(2)
        assert not (config.folder / "job.json").exists()


async def test_labels_of_another_tokenizer_and_nonsense_go_to_the_dead_letters(
    config: RewardConfig, vocabulary: Vocabulary, bus: str
) -> None:
    foreign, odd, none, fine = (make_event(vocabulary, n) for n in range(4))
    foreign.policy.tokenizer_digest = "0123456789abcdef"
    odd.probability_a = 1.5
    del none.answer_a.token_ids[:]
    with open_bus(bus) as opened:
        opened.publish([encode("preferences", e.prompt_id, e) for e in (foreign, odd, none, fine)])
        async with Served(replace(config, bus=bus), vocabulary) as served:
            await served.labels(1)
            while len(opened.fetch("dead-letters", 0, 0)) < 3:
                await asyncio.sleep(0.05)
            assert (await served.status()).labels_seen == 1


async def test_people_and_judges_labels_mix_and_what_is_too_long_is_left_out(
    config: RewardConfig, vocabulary: Vocabulary, bus: str
) -> None:
    from charter.lm.base import ChatMessage, Role
    from charter.reward.human import HumanPair

    asked = (ChatMessage(Role.USER, "What about the cup?"),)
    short = HumanPair(asked, "I will help.", "No.").to_proto(1.0, 1)
    long = HumanPair(asked, "I will help. " * 200, "No.").to_proto(1.0, 1)
    earlier = (ChatMessage(Role.USER, "x " * 900), ChatMessage(Role.ASSISTANT, "Well."), *asked)
    trimmed = HumanPair(earlier, "I will help.", "No.").to_proto(1.0, 1)
    with open_bus(bus) as opened:
        events = [short, short, long, trimmed, make_event(vocabulary, 1)]
        opened.publish([encode("preferences", e.prompt_id, e) for e in events])
    async with Served(replace(config, bus=bus), vocabulary) as served:
        await served.labels(3)
        while 'reason="too_long"} 1.0' not in generate_latest(served.registry).decode():
            await asyncio.sleep(0.05)
        assert (await served.status()).labels_seen == 3


async def test_a_fresh_folder_reads_the_labels_that_the_group_has_passed(
    trained: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    config = replace(trained, folder=tmp_path / "fresh", schedule=replace(trained.schedule, first=9999))
    async with Served(config, vocabulary) as served:
        await served.labels(160)


async def test_a_reward_model_can_be_given(
    trained: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    given = Registry(trained.folder / "models")
    folder = given.resolve(given.serving(REWARD).id)
    config = replace(trained, init=str(folder), folder=tmp_path / "other", bus="")
    pair = make_pair(vocabulary, 9)
    async with Served(config, vocabulary) as served:
        score = (await served.score((pair.prompt_ids, pair.answer_a))).scores[0]
    scorer = open_scorer(folder, trained.rule, 4096)
    assert score == pytest.approx(
        scorer.score([Answer(pair.prompt_ids, pair.answer_a)], vocabulary.digest)[0]
    )
    other = Registry(config.folder / "models")
    assert other.status(other.serving(REWARD).id).status is Status.SERVING


def test_the_server_module_imports_without_torch_and_trl() -> None:
    heavy = "torch", "transformers", "trl"
    script = f"import sys, charter.reward.server; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
