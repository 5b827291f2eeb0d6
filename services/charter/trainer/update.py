"""One PPO step: frozen rollouts in, a better policy and value model out.

    prepare     log-probs of the proximal policy and the reference, entropy, values: no gradient
    advantages  token rewards, GAE, whitening, staleness weights: `charter.trainer.algorithm`
    epochs      four passes over the answers in fresh orders; micro-batches by a token budget

The result does not depend on the micro-batches, on padding, or on how many devices share the work, but for
the order in which floating-point numbers are added. On one CPU process it is the same bit for bit: there is
no dropout, and every order is drawn from (seed, step, epoch), so nothing random survives a step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from charter.errors import ConfigError, TrainingStopped
from charter.trainer.algorithm.advantages import gae
from charter.trainer.algorithm.controller import AdaptiveKL, FixedKL, KLController
from charter.trainer.algorithm.kl import kl_estimate
from charter.trainer.algorithm.losses import policy_loss, staleness_weights, value_loss
from charter.trainer.algorithm.metrics import UpdateMetrics
from charter.trainer.algorithm.rewards import shape_scores, token_rewards
from charter.trainer.algorithm.whitening import whiten
from charter.trainer.batch import Batch, MicroBatch, build_batch, micro_batches
from charter.trainer.config import PPOConfig
from charter.trainer.forward import (
    ValueModel,
    can_pack,
    disable_dropout,
    enable_checkpointing,
    logprobs_and_entropy,
    mean_entropy_with_gradient,
    places_of_actions,
    policy_logits,
    select_attention,
    selected_logprobs,
    slot_values,
)
from charter.trainer.narrow import narrow_last_layer
from charter.trainer.report import EpochTally, summarize
from charter.trainer.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Prepared:
    """What stays fixed during an update; all [slots] on the CPU, zero where the policy did not act."""

    prox_logp: Tensor
    ref_logp: Tensor
    entropy: Tensor
    values: Tensor
    weights: Tensor
    """Truncated proximal/behaviour."""
    raw_advantages: Tensor
    advantages: Tensor
    """Whitened."""
    returns: Tensor
    shaped_scores: Tensor
    """[answers]."""


class Updater:
    """Holds the models and their optimizers between steps.

    The policy may be any causal model of transformers, whole or with LoRA adapters of peft. `reference` is
    a frozen copy of where it started; None takes the policy with its adapters switched off. The models are
    put into evaluation mode for good: none has dropout.
    """

    def __init__(
        self,
        policy: Any,
        value_model: ValueModel,
        reference: Any | None,
        config: PPOConfig,
        accelerator: Any | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.config = config
        self.accelerator = accelerator or Accelerator()
        self.step = 0
        self.controller: KLController = (
            FixedKL(config.beta)
            if config.kl_target is None
            else AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
        )
        if reference is None and not hasattr(policy, "disable_adapter"):
            raise ConfigError(
                "PPO needs a reference model, unless the policy has LoRA adapters to switch off"
            )
        text = policy.config.get_text_config()
        self.vocabulary: int = text.vocab_size
        self.context: int = getattr(text, "max_position_embeddings", None) or 1 << 30
        device = self.accelerator.device
        for model in (policy, value_model, reference):
            if model is not None:
                disable_dropout(model.to(device).eval())
        self.packed = can_pack(policy)
        for model in (value_model.backbone, reference):
            if model is not None:
                select_attention(model, packed=self.packed)
        for model in (policy, value_model.backbone, reference):
            if model is not None:
                narrow_last_layer(model)
        if config.gradient_checkpointing:
            for model in (policy, value_model.backbone):
                enable_checkpointing(model)
        if reference is not None:
            reference.requires_grad_(requires_grad=False)
        self.reference = reference
        self.policy, self.policy_optimizer = self._prepared(policy, config.learning_rate)
        self.value_model, self.value_optimizer = self._prepared(
            value_model, config.value_learning_rate or config.learning_rate
        )

    def _prepared(self, model: nn.Module, rate: float) -> tuple[Any, Any]:
        trainable = [p for p in model.parameters() if p.requires_grad]
        config = self.config
        optimizer = torch.optim.Adam(
            trainable, lr=rate, betas=config.adam_betas, eps=config.adam_eps, fused=True
        )
        prepared: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    # The step

    def update(
        self, rollouts: Sequence[Rollout], orders: Sequence[Sequence[int]] | None = None
    ) -> UpdateMetrics:
        """Learns from the rollouts, all of them in every epoch.

        Args:
            rollouts: at least one; raises `RequestError` for one that PPO cannot learn from, before
                anything has changed.
            orders: of the answers in each epoch; None draws them from the seed, the step and the epoch.

        Returns:
            What happened. Raises `TrainingStopped` when a loss or gradient is not finite; the models are
            then in the middle of a step and must be loaded again from the last checkpoint.
        """
        began = time.perf_counter()
        checked = [r.checked(self.vocabulary, self.context) for r in rollouts]
        batch = build_batch(checked, self.config.score_slot)
        prepared = self.prepare(batch)
        ready = time.perf_counter()
        tally = self.learn(batch, prepared, orders)
        done = time.perf_counter()
        metrics = summarize(
            batch,
            prepared,
            tally,
            step=self.step,
            beta=self.controller.beta,
            weight_cap=self.config.staleness_weight_cap,
            seconds={"prepare": ready - began, "epochs": done - ready},
        )
        self.controller = self.controller.updated(metrics.kl_per_answer, metrics.answers)
        self.step += 1
        return metrics

    # Preparation

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Everything that stays fixed during the epochs."""
        prox, entropy, ref, values = self._evaluate(batch)
        for name, numbers in (("policy", prox), ("reference", ref), ("value model", values)):
            if not bool(numbers.isfinite().all()):
                raise TrainingStopped(
                    f"step {self.step}: the {name} gives numbers that are not finite, before any learning; "
                    "its weights are broken. Go back to the last good checkpoint"
                )
        config, acts = self.config, batch.acts
        weights = staleness_weights(prox, batch.behaviour_logp, config.staleness_weight_cap)
        scores = shape_scores(
            batch.scores,
            batch.stopped,
            clip=config.score_clip,
            missing_stop_penalty=config.missing_stop_penalty,
        )
        rewards = token_rewards(
            prox,
            ref,
            acts,
            scores,
            batch.lengths,
            beta=self.controller.beta,
            estimator=config.kl_estimator,
        )
        if config.whiten_rewards:
            every = torch.ones_like(acts)
            rewards = whiten(rewards, every, unbiased=config.unbiased_variance, shift_mean=False)
        advantages, returns = gae(rewards, values, batch.lengths, gamma=config.gamma, lam=config.lam)
        whitened = whiten(advantages, acts, unbiased=config.unbiased_variance)
        return Prepared(prox, ref, entropy, values, weights, advantages, whitened, returns, scores)

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Proximal log-probs, entropy, reference log-probs and values, each [slots]."""
        slots = len(batch.acts)
        found = torch.zeros(4, slots)
        mine = []
        for micro in self._my_micro_batches(batch, range(len(batch))):
            acting, flat = places_of_actions(batch, micro)
            index = acting.cpu()
            targets = batch.targets[index].to(flat.device)
            scale = batch.inverse_temperature[index].to(flat.device)
            prox, entropy = logprobs_and_entropy(policy_logits(self.policy, micro, flat), targets, scale)
            with self._reference() as reference:
                ref, _ = logprobs_and_entropy(policy_logits(reference, micro, flat), targets, scale)
            values = slot_values(self.value_model, micro)
            mine.append((index, prox.cpu(), entropy.cpu(), ref.cpu(), micro.slots.cpu(), values.cpu()))
        for index, prox, entropy, ref, all_slots, values in self._gathered(mine):
            found[0, index], found[1, index], found[2, index] = prox, entropy, ref
            found[3, all_slots] = values
        return found[0], found[1], found[2], found[3]

    @contextlib.contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
        else:
            with self.accelerator.unwrap_model(self.policy).disable_adapter():
                yield self.policy

    def _my_micro_batches(self, batch: Batch, answers: Sequence[int]) -> list[MicroBatch]:
        devices, rank = self.accelerator.num_processes, self.accelerator.process_index
        every = micro_batches(
            batch, answers, self.config.micro_batch_tokens, packed=self.packed, devices=devices
        )
        return [m.to(self.accelerator.device) for m in every[rank::devices]]

    def _gathered(self, mine: list[Any]) -> list[Any]:
        if self.accelerator.num_processes == 1:
            return mine
        from accelerate.utils import gather_object

        return list(gather_object(mine))

    # Epochs

    def learn(
        self, batch: Batch, prepared: Prepared, orders: Sequence[Sequence[int]] | None = None
    ) -> EpochTally:
        """The epochs: optimizer steps over mini-batches in fresh orders."""
        tally = EpochTally()
        for epoch in range(self.config.epochs):
            order = list(orders[epoch]) if orders else self._order(epoch, len(batch))
            size = math.ceil(len(order) / self.config.mini_batches)
            tally.begin_epoch()
            for start in range(0, len(order), size):
                self._optimizer_step(batch, prepared, order[start : start + size], tally)
        return tally

    def _order(self, epoch: int, answers: int) -> list[int]:
        seed = torch.tensor([self.config.seed, self.step, epoch])
        mixed = int((seed * torch.tensor([1_000_003, 10_007, 101])).sum())
        order: list[int] = torch.randperm(answers, generator=torch.Generator().manual_seed(mixed)).tolist()
        return order

    def _optimizer_step(
        self, batch: Batch, prepared: Prepared, answers: Sequence[int], tally: EpochTally
    ) -> None:
        micros = self._my_micro_batches(batch, answers)
        chosen = batch.slots_of(answers)
        actions, slots = int(batch.acts[chosen].sum()), len(chosen)
        learns_policy = self.step >= self.config.value_warmup_steps
        for i, micro in enumerate(micros):
            last = i + 1 == len(micros)
            tally.saw(micro)
            if learns_policy:
                with self._accumulating(self.policy, last=last):
                    self._policy_backward(batch, prepared, micro, actions, tally)
            with self._accumulating(self.value_model, last=last):
                self._value_backward(prepared, micro, slots, tally)
        policy_norm = self._clipped_norm(self.policy_optimizer, "policy") if learns_policy else 0.0
        value_norm = self._clipped_norm(self.value_optimizer, "value model")
        if learns_policy:
            self._apply(self.policy_optimizer, is_value=False)
        self._apply(self.value_optimizer, is_value=True)
        tally.stepped(policy_norm, value_norm)

    def _accumulating(self, model: Any, *, last: bool) -> AbstractContextManager[Any]:
        """Devices exchange gradients once for each optimizer step, with its last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def _policy_backward(
        self, batch: Batch, prepared: Prepared, micro: MicroBatch, actions: int, tally: EpochTally
    ) -> None:
        acting, flat = places_of_actions(batch, micro)
        index, device = acting.cpu(), flat.device
        scale = batch.inverse_temperature[index].to(device)
        logits = policy_logits(self.policy, micro, flat)
        bonus = torch.zeros((), device=device)
        if self.config.entropy_bonus:
            bonus = self.config.entropy_bonus * mean_entropy_with_gradient(logits, scale).sum() / actions
            logits = logits.clone()  # the entropy's backward pass still needs them
        logp = selected_logprobs(logits, batch.targets[index].to(device), scale)
        prox = prepared.prox_logp[index].to(device)
        out = policy_loss(
            logp,
            prox,
            prepared.weights[index].to(device),
            prepared.advantages[index].to(device),
            clip=self.config.clip,
            normaliser=actions,
        )
        self._backward((out.loss - bonus) * micro.weight)
        if micro.weight:
            moved = kl_estimate(prox, logp.detach(), "k3")
            tally.saw_policy(out, moved)

    def _value_backward(self, prepared: Prepared, micro: MicroBatch, slots: int, tally: EpochTally) -> None:
        index, device = micro.slots.cpu(), micro.flat.device
        out = value_loss(
            slot_values(self.value_model, micro),
            prepared.values[index].to(device),
            prepared.returns[index].to(device),
            clip=self.config.value_clip,
            normaliser=slots,
        )
        self._backward(self.config.value_coefficient * out.loss * micro.weight)
        if micro.weight:
            tally.saw_value(out)

    def _backward(self, loss: Tensor) -> None:
        # Devices average their gradients; the losses are sums over all devices, so undo the average.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def _clipped_norm(self, optimizer: Any, which: str) -> float:
        """Clips a model's gradient; returns its norm before. Nothing is applied until both are finite."""
        parameters = list(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))
        limit = self.config.max_grad_norm
        # torch's own: accelerate's looks parameters up model by model, which fails for two sharded models.
        total = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        if not math.isfinite(norm):
            raise TrainingStopped(
                f"step {self.step}: the gradient of the {which} is {norm}, and was not applied. The last "
                "good checkpoint stays in force; lower learning_rate or raise beta, and look at the scores"
            )
        return norm

    def _apply(self, optimizer: Any, *, is_value: bool) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.config.rate(self.step, value=is_value)
        optimizer.step()
        optimizer.zero_grad()
