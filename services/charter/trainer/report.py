"""Gathers what the epochs of an update saw, and says it as `UpdateMetrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from charter.trainer.algorithm.kl import kl_estimate
from charter.trainer.algorithm.losses import PolicyLoss, ValueLoss
from charter.trainer.algorithm.metrics import (
    UpdateMetrics,
    effective_sample_size,
    explained_variance,
    staleness_histogram,
)
from charter.trainer.algorithm.packing import padding_waste
from charter.trainer.batch import Batch, MicroBatch

if TYPE_CHECKING:
    from charter.trainer.update import Prepared


class EpochTally:
    """Running sums over the micro-batches of an update, on this device.

    Sums stay tensors until the end of an optimizer step, so that an accelerator is not made to wait.
    """

    def __init__(self) -> None:
        self.real_tokens = 0
        self.computed_tokens = 0
        self.epochs = 0
        self.optimizer_steps = 0
        self.policy_norm = 0.0
        self.value_norm = 0.0
        self.policy_loss = 0.0
        self.value_loss = 0.0
        self.actions = 0
        self.clipped = 0.0
        self.ratio_sum = 0.0
        self.ratio_max = 0.0
        self.slots = 0
        self.value_clipped = 0.0
        self.moved = 0.0
        self.moved_actions = 0
        self._waiting: list[tuple[int, Tensor]] = []
        self._waiting_values: list[tuple[int, Tensor]] = []

    def begin_epoch(self) -> None:
        """The divergence from the proximal policy is reported for the last epoch alone."""
        self.epochs += 1
        self.moved, self.moved_actions = 0.0, 0

    def saw(self, micro: MicroBatch) -> None:
        """A micro-batch is going through the models."""
        self.real_tokens += sum(micro.segments) if micro.weight else 0
        self.computed_tokens += micro.computed_tokens

    def saw_policy(self, out: PolicyLoss, moved: Tensor) -> None:
        """A micro-batch's policy loss, and k3 from the proximal policy for each of its actions."""
        sums = torch.stack(
            (
                out.loss.detach(),
                out.clipped.sum(),
                out.ratio.sum(),
                out.ratio.max() if len(out.ratio) else out.loss.detach() * 0,
                moved.sum(),
            )
        )
        self._waiting.append((len(out.ratio), sums))

    def saw_value(self, out: ValueLoss) -> None:
        """A micro-batch's value loss."""
        self._waiting_values.append((len(out.clipped), torch.stack((out.loss.detach(), out.clipped.sum()))))

    def stepped(self, policy_norm: float, value_norm: float) -> None:
        """An optimizer step is done."""
        self.optimizer_steps += 1
        self.policy_norm += policy_norm
        self.value_norm += value_norm
        for actions, sums in self._waiting:
            loss, clipped, ratio_sum, ratio_max, moved = sums.tolist()
            self.policy_loss += loss
            self.actions += actions
            self.clipped += clipped
            self.ratio_sum += ratio_sum
            self.ratio_max = max(self.ratio_max, ratio_max)
            self.moved += moved
            self.moved_actions += actions
        for slots, sums in self._waiting_values:
            loss, clipped = sums.tolist()
            self.value_loss += loss
            self.slots += slots
            self.value_clipped += clipped
        self._waiting.clear()
        self._waiting_values.clear()


def summarize(
    batch: Batch,
    prepared: Prepared,
    tally: EpochTally,
    *,
    step: int,
    beta: float,
    weight_cap: float,
    seconds: Mapping[str, float],
) -> UpdateMetrics:
    """The numbers of a finished update. With several devices, the sums are those of this one."""
    acts = batch.acts
    prox, ref = prepared.prox_logp[acts], prepared.ref_logp[acts]
    k1 = kl_estimate(prepared.prox_logp, prepared.ref_logp, "k1").masked_fill(~acts, 0.0)
    advantages, weights = prepared.raw_advantages[acts], prepared.weights[acts]
    behaviour = batch.behaviour_logp[acts]
    steps = max(1, tally.optimizer_steps)
    staleness = staleness_histogram(step, (r.policy_step for r in batch.rollouts))
    return UpdateMetrics(
        step=step,
        answers=len(batch),
        actions=int(acts.sum()),
        real_tokens=sum(r.tokens for r in batch.rollouts),
        padding_waste=padding_waste(tally.real_tokens, tally.computed_tokens),
        score_mean=float(batch.scores.mean()),
        score_std=float(batch.scores.std(correction=0)),
        shaped_score_mean=float(prepared.shaped_scores.mean()),
        cut_off_share=float((~batch.stopped).float().mean()),
        answer_length_mean=int(acts.sum()) / len(batch),
        beta=beta,
        kl_k1=float(kl_estimate(prox, ref, "k1").mean()),
        kl_k3=float(kl_estimate(prox, ref, "k3").mean()),
        kl_per_answer=float(k1.sum()) / len(batch),
        entropy=float(prepared.entropy[acts].mean()),
        policy_loss=tally.policy_loss / steps,
        value_loss=tally.value_loss / steps,
        clip_fraction=tally.clipped / max(1, tally.actions),
        value_clip_fraction=tally.value_clipped / max(1, tally.slots),
        ratio_mean=tally.ratio_sum / tally.actions if tally.actions else 1.0,
        ratio_max=tally.ratio_max if tally.actions else 1.0,
        update_kl_k3=tally.moved / max(1, tally.moved_actions),
        advantage_mean=float(advantages.mean()),
        advantage_std=float(advantages.std(correction=0)),
        return_mean=float(prepared.returns.mean()),
        value_mean=float(prepared.values.mean()),
        explained_variance=explained_variance(prepared.values, prepared.returns),
        staleness_mean=sum(k * n for k, n in staleness.items()) / len(batch),
        staleness_histogram=staleness,
        effective_sample_size=effective_sample_size(weights),
        weight_truncated=float((weights >= weight_cap).float().mean()),
        behaviour_kl_k3=float(kl_estimate(behaviour, prox, "k3").mean()),
        policy_grad_norm=tally.policy_norm / steps,
        value_grad_norm=tally.value_norm / steps,
        optimizer_steps=tally.optimizer_steps,
        seconds=dict(seconds),
    )
