"""`charter checkpoints`: what a person reads."""

import re

import pytest
from tests.registry.conftest import filler
from typer.testing import CliRunner

from charter.errors import ConfigError
from charter.registry import Facts, Kind, Labels, Status
from charter.registry.cli import app, find


@pytest.fixture
def family(registry):
    seed = registry.write(Facts(Kind.SEED), filler(0))
    told = {"protect-people": 2, "no-evasion": 1}
    labels = Labels(3, told, {"judge-digest": 3}, {"cd": 3}, {"preferences/0": (0, 3)})
    one = registry.write(Facts(Kind.RL, parent=seed.id, step=1, labels=labels), filler(1))
    more = Labels(2, {"protect-people": 2}, {"judge-digest": 2}, {"cd": 2}, {"preferences/0": (3, 5)})
    facts = Facts(Kind.RL, parent=one.id, step=2, labels=more, reward_model_digest="rm2")
    two = registry.write(facts, filler(2))
    registry.set_status(one.id, Status.SERVING, "better")
    registry.set_status(two.id, Status.REJECTED, "more evasive: 5 points")
    return seed, one, two


def shown(registry, *args):
    result = CliRunner().invoke(app, [*args, "--registry", registry.root], env={"COLUMNS": "220"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_list_says_what_became_of_each(registry, family):
    text = shown(registry, "list")
    assert re.search(rf"{family[1].id}.*serving.*better", text)
    assert re.search(rf"{family[2].id}.*rejected.*more evasive: 5 points", text)


def test_an_empty_registry_says_so(registry):
    assert "no checkpoints yet" in shown(registry, "list")


def test_the_lineage_walks_from_a_served_version_to_labels_and_principles(registry, family):
    text = shown(registry, "lineage", family[2].id)
    assert text.index(family[2].id) < text.index(family[1].id) < text.index(family[0].id)
    assert "5 labels over 3 checkpoints" in text
    assert re.search(r"principle .* protect-people .* 4 ", text)
    assert re.search(r"judge .* judge-digest .* 5 ", text)
    assert "preferences/0 3–5" in text


def test_show_has_digests_and_history(registry, family):
    text = shown(registry, "show", "serving")
    assert family[1].digest in text
    assert "better" in text


def test_diff_names_what_differs_and_what_does_not(registry, family):
    text = shown(registry, "diff", family[1].id, family[2].id)
    assert "rm2" in text
    assert re.search(r"model\.safetensors +│ [0-9a-f]{12} +│ [0-9a-f]{12}", text)
    assert "The same in both: tokenizer.json" in text


def test_a_beginning_of_an_id_is_enough_when_it_is_the_only_one(registry, family):
    assert find(registry, "rl-000002") == family[2]
    with pytest.raises(ConfigError, match="2 checkpoints that begin with 'rl-'"):
        find(registry, "rl-")
    with pytest.raises(ConfigError, match="0 checkpoints"):
        find(registry, "x")
