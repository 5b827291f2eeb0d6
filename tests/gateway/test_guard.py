"""The guard's decisions, pure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.constitution.model import Phase, Principle
from charter.errors import ConfigError
from charter.gateway.guard import (
    Accept,
    Attempt,
    GuardMode,
    GuardRules,
    Refuse,
    Revise,
    Verdict,
    decide,
    in_doubt,
)


def principle(id_, category="harm", priority=1, weight=1.0):
    return Principle(id_, id_, "", category, priority, weight, frozenset({Phase.CRITIQUE}), "c", "r")


KNOWN = {
    p.id: p
    for p in (
        principle("harm"),
        principle("privacy", "privacy"),
        principle("help", "helpfulness", priority=2),
        principle("tone", "style", priority=3, weight=0.1),
    )
}
RULES = GuardRules(max_rounds=2)
CLEAN = {"harm": 0.01, "privacy": 0.02, "help": 0.1, "tone": 0.2}


def attempt(revised_by="", **changes):
    return Attempt("an answer", CLEAN | changes, revised_by)


def test_a_draft_that_nothing_speaks_against_is_accepted():
    assert decide(GuardMode.GATED, RULES, KNOWN, [attempt()], 0) == Accept(0)


def test_a_draft_in_doubt_is_revised_by_the_most_important_principle_not_the_likeliest():
    assert decide(GuardMode.GATED, RULES, KNOWN, [attempt(harm=0.6, help=0.99)], 0) == Revise(0, "harm")


def test_among_principles_of_one_priority_the_likeliest_comes_first():
    assert decide(GuardMode.GATED, RULES, KNOWN, [attempt(harm=0.6, privacy=0.8)], 0) == Revise(0, "privacy")


def test_a_revision_that_breaks_another_principle_does_not_pass():
    attempts = [attempt(privacy=0.9), attempt("privacy", harm=0.8)]
    assert isinstance(decide(GuardMode.GATED, RULES, KNOWN, attempts, 1), Revise)


def test_the_next_revision_starts_from_the_best_attempt_and_not_from_the_last():
    attempts = [attempt(help=0.6), attempt("help", harm=0.9)]
    assert decide(GuardMode.GATED, RULES, KNOWN, attempts, 1) == Revise(0, "help")


def test_after_the_last_round_an_answer_in_doubt_is_refused():
    attempts = [attempt(harm=0.9), attempt("harm", harm=0.8), attempt("harm", harm=0.7)]
    assert decide(GuardMode.GATED, RULES, KNOWN, attempts, 2) == Refuse(2, "harm")


def test_a_revision_that_passes_is_accepted_even_in_the_last_round():
    attempts = [attempt(harm=0.9), attempt("harm", harm=0.8), attempt("harm")]
    assert decide(GuardMode.GATED, RULES, KNOWN, attempts, 2) == Accept(2)


def test_what_only_lacks_in_helpfulness_is_revised_and_never_refused():
    attempts = [attempt(help=0.9), attempt("help", help=0.8)]
    assert decide(GuardMode.GATED, RULES, KNOWN, attempts, 1) == Revise(1, "help")
    assert decide(GuardMode.GATED, RULES, KNOWN, attempts, 2) == Accept(1)
    assert decide(GuardMode.GATED, RULES, KNOWN, [attempt(tone=0.9), *attempts], 2) == Accept(2)
    strict = GuardRules(max_rounds=2, revise_only=())
    assert decide(GuardMode.GATED, strict, KNOWN, attempts, 2) == Refuse(1, "help")


def test_a_refusal_names_what_it_is_for_and_not_the_missing_help():
    attempts = [attempt(tone=0.9, help=0.99)] * 3
    assert decide(GuardMode.GATED, RULES, KNOWN, attempts, 2) == Refuse(2, "tone")


def test_always_revises_a_clean_draft_once_by_the_principle_it_comes_closest_to_breaking():
    assert decide(GuardMode.ALWAYS, RULES, KNOWN, [attempt()], 0) == Revise(0, "help")


def test_always_gives_the_better_of_draft_and_revision():
    assert decide(GuardMode.ALWAYS, RULES, KNOWN, [attempt(), attempt("help", harm=0.4)], 1) == Accept(0)
    assert decide(GuardMode.ALWAYS, RULES, KNOWN, [attempt(), attempt("help", help=0.0)], 1) == Accept(1)


def test_a_principle_that_the_gateway_does_not_know_counts_as_the_most_important():
    unknown = attempt(new=0.55, harm=0.9)
    assert in_doubt(RULES, KNOWN, unknown) == ("new", "harm")


def test_a_category_can_have_a_threshold_of_its_own():
    rules = GuardRules(category_thresholds={"harm": 0.2, "style": 0.95})
    assert in_doubt(rules, KNOWN, attempt(harm=0.3, tone=0.9)) == ("harm",)


def test_a_probability_that_is_not_a_number_is_doubt():
    assert in_doubt(RULES, KNOWN, attempt(harm=math.nan)) == ("harm",)


@pytest.mark.parametrize(
    "rules", [{"threshold": 0.0}, {"category_thresholds": {"harm": 1.5}}, {"max_rounds": 0}]
)
def test_rules_that_would_let_everything_or_nothing_pass_are_refused(rules):
    with pytest.raises(ConfigError, match="choose"):
        GuardRules(**rules)


def test_modes_and_verdicts_are_ordered():
    assert [m.strictness for m in GuardMode] == [0, 1, 2, 3]
    assert Verdict.REFUSED.severity > Verdict.REVISED.severity > Verdict.PASSED.severity


probabilities = st.fixed_dictionaries({i: st.floats(0, 1) for i in CLEAN})


@given(
    st.lists(probabilities, min_size=1, max_size=4), st.integers(0, 3), st.sampled_from(["gated", "always"])
)
def test_nothing_in_grave_doubt_is_ever_accepted_and_every_course_ends(tried, rounds, mode):
    attempts = [Attempt(str(i), p, "harm" if i else "") for i, p in enumerate(tried)]
    step = decide(GuardMode(mode), RULES, KNOWN, attempts, rounds)
    if isinstance(step, Accept):
        assert {KNOWN[i].category for i in in_doubt(RULES, KNOWN, attempts[step.attempt])} <= {"helpfulness"}
    if isinstance(step, Revise):
        assert rounds < RULES.max_rounds
