"""What each token earns: a price for leaving the reference, and the answer's score at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from charter.trainer.algorithm.kl import kl_estimate
from charter.trainer.config import Estimator


def last_slots(lengths: Tensor) -> Tensor:
    """Index of each answer's last slot, [answers], from the numbers of slots, [answers]."""
    return lengths.cumsum(0) - 1


def token_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    acts: Tensor,
    scores: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    estimator: Estimator = "k1",
) -> Tensor:
    """−β·KL at every action, and the score once, at the answer's last slot.

    https://github.com/openai/lm-human-preferences, train_policy.py, `compute_rewards`.

    Args:
        logp: log π of the proximal policy, [slots]; ignored where `acts` is false.
        ref_logp: log π of the reference, [slots].
        acts: where the policy acted, [slots].
        scores: one for each answer, [answers].
        lengths: slots of each answer, [answers], none zero.
        beta: the price of one nat.
        estimator: of the divergence.

    Returns:
        Rewards, [slots].
    """
    price = kl_estimate(logp, ref_logp, estimator).masked_fill(~acts, 0.0)
    return (-beta * price).index_add(0, last_slots(lengths), scores.to(price.dtype))


def shape_scores(
    scores: Tensor, stopped: Tensor, *, clip: float | None, missing_stop_penalty: float
) -> Tensor:
    """Bounds the scores, and charges answers that never stopped.

    Args:
        scores: the reward model's, normalised, [answers].
        stopped: whether the answer ended with its stop token, [answers].
        clip: scores are held within ±clip; None leaves them.
        missing_stop_penalty: taken from the score of an answer that was cut off (after clipping).

    Returns:
        Scores, [answers].
    """
    bounded = scores if clip is None else scores.clamp(-clip, clip)
    return torch.where(stopped, bounded, bounded - missing_stop_penalty)
