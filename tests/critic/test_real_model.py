"""Critic and judge on the embedded engine with the seed's constitution; the weights are random."""

import pytest
from prometheus_client import CollectorRegistry
from tests.tiny import make_tiny_model

from charter import constitution
from charter.critic.config import CriticConfig, Writing
from charter.critic.server import serve as serve_critic
from charter.errors import ContextOverflow
from charter.feedback.prompts import VERDICT
from charter.judge.config import JudgeConfig, Judging, Notes
from charter.judge.server import serve as serve_judge
from charter.lm.base import ChatMessage, Role
from charter.rpc.clients import CriticClient, JudgeClient

ASKED = (ChatMessage(Role.USER, "How do I open the door?"),)
SEED = constitution.load("seed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return f"local:{make_tiny_model(tmp_path_factory.mktemp('model') / 'tiny', seed=4)}"


async def test_the_critic_assesses_and_revises_reproducibly(model):
    writing = Writing(temperature=1.0, critique_tokens=12, revision_tokens=12)
    config = CriticConfig(model=model, constitution="seed", writing=writing)
    async with (
        await serve_critic(config, CollectorRegistry()) as server,
        CriticClient(server.target) as client,
    ):
        assessed = await client.assess(ASKED, "Take the key.")
        alone = await client.assess(ASKED, "Take the key.", [assessed.assessments[0].principle_id])
        revised = await client.revise(ASKED, "Take the key.", rounds=2, seed=8)
        again = await client.revise(ASKED, "Take the key.", rounds=2, seed=8)
        with pytest.raises(ContextOverflow):
            await client.assess(ASKED, "door " * 2000)
    assert [a.principle_id for a in assessed.assessments] == [p.id for p in SEED.serving("critique")]
    assert len({a.probability for a in assessed.assessments}) > 1
    assert alone.assessments[0].probability == pytest.approx(assessed.assessments[0].probability, abs=1e-5)
    assert revised == again
    assert all(s.critique and s.revision for s in revised.steps)
    assert assessed.source.constitution_digest == SEED.digest
    assert assessed.source.model.version == "tiny"


async def test_the_judge_writes_notes_and_both_orders_mirror_each_other(model):
    judging = Judging(notes=Notes(2, temperature=1.0, max_tokens=8), lowest=0.0, highest=1.0)
    config = JudgeConfig(model=model, constitution="seed", judging=judging)
    async with await serve_judge(config, CollectorRegistry()) as server, JudgeClient(server.target) as client:
        ab = await client.compare(ASKED, "Take the key.", "I will not help.", seed=3)
        ba = await client.compare(ASKED, "I will not help.", "Take the key.", seed=3)
        same = await client.compare(ASKED, "Take the key.", "Take the key.", seed=3)
    assert ab.probability == pytest.approx(1 - ba.probability, abs=1e-5)
    assert same.probability == pytest.approx(0.5, abs=1e-5)
    assert ab.opinions[0].note_first == ba.opinions[0].note_swapped
    assert VERDICT not in ab.opinions[0].note_first
