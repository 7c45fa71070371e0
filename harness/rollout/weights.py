"""The policy as rollouts see it: with its large weights in the precision of autocast."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from harness.policy.projections import GatedFeedForward, JointAttention
from harness.policy.routing import is_experts


class SamplingWeights:
    """Copies of the matrices that are read at every token.

    Autocast would cast those of linear layers once in a rollout, in memory that CUDA graphs cannot rely on, and those
    of experts at every token. Embeddings, norms and routers stay the policy's own, so that numbers are those of
    autocast.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.copies: dict[str, Tensor] | None = None  # by name; none where autocast is off

    def refresh(self) -> None:
        """Take over the policy's weights as they are now, in the precision that autocast is set to."""
        masters = dict(self.model.named_parameters(remove_duplicate=False))
        if self.copies is None:
            kind = self.model.device.type
            self.copies = {}
            if torch.is_autocast_enabled(kind):
                self.copies = self._room(masters, torch.get_autocast_dtype(kind))
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), [masters[name] for name in self.copies])

    def _room(self, masters: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
        """Those that are multiplied at once lie one behind the other."""
        room: dict[str, Tensor] = {}
        names = {id(master): name for name, master in masters.items()}
        for module in self.model.modules():
            if isinstance(module, (JointAttention, GatedFeedForward)):
                weights = [projection.weight for projection in module.projections()]
                sizes = list(map(len, weights))
                whole = weights[0].new_empty(sum(sizes), *weights[0].shape[1:], dtype=dtype)
                room |= {names[id(weight)]: part for weight, part in zip(weights, whole.split(sizes), strict=True)}
        for name in _matrices(self.model):
            if name not in room:
                room[name] = torch.empty_like(masters[name], dtype=dtype)
        return room

    def __call__(self, **inputs: object) -> Tensor:
        """Logits [n, V] of each row's next token."""
        if self.copies:
            output = functional_call(self.model, self.copies, (), inputs, tie_weights=False)
        else:
            output = self.model(**inputs)
        return output.logits[:, -1]


def _matrices(model: PreTrainedModel) -> list[str]:
    """Names of the weights of linear layers and stacked experts."""
    names = []
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            if weight.ndim == 3 if is_experts(module) else weight.ndim == 2 and isinstance(module, nn.Linear):
                names.append(name)
    return names
