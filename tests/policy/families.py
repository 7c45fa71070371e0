"""A tiny random model of each family of mixture-of-experts models, by how its router turns scores into weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EXPERTS, CHOSEN = 8, 2

_COMMON = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_SMALL = {"moe_intermediate_size": 16, "head_dim": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_GROUPS = {"n_group": 4, "topk_group": 2}  # of the 4 groups of 2 experts, a token's experts lie in 2
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_expert_intermediate_size": 16,
}

FAMILIES = {
    # softmax, then top-k
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1], **_SMALL},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "qwen3_next": {"num_experts": EXPERTS, **_SMALL, **_LINEAR},
    "qwen3_5_moe_text": {"num_experts": EXPERTS, **_SMALL, **_LINEAR},
    "jamba": {
        "num_experts": EXPERTS,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
    },
    # softmax, a bias on the choice alone
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": CHOSEN, "moe_layer_start_index": 1, **_SMALL},
    # softmax, the best groups of experts, then top-k of scores that are zeroed elsewhere
    "deepseek_v2": {"n_routed_experts": EXPERTS, "topk_method": "group_limited_greedy", **_GROUPS, **LATENT},
    # top-k, then softmax
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "granitemoe": {"num_local_experts": EXPERTS},
    # sigmoid, a bias on the choice, the best groups of experts, then top-k
    "deepseek_v3": {"n_routed_experts": EXPERTS, **_GROUPS, **LATENT},
    "glm4_moe": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, **_GROUPS, **_SMALL},
    # sigmoid, a bias on the choice, top-k over all
    "minimax_m2": {"num_local_experts": EXPERTS, "head_dim": 8, "rotary_dim": 8},
    "lfm2_moe": {
        "num_experts": EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv", "full_attention"],
        "moe_intermediate_size": 16,
    },
    # the router and its experts stand in the layer itself, beside the attention
    "gemma4_text": {
        "num_experts": EXPERTS,
        "top_k_experts": CHOSEN,
        "enable_moe_block": True,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": 32,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["full_attention"] * 3,
        **_SMALL,
    },
}
# Dense; their layers, or the second of two, attend and keep a state beside it.
HYBRID = {
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "zamba2": {
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 4,
    },
}


def build(family: str, **changes) -> PreTrainedModel:
    """The model with fresh weights, large enough to tell its experts apart."""
    known = AutoConfig.for_model(family)
    common = {key: value for key, value in _COMMON.items() if hasattr(known, key)}
    config = AutoConfig.for_model(family, **{**common, **FAMILIES.get(family, {}), **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim > 1 or "bias" in name:
                tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
    return model
