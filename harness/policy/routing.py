"""Record, replay and compare expert choices of mixture-of-experts models.

Only the chosen expert indices are kept. On replay each router computes its weights from its current logits at the
recorded indices, by its own arithmetic: while its forward runs, its `torch.topk` is answered with the recorded choice.
Router weights keep their gradient, and where the model renormalises the chosen weights it still does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.return_types import topk as TopK


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a mixture-of-experts model in the order of its layers; none in a dense model."""
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


class Routing(TorchFunctionMode):
    """The expert choices of forward passes.

    ``native`` and ``used`` hold, for each router, the indices [tokens, k] that it would choose and that it used in the
    latest forward pass; they differ under replay alone.
    """

    def __init__(self, model: nn.Module, replay: Tensor | None = None) -> None:
        """
        Args:
            model: the model to watch.
            replay: [B, L, routers, k] indices to use instead of the routers' own, or None.
        """
        super().__init__()
        self.routers = routers(model)
        self.replay = replay
        self.native: list[Tensor] = [torch.empty(0)] * len(self.routers)
        self.used: list[Tensor] = [torch.empty(0)] * len(self.routers)
        self._layer = -1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._layer < 0 or func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        native = func(*args, **kwargs)
        self.native[self._layer] = self.used[self._layer] = native.indices
        if self.replay is None:
            return native
        indices = self.replay[:, :, self._layer].reshape(native.indices.shape).long()
        self.used[self._layer] = indices
        return TopK((args[0].gather(-1, indices), indices))

    @contextmanager
    def watch(self) -> Iterator["Routing"]:
        """Record, and replay, the forward passes made inside."""
        handles = []
        for layer, router in enumerate(self.routers):
            handles.append(router.register_forward_pre_hook(lambda *_, layer=layer: self._enter(layer)))
            handles.append(router.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: int) -> None:
        self._layer = layer
        self.__enter__()

    def _leave(self) -> None:
        self.__exit__(None, None, None)
        self._layer = -1

    def choices(self, rows: int) -> Tensor:
        """The native choices as [B, L, routers, k] for ``rows`` = B, in the smallest integer type."""
        stacked = torch.stack([indices.reshape(rows, -1, indices.shape[-1]) for indices in self.native], 2)
        return stacked.to(torch.int16)


def changes(new: list[Tensor], old: Tensor) -> tuple[Tensor, Tensor]:
    """How many expert choices are new.

    Args:
        new: for each router the indices [tokens, k] of the new policy.
        old: [tokens, routers, k] of the old policy.

    Returns:
        the number of (token, router, slot) choices that are not among the old ones of that token and router, and the
        number of tokens with any such choice.
    """
    stacked = torch.stack(new, 1)
    changed = ~(stacked.unsqueeze(-1) == old.long().unsqueeze(-2)).any(-1)
    return changed.sum(), changed.flatten(1).any(1).sum()
