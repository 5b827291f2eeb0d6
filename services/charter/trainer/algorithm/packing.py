"""Cuts a mini-batch into micro-batches by a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Spreads sequences over micro-batches of about equal numbers of tokens, none above the budget.

    The longest sequence goes first to the emptiest micro-batch (LPT), so devices that work side by side
    finish together. A sequence longer than the budget gets a micro-batch that exceeds it: better a large
    one than a lost answer. The same input always gives the same output.

    Args:
        lengths: tokens of each sequence.
        budget: tokens that a micro-batch should not exceed.
        multiple: the number of micro-batches is a multiple of this (devices run in step, each needs one);
            some may be empty when there are fewer sequences.

    Returns:
        Indices into `lengths`, ascending within a micro-batch.
    """
    count = max(1, math.ceil(sum(lengths) / budget))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        count = multiple * math.ceil(count / multiple)
        bins = _spread(lengths, order, count)
        fullest = max(sum(lengths[i] for i in b) for b in bins)
        if fullest <= budget or count >= len(lengths) or fullest <= max(lengths):
            filled = [sorted(b) for b in bins if b]
            return filled + [[]] * (-len(filled) % multiple)
        count += 1


def _spread(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in order:
        emptiest = min(range(count), key=loads.__getitem__)
        bins[emptiest].append(i)
        loads[emptiest] += lengths[i]
    return bins


def bucket(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Micro-batches of neighbours in length, for models that can only be given padded rectangles.

    A rectangle of n rows costs n times its longest row; the budget bounds that. Sorted neighbours keep
    the padding small, and since every token counts the same, the sorting changes no gradient.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    buckets: list[list[int]] = []
    current: list[int] = []
    for i in order:
        if current and (len(current) + 1) * lengths[i] > budget:
            buckets.append(current)
            current = []
        current.append(i)
    buckets.append(current)
    while len(buckets) % multiple:
        largest = max(range(len(buckets)), key=lambda b: len(buckets[b]))
        whole = buckets[largest]
        if len(whole) < 2:
            buckets.append([])
            continue
        buckets[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return buckets


def padding_waste(real_tokens: int, computed_tokens: int) -> float:
    """Share of the computed tokens that were padding."""
    return 1.0 - real_tokens / computed_tokens if computed_tokens else 0.0
