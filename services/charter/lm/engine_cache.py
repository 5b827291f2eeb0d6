"""The engine's key-value cache: one row for each answer being written, rows kept dense.

It is a transformers `Cache`, so any Hugging Face decoder can write to it. Row b holds the keys of answer b
from position 0 on; nothing is padded, so positions are indices. A finished row is filled by the last one,
and a decode step only touches the rows and columns that are in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_COLUMN_STEP = 64


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of up to `max_rows` answers; buffers grow with need.

    Before a forward pass say what it is: `begin_packed` (new prompts, laid out by `engine_pack`) or
    `begin_decode` (one more token for each of the first rows).
    """

    # Asked by transformers' mask helpers at every step; full attention in every layer.
    is_sliding = (False,)
    is_linear = (False,)
    is_dummy = (False,)
    is_compileable = False

    def __init__(self, max_rows: int) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._fresh: list[tuple[Tensor, Tensor]] | None = None
        self._columns = 0
        self._flat: dict[int, Tensor] = {}
        self._rows = 0
        self._positions: Tensor | None = None

    # What transformers asks of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new states [rows, heads, new, dim]; returns all that the new tokens may see."""
        if self._fresh is not None:
            self._fresh.append((key_states, value_states))
            return key_states, value_states
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        self._write(keys, key_states)
        self._write(values, value_states)
        return keys[: self._rows, :, : self._columns], values[: self._rows, :, : self._columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the new tokens."""
        return 0 if self._fresh is not None else self._columns - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`; used by mask helpers when no mask is given."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that attention covers, and the first of them."""
        return self.get_seq_length(layer_idx) + query_length, 0

    # What the engine does with it.

    def begin_packed(self) -> None:
        """The next pass reads prompts from their beginning; its states wait for `commit`."""
        self._fresh = []

    def commit(self, slots: Sequence[int], rows: Sequence[int], paths: Sequence[Tensor | slice]) -> None:
        """Copies prompts of the packed pass into their slots; every other state of it is dropped."""
        fresh, self._fresh = self._fresh or [], None
        if not slots:
            return
        lengths = [p.stop if isinstance(p, slice) else p.shape[0] for p in paths]
        self._reserve(fresh, max(slots) + 1, max(lengths))
        for layer, (new_keys, new_values) in enumerate(fresh):
            for slot, row, path, length in zip(slots, rows, paths, lengths, strict=True):
                self._keys[layer][slot, :, :length] = new_keys[row][:, path]
                self._values[layer][slot, :, :length] = new_values[row][:, path]

    def begin_decode(self, positions: Tensor, columns: int) -> None:
        """The next pass writes one token for each of the first len(positions) rows, at these positions.

        `columns` is the largest position plus 1.
        """
        self._fresh = None
        self._rows, self._columns, self._positions = positions.shape[0], columns, positions
        self._flat.clear()
        self._reserve([], self._rows, columns)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` columns of one row over another."""
        for buffer in (*self._keys, *self._values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self) -> None:
        """Gives the buffers back."""
        self._keys, self._values, self._fresh = [], [], None
        self._flat.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() * b.element_size() for b in (*self._keys, *self._values))

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one answer takes."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in (*self._keys, *self._values))

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        _, heads, _, dim = states.shape
        buffer.view(-1, dim).index_copy_(0, self._flat_index(heads, buffer.shape[2]), states.reshape(-1, dim))

    def _flat_index(self, heads: int, capacity: int) -> Tensor:
        """Where (row, head, position) lies in a buffer seen as [rows * heads * capacity, dim]."""
        index = self._flat.get(heads)
        if index is None:
            assert self._positions is not None
            first = torch.arange(self._rows * heads, device=self._positions.device).view(self._rows, heads)
            index = (first * capacity + self._positions[:, None]).reshape(-1)
            self._flat[heads] = index
        return index

    def _reserve(self, like: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int) -> None:
        if not self._keys:
            self._keys = [_buffer(k, 0, 0) for k, _ in like]
            self._values = [_buffer(v, 0, 0) for _, v in like]
        if not self._keys:
            return
        has_rows, has_columns = self._keys[0].shape[0], self._keys[0].shape[2]
        if rows <= has_rows and columns <= has_columns:
            return
        if rows > has_rows:
            rows = min(self.max_rows, max(rows, 2 * has_rows, 4))
        rows = max(rows, has_rows)
        columns = max(-(-columns // _COLUMN_STEP) * _COLUMN_STEP, has_columns)
        self._keys = [_grown(b, rows, columns) for b in self._keys]
        self._values = [_grown(b, rows, columns) for b in self._values]
        self._flat.clear()


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_zeros((rows, like.shape[1], columns, like.shape[3]))


def _grown(buffer: Tensor, rows: int, columns: int) -> Tensor:
    grown = _buffer(buffer, rows, columns)
    grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
