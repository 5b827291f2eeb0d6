"""A round: it learns, it measures honestly, and it gives the same result when it is done again."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.reward.conftest import fill, make_pair

from charter.errors import CheckpointError, ConfigError
from charter.finetune.checkpoints import Vocabulary
from charter.reward import network
from charter.reward.config import RewardConfig
from charter.reward.labels import LabelStore
from charter.reward.rounds import FINDINGS, RECORD, Findings, Job, run


def _first(vocabulary: Vocabulary, upto: int) -> Job:
    return Job(1, upto, str(vocabulary.folder), False)


def _findings(target: Path) -> Findings:
    return Findings.loads((target / FINDINGS).read_text())


def test_a_toy_task_is_learned_and_the_next_round_is_measured_beside_the_model_in_force(
    config: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    fill(config, vocabulary, 320)
    steps: list[int] = []
    run(_first(vocabulary, 160), config, tmp_path / "1", report=lambda p: steps.append(p.step))
    first = _findings(tmp_path / "1")
    assert first.candidate.quality.accuracy > 0.9
    assert first.candidate.quality.calibration_error < 0.2
    assert first.in_force is None
    assert steps == list(range(1, len(steps) + 1))
    assert first.learned.by_principle == {"polite": first.learned.count}
    assert (first.learned.by_judge, first.learned.by_constitution) == (
        {"judge": first.learned.count}, {"c0ffee": first.learned.count},
    )  # fmt: skip
    assert 0 < first.augmented < first.learned.count

    run(Job(2, 320, str(tmp_path / "1/model"), True), config, tmp_path / "2")
    second = _findings(tmp_path / "2")
    assert second.in_force is not None
    assert second.in_force.quality.labels == second.candidate.quality.labels == 60
    assert second.replayed == 24
    assert second.learned.count == 144
    assert second.candidate.quality.accuracy > 0.9


def test_the_folder_is_a_sequence_classifier_with_its_scale(
    config: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    fill(config, vocabulary, 160)
    run(_first(vocabulary, 160), config, tmp_path / "1")
    folder = tmp_path / "1/model"
    assert network.is_reward_model(folder)
    assert not network.is_reward_model(vocabulary.folder)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    with LabelStore(config.folder / "labels.db") as labels:
        reference = labels.read(labels.numbers(True, 160)[:16])
    sequences = [(*p.prompt_ids, *a) for p in reference for a in (p.answer_a, p.answer_b)]
    raw = network.raw_scores(model.eval(), sequences, vocabulary, 4096)
    record = json.loads((folder / RECORD).read_text())
    mean = sum(raw) / len(raw)
    assert record["mean"] == pytest.approx(mean, abs=1e-4)
    assert record["deviation"] ** 2 == pytest.approx(sum((r - mean) ** 2 for r in raw) / len(raw), rel=1e-3)


def test_a_round_done_again_gives_the_same_weights_bit_for_bit(
    config: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    config = replace(config, tuning=replace(config.tuning, epochs=1))
    fill(config, vocabulary, 170)  # labels that came later change nothing
    for name in ("a", "b"):
        run(_first(vocabulary, 160), config, tmp_path / name)
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_held_out_prompts_are_never_trained_on(
    config: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    fill(config, vocabulary, 160)
    with LabelStore(config.folder / "labels.db") as labels:
        for number in range(160):  # a second label of each prompt
            pair = make_pair(vocabulary, number, seed=1)
            labels.add(
                pair, any(p.prompt_id == pair.prompt_id for p in labels.read(labels.numbers(True, 160)))
            )
        splits = [{p.prompt_id for p in labels.read(labels.numbers(h, 320))} for h in (True, False)]
    assert not splits[0] & splits[1]
    assert len(splits[0]) + len(splits[1]) == 160


def test_a_label_is_stored_once(config: RewardConfig, vocabulary: Vocabulary) -> None:
    pair = make_pair(vocabulary, 1)
    with LabelStore(config.folder / "labels.db") as labels:
        assert labels.add(pair, False)
        assert not labels.add(replace(pair, probability=0.1), True)
        assert labels.read(labels.numbers(False, 9)) == [pair]


def test_a_round_that_diverges_leaves_nothing(
    config: RewardConfig, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    fill(config, vocabulary, 160)
    tuning = replace(config.tuning, learning_rate=1e30, warmup_share=0.0, log_every=1)
    with pytest.raises(ConfigError, match="not finite"):
        run(_first(vocabulary, 160), replace(config, tuning=tuning), tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_a_full_disk_leaves_nothing_and_says_so(
    config: RewardConfig, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(config, vocabulary, 160)
    config = replace(config, tuning=replace(config.tuning, epochs=0.2))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("charter.finetune.run.copy_tokenizer", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run(_first(vocabulary, 160), config, tmp_path / "1")
    assert not (tmp_path / "1").exists()
