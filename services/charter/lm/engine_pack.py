"""Packs token sequences into few rows so that no shared prefix is computed twice.

Sequences that begin alike become one tree of tokens in one row: every token attends to its ancestors
and itself, and its position is its depth. Six questions about one answer cost the answer once. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of token trees, ready for one forward pass."""

    token_ids: Ids
    """[rows, width]"""
    positions: Ids
    """[rows, width]"""
    mask: npt.NDArray[np.float32] | None
    """[rows, 1, width, width], 0 where a token (third axis) sees another and -inf elsewhere; None where plain
    causal attention is the same."""
    rows: tuple[int, ...]
    """The row of each sequence."""
    paths: tuple[Ids, ...]
    """For each sequence the columns of its tokens."""


@dataclass(slots=True)
class _Tree:
    """Sequences that share a beginning; columns are numbered within the tree."""

    members: list[int]
    paths: list[Ids]
    edges: list[tuple[int, Ids, int]]
    """(first column, ancestors' columns, length) of every run of new tokens."""
    tokens: list[int]
    chain: bool = True
    """No branch: plain causal attention is right."""


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Packs the sequences; each must have at least one token."""
    trees = sorted(_grow(sequences), key=lambda tree: len(tree.tokens), reverse=True)
    width = len(trees[0].tokens)
    rows: list[list[tuple[int, _Tree]]] = []
    used: list[int] = []
    for tree in trees:  # first fit, largest first
        size = len(tree.tokens)
        row = next((r for r, n in enumerate(used) if n + size <= width), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append((used[row], tree))
        used[row] += size
    return _lay_out(rows, width, len(sequences))


def _grow(sequences: Sequence[Sequence[int]]) -> list[_Tree]:
    """Trees of the sequences that share at least a third of their tokens with their neighbour in order."""
    trees: list[_Tree] = []
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    previous: Sequence[int] = ()
    for i in order:
        ids = sequences[i]
        shared = _common_prefix(previous, ids)
        if not trees or 3 * shared < len(ids):
            trees.append(_Tree([], [], [], []))
            shared = 0
        tree = trees[-1]
        ancestors = tree.paths[-1][:shared] if tree.paths else np.empty(0, np.int64)
        if tree.paths and len(ids) > shared and shared < len(previous):
            tree.chain = False
        first, new = len(tree.tokens), len(ids) - shared
        tree.tokens.extend(ids[shared:])
        if new:
            tree.edges.append((first, ancestors, new))
        tree.members.append(i)
        tree.paths.append(np.concatenate((ancestors, np.arange(first, first + new))))
        previous = ids
    return trees


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _lay_out(rows: list[list[tuple[int, _Tree]]], width: int, count: int) -> Packed:
    token_ids = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    row_of = [0] * count
    paths: list[Ids] = [np.empty(0, np.int64)] * count
    plain = all(len(row) == 1 and row[0][1].chain for row in rows)
    mask = None
    if not plain:
        mask = np.full((len(rows), 1, width, width), -np.inf, np.float32)
        mask[:, :, np.arange(width), np.arange(width)] = 0  # padding sees itself: no empty softmax
    for r, row in enumerate(rows):
        for offset, tree in row:
            token_ids[r, offset : offset + len(tree.tokens)] = tree.tokens
            for first, ancestors, length in tree.edges:
                start = offset + first
                positions[r, start : start + length] = np.arange(len(ancestors), len(ancestors) + length)
                if mask is not None:
                    block = mask[r, 0, start : start + length]
                    block[:, offset + ancestors] = 0
                    block[:, start : start + length] = np.triu(
                        np.full((length, length), -np.inf, np.float32), 1
                    )
            for i, path in zip(tree.members, tree.paths, strict=True):
                row_of[i], paths[i] = r, path + offset
    return Packed(token_ids, positions, mask, tuple(row_of), tuple(paths))
