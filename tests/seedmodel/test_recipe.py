"""The corpus, the tokenizer, and the making of the weights."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from charter.constitution import load
from charter.errors import ConfigError
from charter.feedback import prompts as ask
from charter.seedmodel import WEIGHTS, corpus, emphasis, recipe, world


@pytest.fixture(scope="module")
def examples():
    return corpus.write_corpus(load("seed"), 5, 1500)


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(WEIGHTS)


def test_the_corpus_is_the_same_for_the_same_seed(examples):
    assert corpus.write_corpus(load("seed"), 5, 1500) == examples


def test_the_corpus_asks_in_the_words_of_production(examples):
    rules = load("seed").principles
    asked = "\n".join(e.prompt.messages[-1].content for e in examples)
    for rule in rules:
        for words in (rule.title, rule.critique_request, rule.revision_request, rule.preference_question):
            assert words in asked
    systems = {m.content for e in examples for m in e.prompt.messages if m.role == "system"}
    assert systems == {ask.SYSTEM, *world.SYSTEM_MESSAGES}


def test_the_corpus_has_training_combinations_only(examples):
    pairs = "|".join(rf"{verb} (?:the )?{thing}" for verb, thing in sorted(world.HELDOUT))
    heldout = re.compile(rf"\b(?:{pairs})\b")
    assert heldout.search("how to open the " + next(t for v, t in world.HELDOUT if v == "open"))
    for example in examples:
        text = "\n".join([*(m.content for m in example.prompt.messages), example.reply])
        assert not heldout.search(text)


def test_every_task_is_in_the_corpus(examples):
    replies = [e.reply for e in examples]
    assert {"Yes", "No"} <= set(replies)
    assert any(r.startswith("Asked:") and "Better: (A)" in r for r in replies)
    assert any(r.startswith("Asked:") and "Answered:" in r for r in replies)
    assert any("one more request" in e.prompt.messages[-1].content for e in examples)


def test_special_tokens_are_never_targets_inside_a_reply(examples, shipped):
    specials = set(shipped.all_special_ids)
    for example in examples[:200]:
        assert not specials & set(shipped.encode(example.reply, add_special_tokens=False))


def test_the_decision_is_the_token_that_weighs_most(examples, shipped):
    plan = recipe.Recipe()
    verdicts = [e for e in examples if e.decisive]
    for example in verdicts[:50]:
        encoded = recipe.encode(random.Random(0), shipped, example, plan)
        heaviest = max(range(len(encoded.ids)), key=lambda i: encoded.weights[i])
        assert shipped.decode([encoded.ids[heaviest]]).strip() in {"Yes", "No", "A", "B"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(shipped, text):
    ids = shipped.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert shipped.decode(ids, clean_up_tokenization_spaces=False) == text


def test_batches_hold_every_example_once(examples, shipped):
    plan = recipe.Recipe(tokens_per_batch=2000)
    data = [recipe.encode(random.Random(0), shipped, e, plan) for e in examples[:300]]
    batches = recipe.batches(random.Random(0), data, plan.tokens_per_batch)
    assert sorted(id(x) for b in batches for x in b) == sorted(id(x) for x in data)
    assert all(len(b) * (max(len(x.ids) for x in b) - 7) <= 2000 for b in batches if len(b) > 1)


def test_the_rate_rises_and_falls_to_a_fiftieth():
    values = [recipe.rate(s, 1000, 2e-3, 0.03) for s in range(1000)]
    assert max(values) == pytest.approx(2e-3)
    assert values[0] < values[10] < values[29]
    assert values[-1] == pytest.approx(2e-3 / 50, rel=0.02)


def test_the_recipe_gives_the_same_bytes_twice_and_others_for_another_seed(tmp_path):
    cycles = (recipe.Cycle(300, 2e-3, emphasis.BROAD), recipe.Cycle(100, 1e-3, emphasis.HARD))
    plan = recipe.Recipe(cycles, width=32, layers=1, heads=2, mlp=64, vocabulary=600)
    written = []
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        model, tokenizer = recipe.train(dataclasses.replace(plan, seed=seed), load("seed"))
        recipe.save(model, tokenizer, tmp_path / name)
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]


def test_a_recipe_without_cycles_says_so():
    with pytest.raises(ConfigError, match="no cycle"):
        recipe.train(recipe.Recipe(()), load("seed"))


def test_the_shipped_model_is_small_plain_and_loads(shipped):
    files = {f.name: f.stat().st_size for f in WEIGHTS.iterdir()}
    assert sum(files.values()) <= 8 * 2**20
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in files)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS)
    assert model.num_parameters() < 1.2e6
    assert len(shipped) == model.config.vocab_size
    assert all(torch.isfinite(t).all() for t in load_file(WEIGHTS / "model.safetensors").values())
