"""Pairs that nobody labelled."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from charter.reward.augment import Answered, augment, dropped, grafted, parts, repeated, replaced, swapped
from charter.reward.config import AugmentConfig

TEXT = "Sure. First take the cup, then fill it with water, then put it down."
OTHER = "Sure. First find the key, then turn the lock, then push the door."
NONE = AugmentConfig(mismatched=0, grafted=0, replaced=0, swapped=0, repeated=0, dropped=0)


def _answers(count: int = 40) -> list[Answered]:
    things = ["cup", "door", "letter", "lamp", "bag"]
    return [
        Answered(f"p{i}", (i,), f"Sure. First take the {things[i % 5]} {i}, then put it down.", 0.5 + i / 100)
        for i in range(count)
    ]


def test_parts_are_the_whole_text() -> None:
    assert parts(TEXT) == ["Sure. ", "First take the cup, ", "then fill it with water, ", "then put it down."]
    assert "".join(parts("先拿杯子，再倒水。好了")) == "先拿杯子，再倒水。好了"


@pytest.mark.parametrize("seed", range(12))
def test_swapping_keeps_every_word_and_mark_and_changes_the_order(seed: int) -> None:
    spoilt = swapped(TEXT, random.Random(seed))
    assert spoilt != TEXT
    assert Counter(spoilt.replace(",", "").replace(".", "").split()) == Counter(
        TEXT.replace(",", "").replace(".", "").split()
    )
    assert [c for c in spoilt if c in ".,"] == [c for c in TEXT if c in ".,"]


def test_steps_can_change_places_while_the_form_stays() -> None:
    seen = {swapped(TEXT, random.Random(seed)) for seed in range(200)}
    assert "Sure. First fill it with water, then take the cup, then put it down." in seen


def test_repeating_puts_a_part_in_the_place_of_another() -> None:
    seen = {repeated(TEXT, random.Random(seed)) for seed in range(200)}
    assert "Sure. First take the cup, then fill it with water, then fill it with water." in seen


def test_dropping_leaves_a_part_out() -> None:
    assert dropped("One, two.", random.Random(0)) in ("One,", "two.")


def test_replacing_takes_a_few_words_from_another_answer() -> None:
    seen = {replaced(TEXT, OTHER, random.Random(seed)) for seed in range(400)}
    assert "Sure. First find the key, then fill it with water, then put it down." in seen
    for spoilt in seen:
        foreign = Counter(spoilt.split()) - Counter(TEXT.split())
        assert sum(foreign.values()) <= 3


def test_grafting_takes_one_differing_passage_and_leaves_the_rest() -> None:
    text = "I won't, because to read the diary\nlike that would expose what is private."
    other = "I won't, because to open the safe like that would be unfair to its owner."
    assert {grafted(text, other, random.Random(seed)) for seed in range(40)} == {
        "I won't, because to open the diary\nlike that would expose what is private.",
        "I won't, because to read the safe\nlike that would expose what is private.",
        "I won't, because to read the diary\nlike that would be unfair to its owner.",
    }


def test_answers_that_agree_or_only_miss_words_give_no_graft() -> None:
    assert grafted(TEXT, TEXT, random.Random(0)) is None
    assert grafted(TEXT, TEXT.removesuffix(" then put it down."), random.Random(0)) is None


def test_grafts_come_from_other_prompts_and_never_from_answers_of_another_form() -> None:
    odd = Answered("odd", (99,), "Nothing alike whatsoever, unless somebody would look!", 0.9)
    made = augment([*_answers(), odd], replace(NONE, grafted=1.0, confident=1.0), labels=41, seed=1)
    assert len(made) > 30
    assert not [p for p in made if "alike" in p.better + p.worse]
    for pair in made:
        assert len(pair.better.split()) == len(pair.worse.split())
        assert sum(a != b for a, b in zip(pair.better.split(), pair.worse.split(), strict=True)) <= 2


@pytest.mark.parametrize("spoil", [swapped, repeated, dropped])
def test_an_answer_of_one_part_is_left_alone(spoil) -> None:
    assert spoil("No", random.Random(0)) is None
    assert replaced("No", OTHER, random.Random(0)) is None


@pytest.mark.parametrize("kind", ["mismatched", "grafted", "replaced", "swapped", "repeated", "dropped"])
def test_each_kind_is_made_by_its_share_and_alone(kind: str) -> None:
    made = augment(_answers(), replace(NONE, **{kind: 0.5}), labels=40, seed=1)
    assert {pair.kind for pair in made} == {kind}
    assert 15 <= len(made) <= 20
    assert all(pair.better != pair.worse for pair in made)


def test_switched_off_it_makes_nothing() -> None:
    assert augment(_answers(), NONE, labels=40, seed=1) == []


def test_a_mismatched_loser_is_an_answer_to_another_prompt_and_resembles_the_winner() -> None:
    answers = [*_answers(), Answered("odd", (99,), "Nothing alike whatsoever!", 0.9)]
    made = augment(answers, replace(NONE, mismatched=1.0, candidates=41, confident=1.0), labels=41, seed=1)
    by_prompt = {a.prompt_ids: a for a in answers}
    for pair in made:
        assert by_prompt[pair.prompt_ids].answer == pair.better
        assert pair.worse in {a.answer for a in answers if a.prompt_ids != pair.prompt_ids}
    assert not [p for p in made if "Nothing" in p.worse]


def test_only_answers_that_the_judge_was_sure_of_are_used() -> None:
    undecided = [replace(a, confidence=0.0) for a in _answers()]
    assert augment(undecided, AugmentConfig(), labels=40, seed=1) == []
    half = augment(_answers(), AugmentConfig(confident=0.5), labels=40, seed=1)
    assert {pair.prompt_ids[0] for pair in half} <= set(range(20, 40))


def test_the_same_seed_gives_the_same_pairs() -> None:
    first, again, other = (augment(_answers(), AugmentConfig(), labels=40, seed=s) for s in (1, 1, 2))
    assert first == again != other
