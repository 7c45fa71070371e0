"""Models of real shapes, and the work that they are measured on."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """An architecture, and one rollout batch of it."""

    architecture: dict[str, Any]  # fields of the transformers configuration of that model_type
    sequences: int = 64  # in a rollout batch
    group_size: int = 8
    minibatches: int = 4  # optimizer steps of a rollout batch
    micro_batch: int = 16  # sequences in one forward and backward
    prompt: int = 256  # tokens
    completion: int = 256  # tokens
    generates: bool = True  # beside transformers' `generate`, which takes most of a minute for a thousand tokens


_QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
_QWEN3_1_7B = {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144}
SHAPES = {
    "qwen3_0_6b": Shape({**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072}),
    "qwen3_1_7b": Shape(_QWEN3_1_7B),
    # About as many tokens in a forward and backward; what a step costs beside them counts less.
    "qwen3_1_7b_long": Shape(_QWEN3_1_7B, micro_batch=8, completion=1024, generates=False),
    # Qwen3-30B-A3B with 4 of its 48 layers.
    "qwen3_30b_a3b_4_layers": Shape(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151_936,
            "tie_word_embeddings": False,
        }
    ),
    # To try the table out anywhere.
    "tiny": Shape(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 16,
            "moe_intermediate_size": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": 64,
            "tie_word_embeddings": False,
        },
        sequences=8,
        group_size=4,
        micro_batch=2,
        prompt=4,
        completion=4,
    ),
}
REAL = tuple(name for name in SHAPES if name != "tiny")
