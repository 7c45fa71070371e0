"""A policy whose every answer is known: a Qwen3 whose next token depends on the last one alone."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from harness.config import EvaluationConfig
from harness.policy.tokenizer import build_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def markov_policy(tokenizer):
    """Makes a policy from transitions, e.g. {"=": "#", "#": "45"}: after `#` comes 4 or 5, each half of the time."""

    def make(transitions: dict[str, str | list[str]]) -> Qwen3ForCausalLM:
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        layer = model.model.layers[0]
        with torch.no_grad():
            # Attention and MLP add nothing, so the last hidden state is the last token's one-hot embedding.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 32))
            model.lm_head.weight.zero_()
            for last, following in transitions.items():
                for token in following:
                    model.lm_head.weight[index(token), index(last)] = 10.0
        return model.eval()

    def index(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    return make


@pytest.fixture
def evaluation() -> EvaluationConfig:
    tasks = ["chain_sum_held_out", "chain_sum_longer", "chain_sum_signed"]
    return EvaluationConfig(tasks=tasks, task_path=None, fractions=[1.0], limit=64, batch_size=48, samples=0)
