"""Whitening: mean 0 and variance 1 over real tokens only."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(
    values: Tensor, acts: Tensor, *, unbiased: bool = True, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whitens over the actions.

    Which variance is a convention: OpenAI's code takes the biased one (divides by n), TRL the unbiased
    one (by n − 1). Ours is the unbiased one unless told otherwise. A single action has no variance: its
    whitened value is 0.

    Args:
        values: [slots].
        acts: which slots take part, [slots].
        unbiased: divide by n − 1.
        shift_mean: false keeps the mean and only scales, as for rewards.
        eps: added to the variance.

    Returns:
        Whitened values, [slots]; 0 outside the actions.
    """
    real = values[acts]
    mean = real.mean()
    var = real.var(correction=1 if unbiased and len(real) > 1 else 0)
    whitened = (values - mean) * torch.rsqrt(var + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~acts, 0.0)
