"""Estimates of the Kullback-Leibler divergence from log-probs of sampled tokens.

http://joschu.net/blog/kl-approx.html: for x drawn from p and r = q(x)/p(x), KL(p‖q) is the mean of
k1 = −log r (unbiased, may be negative) and of k3 = (r − 1) − log r (unbiased, never negative, usually
of lower variance); k2 = (log r)²/2 is biased and serves as a cheap distance between close policies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from charter.trainer.config import Estimator


def kl_estimate(logp: Tensor, logq: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimates of KL(p‖q), in nats, from tokens drawn from p.

    Args:
        logp: log p(x), any shape.
        logq: log q(x), the same shape.
        estimator: which one.

    Returns:
        The estimates, the same shape.
    """
    log_ratio = logq - logp
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2 or k3")


def exact_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) of whole distributions, [..., vocabulary] → [...]."""
    return (logp.exp() * (logp - logq)).sum(-1)
