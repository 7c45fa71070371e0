"""Forward passes without padding: the tokens of a batch one behind the other in a single row.

Where tokens are is worked out in host memory and then sent to the device, so that nobody waits for it to say.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from harness.policy.attention import PADDING_FREE, is_padding_free
from harness.rollout.batch import Batch, send


class Packing:
    """Where the N tokens of a batch's rows, and M completion tokens among them, are in the input of a network.

    Networks that cannot do without padding see all B x L positions; the others see the real ones alone.

    Attributes:
        inputs: what the network is called with.
        completion: [M] the places, among the N tokens, from which the completion tokens are predicted.
    """

    def __init__(self, network: PreTrainedModel, batch: Batch) -> None:
        """
        Args:
            network: says whether it does without padding, and on which device the places are to be.
            batch: in host memory.
        """
        self.shape, self._completions_shape = batch.input_ids.shape, batch.mask.shape
        rows, columns = batch.positions()
        self._sampled = batch.mask.flatten().nonzero().squeeze(1)
        all_columns = torch.arange(self.shape[1]).expand(self.shape)
        padding_free = is_padding_free(network)
        lengths = batch.lengths if padding_free else torch.full_like(batch.lengths, self.shape[1])
        self._places = (all_columns < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
        # Of each position of the rows, which token is there; N, one past the last, where none is.
        self._tokens = torch.full((self.shape.numel(),), len(self._places))
        self._tokens[self._places] = torch.arange(len(self._places))
        self.completion = (lengths.cumsum(0) - lengths)[rows] + columns
        self.inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if padding_free:
            self.inputs = {
                "input_ids": self.in_one(batch.input_ids).unsqueeze(0),
                "position_ids": self.in_one(all_columns).unsqueeze(0),
                # Without one transformers would look in the positions for sequences, and wait for the device.
                "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
            }
        for name, tensor in self.inputs.items():
            self.inputs[name] = send(tensor, network.device)
        self._places, self._tokens, self._sampled, self.completion = (
            send(places, network.device) for places in (self._places, self._tokens, self._sampled, self.completion)
        )
        if padding_free:
            self.inputs["packing"] = self

    def in_one(self, rows: Tensor) -> Tensor:
        """[N, ...] from [B, L, ...]."""
        return _Gather.apply(rows.flatten(0, 1), self._places, self._tokens)

    def in_rows(self, tokens: Tensor, fill: Tensor | None = None) -> Tensor:
        """[B, L, ...] from [N, ...]; 0 where no token is, or those of ``fill`` [B, L, ...]."""
        if fill is None:
            return _Gather.apply(tokens, self._tokens, self._places).unflatten(0, self.shape)
        return fill.flatten(0, 1).index_copy(0, self._places, tokens).unflatten(0, self.shape)

    def of_completions(self, values: Tensor) -> Tensor:
        """[B, T] from those of the M completion tokens, 0 where masked."""
        zeros = values.new_zeros(self._completions_shape.numel())
        return zeros.index_copy(0, self._sampled, values).unflatten(0, self._completions_shape)


class _Gather(torch.autograd.Function):
    """Elements along the first dimension, each at most once, and 0 for an index past the last.

    Both directions gather, where torch would scatter the gradient: with deterministic kernels by sorting the indices.
    """

    @staticmethod
    def forward(ctx: Any, elements: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(indices, inverse)
        return _gather(elements, indices, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        indices, inverse = ctx.saved_tensors
        return _gather(gradient, inverse, indices), None, None


def _gather(elements: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    if len(indices) > len(inverse):  # some are past the last
        elements = torch.cat([elements, elements.new_zeros(1, *elements.shape[1:])])
    return elements.index_select(0, indices)


@torch.no_grad()
def drop_padding(model: PreTrainedModel) -> None:
    """Let the passes of a model do without padding, if it can.

    It must attend to all that came before in each of its layers (no window, no recurrence) through transformers'
    attention interface, and give what it gave with padding.
    """
    text = model.config.get_text_config()
    whole = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    if text._attn_implementation != "sdpa" or not whole:
        return
    batch = _probe(text.vocab_size)
    network: Any = model.base_model
    padded = network(**Packing(network, batch).inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    padded = padded[Packing(network, batch).completion]
    model.set_attn_implementation(PADDING_FREE)
    try:
        packing = Packing(network, batch)
        packed = network(**packing.inputs, use_cache=False).last_hidden_state[0, packing.completion]
        same = torch.allclose(packed, padded, rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, RuntimeError):  # it does not pass settings on to its attention
        same = False
    if not same:
        model.set_attn_implementation("sdpa")


def _probe(vocabulary: int) -> Batch:
    """Two sequences of different length."""
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    tokens = torch.arange(12).view(2, 6).remainder(vocabulary)
    lengths = torch.tensor([3, 2])
    return Batch(tokens, lengths, tokens[:, :4], mask, torch.zeros(2, dtype=torch.long), torch.zeros_like(mask))
