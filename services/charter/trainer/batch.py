"""Rollouts as flat tensors, and cut into micro-batches that a model takes.

See `charter.trainer.algorithm` for what slots are. A slot names the hidden state that predicts it: the
answer token at position p of its sequence is predicted, and valued, at position p − 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from charter.trainer.algorithm.packing import bucket, pack
from charter.trainer.config import ScoreSlot
from charter.trainer.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Batch:
    """A PPO step's rollouts."""

    rollouts: tuple[Rollout, ...]
    ids: tuple[Tensor, ...]
    """Prompt and answer of each rollout."""
    lengths: Tensor
    """Slots of each answer, [answers]."""
    starts: Tensor
    """Index of each answer's first slot, [answers]."""
    places: Tensor
    """Position in its own sequence of the hidden state that predicts the slot, [slots]."""
    targets: Tensor
    """The token that was drawn, [slots]; 0 where nothing was."""
    acts: Tensor
    """Where the policy drew a token, [slots]."""
    behaviour_logp: Tensor
    """[slots]; 0 where nothing was drawn."""
    inverse_temperature: Tensor
    """[slots]."""
    scores: Tensor
    """[answers]."""
    stopped: Tensor
    """[answers]."""

    def __len__(self) -> int:
        return len(self.rollouts)

    def slots_of(self, answers: Sequence[int]) -> Tensor:
        """Indices of the slots of these answers, in their order."""
        return torch.cat(
            [torch.arange(int(self.starts[i]), int(self.starts[i] + self.lengths[i])) for i in answers]
        )


def build_batch(rollouts: Sequence[Rollout], score_slot: ScoreSlot = "last_token") -> Batch:
    """Lays rollouts out as slots. The rollouts have been `checked`."""
    longest = max(len(r.answer_ids) for r in rollouts)
    places: list[int] = []
    targets: list[int] = []
    acts: list[bool] = []
    behaviour: list[float] = []
    lengths: list[int] = []
    for r in rollouts:
        drawn = [j for j in range(len(r.answer_ids)) if r.drawn is None or r.drawn[j]]
        places += [len(r.prompt_ids) + j - 1 for j in drawn]
        targets += [r.answer_ids[j] for j in drawn]
        behaviour += [r.behaviour_logprobs[j] for j in drawn]
        acts += [True] * len(drawn)
        extra = score_slot == "after_last_token" and len(r.answer_ids) < longest
        if extra:
            places.append(r.tokens - 1)
            targets.append(0)
            behaviour.append(0.0)
            acts.append(False)
        lengths.append(len(drawn) + extra)
    slots = torch.tensor(lengths)
    temperature = torch.tensor([1.0 / r.temperature for r in rollouts])
    return Batch(
        rollouts=tuple(rollouts),
        ids=tuple(torch.tensor([*r.prompt_ids, *r.answer_ids]) for r in rollouts),
        lengths=slots,
        starts=slots.cumsum(0) - slots,
        places=torch.tensor(places),
        targets=torch.tensor(targets),
        acts=torch.tensor(acts),
        behaviour_logp=torch.tensor(behaviour),
        inverse_temperature=temperature.repeat_interleave(slots),
        scores=torch.tensor([r.score for r in rollouts]),
        stopped=torch.tensor([r.stopped for r in rollouts]),
    )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some answers as one model input."""

    input_ids: Tensor
    """Packed: [1, tokens]. Padded: [answers, longest], padded on the right."""
    position_ids: Tensor
    """As `input_ids`; each answer counts from 0."""
    attention_mask: Tensor | None
    """Padded only: true where a token is real."""
    segments: tuple[int, ...]
    """Tokens of each answer, in order."""
    slots: Tensor
    """Which slots of the batch these are, [n]."""
    flat: Tensor
    """Where their hidden states lie in `input_ids`, flattened, [n]."""
    weight: float = 1.0
    """0 for a stand-in that only keeps devices in step."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        if device.type == "cpu":
            return self
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        tensors = (self.input_ids, self.position_ids, self.slots, self.flat)
        ids, positions, slots, flat = (t.to(device, non_blocking=True) for t in tensors)
        return MicroBatch(ids, positions, mask, self.segments, slots, flat, self.weight)


def micro_batches(
    batch: Batch, answers: Sequence[int], budget: int, *, packed: bool, devices: int = 1
) -> list[MicroBatch]:
    """Cuts these answers into micro-batches; their number is a multiple of the number of devices."""
    lengths = [batch.rollouts[i].tokens for i in answers]
    parts = (pack if packed else bucket)(lengths, budget, devices)
    make = _packed if packed else _padded
    cut = []
    for part in parts:
        chosen = [answers[i] for i in part]
        stand_in = not chosen
        if stand_in:
            chosen = [answers[min(range(len(lengths)), key=lengths.__getitem__)]]
        cut.append(make(batch, chosen, 0.0 if stand_in else 1.0))
    return cut


def _packed(batch: Batch, answers: Sequence[int], weight: float) -> MicroBatch:
    segments = tuple(len(batch.ids[i]) for i in answers)
    slots = batch.slots_of(answers)
    ends = torch.tensor(segments).cumsum(0)
    offsets = (ends - torch.tensor(segments)).repeat_interleave(batch.lengths[list(answers)])
    return MicroBatch(
        input_ids=torch.cat([batch.ids[i] for i in answers])[None],
        position_ids=torch.cat([torch.arange(n) for n in segments])[None],
        attention_mask=None,
        segments=segments,
        slots=slots,
        flat=batch.places[slots] + offsets,
        weight=weight,
    )


def _padded(batch: Batch, answers: Sequence[int], weight: float) -> MicroBatch:
    segments = tuple(len(batch.ids[i]) for i in answers)
    longest = max(segments)
    slots = batch.slots_of(answers)
    rows = torch.arange(len(answers)).repeat_interleave(batch.lengths[list(answers)])
    ids = torch.nn.utils.rnn.pad_sequence([batch.ids[i] for i in answers], batch_first=True)
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(longest).expand(len(answers), -1),
        attention_mask=torch.arange(longest) < torch.tensor(segments)[:, None],
        segments=segments,
        slots=slots,
        flat=rows * longest + batch.places[slots],
        weight=weight,
    )
