"""The two losses of PPO, decoupled for rollouts that an older policy made.

Three policies are kept apart (Hilton et al. 2022, arXiv 2110.00641; AReaL, arXiv 2505.24298): the one
that *behaved*, the *proximal* one at the start of the update, and the *current* one. Ratio and clip are
around the proximal policy; how much the proximal policy differs from the one that behaved enters as a
weight, truncated so that no token shouts. With behaviour = proximal it is plain PPO, exactly.

Losses are sums divided by a count that the caller takes over the whole mini-batch on all devices, so that
splitting it into micro-batches changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The clipped objective and what was seen while computing it."""

    loss: Tensor
    """Scalar; its gradient teaches the policy."""
    ratio: Tensor
    """Current over proximal, [actions], detached."""
    clipped: Tensor
    """Where the clip took the gradient away, [actions]."""


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """The clipped squared error and where the clip held."""

    loss: Tensor
    clipped: Tensor
    """[slots]."""


def staleness_weights(prox_logp: Tensor, behaviour_logp: Tensor, cap: float) -> Tensor:
    """min(π_proximal / π_behaviour, cap) for every action, [actions]: truncated importance weights.

    Both log-probs must be of the whole distribution: where sampling was truncated by top_k or top_p, add
    the log of the kept mass to the behaviour's first, or the weights are biased.
    """
    return torch.exp(prox_logp - behaviour_logp).clamp(max=cap)


def policy_loss(
    logp: Tensor,
    prox_logp: Tensor,
    weights: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    normaliser: float,
) -> PolicyLoss:
    """Σ w·max(−A·r, −A·clamp(r, 1 − clip, 1 + clip)) / normaliser, with r = π/π_proximal.

    Args:
        logp: of the current policy, with gradient, [actions].
        prox_logp: of the policy at the start of the update, [actions].
        weights: truncated proximal/behaviour, [actions]; ones for fresh rollouts.
        advantages: [actions].
        clip: how far the ratio may go before the gradient stops.
        normaliser: number of actions in the whole mini-batch.
    """
    ratio = torch.exp(logp - prox_logp)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = (weights * torch.maximum(plain, bounded)).sum() / normaliser
    return PolicyLoss(loss, ratio.detach(), (bounded > plain).detach())


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None, normaliser: float
) -> ValueLoss:
    """½ Σ max((V − R)², (V_old + clamp(V − V_old, ±clip) − R)²) / normaliser.

    Args:
        values: of the current value model, with gradient, [slots].
        old_values: at the start of the update, [slots].
        returns: [slots].
        clip: how far a value may move in one update; None does not clip.
        normaliser: number of slots in the whole mini-batch.
    """
    plain = (values - returns).square()
    if clip is None:
        return ValueLoss(0.5 * plain.sum() / normaliser, torch.zeros_like(plain, dtype=torch.bool))
    near = torch.clamp(values, old_values - clip, old_values + clip)
    bounded = (near - returns).square()
    return ValueLoss(0.5 * torch.maximum(plain, bounded).sum() / normaliser, (bounded > plain).detach())
