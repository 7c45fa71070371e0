"""A key-value cache that writes in place and gives up the rows of finished sequences."""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer


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


class StateLayer(LinearAttentionLayer):
    """One layer's states of fixed size (linear attention, convolution), whose rows transformers only reorders."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        states = next(state for state in self.conv_states.values() if state is not None)
        self.batch_select_indices(torch.arange(len(states), device=states.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        self.reorder_cache(indices)  # type: ignore[arg-type]


def build_cache(config: PretrainedConfig, capacity: int) -> Cache:
    """A cache for ``capacity`` tokens a row; other kinds of layers, as sliding windows, are transformers' own."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = SlotLayer(capacity)
        elif type(layer) is LinearAttentionLayer:
            cache.layers[index] = StateLayer(layer.number_of_states)
    return cache
