"""Record, replay and compare expert choices of mixture-of-experts models.

Only the chosen expert indices are kept. On replay each router computes its weights from its current logits at the
recorded indices, by its own arithmetic: while its forward runs, its `torch.topk` over the experts is answered with the
recorded choice. Router weights keep their gradient, and where the model renormalises the chosen weights it still does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import filterfalse

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.return_types import topk as TopK
from transformers import PreTrainedModel

from harness.errors import ConfigError
from harness.policy.loading import autocast, decoder

_TOPK = (torch.topk, Tensor.topk)
_MASKED_FILL = (torch.masked_fill, Tensor.masked_fill)


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a mixture-of-experts model that route to experts, in the model's order; none in a dense model.

    They are the modules right around stacked experts, which is where transformers has their router too.
    """
    return [module for module in model.modules() if any(map(is_experts, module.children()))]


def is_experts(module: nn.Module) -> bool:
    """Whether it holds weights [experts, in, out]."""
    count = getattr(module, "num_experts", None)
    return any(weight.ndim == 3 and len(weight) == count for weight in module.parameters(recurse=False))


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a mixture-of-experts model in the order of its layers."""
    children = [child for layer in expert_layers(model) for child in layer.named_children()]
    return [module for name, module in children if name in ("gate", "router")]


@torch.no_grad()
def check_routing(model: PreTrainedModel) -> None:
    """Route a few tokens.

    Raises:
        ConfigError: if there are experts that are not found, or a layer's choices cannot be observed.
    """
    if not expert_layers(model) and any(".experts." in name for name, _ in model.named_parameters()):
        raise ConfigError(
            f"model: the experts of {type(model).__name__} are not, or not all, stacked in weights [experts, in, out], "
            "so that it would be taken for a dense model; choose a model of another architecture"
        )
    vocabulary = model.config.get_text_config().vocab_size
    input_ids = torch.arange(8, device=model.device).remainder(vocabulary).unsqueeze(0)
    with autocast(model.device), Routing(model).watch():
        decoder(model)(input_ids=input_ids, use_cache=False)


class Routing(TorchFunctionMode):
    """The expert choices of forward passes.

    A choice is a top-k over [tokens, experts] scores that any module beside the experts asks for: that is their router.
    Its rankings of expert groups have other shapes, and are left alone.

    Attributes:
        layers: those that route to experts.
        replay: [..., layers, k] indices for each token to use instead of the layers' own, or None.
        native: for each layer the indices [tokens, k] that it would choose in the latest forward pass.
        used: those that it used; they differ under replay alone.
    """

    def __init__(self, model: nn.Module, replay: Tensor | None = None) -> None:
        super().__init__()
        self.layers = expert_layers(model)
        self.replay = replay
        self.native: list[Tensor] = []
        self.used: list[Tensor] = []
        self._counts = [next(filter(is_experts, layer.children())).num_experts for layer in self.layers]
        self._layer = -1
        self._masked: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _MASKED_FILL:
            self._masked = result, args[0]
        elif func in _TOPK and args[0].shape[1:] == (self._counts[self._layer],):
            return self._choose(args[0], result)
        return result

    def _choose(self, scores: Tensor, native: TopK) -> TopK:
        self.native[self._layer] = self.used[self._layer] = native.indices
        if self.replay is None:
            return native
        if self._masked is not None and scores is self._masked[0]:
            # Scores outside of the groups that are chosen now: a recorded expert there has its real one underneath.
            scores = self._masked[1]
        indices = self.replay[..., self._layer, :].reshape(native.indices.shape).long()
        self.used[self._layer] = indices
        return TopK((scores.gather(-1, indices), indices))

    @contextmanager
    def watch(self) -> Iterator["Routing"]:
        """Record, and replay, the forward passes made inside.

        Raises:
            ConfigError: if a layer has made no choice that could be seen.
        """
        self.native, self.used = ([torch.empty(0)] * len(self.layers) for _ in range(2))
        handles = []
        for index, layer in enumerate(self.layers):
            for child in filterfalse(is_experts, layer.children()):
                handles.append(child.register_forward_pre_hook(lambda *_, index=index: self._enter(index)))
                # Recomputation for a backward pass ends by an exception, maybe in here.
                handles.append(child.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        for layer, indices in zip(self.layers, self.native, strict=True):
            if not indices.numel():
                raise ConfigError(
                    f"model: {type(layer).__name__} chooses its experts without a top-k over all their scores, so that "
                    "its choices can be neither recorded nor replayed; choose a model of another architecture"
                )

    def _enter(self, index: int) -> None:
        self._layer = index
        self.__enter__()

    def _leave(self) -> None:
        self.__exit__(None, None, None)
        self._layer, self._masked = -1, None

    def choices(self) -> Tensor:
        """The native choices [tokens, layers, k], in the smallest integer type."""
        return torch.stack(self.native, 1).to(torch.int16)


def padding_routes(rows: int, length: int, like: Tensor) -> Tensor:
    """Routes [rows, length, layers, k] where nothing is recorded: the first experts, as good as any others.

    Whatever follows a sequence cannot reach it.

    Args:
        rows: how many rows.
        length: how many positions.
        like: recorded routes [..., layers, k].
    """
    layers, k = like.shape[-2:]
    return torch.arange(k, dtype=like.dtype, device=like.device).repeat(rows, length, layers, 1)


def changes(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """How many expert choices are new.

    Args:
        new: [tokens, layers, k] indices of the new policy.
        old: [tokens, layers, k] of the old policy.

    Returns:
        the number of (token, layer, slot) choices that are not among the old ones of that token and layer, and the
        number of tokens with any such choice.
    """
    changed = ~(new.unsqueeze(-1) == old.long().unsqueeze(-2)).any(-1)
    return changed.sum(), changed.flatten(1).any(1).sum()
