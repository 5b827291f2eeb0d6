"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) on flat slots."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns. The value after an answer's last slot is 0: every answer is an episode.

    A_t = δ_t + γλ·A_{t+1}, with δ_t = r_t + γ·V_{t+1} − V_t; the return is A_t + V_t, before any
    whitening. Tokens that the user wrote are not slots, so in a conversation of several turns the
    recursion steps over them from one turn of the policy to the next.

    Args:
        rewards: [slots].
        values: of the value model at the start of the update, [slots].
        lengths: slots of each answer, [answers], none zero.
        gamma: discount.
        lam: 0 trusts the values, 1 the rewards.

    Returns:
        Advantages and returns, both [slots].
    """
    rows, columns = _right_aligned(lengths)
    width = int(lengths.max())
    padded_rewards = rewards.new_zeros(len(lengths), width)
    padded_values = values.new_zeros(len(lengths), width + 1)
    padded_rewards[rows, columns] = rewards
    padded_values[rows, columns] = values
    # Right-aligned, every answer ends in the last column; what lies before its first slot is computed
    # and never read.
    advantages = torch.empty_like(padded_rewards)
    running = rewards.new_zeros(len(lengths))
    for t in reversed(range(width)):
        delta = padded_rewards[:, t] + gamma * padded_values[:, t + 1] - padded_values[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
    flat = advantages[rows, columns]
    return flat, flat + values


def _right_aligned(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every slot in a [answers, longest] rectangle whose rows end together."""
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    within = torch.arange(len(rows), device=lengths.device) - (lengths.cumsum(0) - lengths)[rows]
    return rows, within + (lengths.max() - lengths)[rows]
