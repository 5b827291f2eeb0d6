"""Choosing prompts: sources by weight, interest by disagreement, near-duplicates left out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.errors import ConfigError
from charter.lm.base import ChatMessage, Role
from charter.prompts.config import PromptsConfig, Weights
from charter.prompts.heldout import HeldOut
from charter.prompts.service import Mixer, Source, SourcedPrompt, novel, similarity, trigrams
from charter.seedmodel.world import RequestClass, Split, sample


def prompts(source, count, name="request"):
    return [
        SourcedPrompt((ChatMessage(Role.USER, f"{name} {source} number {i}"),), source) for i in range(count)
    ]


def mixer(**fields):
    made = Mixer(PromptsConfig(**fields))
    made.add(prompts(Source.RED_TEAM, 20))
    made.add(prompts(Source.HELPFUL, 20))
    return made


def test_sources_are_drawn_by_weight_and_an_empty_one_gives_its_share_away():
    drawn = Counter(p.source for p in mixer(weights=Weights(0.75, 0.25, 0.5, 0.5)).draw(4000))
    assert drawn[Source.RED_TEAM] / 4000 == pytest.approx(0.75, abs=0.03)
    assert set(drawn) == {Source.RED_TEAM, Source.HELPFUL}


def test_prompts_whose_answers_the_judge_tells_apart_come_more_often():
    made = mixer(weights=Weights(1, 0, 0, 0))
    clear, tied = prompts(Source.RED_TEAM, 20)[:2]
    for _ in range(10):
        made.on_labelled(clear.id, 0.6)  # clamped labels: as sure as this judge may be
        made.on_labelled(tied.id, 0.5)
    drawn = Counter(p.id for p in made.draw(6000))
    assert drawn[clear.id] / drawn[tied.id] == pytest.approx(1.2 / 0.2, rel=0.3)


def test_a_prompt_is_taken_in_once_whoever_brings_it():
    made = mixer()
    again = SourcedPrompt(prompts(Source.RED_TEAM, 1)[0].conversation, Source.PRODUCTION)
    assert made.add([again]) == 0
    assert made.add(prompts(Source.GENERATED, 3)) == 3
    assert len(made) == 43


def test_only_the_newest_of_the_users_prompts_are_kept():
    made = mixer(production_kept=5, weights=Weights(0, 0, 1, 0))
    made.add(prompts(Source.PRODUCTION, 9))
    newest = {p.id for p in prompts(Source.PRODUCTION, 9)[-5:]}
    assert {p.id for p in made.draw(300)} == newest
    made.on_labelled(prompts(Source.PRODUCTION, 9)[-1].id, 0.5)
    assert {p.id for p in made.draw(300)} <= newest


def test_nothing_is_drawn_where_there_is_nothing():
    assert Mixer(PromptsConfig()).draw(5) == []
    assert Mixer(PromptsConfig()).examples(5) == []


def test_a_restored_mixer_draws_what_the_other_would_have_drawn():
    one = mixer()
    one.add(prompts(Source.GENERATED, 4))
    one.draw(37)
    one.on_labelled(prompts(Source.RED_TEAM, 3)[2].id, 0.9)
    two = mixer()
    two.restore(one.state())
    assert [p.id for p in one.draw(200)] == [p.id for p in two.draw(200)]
    assert one.examples(4) == two.examples(4)


def test_near_duplicates_are_left_out():
    known = ["How do I open the door of my neighbour at night?"]
    found = novel(
        [
            "how do I open the door of my neighbour at  night?",
            "How do I open the door of my neighbour at noon?",
            "Tell me how to read the letters of a friend.",
            "Tell me how to read the letters of a friend.",
            " ",
        ],
        known,
        0.7,
    )
    assert list(found) == ["Tell me how to read the letters of a friend."]


def test_a_language_without_spaces_is_compared_by_characters():
    one, two, other = (
        trigrams(t) for t in ("怎样打开邻居家的门锁呢", "怎样打开邻居家的门锁", "今天的天气怎么样啊")
    )
    assert similarity(one, two) > 0.8
    assert similarity(one, other) < 0.1


@given(st.text(max_size=60), st.text(max_size=60))
def test_similarity_is_symmetric_and_1_for_the_same_text(a, b):
    one, two = trigrams(a), trigrams(b)
    assert similarity(one, two) == similarity(two, one)
    assert similarity(one, one) == 1.0
    assert 0 <= similarity(one, two) <= 1


def test_held_out_combinations_are_known_in_every_phrasing_and_training_ones_are_not():
    held_out = HeldOut(("seed-heldout",), 0.8)
    for kind in RequestClass:
        assert all(r.text in held_out for r in sample(1, kind, Split.HELDOUT, 100))
        trained = [r.text in held_out for r in sample(1, kind, Split.TRAIN, 100)]
        assert sum(trained) <= 10


def test_prompts_like_those_of_a_held_out_file_are_known(tmp_path):
    (tmp_path / "held.txt").write_text("How do I open the door of my neighbour at night?\n")
    held_out = HeldOut((str(tmp_path / "held.txt"),), 0.7)
    assert "how do I open the door of my neighbour at night" in held_out
    assert "How do I bake bread?" not in held_out


def test_settings_that_cannot_work_say_so():
    with pytest.raises(ConfigError, match="at least one above 0"):
        Weights(0, 0, 0, 0)
    with pytest.raises(ConfigError, match=r"prompts\.batch is 0"):
        PromptsConfig(batch=0)
    with pytest.raises(ConfigError, match="memory"):
        PromptsConfig(memory=1.0)
