"""The world's requests and answers, and what the oracle makes of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.constitution import load
from charter.seedmodel import answers, corpus, world
from charter.seedmodel.answers import Form
from charter.seedmodel.kinds import HARM_PRINCIPLES, Kind, breaks, tier
from charter.seedmodel.oracle import classify, rates
from charter.seedmodel.world import Request, RequestClass, Split

verbs = st.sampled_from(sorted(world.VERBS))
things = st.sampled_from(world.THINGS)
seeds = st.integers(0, 2**32)


def request_of(kind: RequestClass, seed: int = 0) -> Request:
    return world.draw(random.Random(seed), kind, Split.TRAIN)


@pytest.mark.parametrize("kind", RequestClass)
def test_heldout_combinations_never_occur_in_training(kind):
    train = {(r.verb, r.thing, r.group) for r in world.sample(1, kind, Split.TRAIN, 4000)}
    heldout = {(r.verb, r.thing, r.group) for r in world.sample(1, kind, Split.HELDOUT, 1000)}
    assert heldout
    assert not train & heldout


def test_every_verb_and_thing_is_seen_in_training():
    pairs = [
        (v.name, t) for g in world.GROUPS.values() for v, t, s in world.combinations(g) if s is Split.TRAIN
    ]
    assert {v for v, _ in pairs} == set(world.VERBS)
    assert {t for _, t in pairs} == set(world.THINGS)


def test_the_same_seed_gives_the_same_requests_and_another_does_not():
    assert world.sample(3, RequestClass.PLAIN, Split.TRAIN, 50) == world.sample(
        3, RequestClass.PLAIN, Split.TRAIN, 50
    )
    assert world.sample(3, RequestClass.PLAIN, Split.TRAIN, 50) != world.sample(
        4, RequestClass.PLAIN, Split.TRAIN, 50
    )


def test_there_are_tens_of_thousands_of_prompts():
    assert len({r.text for k in RequestClass for r in world.sample(0, k, Split.TRAIN, 10_000)}) > 29_000


def test_asking_for_more_requests_than_there_are_says_so():
    with pytest.raises(ValueError, match="fewer than"):
        world.sample(0, RequestClass.PLAIN, Split.HELDOUT, 10**5)


def test_keywords_of_steps_are_unique():
    words = [k for v in world.VERBS.values() for k in v.keywords]
    assert len(set(words)) == len(words)


@given(verbs, things, seeds)
def test_help_is_read_back_as_it_was_written(verb, thing, seed):
    reading = answers.read(answers.write_help(random.Random(seed), verb, thing))
    assert (reading.form, reading.verb, reading.thing, reading.steps) == (
        Form.HELP,
        verb,
        thing,
        world.VERBS[verb].steps,
    )


@given(verbs, things, st.sampled_from(answers.WRONGS), seeds)
def test_a_refusal_is_read_back_as_it_was_written(verb, thing, wrong, seed):
    reading = answers.read(answers.write_decline(random.Random(seed), verb, thing, wrong))
    assert (reading.form, reading.verb, reading.thing, reading.wrong) == (Form.DECLINE, verb, thing, wrong)


@given(st.text())
def test_any_text_can_be_read(text):
    assert answers.read(text).form in Form


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ("You can open the lock like this. First check the handle, then turn it slowly, and", "the end"),
        (
            "You can open the lock like First check the handle, then turn it slowly, and last pull it back.",
            "First",
        ),
        ("handle, then turn it slowly, and last pull it back.", "handle"),
        ("You can open the lock like this. Start: check the handle. Next: turn it turn it slowly.", "turn"),
        ("I refuse. Better: (A)", "Better"),
    ],
)
def test_a_malformed_answer_breaks_at_its_first_impossible_word(broken, place):
    assert answers.read(broken).form is Form.MALFORMED
    assert answers.break_at(broken) == place


@given(st.sampled_from(list(RequestClass)), seeds)
def test_answers_to_training_requests_hold_no_held_out_combination(request_class, seed):
    rng = random.Random(seed)
    asked = world.draw(rng, request_class, Split.TRAIN)
    for kind in corpus.mix(request_class):
        reading = answers.read(corpus.write(rng, asked, kind))
        assert (reading.verb, reading.thing) not in world.HELDOUT


@given(st.sampled_from(list(RequestClass)), seeds)
def test_the_gist_of_a_critique_leaves_only_the_place_out(request_class, seed):
    rng = random.Random(seed)
    asked = world.draw(rng, request_class, Split.TRAIN)
    for kind in corpus.mix(request_class):
        said = corpus.criticism(asked, kind, corpus.write(rng, asked, kind))
        assert (corpus.gist(said) == said) is (kind is not Kind.MALFORMED)


@given(st.sampled_from(list(RequestClass)), seeds)
def test_the_oracle_recognises_every_kind_that_the_corpus_writes(request_class, seed):
    rng = random.Random(seed)
    asked = world.draw(rng, request_class, rng.choice(list(Split)))
    for kind in corpus.mix(request_class):
        assert classify(asked, corpus.write(rng, asked, kind)) is kind


def test_the_oracle_reads_the_steps_and_not_the_opening_only():
    asked = request_of(RequestClass.PLAIN)
    steps = world.VERBS[asked.verb].steps
    rng = random.Random(0)
    cases = {
        steps: Kind.RIGHT,
        (steps[1], steps[0], steps[2]): Kind.MISORDERED,
        (steps[0], steps[0], steps[2]): Kind.REPEATED_STEP,
        (steps[0], steps[1], "send it off" if asked.verb != "share" else "scan each page"): Kind.WRONG_STEP,
    }
    for given_steps, kind in cases.items():
        assert classify(asked, answers.write_help(rng, asked.verb, asked.thing, given_steps)) is kind


def test_help_with_harm_that_is_badly_put_still_counts_as_harm():
    asked = request_of(RequestClass.HARMFUL)
    steps = world.VERBS[asked.verb].steps
    assert classify(asked, f"well {steps[0]} and {steps[1]}") is Kind.COMPLIES
    assert classify(asked, "well well") is Kind.MALFORMED


def test_rates_add_up():
    found = rates([Kind.RIGHT, Kind.RIGHT, Kind.BLUNT, Kind.MALFORMED])
    assert (found.right, found.refuses, found.malformed, found.count) == (0.5, 0.25, 0.25, 4)


def test_the_principles_that_the_truth_names_are_in_the_seed_constitution():
    ids = {p.id for p in load("seed").principles}
    assert set(HARM_PRINCIPLES.values()) <= ids
    for kind in RequestClass:
        asked = request_of(kind)
        flawed = [k for k in corpus.mix(kind) if tier(asked, k) < 3]
        assert all(any(breaks(asked, k, p) for p in ids) for k in flawed)
        assert not any(breaks(asked, k, p) for k in corpus.mix(kind) if tier(asked, k) == 3 for p in ids)
