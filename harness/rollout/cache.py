"""Key-value caches that write in place and give up the rows of finished sequences."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from harness.policy.kernels import LANES, arrays, on_one_core


class SlotLayer(DynamicLayer):
    """One layer's keys and values in buffers allocated once.

    transformers' own dynamic layer copies everything it holds for each new token; this writes the token into place. The
    first rows are in use; :meth:`copy_rows` touches only those that another row's place is given to.
    """

    def __init__(self, rows: int, columns: int) -> None:
        """Room for so many tokens of so many sequences."""
        super().__init__()
        self.rows, self.columns = rows, -(-columns // LANES) * LANES
        self.length = 0
        self.alone = False  # whether kernels for one core move its rows

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [n, heads, q, dim] states; returns views of all [n, heads, length, dim] so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (self._buffer(states) for states in (key_states, value_states))
            if self.keys.device.type == "cpu":  # transposed in memory, as decoded tokens read them fastest
                self.keys = self.keys.view(*self.keys.shape[:2], -1, self.columns).transpose(2, 3)
                self.alone = on_one_core(self.values)
        assert self.keys is not None and self.values is not None
        rows, end = key_states.shape[0], self.length + key_states.shape[2]
        self.keys[:rows, :, self.length : end] = key_states
        self.values[:rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values [n, heads, length, dim] so far."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @cached_property
    def buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys [rows, heads, dim, columns] and values [rows, heads, columns, dim] in host memory."""
        assert self.keys is not None and self.values is not None
        return self.keys.transpose(2, 3).numpy(), self.values.numpy()

    def get_seq_length(self) -> int:
        """Tokens held for each row."""
        return self.length

    def copy_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Give the places ``targets`` to what the rows ``sources`` hold, all at once."""
        if self.alone:
            from harness.policy.kernels.cpu import decoding

            decoding.copy_rows(*self.buffers, *arrays(sources, targets), self.length)
            return
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            held = buffer[:, :, : self.length]
            held.index_copy_(0, targets, held.index_select(0, sources))

    def _buffer(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        kind = states.device.type
        # Attention would cast them at every token.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        # Zeros: kernels read to the end of a register, and what is masked there is still multiplied.
        return states.new_zeros(self.rows, heads, self.columns, dim, dtype=dtype)


class FixedLayer(DynamicLayer):
    """One layer's keys and values in buffers that stay where they are, written at a column that the device knows.

    Attributes:
        columns: how many of the first columns :meth:`update` returns; the caller masks those that hold nothing yet.
    """

    def __init__(self, like: tuple[Tensor, Tensor], rows: int, columns: int, column: Tensor) -> None:
        """Room for so many rows and columns of keys and values as these are, to be written at ``column`` [1]."""
        super().__init__()
        # Zeros: what is masked is still multiplied, by 0.
        self.states = tuple(each.new_zeros(rows, each.shape[1], columns, each.shape[3]) for each in like)
        self.is_initialized = True
        self.column, self.columns = column, columns

    def fill(self, states: tuple[Tensor, Tensor], group_size: int) -> None:
        """Begin with the keys and values [P, heads, W, dim] of prompts, each repeated for its group."""
        for buffer, read in zip(self.states, states, strict=True):
            buffer[: len(read) * group_size, :, : read.shape[2]] = read.repeat_interleave(group_size, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write [n, heads, 1, dim] states; returns views of the first columns [n, heads, columns, dim]."""
        rows = len(key_states)
        for buffer, new in zip(self.states, (key_states, value_states), strict=True):
            buffer[:rows].index_copy_(2, self.column, new.to(buffer.dtype))
        keys, values = (buffer[:rows, :, : self.columns] for buffer in self.states)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns, since which of them hold tokens the device alone knows."""
        return self.columns

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order, as the first ones."""
        for buffer in self.states:
            buffer[: len(indices)] = buffer.index_select(0, indices)


class SlotCache(DynamicCache):
    """A cache for so many tokens of so many sequences; layers other than of full attention are transformers' own."""

    def __init__(self, config: PretrainedConfig, rows: int, columns: int) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = SlotLayer(rows, columns)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Have the rows ``indices``, in that order, as the first ones; any of them as often as it is asked for."""
        targets = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        sources = indices[targets]
        layer: Any
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.copy_rows(sources, targets)
            elif isinstance(layer, LinearAttentionLayer):  # transformers only reorders their states
                layer.reorder_cache(indices)  # type: ignore[arg-type]
            else:
                layer.batch_select_indices(indices)
