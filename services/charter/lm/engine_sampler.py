"""Draws the next token of every answer in the batch, and reports log-probs of exactly what it drew from.

The distribution: the model's logits without the blocked ids, divided by the temperature, cut by top_k and
then by top_p, renormalised. The draw inverts the cumulative distribution (in float64) at a uniform number
that belongs to the answer alone, so what an answer becomes does not depend on its neighbours. (What a
neighbour can change is the last bits of the logits, since matrix products of other shapes round otherwise;
it takes a uniform number within about 1e-6 of a boundary for that to show.) Temperature 0 takes the
likeliest token and reports its log-prob at temperature 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from charter.lm.base import Sampling

_RANKED = 64
"""Tokens ranked at first for top_p; a whole sort only where they hold too little mass."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to sample each row; made once for as long as the rows stay the same."""

    temperature: Tensor | None
    """[rows, 1], 1 for greedy rows; None when all are 1."""
    greedy: Tensor | None
    """[rows], or None when no row is."""
    top_k: Tensor | None
    """[rows, 1], or None together with `top_p` when no row is truncated."""
    top_p: Tensor | None
    """[rows, 1]; 2 for rows without."""
    alternatives: int
    """Alternatives to report; the largest that a row asked for."""

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocabulary_size: int, device: torch.device) -> Plan:
        """The plan of these rows."""

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        temperatures = [s.temperature or 1.0 for s in rows]
        greedy = [s.temperature == 0 for s in rows]
        cut = any((0 < s.top_k < vocabulary_size or s.top_p < 1) and s.temperature > 0 for s in rows)
        ks = [s.top_k if s.top_k and s.temperature else vocabulary_size for s in rows]
        ps = [s.top_p if s.top_p < 1 and s.temperature else 2.0 for s in rows]
        return cls(
            temperature=column(temperatures, torch.float32) if any(t != 1 for t in temperatures) else None,
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            top_k=column(list(map(float, ks)), torch.int64) if cut else None,
            top_p=column(ps, torch.float64) if cut else None,
            alternatives=max((s.top_logprobs for s in rows), default=0),
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each row."""

    token_ids: list[int]
    logprobs: list[float]
    kept_log_mass: list[float] | None
    """None when no row was truncated."""
    alternatives: list[list[tuple[int, float]]] | None
    """Likeliest first, for the rows' largest wish; None when no row asked."""


def uniforms(seed: int | None) -> random.Random:
    """An answer's own stream of uniform numbers; without a seed, from the system's entropy."""
    return random.Random(seed)


def draw(logits: Tensor, plan: Plan, blocked: Tensor | None, uniform: Sequence[float]) -> Drawn:
    """One token for each row of `logits` [rows, vocabulary]; `blocked` [vocabulary] is 0 or -inf."""
    logits = logits.float()
    if blocked is not None:
        logits = logits + blocked
    if plan.temperature is not None:
        logits = (logits - logits.amax(-1, keepdim=True)) / plan.temperature
    logp = torch.log_softmax(logits, -1)
    kept = None
    if plan.top_k is not None and plan.top_p is not None:
        logp, kept = _truncate(logp, plan.top_k, plan.top_p)
    tokens = _invert(logp, torch.tensor(uniform, dtype=torch.float64, device=logp.device))
    if plan.greedy is not None:
        tokens = torch.where(plan.greedy, logp.argmax(-1), tokens)
    chosen = logp.gather(1, tokens[:, None])[:, 0]
    alternatives = None
    if plan.alternatives:
        values, ids = logp.topk(min(plan.alternatives, logp.shape[-1]), -1)
        alternatives = [
            [(i, v) for i, v in zip(row_ids, row, strict=True) if v != -torch.inf]
            for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)
        ]
    return Drawn(tokens.tolist(), chosen.tolist(), kept.tolist() if kept is not None else None, alternatives)


def _invert(logp: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes `uniform`; never one of probability 0."""
    cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True)[:, 0]


def _truncate(logp: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs after top_k and then top_p, renormalised, and the log of the mass that was kept."""
    vocabulary = logp.shape[-1]
    whole = (top_k >= vocabulary) & (top_p >= 1)  # rows that asked for no cut
    width = min(vocabulary, _RANKED)
    while True:
        ranked, order = logp.topk(width, -1)
        mass = ranked.double().exp()
        # Enough of the ranking is known when it covers top_k, or the mass that top_p can ask for.
        if width == vocabulary or bool(
            (whole | (top_k <= width) | (mass.sum(-1, keepdim=True) > top_p)).all()
        ):
            break
        width = vocabulary
    within_k = torch.arange(width, device=logp.device) < top_k
    mass = torch.where(within_k, mass, 0.0)
    total = torch.where(top_k >= vocabulary, 1.0, mass.sum(-1, keepdim=True))
    keep_ranked = within_k & (mass.cumsum(-1) - mass < top_p * total)
    kept = torch.where(keep_ranked, mass, 0.0).sum(-1, keepdim=True).log().clamp_(max=0.0)
    keep = torch.zeros_like(logp, dtype=torch.bool).scatter_(1, order, keep_ranked)
    cut = torch.where(keep, logp.double() - kept, -torch.inf).float()
    return torch.where(whole, logp, cut), torch.where(whole, 0.0, kept)[:, 0]
