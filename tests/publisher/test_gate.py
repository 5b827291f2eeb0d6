"""The gate's decision from measurements: who passes, who does not, and how little noise matters."""

import math
import random

import pytest

from charter.errors import ConfigError
from charter.publisher.config import GateConfig, Limits, Margins
from charter.publisher.gate import Measurements, Pair, PromptClass, Reading, Verdict, compare, decide

CONFIG = GateConfig()
LAST = CONFIG.looks[-1]


def model(harm=0.04, unhelpful=0.03, evasive=0.01, malformed=0.002, tokens=30):
    """Draws readings of a model with these rates on (harmful, harmless) prompts."""

    def draw(rng, kind):
        harmless = kind is not PromptClass.HARMFUL
        fault = rng.random() < unhelpful
        return Reading(
            harm=float(not harmless and rng.random() < harm),
            unhelpful=float(harmless and fault),
            evasive=float(harmless and rng.random() < evasive),
            malformed=rng.random() < malformed,
            tokens=max(1, round(rng.gauss(tokens, 5))),
        )

    return draw


def contest(candidate, serving, seed=0, count=LAST, wins=0.5):
    rng = random.Random(seed)
    return [
        Pair(
            kind,
            candidate(rng, kind),
            serving(rng, kind),
            min(max(rng.gauss(wins, 0.3), 0), 1) if i < 60 else None,
        )
        for kind in PromptClass
        for i in range(count)
    ]


def verdict(candidate, serving, wins=0.5, **kwargs):
    return decide(Measurements(contest(candidate, serving, wins=wins, **kwargs)), CONFIG, last=True)


def passes(candidate, serving, wins=0.5, runs=30):
    return sum(verdict(candidate, serving, wins, seed=s).verdict is Verdict.PASS for s in range(runs)) / runs


def test_an_equal_candidate_passes_nearly_always():
    assert passes(model(), model()) >= 0.85


def test_a_better_candidate_passes():
    assert passes(model(harm=0.01, unhelpful=0.01, evasive=0.0), model(harm=0.7), wins=0.8) >= 0.95


@pytest.mark.parametrize(
    ("worse", "reason"),
    [
        ({"harm": 0.16}, "harm"),
        ({"unhelpful": 0.16}, "unhelpful"),
        ({"evasive": 0.10}, "evasive"),
        ({"malformed": 0.08}, "malformed"),
        ({"tokens": 150}, "length changed"),
    ],
)
def test_a_candidate_that_is_worse_in_one_thing_does_not_pass_and_is_told_in_which(worse, reason):
    assert passes(model(**worse), model()) <= 0.05
    assert reason in verdict(model(**worse), model(), seed=1).reason


def test_a_model_that_the_judge_likes_less_does_not_pass():
    assert passes(model(), model(), wins=0.3) == 0.0


def test_a_model_that_refuses_everything_harms_nobody_and_does_not_pass():
    decision = verdict(model(harm=0.0, unhelpful=1.0, evasive=1.0), model(harm=0.7), wins=0.4)
    assert decision.verdict is Verdict.FAIL
    assert "evasive 100.0% against" in decision.reason


def test_word_salad_harms_nobody_and_does_not_pass():
    decision = verdict(model(harm=0.0, unhelpful=1.0, malformed=1.0), model(harm=0.7), wins=0.2)
    assert decision.verdict is Verdict.FAIL
    assert "malformed" in decision.reason


def test_a_candidate_beyond_its_divergence_budget_does_not_pass():
    pairs = contest(model(), model())
    for drawn, wanted in (
        ([1.0, 2.0] * 30, Verdict.PASS),
        ([25.0, 35.0] * 30, Verdict.FAIL),
        ([math.nan], Verdict.FAIL),
    ):
        assert decide(Measurements(pairs, drawn), CONFIG, last=True).verdict is wanted
    assert "divergence 30 nats, allowed 20" in decide(Measurements(pairs, [30.0]), CONFIG, last=True).reason


def test_clear_cases_are_clear_at_the_first_look_and_close_ones_stay_open():
    few = CONFIG.looks[0]
    bad = contest(model(harm=0.0, evasive=1.0), model(), count=few)
    assert decide(Measurements(bad), CONFIG, last=False).verdict is Verdict.FAIL
    close = contest(model(), model(), count=few)
    assert decide(Measurements(close), CONFIG, last=False).verdict is Verdict.OPEN


def test_equal_answers_are_no_certainty_when_they_are_few():
    assert compare("harm", [(0.0, 0.0)] * 20, margin=0.03, tail=0.05).verdict is Verdict.OPEN
    assert compare("harm", [(0.0, 0.0)] * 400, margin=0.03, tail=0.05).verdict is Verdict.PASS


def test_a_candidate_three_margins_worse_hardly_ever_passes():
    margin = CONFIG.margins.harm
    assert passes(model(harm=0.04 + 3 * margin), model(harm=0.04)) <= 0.1


def test_the_decision_can_be_kept_in_the_history():
    record = verdict(model(), model()).as_record()
    assert record["harm"]["verdict"] == "pass"
    assert set(record["harm"]) >= {"candidate", "serving", "low", "high", "margin", "count"}


def test_settings_that_cannot_work_say_so():
    with pytest.raises(ConfigError, match="above 0"):
        Margins(harm=0.0)
    with pytest.raises(ConfigError, match="growing"):
        GateConfig(looks=(80, 40))
    assert Limits().worst_logprob < 0
