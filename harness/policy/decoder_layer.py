"""A decoder's layer in two halves, either of which is one function with its gradients on one core of a CPU.

There a small model's operations cost as much to call as to compute.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.policy import one_core
from harness.policy.kernels import LANES, WIDEST, on_one_core
from harness.policy.normalization import RMSNorm
from harness.policy.packing import Packing
from harness.policy.projections import GatedFeedForward, JointAttention, half_turned, replace_layers

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward layer of any kind, before each of which states are normalised."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def __init__(self, layer: nn.Module) -> None:
        """Takes over the parts of ``layer``, under their names, and what else it holds.

        Raises:
            ValueError: if it has others, or such as kernels do not take.
        """
        super().__init__()
        self.__dict__.update(layer.__dict__)
        norms = self.input_layernorm, self.post_attention_layernorm
        normalized = all(isinstance(norm, RMSNorm) and not len(norm.weight) % LANES for norm in norms)
        if not (normalized and isinstance(self.self_attn, JointAttention) and self.self_attn.suits_kernels):
            raise ValueError("its parts are of other kinds")
        if [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            raise ValueError("it holds numbers beside its parts")
        sizes = [size for part in self.modules() if isinstance(part, nn.Linear) for size in part.weight.shape]
        sizes.append(sum(projection.out_features for projection in self.self_attn.projections()))
        if isinstance(self.mlp, GatedFeedForward):
            sizes.append(2 * self.mlp.down_proj.in_features)
        # Libraries, which multiply what kernels do not, want shapes that come again.
        self.takes_any_count = max(sizes) <= WIDEST and not any(size % LANES for size in sizes)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        packing: Packing | None = None,
        **settings: Any,
    ) -> Tensor:
        """As the layer that it stands in for: [B, L, H] from [B, L, H]."""
        rotates = position_embeddings[0].shape[-1] == self.self_attn.head_dim
        if packing is not None and rotates and on_one_core(hidden_states):
            tokens = self._in_halves(hidden_states.flatten(0, 1), position_embeddings, packing)
            return tokens.view(hidden_states.shape)
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, packing=packing, **settings
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _in_halves(self, tokens: Tensor, embeddings: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        """[N, H] from [N, H], without padding."""
        attention, first, norm, mlp = self.self_attn, self.input_layernorm, self.post_attention_layernorm, self.mlp
        gains, epsilon = (None, None), 0.0
        if attention.normalizes:
            gains, epsilon = (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.epsilon
        tokens = one_core.Attending.apply(
            tokens, first.weight, *(projection.weight for projection in attention.projections()), attention.bias(),
            *gains, attention.o_proj.weight, attention.o_proj.bias, (first.epsilon, epsilon),
            *packing.once(_of_tokens, embeddings), attention.heads(), packing,
        )  # fmt: skip
        if isinstance(mlp, GatedFeedForward) and mlp.fits_kernels(tokens):
            weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
            return one_core.Feeding.apply(tokens, norm.weight, norm.epsilon, *weights)
        return tokens + mlp(norm(tokens).unsqueeze(0)).flatten(0, 1)


def _of_tokens(cos: Tensor, sin: Tensor) -> list[Tensor]:
    """[N, D] what tokens are rotated by, from transformers' position embeddings [1, N, D]."""
    return [part[0, :, 0] for part in half_turned(cos, sin)]


def join_halves(model: PreTrainedModel) -> None:
    """Put :class:`DecoderLayer` in the place of a model's own, if it then gives what it gave, which is tried."""
    layers = {name for name, layer in model.named_modules() if {part for part, _ in layer.named_children()} == _PARTS}
    replace_layers(model, dict.fromkeys(sorted(layers), DecoderLayer))
