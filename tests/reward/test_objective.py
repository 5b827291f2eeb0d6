"""TRL's reward loss with soft targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from charter.finetune import run
from charter.finetune.checkpoints import Vocabulary
from charter.finetune.config import TuningConfig
from charter.reward import network
from charter.reward.objective import SoftPair, SoftPairCollator, SoftRewardTrainer, dataset

PAIRS = [SoftPair((6, 7, 8 + i, 9), (6, 7, 10 + i), 1.0) for i in range(6)]


def _trainer(kind, collator, vocabulary: Vocabulary, folder: Path):
    model = network.load(vocabulary.folder, vocabulary, seed=3)
    data = dataset(PAIRS)
    return kind(
        model=model,
        args=RewardConfig(**run.arguments(TuningConfig(batch_size=3), folder)),
        train_dataset=data if kind is SoftRewardTrainer else data.remove_columns("target"),
        processing_class=vocabulary.tokenizer,
        data_collator=collator(pad_token_id=vocabulary.pad_id),
    )


def _loss_and_gradients(trainer, collator, pairs, vocabulary: Vocabulary):
    examples = [
        {"chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids, "target": p.target} for p in pairs
    ]
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, collator(pad_token_id=vocabulary.pad_id)(examples))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainer.model.parameters()]


def test_hard_labels_give_exactly_trls_own_loss_and_gradients(vocabulary: Vocabulary, tmp_path: Path) -> None:
    theirs = _trainer(RewardTrainer, DataCollatorForPreference, vocabulary, tmp_path / "a")
    ours = _trainer(SoftRewardTrainer, SoftPairCollator, vocabulary, tmp_path / "b")
    wanted, gradients = _loss_and_gradients(theirs, DataCollatorForPreference, PAIRS, vocabulary)
    loss, found = _loss_and_gradients(ours, SoftPairCollator, PAIRS, vocabulary)
    assert float(loss) == float(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    assert any(bool(g.abs().sum()) for g in gradients)


@pytest.mark.parametrize("target", [0.5, 0.7, 0.95])
def test_soft_labels_give_the_binary_cross_entropy(
    target: float, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    trainer = _trainer(SoftRewardTrainer, SoftPairCollator, vocabulary, tmp_path)
    pairs = [SoftPair(p.chosen_ids, p.rejected_ids, target) for p in PAIRS]
    loss, found = _loss_and_gradients(trainer, SoftPairCollator, pairs, vocabulary)
    model = trainer.model
    model.zero_grad()
    margins = torch.stack(
        [
            model(input_ids=torch.tensor([p.chosen_ids])).logits[0, 0]
            - model(input_ids=torch.tensor([p.rejected_ids])).logits[0, 0]
            for p in PAIRS
        ]
    )
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(margins, torch.full((6,), target))
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-7)
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_label_and_its_mirror_image_teach_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    trainer = _trainer(SoftRewardTrainer, SoftPairCollator, vocabulary, tmp_path)
    one = [SoftPair((6, 7, 8), (6, 7, 9), 0.8)]
    mirrored = [SoftPair((6, 7, 9), (6, 7, 8), 0.2)]
    first, again = (_loss_and_gradients(trainer, SoftPairCollator, p, vocabulary)[0] for p in (one, mirrored))
    torch.testing.assert_close(first, again)


def test_a_new_head_is_small_and_the_same_for_the_same_seed(vocabulary: Vocabulary) -> None:
    heads = [network.load(vocabulary.folder, vocabulary, seed=s).score.weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].detach().abs().max()) < 0.15


def test_batching_and_padding_change_no_score(vocabulary: Vocabulary) -> None:
    model = network.load(vocabulary.folder, vocabulary, seed=3).eval()
    sequences = [[6 + (i * j) % 50 for j in range(3 + i)] for i in range(9)]
    alone = network.raw_scores(model, sequences, vocabulary, 1)
    together = network.raw_scores(model, sequences, vocabulary, 10_000)
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert network.raw_scores(model, [], vocabulary, 100) == []
