"""Attention for passes without padding and for decoding, behind transformers' attention interface.

In a pass without padding the tokens of a batch stand one behind the other in a single row (see
:mod:`harness.policy.packing`), so that projections, experts and normalisation work on real tokens alone; only in here
they stand in rows again. A decoded token's query heads are one product with the key head that they share. Everything
else is transformers' own.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from harness.policy.packing import Packing

PADDING_FREE = "padding_free"  # the name in a model's configuration

# Keys at least for a decoded token: with fewer, torch's CPU kernels for softmax and small products are several times
# slower than with as many of which some are masked.
_COLUMNS = 16


def is_padding_free(network: PreTrainedModel) -> bool:
    """Whether it attends through here, which only models do whose layers all attend to all that came before."""
    return network.config._attn_implementation == PADDING_FREE


def padding_free_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: "Packing | None" = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers' models call it.

    Args:
        module: the model's attention layer.
        query: [B, heads, Q, D].
        key: [B, key heads, L, D].
        value: [B, key heads, L, Dv].
        attention_mask: [B, 1, Q, L] bool, or to be added to the scores, or None where nothing but what follows is
            hidden; not looked at where there is ``packing``.
        scaling: of the scores; 1 / sqrt(D) by default.
        packing: where the tokens of a pass without padding (B = 1) belong.
        settings: the rest of what models pass on.

    Returns:
        [B, Q, heads, Dv], and no attention weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is not None:
        q, k, v = (packing.in_rows(states[0].transpose(0, 1)).transpose(1, 2) for states in (query, key, value))
        return packing.in_one(causal_attention(q, k, v, scaling).transpose(1, 2)).unsqueeze(0), None
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        return _decode(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """[B, heads, L, Dv] from queries [B, heads, L, D], keys [B, key heads, L, D] and values [B, key heads, L, Dv]."""
    return nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def decoding_mask(present: Tensor) -> Tensor:
    """[n, 1, 1, L] of decoded tokens, which see those that ``present`` [n, L] marks, as is fastest for their layers."""
    mask = present[:, None, None]
    if present.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)  # adding takes a third of the time of filling


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, 1, heads, Dv] for one query a row, without a copy of the keys for each head."""
    batch, heads, _, dim = query.shape
    # The heads that share a key head, as if they were queries of one.
    query = query.view(batch, key.shape[1], -1, dim)
    attend = _products if query.device.type == "cpu" else nn.functional.scaled_dot_product_attention
    return attend(query, key, value, mask, scale=scaling).reshape(batch, 1, heads, -1)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As torch's kernel, which is slower for a single query on a CPU."""
    missing = _COLUMNS - key.shape[2]
    if missing > 0:
        mask = decoding_mask(key.new_ones(1, key.shape[2], dtype=torch.bool)) if mask is None else mask
        key, value = (nn.functional.pad(states, (0, 0, 0, missing)) for states in (key, value))
        mask = nn.functional.pad(mask, (0, missing), value=False if mask.dtype == torch.bool else -torch.inf)
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)


AttentionInterface.register(PADDING_FREE, padding_free_attention)
AttentionMaskInterface.register(PADDING_FREE, sdpa_mask)
