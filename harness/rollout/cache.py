"""A key-value cache that writes in place and gives up the rows of finished sequences."""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class SlotLayer(DynamicLayer):
    """One layer's keys and values in buffers allocated once.

    transformers' own dynamic layer copies everything it holds for each new token; this writes the token into place. The
    first rows are in use; :meth:`batch_select_indices` moves only the rows that change their place.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [n, heads, q, dim] states; returns views of all [n, heads, length, dim] so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (self._buffer(states) for states in (key_states, value_states))
        assert self.keys is not None and self.values is not None
        rows, end = key_states.shape[0], self.length + key_states.shape[2]
        self.keys[:rows, :, self.length : end] = key_states
        self.values[:rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_seq_length(self) -> int:
        """Tokens held for each row."""
        return self.length

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        assert self.keys is not None and self.values is not None
        self.keys = self.keys.repeat_interleave(repeats, 0)
        self.values = self.values.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order, as the first ones."""
        assert self.keys is not None and self.values is not None
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        for buffer in (self.keys, self.values):
            buffer[moved, :, : self.length] = buffer[indices[moved], :, : self.length]

    def _buffer(self, states: Tensor) -> Tensor:
        rows, heads, _, dim = states.shape
        return states.new_empty(rows, heads, self.capacity, dim)


def build_cache(config: PretrainedConfig, capacity: int) -> Cache:
    """A cache for ``capacity`` tokens a row; layers that are not plain attention keep transformers' own kind."""
    cache = DynamicCache(config=config)
    cache.layers = [SlotLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
