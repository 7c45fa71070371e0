"""A rollout batch as tensors."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Batch:
    """B completions with their prompts, in host memory: networks are given micro-batches on their device.

    A row of ``input_ids`` is its prompt, its completion without the last token (whose successor nobody asks for), then
    padding: contiguous rows need no attention mask, since nothing attends to what follows it.
    """

    input_ids: Tensor  # [B, L] int
    prompt_lengths: Tensor  # [B] int
    completions: Tensor  # [B, T] int, padded on the right
    mask: Tensor  # [B, T] float, 1 at sampled tokens, the end-of-sequence token included
    group_ids: Tensor  # [B] int, equal for the completions of one prompt
    rollout_logprobs: Tensor  # [B, T] float, as the engine computed them at sampling
    routes: Tensor | None = None  # [B, L, layers, k] experts that the engine chose, where it was asked to record them

    @cached_property
    def lengths(self) -> Tensor:
        """[B] tokens of each row that the network sees."""
        return self.prompt_lengths + self.completion_lengths - 1

    @cached_property
    def completion_lengths(self) -> Tensor:
        """[B] tokens that were sampled."""
        return self.mask.sum(1).long()

    @property
    def first(self) -> Tensor:
        """[B, L] for each token one row, the same for all rows that begin with it and with what comes before it; -1
        where no token is.

        What a network makes of the token is the same in all of these rows.
        """
        columns = torch.arange(self.input_ids.shape[1])
        tokens = self.input_ids.where(columns < self.lengths.unsqueeze(1), -1)
        # In the order of their bytes rows that begin alike are next to each other, and what another one begins with is
        # behind it.
        order = torch.tensor(sorted(range(len(tokens)), key=[row.tobytes() for row in tokens.numpy()].__getitem__))
        differs = torch.ones_like(tokens, dtype=torch.bool)  # here or before, from the row above
        differs[1:] = (tokens[order[1:]] != tokens[order[:-1]]).cummax(1).values
        above = torch.where(differs, torch.arange(len(order)).unsqueeze(1), 0).cummax(0).values
        return torch.empty_like(above).index_copy_(0, order, order[above]).where(tokens >= 0, -1)

    def alike(self, routes: Tensor) -> Tensor:
        """Routes [B, L, layers, k] with one choice for each token of the rows that begin alike up to it.

        Passes that read it several times may differ where two experts score nearly the same; others read it once.
        """
        first, own = self.first, torch.arange(len(routes)).unsqueeze(1)
        return routes[torch.where(first < 0, own, first), torch.arange(routes.shape[1])]

    def select(self, rows: Tensor) -> "Batch":
        """The given rows, cut to the longest among them."""
        part = Batch(**{name: tensor[rows] for name, tensor in self._tensors().items()})
        length, width = int(part.lengths.max()), int(part.completion_lengths.max())
        part.input_ids = part.input_ids[:, :length]
        part.routes = None if part.routes is None else part.routes[:, :length]
        for name in ("completions", "mask", "rollout_logprobs"):
            setattr(part, name, getattr(part, name)[:, :width])
        return part

    @staticmethod
    def concatenate(parts: "list[Batch]") -> "Batch":
        """Several rollout batches as one; their groups stay apart."""
        columns = {name: stack_rows([getattr(part, name) for part in parts]) for name in parts[0]._tensors()}
        groups = torch.tensor([0, *(int(part.group_ids.max()) + 1 for part in parts[:-1])]).cumsum(0)
        shifted = [part.group_ids + int(shift) for part, shift in zip(parts, groups, strict=True)]
        return Batch(**{**columns, "group_ids": torch.cat(shifted)})

    def positions(self) -> tuple[Tensor, Tensor]:
        """Rows [N] and columns [N] of ``input_ids`` from which the N valid completion tokens are predicted."""
        rows, steps = self.mask.nonzero(as_tuple=True)
        return rows, self.prompt_lengths[rows] - 1 + steps

    def _tensors(self) -> dict[str, Tensor]:
        """Those that are there."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in columns.items() if tensor is not None}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """From host memory to a device, without waiting for it."""
    if device.type == "cuda":  # which waits for what it copies from memory that may be paged out, as a view's copy may
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def stack_rows(parts: list[Tensor]) -> Tensor:
    """Tensors [B_i, L_i, ...] on top of each other, padded on the right with 0 to the longest L."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    length = max(part.shape[1] for part in parts)
    behind = [0, 0] * (parts[0].dim() - 2)
    return torch.cat([F.pad(part, [*behind, 0, length - part.shape[1]]) for part in parts])


def join(
    prompts: list[list[int]], completions: Tensor, mask: Tensor, rollout_logprobs: Tensor, group_ids: Tensor, pad: int
) -> Batch:
    """A batch from prompts (one a completion), completions [B, T], their mask and log-probabilities."""
    lengths = mask.sum(1).long()
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.full((len(prompts), int((prompt_lengths + lengths).max()) - 1), pad)
    columns = torch.arange(input_ids.shape[1])
    input_ids[columns < prompt_lengths.unsqueeze(1)] = torch.tensor([token for prompt in prompts for token in prompt])
    rows, steps = (torch.arange(completions.shape[1]) < lengths.unsqueeze(1) - 1).nonzero(as_tuple=True)
    input_ids[rows, prompt_lengths[rows] + steps] = completions[rows, steps]
    width = int(lengths.max())
    return Batch(
        input_ids, prompt_lengths, completions[:, :width], mask[:, :width], group_ids, rollout_logprobs[:, :width]
    )
