"""`charter sft`'s run, with TRL and a tiny random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from charter.errors import CheckpointError, ConfigError
from charter.finetune.checkpoints import Vocabulary, load_vocabulary
from charter.finetune.config import LoraConfig, TuningConfig
from charter.finetune.run import Stopped
from charter.finetune.tokens import tokenise
from charter.lm.base import ChatMessage, Role
from charter.lm.checkpoint import tokenizer_digest
from charter.sft.config import SftConfig
from charter.sft.examples import Mixture, mix
from charter.sft.training import Trained, train

ANSWER = " I will not help with that."
CONFIG = SftConfig(tuning=TuningConfig(learning_rate=5e-3, epochs=6, batch_size=8, log_every=2))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(make_tiny_model(tmp_path_factory.mktemp("tiny"), spread=0.05))


def _asked(text: str):
    return (ChatMessage(Role.USER, text),)


@pytest.fixture(scope="module")
def mixture(vocabulary: Vocabulary) -> Mixture:
    revisions = [(_asked(f"How do I open the door {i}?"), ANSWER) for i in range(16)]
    own = [(_asked(f"Fill the cup {i}"), "Sure. First take the cup.") for i in range(16)]
    return mix(vocabulary, revisions, own, 0, seed=0)


def _train(
    vocabulary: Vocabulary, mixture: Mixture, folder: Path, config: SftConfig = CONFIG, **options
) -> Trained:
    return train(vocabulary, mixture, config, folder / "model", work=folder / "work", **options)


def _answer_loss(folder: Path, vocabulary: Vocabulary, question: str, answer: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    example = tokenise(vocabulary, _asked(question), answer)
    with torch.no_grad():
        return float(
            model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        )


def test_a_run_teaches_both_kinds_of_answer_and_writes_a_checkpoint(
    vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path
) -> None:
    steps: list[int] = []
    trained = _train(
        vocabulary, mixture, tmp_path, report=lambda p: steps.append(p.step), logs=tmp_path / "logs"
    )
    assert steps == list(range(1, 25))
    assert trained.steps == 24
    for question, answer in (
        ("How do I open the door 77?", ANSWER),
        ("Fill the cup 77", "Sure. First take the cup."),
    ):
        before = _answer_loss(vocabulary.folder, vocabulary, question, answer)
        after = _answer_loss(trained.folder, vocabulary, question, answer)
        assert after < 0.5 * before
    assert tokenizer_digest(trained.folder) == vocabulary.digest
    assert [f.name for f in trained.folder.glob("*.safetensors")] == ["model.safetensors"]
    assert list((tmp_path / "logs").glob("events.*"))


def test_the_same_seed_gives_the_same_weights_bit_for_bit(
    vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path
) -> None:
    config = replace(CONFIG, tuning=replace(CONFIG.tuning, epochs=1))
    first, second = (_train(vocabulary, mixture, tmp_path / name, config) for name in "ab")
    weights = [(t.folder / "model.safetensors").read_bytes() for t in (first, second)]
    assert weights[0] == weights[1]


def test_adapters_are_merged_and_leave_the_rest_as_it_was(
    vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path
) -> None:
    tuning = replace(CONFIG.tuning, epochs=1, lora=LoraConfig(rank=4))
    trained = _train(vocabulary, mixture, tmp_path, replace(CONFIG, tuning=tuning))
    before = load_file(vocabulary.folder / "model.safetensors")
    after = load_file(trained.folder / "model.safetensors")
    assert sorted(before) == sorted(after)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "model.embed_tokens.weight" in same
    assert "model.layers.0.self_attn.q_proj.weight" not in same


def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_weights(
    vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path
) -> None:
    config = replace(CONFIG, tuning=replace(CONFIG.tuning, epochs=2, save_every=3))
    whole = _train(vocabulary, mixture, tmp_path / "whole", config)

    def crash(progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(vocabulary, mixture, tmp_path / "cut", config, report=crash)
    half_written = tmp_path / "cut/work/checkpoint-4"
    half_written.mkdir()
    steps: list[int] = []
    cut = _train(vocabulary, mixture, tmp_path / "cut", config, report=lambda p: steps.append(p.step))
    assert steps[0] == 4
    assert not half_written.exists()
    assert (cut.folder / "model.safetensors").read_bytes() == (
        whole.folder / "model.safetensors"
    ).read_bytes()


def test_a_run_can_be_stopped(vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        _train(vocabulary, mixture, tmp_path, stop=lambda: True)
    assert not (tmp_path / "model").exists()


def test_a_run_that_diverges_says_so_and_writes_nothing(
    vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path
) -> None:
    tuning = replace(CONFIG.tuning, learning_rate=1e30, warmup_share=0.0, log_every=1)
    with pytest.raises(ConfigError, match="not finite"):
        _train(vocabulary, mixture, tmp_path, replace(CONFIG, tuning=tuning))
    assert not (tmp_path / "model").exists()


def test_an_empty_data_set_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to learn from"):
        _train(vocabulary, Mixture((), 0, 0, 3), tmp_path)


def test_an_existing_folder_is_not_overwritten(
    vocabulary: Vocabulary, mixture: Mixture, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    config = replace(CONFIG, tuning=replace(CONFIG.tuning, epochs=0.25))
    with pytest.raises(CheckpointError, match="exists already"):
        _train(vocabulary, mixture, tmp_path, config)
