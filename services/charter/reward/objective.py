"""TRL's RewardTrainer with soft targets. Imports trl: only the learner imports this module.

TRL's loss is −log σ(d) with d = score(chosen) − score(rejected). With p the probability that "chosen" is
better, the cross-entropy −p log σ(d) − (1−p) log σ(−d) equals −log σ(d) + (1−p)·d, since
log σ(−d) = log σ(d) − d. So TRL's loss stays as it is and a term is added that vanishes for p = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference


@dataclass(frozen=True, slots=True)
class SoftPair:
    """Two whole sequences and the probability that the first is better, at least one half."""

    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    target: float


@dataclass
class SoftPairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, and the targets."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A padded batch: chosen ones first, then rejected ones."""
        batch = super().torch_call(examples)
        batch["target"] = torch.tensor([e["target"] for e in examples], dtype=torch.float32)
        return dict(batch)


class SoftRewardTrainer(RewardTrainer):  # type: ignore[misc]
    """TRL's trainer, and the term that soft targets add."""

    _signature_columns: list[str] | None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "target"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Binary cross-entropy of σ(score difference) with the targets, in nats, mean over the batch."""
        inputs = dict(inputs)
        target = inputs.pop("target")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
        loss = loss + ((1 - target) * (chosen - rejected)).mean()
        return (loss, outputs) if return_outputs else loss


def dataset(pairs: Sequence[SoftPair]) -> Any:
    """The pairs as what TRL trains on."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "chosen_ids": [list(p.chosen_ids) for p in pairs],
            "rejected_ids": [list(p.rejected_ids) for p in pairs],
            "target": [p.target for p in pairs],
        }
    )
