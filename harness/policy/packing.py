"""Forward passes without padding: the tokens of a batch one behind the other in a single row.

What several rows begin with stands there once, be it their prompt or more: whatever is computed from it is the same for
all of them. Only attention sets tokens in rows, each behind what comes before it.

Where tokens are is worked out in host memory and then sent to the device, so that nobody waits for it to say.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from harness.policy.attention import PADDING_FREE, is_padding_free
from harness.policy.fusion import compiles
from harness.policy.kernels import arrays, on_one_core
from harness.policy.products import MULTIPLE
from harness.rollout.batch import Batch, join, send


class Packing:
    """Where the N tokens of a batch's rows, and M completion tokens among them, are in the input of a network.

    Networks that cannot do without padding see all B x L positions; the others see the real tokens, each once for the
    rows that begin with it and with what comes before it, and a few more that fill up their number.

    Attributes:
        inputs: what the network is called with.
        count: of the tokens, without those that fill up.
        completion: [M] the places, among the N tokens, from which the completion tokens are predicted.
    """

    def __init__(self, network: PreTrainedModel, batch: Batch) -> None:
        """
        Args:
            network: says whether it does without padding, and on which device the places are to be.
            batch: in host memory.
        """
        self._shape, self._completions_shape = batch.input_ids.shape, batch.mask.shape
        device, padding_free = network.device, is_padding_free(network)
        columns = torch.arange(self._shape[1]).expand(self._shape)
        layout = _packed(batch, _multiple(network)) if padding_free else _all(columns)
        self.completion = send(layout.tokens[batch.positions()], device)
        self._sampled = send(batch.mask.flatten().nonzero().squeeze(1), device)
        self._latest: tuple[Callable[..., Any], tuple[Any, ...], Any] | None = None
        self._layout, self._device, self.count = layout, device, layout.count
        self._tokens, self._positions = send(layout.tokens, device), send(layout.positions, device)
        self.inputs: dict[str, Any]
        if not padding_free:
            self.inputs = {"input_ids": send(batch.input_ids, device)}
        else:
            self.inputs = {
                "input_ids": send(batch.input_ids.flatten()[layout.positions].unsqueeze(0), device),
                "position_ids": send(columns.flatten()[layout.positions].unsqueeze(0), device),
                # Without one transformers would look in the positions for sequences, and wait for the device.
                "attention_mask": send(torch.ones(1, 1, 1, 1, dtype=torch.bool), device),
                "packing": self,
            }

    def once(self, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """What a function makes of something, computed for the first of the layers that are given the same object."""
        if self._latest is None or self._latest[0] is not function or self._latest[1] is not given:
            self._latest = function, given, function(*given)
        return self._latest[2]

    def of_tokens(self, values: Tensor) -> Tensor:
        """[N, ...] from those of the batch's positions [B, L, ...]: of equal ones that of one row."""
        return values.flatten(0, 1).index_select(0, self._positions)

    def of_positions(self, values: Tensor) -> Tensor:
        """[B, L, ...] from those of the tokens [N, ...]; where no token is, that of a filling one."""
        return values[self._tokens]

    def of_completions(self, values: Tensor) -> Tensor:
        """[B, T] from those of the M completion tokens, 0 where masked."""
        zeros = values.new_zeros(self._completions_shape.numel())
        return zeros.index_copy(0, self._sampled, values).unflatten(0, self._completions_shape)

    @cached_property
    def places(self) -> list[np.ndarray]:
        """As kernels take them: [R, L] the token at each place of the rows for attention, [R] where those begin that no
        earlier row has, and [R] one past the last."""
        return arrays(self._layout.rows.view(-1, self._shape[1]), self._layout.begins, self._layout.ends)

    @cached_property
    def _scattering(self) -> "_Scattering":
        """Worked out where it is asked for: kernels that read tokens where they are do not."""
        return _Scattering.of(self._layout).to(self._device)

    def in_rows(self, tokens: Tensor) -> Tensor:
        """[R, L, ...] from [N, ...]: each token behind what comes before it."""
        return _InRows.apply(tokens, self._scattering).unflatten(0, (-1, self._shape[1]))

    def in_one(self, rows: Tensor) -> Tensor:
        """[N, ...] from [R, L, ...]."""
        return _InOne.apply(rows.flatten(0, 1), self._scattering)


@dataclass
class _Layout:
    """Which of the N tokens are where: in the batch's B x L positions, and in R x L of rows for attention.

    Rows for attention are those of the batch with a token that no other row has for it. Of three rows "p q x y",
    "p q x" and "p q u" they are the first and the last. With the first filling token:

        token      p q x y u .
        tokens     0 1 2 3   0 1 2 5   0 1 4 5
        positions  0 1 2 3 10 0
        rows       0 1 2 3   0 1 4 5
        begins     0 2
        ends       4 3

    All are in host memory.
    """

    tokens: Tensor  # [B, L] of each position the token, the first filling one where there is none
    positions: Tensor  # [N] of each token one of its positions; of filling ones any
    rows: Tensor  # [R x L] of each position in those rows the token, the first filling one where there is none
    begins: Tensor  # [R] the first place of each of those rows whose token is there for it, as all after it are
    ends: Tensor  # [R] one past the last place of each
    count: int  # of the tokens, without those that fill up


@dataclass
class _Scattering:
    """What it takes to set tokens in rows and back, gradients too. Of the rows above:

    places     0 1 2 3 6 0
    owner      0 1 2 3   5 5 4 5
    copies     0 4   1 5   2   3   6
    starts     0 2 4 5 6 7
    """

    rows: Tensor  # as above
    places: Tensor  # [N] of each token the position in the rows for attention where it is there for them
    owner: Tensor  # [R x L] of each such place the token, of others the first filling one
    copies: Tensor  # of the first token all positions in those rows, then of the second and so on; of filling ones none
    starts: Tensor  # [N] where in ``copies`` those of each token begin

    @classmethod
    def of(cls, layout: _Layout) -> "_Scattering":
        """In host memory."""
        rows, every = layout.rows, len(layout.positions)
        columns = torch.arange(len(rows) // len(layout.begins))
        own = (columns >= layout.begins.unsqueeze(1)) & (columns < layout.ends.unsqueeze(1))
        places = own.flatten().nonzero().squeeze(1)
        count = len(places)
        owner = torch.full_like(rows, count).index_copy_(0, places, rows[places])
        copies = rows.argsort(stable=True)[: int((rows < count).sum())]
        counts = rows.bincount(minlength=count)[:count]
        return cls(
            rows=rows,
            places=functional.pad(places, (0, every - count)),
            owner=owner,
            copies=copies,
            starts=functional.pad(counts.cumsum(0) - counts, (0, every - count), value=len(copies)),
        )

    def to(self, device: torch.device) -> "_Scattering":
        """On another device."""
        return _Scattering(*(send(getattr(self, field.name), device) for field in fields(self)))


def _multiple(network: PreTrainedModel) -> int:
    """What tokens are filled up to a multiple of."""
    layers = getattr(network, "layers", ())
    any_count = bool(layers) and all(getattr(layer, "takes_any_count", False) for layer in layers)
    return 1 if any_count and on_one_core(next(network.parameters())) else MULTIPLE


def _packed(batch: Batch, multiple: int) -> _Layout:
    """Tokens alone, each once for the rows that begin alike up to it.

    At least one more fills up their number. What is computed from it reaches no completion, so that its gradients are
    0: it stands wherever there is no token.

    Args:
        batch: in host memory.
        multiple: of what their number is to be.
    """
    first = batch.first
    own = first == torch.arange(len(first)).unsqueeze(1)
    positions, attending = own.flatten().nonzero().squeeze(1), own.any(1)
    count = len(positions)
    numbers = own.flatten().cumsum(0).view(own.shape) - 1
    tokens = torch.where(first < 0, count, numbers.gather(0, first.clamp(min=0)))
    return _Layout(
        tokens=tokens,
        positions=functional.pad(positions, (0, multiple - count % multiple)),
        rows=tokens[attending].flatten(),
        begins=own[attending].int().argmax(1),
        ends=(first[attending] >= 0).sum(1),
        count=count,
    )


def _all(columns: Tensor) -> _Layout:
    """All positions, as they are; attention keeps its rows."""
    every, rows = torch.arange(columns.numel()), len(columns)
    ends = torch.full((rows,), columns.shape[1])
    return _Layout(every.view(columns.shape), every, every, torch.zeros_like(ends), ends, len(every))


class _InOne(torch.autograd.Function):
    """[N, ...] from [R x L, ...].

    Here as there both directions gather, where torch would scatter the gradient: with deterministic kernels by sorting
    the indices.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: _Scattering) -> Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.layout.owner), None


class _InRows(torch.autograd.Function):
    """[R x L, ...] from [N, ...]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: _Scattering) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layout, rows = ctx.layout, gradient.flatten(1)
        if rows.is_cuda and compiles():
            from harness.policy.kernels.gpu import sum_of_rows

            summed = sum_of_rows(rows, layout.copies, layout.starts)
        else:
            summed = functional.embedding_bag(layout.copies, rows, layout.starts, mode="sum")
        return summed.view(-1, *gradient.shape[1:]), None


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
    padded = packed_states(model)
    model.set_attn_implementation(PADDING_FREE)
    try:
        same = torch.allclose(packed_states(model), padded, rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, RuntimeError):  # it does not pass settings on to its attention
        same = False
    if not same:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def packed_states(model: PreTrainedModel) -> Tensor:
    """The hidden states [M, H] that completion tokens of a small batch are predicted from, to try out a model's layers.

    Its sequences differ in length, and two of them share their prompt.
    """
    prompts, groups = [[0, 1, 2], [3, 4], [0, 1, 2]], torch.tensor([0, 1, 0])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    batch = join(prompts, torch.arange(5, 17).view(3, 4), mask, torch.zeros_like(mask), groups, 0)
    batch = replace(batch, input_ids=batch.input_ids.remainder(model.config.get_text_config().vocab_size))
    network: Any = model.base_model
    packing = Packing(network, batch)
    return network(**packing.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[packing.completion]
