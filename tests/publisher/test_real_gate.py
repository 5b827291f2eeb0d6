"""The whole publisher with the seed model as serving model, reference, critic and judge.

Three candidates against the seed model, which helps and also complies with harm: word salad, which harms
nobody; a model that refuses everything; and one that refuses harm and helps with the rest.
"""

import asyncio
import contextlib
import random

import pytest
from prometheus_client import CollectorRegistry
from tests.registry.conftest import filler
from tests.scripted import Scripted

from charter.bus import open_bus
from charter.critic.config import CriticConfig
from charter.critic.server import serve as serve_critic
from charter.judge.config import JudgeConfig
from charter.judge.server import serve as serve_judge
from charter.lm import open_model
from charter.lm.base import Scored
from charter.publisher.config import GateConfig, PublisherConfig, SuiteConfig
from charter.publisher.gate import PromptClass
from charter.publisher.measuring import LocalArena
from charter.publisher.metrics import PublisherMetrics
from charter.publisher.suite import load, repetition
from charter.publisher.worker import Publisher
from charter.registry import Facts, Kind, Registry, Status
from charter.registry.events import announcement
from charter.rpc.clients import CriticClient, JudgeClient
from charter.seedmodel import corpus
from charter.seedmodel.kinds import Kind as AnswerKind
from charter.seedmodel.world import RequestClass, Split, sample

COUNT = 16
SUITE = SuiteConfig()
GATE = GateConfig(looks=(10, COUNT), judged=6, kl_samples=12, concurrency=64)
REQUESTS = {r.text: r for kind in RequestClass for r in sample(SUITE.seed, kind, Split.HELDOUT, COUNT)}


def writes(kind_for):
    """A model that answers each held-out request with an answer of this kind."""

    def write(prompt, sampling):
        request = REQUESTS[prompt.messages[-1].content]
        return corpus.write(random.Random(sampling.seed), request, kind_for(request))

    return Scripted(write, weigh=lambda prompt, text: -1.0)


def salad():
    def write(prompt, sampling):
        rng = random.Random(sampling.seed)
        words = " ".join(request.text for request in REQUESTS.values()).split()
        return " ".join(rng.choice(words) for _ in range(25)) + "."

    return Scripted(write, weigh=lambda prompt, text: -1.0)


def better(request):
    return AnswerKind.EXPLAINS if request.kind is RequestClass.HARMFUL else AnswerKind.RIGHT


class Candidates(LocalArena):
    """Fakes for the candidates' ids, the real seed model for its own."""

    def __init__(self, registry, fakes):
        super().__init__(registry, open_model)
        self.fakes = fakes

    @contextlib.asynccontextmanager
    async def model(self, checkpoint_id):
        if checkpoint_id in self.fakes:
            yield self.fakes[checkpoint_id]
            return
        async with super().model(checkpoint_id) as model:
            yield model


@contextlib.asynccontextmanager
async def publisher(registry, bus, fakes, feedback):
    metrics = CollectorRegistry()
    opener = lambda uri: feedback  # noqa: E731
    async with (
        await serve_critic(
            CriticConfig(constitution="seed"), CollectorRegistry(), open_model=opener
        ) as critic,
        await serve_judge(JudgeConfig(constitution="seed"), CollectorRegistry(), open_model=opener) as judge,
    ):
        made = Publisher(
            PublisherConfig(registry=registry.root, gate=GATE, converge_s=0.2),
            bus,
            registry,
            PublisherMetrics.of(metrics),
            policies=[],
            learners=[],
            arena=Candidates(registry, fakes),
            critic=CriticClient(critic.target),
            judge=JudgeClient(judge.target),
        )
        running = asyncio.create_task(made.run())
        try:
            yield metrics
        finally:
            made.stop()
            await running
            await made.close()


async def decided(registry, checkpoint_id):
    async with asyncio.timeout(240):
        while True:
            change = registry.status(checkpoint_id)
            if change.status not in (Status.CANDIDATE, Status.PROMOTING):
                return change
            await asyncio.sleep(0.1)


@pytest.mark.timeout(900)  # 13 seconds of a processor, on whatever share of it there is
async def test_word_salad_and_refusing_everything_do_not_pass_and_a_better_model_does(tmp_path):
    from charter.publisher.promotion import register_initial

    registry = Registry(tmp_path / "checkpoints")
    seed = register_initial(registry, "seed")
    made = [registry.write(Facts(Kind.RL, seed.id, step=i), filler(i)).id for i in (1, 2, 3)]
    fakes = dict(zip(made, [salad(), writes(lambda r: AnswerKind.EXPLAINS), writes(better)], strict=True))
    outcomes = []
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as bus:
        async with publisher(registry, bus, fakes, open_model("local:seed")) as metrics:
            for name in made:
                change = registry.set_status(name, Status.CANDIDATE)
                bus.publish([announcement(registry.get(name), registry.root, change)])
                outcomes.append(await decided(registry, name))
    hot, refusing, good = outcomes
    assert hot.status is Status.REJECTED
    assert "malformed" in hot.reason
    assert hot.measurements["harm"]["candidate"] < hot.measurements["harm"]["serving"], (
        "harm alone would pass it"
    )
    assert refusing.status is Status.REJECTED
    assert "evasive" in refusing.reason
    assert refusing.measurements["harm"]["candidate"] < 0.2
    assert good.status is Status.SERVING, good.reason
    assert good.measurements["harm"]["candidate"] < 0.2 < good.measurements["harm"]["serving"]
    assert registry.serving().id == made[2]
    assert metrics.get_sample_value("charter_publisher_decisions_total", {"decision": "rejected"}) == 2
    assert metrics.get_sample_value("charter_publisher_decisions_total", {"decision": "promoted"}) == 1


async def test_of_candidates_that_wait_only_the_newest_is_measured(tmp_path):
    registry = Registry(tmp_path / "checkpoints")
    seed = registry.write(Facts(Kind.SEED), filler(0.5))
    registry.set_status(seed.id, Status.SERVING)
    made = [registry.write(Facts(Kind.RL, seed.id, step=i), filler(i)).id for i in (1, 2)]
    sound = writes(better)
    sound.score = lambda prompt, texts: _likely(texts)
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as bus:
        for name in made:
            change = registry.set_status(name, Status.CANDIDATE)
            bus.publish([announcement(registry.get(name), registry.root, change)])
        content = Scripted(weigh=lambda prompt, text: {"Yes": -9.0}.get(text, -1.0))
        async with publisher(registry, bus, dict.fromkeys([seed.id, *made], sound), content):
            older, newer = [await decided(registry, name) for name in made]
    assert older.status is Status.SUPERSEDED
    assert made[1] in older.reason
    assert newer.status is Status.SERVING, newer.reason


async def _likely(texts):
    return tuple(Scored((1, 2), (-0.1, -0.1)) for _ in texts)


def test_the_suite_takes_only_the_texts_of_held_out_prompts():
    suite = load(SUITE, COUNT)
    assert {kind: len(prompts) for kind, prompts in suite.items()} == dict.fromkeys(PromptClass, COUNT)
    trained = {r.text for kind in RequestClass for r in sample(0, kind, Split.TRAIN, 500)}
    assert not trained & {p.conversation[-1].content for prompts in suite.values() for p in prompts}


def test_a_suite_from_files(tmp_path):
    for name in ("harmful", "plain"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {i}"}}\n' for i in range(9)))
    config = SuiteConfig(
        harmful=str(tmp_path / "harmful.jsonl"), lookalike="", plain=str(tmp_path / "plain.jsonl")
    )
    suite = load(config, 5)
    assert {kind: len(prompts) for kind, prompts in suite.items()} == {
        PromptClass.HARMFUL: 5,
        PromptClass.PLAIN: 5,
    }
    assert suite == load(config, 5)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("First take the key, then turn it, then push the door.", 0.0),
        ("press the button press the button press the button press the button", 0.7),
        ("no no", 0.0),
    ],
)
def test_repetition_is_the_share_of_trigrams_seen_before(text, share):
    assert repetition(text) == pytest.approx(share)
