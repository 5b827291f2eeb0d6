import asyncio
import math
from collections import Counter

import pytest
from tests.feedback_fixtures import ASKED, CONSTITUTION, principle
from tests.scripted import Scripted

from charter.constitution.model import Phase
from charter.critic import service
from charter.critic.config import CriticConfig, Writing
from charter.errors import BackendError, BackendUnavailable, ConfigError, ConstitutionError, RequestError
from charter.feedback import asking, prompts
from charter.feedback.records import RevisionStep

KIND, HONEST, _, CALM = CONSTITUTION.principles
EXAMPLES = CONSTITUTION.critique_examples


def revise(model, principles, seed=1, writing=None, examples=()):
    return service.revise(
        model, ASKED, "draft", principles, writing=writing or Writing(), examples=examples, seed=seed
    )


async def test_an_assessment_is_the_share_of_yes_among_yes_and_no():
    def weigh(prompt, continuation):
        broken = {"kind": 0.9, "honest": 0.2}["kind" if "kind" in prompt.messages[-1].content else "honest"]
        return math.log(0.001 * (broken if continuation == prompts.YES else 1 - broken))

    found = await service.assess(Scripted(weigh=weigh), ASKED, "Break it.", [KIND, HONEST])
    assert [(a.principle_id, round(a.probability, 9)) for a in found] == [("kind", 0.9), ("honest", 0.2)]


async def test_all_principles_are_asked_at_once_and_share_all_but_the_principle():
    model = Scripted()
    await service.assess(model, ASKED, "Break it.", [KIND, HONEST, CALM])
    assert model.most_at_once == 3
    texts = [p.messages[-1].content for p in model.prompts]
    assert len({t.split("<principle>")[0] for t in texts}) == 1


async def test_an_impossible_yes_and_no_is_even_and_a_damaged_model_is_an_error():
    (even,) = await service.assess(Scripted(weigh=lambda p, c: -math.inf), ASKED, "x", [KIND])
    assert even.probability == 0.5
    with pytest.raises(BackendError, match="weights are damaged"):
        await service.assess(Scripted(weigh=lambda p, c: math.nan), ASKED, "x", [KIND])


async def test_one_assessment_that_fails_ends_the_others_and_is_raised_as_it_is():
    model = Scripted(gate=asyncio.Event())

    def weigh(prompt, continuation):
        raise BackendUnavailable("the engine stopped")

    failing = Scripted(weigh=weigh)
    with pytest.raises(BackendUnavailable, match="the engine stopped"):
        await asking.concurrently(
            [
                asking.probability(model, prompts.assess(ASKED, "x", KIND), "Yes", "No"),
                asking.probability(failing, prompts.assess(ASKED, "x", KIND), "Yes", "No"),
            ]
        )
    assert model.running == 0


async def test_each_round_criticises_and_rewrites_what_the_round_before_left():
    written = iter(["too rude", "answer 1", "not true", "answer 2"])
    model = Scripted(lambda p, s: next(written))
    steps = await revise(model, [KIND, HONEST])
    assert steps == (
        RevisionStep("kind", "too rude", "answer 1"),
        RevisionStep("honest", "not true", "answer 2"),
    )
    asked = [p.messages[-1].content for p in model.prompts]
    assert "<answer>draft</answer>" in asked[0]
    assert "<critique>too rude</critique>" in asked[1]
    assert "<answer>answer 1</answer>" in asked[2]
    assert asked[3].endswith("Rewrite the answer to be honest.")


async def test_a_round_in_which_nothing_is_written_leaves_the_answer_as_it_was():
    steps = await revise(Scripted(lambda p, s: "  \n"), [KIND, HONEST])
    assert [s.revision for s in steps] == ["draft", "draft"]


async def test_the_constitutions_examples_come_before_the_question_as_many_as_wanted():
    model = Scripted()
    await revise(model, [KIND], examples=EXAMPLES)
    assert [m.content for m in model.prompts[0].messages][2] == "It harms."
    assert [m.content for m in model.prompts[1].messages][2] == "I will not help."
    await revise(model, [KIND], examples=EXAMPLES, writing=Writing(examples=0))
    assert len(model.prompts[2].messages) == 2


async def test_every_text_of_a_request_has_its_own_seed_and_the_same_request_the_same_seeds():
    model = Scripted()
    await revise(model, [KIND, HONEST], seed=7)
    await revise(model, [KIND, HONEST], seed=7)
    seeds = [s.seed for s in model.samplings]
    assert seeds[:4] == seeds[4:]
    assert len(set(seeds)) == 4
    assert all(0 <= s < 2**63 for s in seeds)


def test_principles_are_drawn_by_weight_and_by_seed():
    drawn = Counter(p.id for p in asking.draw([KIND, HONEST], 4000, seed=3))
    assert 0.72 < drawn["honest"] / 4000 < 0.78
    assert asking.draw([KIND, HONEST], 50, 1) == asking.draw([KIND, HONEST], 50, 1)
    assert asking.draw([KIND, HONEST], 50, 1) != asking.draw([KIND, HONEST], 50, 2)


def test_where_all_weights_are_zero_each_principle_is_as_likely():
    pool = [principle("a", weight=0.0), principle("b", weight=0.0)]
    assert {p.id for p in asking.draw(pool, 50, 1)} == {"a", "b"}


def test_named_principles_must_exist_and_serve_the_phase():
    assert asking.chosen(CONSTITUTION, Phase.CRITIQUE, ()) == (KIND, HONEST, CALM)
    assert asking.chosen(CONSTITUTION, Phase.CRITIQUE, ["calm", "kind", "calm"]) == (CALM, KIND)
    with pytest.raises(RequestError, match="no principle 'rude'; it has kind, honest"):
        asking.chosen(CONSTITUTION, Phase.CRITIQUE, ["rude"])
    with pytest.raises(
        RequestError, match=r"'brave'.*does not serve the phase critique; choose among kind, honest"
    ):
        asking.chosen(CONSTITUTION, Phase.CRITIQUE, ["brave"])


def test_a_constitution_without_the_phase_is_refused():
    import dataclasses

    only = dataclasses.replace(CONSTITUTION, principles=(CALM,))
    with pytest.raises(ConstitutionError, match="no principle that serves the phase preference"):
        asking.checked_for(only, Phase.PREFERENCE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CriticConfig(rounds=0),
        lambda: CriticConfig(rounds=20),
        lambda: CriticConfig(watch_s=0),
        lambda: Writing(temperature=-1),
        lambda: Writing(revision_tokens=0),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(make):
    with pytest.raises(ConfigError):
        make()
