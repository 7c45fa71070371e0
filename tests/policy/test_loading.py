"""Checkpoints that cannot be used are refused by their key, with what is wrong with them."""

import json
import re

import pytest
import torch

from harness.config import compose
from harness.errors import ConfigError
from harness.policy.loading import build_model, end_tokens, load_policy
from harness.policy.tokenizer import build_tokenizer
from tests.policy.families import build

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = build_tokenizer()
    build_model(ARCHITECTURE, tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def more_tokens(folder):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(folder)


def infinite_weights(folder):
    model = build_model(ARCHITECTURE, build_tokenizer(), seed=0)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    model.save_pretrained(folder)


def no_end(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))


def config_of(path):
    return compose(["model=huggingface", f"model.path={path}", "task.max_prompt_tokens=20"]).model


def test_a_whole_checkpoint_is_loaded(checkpoint):
    model, tokenizer = load_policy(config_of(checkpoint), "cpu")
    assert not model.training and tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("named", "ends"),
    [({}, (1,)), ({"eos_token_id": 1}, (1,)), ({"eos_token_id": 5}, (1, 5)), ({"eos_token_id": [4, 1, 6]}, (1, 4, 6))],
)
def test_completions_end_by_the_tokenizer_and_the_generation_settings(checkpoint, named, ends):
    (checkpoint / "generation_config.json").write_text(json.dumps(named))
    assert end_tokens(*load_policy(config_of(checkpoint), "cpu")) == ends


def test_generation_settings_that_contradict_each_other_do_not_keep_a_policy_from_being_saved(checkpoint, tmp_path):
    """Many published models name a temperature, but not that it be used."""
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    model, _ = load_policy(config_of(checkpoint), "cpu")
    model.save_pretrained(tmp_path / "policy")
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_weights, r"its files cannot be read as a causal language model's \(SafetensorError: "),
        (damaged_tokenizer, r"its files cannot be read as a causal language model's \("),
        (more_tokens, r"its tokenizer has \d+ tokens and its embedding rows for \d+; put the tokenizer there"),
        (infinite_weights, r"its logits are not finite; are its weights damaged\?"),
        (no_end, r"its tokenizer has no end-of-sequence token"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ConfigError, match=rf"^model\.path={re.escape(str(checkpoint))}: {message}"):
        load_policy(config_of(checkpoint), "cpu")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, "scales or caps its logits after the output layer"),
        ("granite", {"logits_scaling": 8.0}, "scales or caps its logits after the output layer"),
        ("modernbert-decoder", {"bos_token_id": 1}, "computes more than a linear layer between"),
    ],
)
def test_logits_that_are_not_those_of_a_linear_layer_are_refused(tmp_path, family, changes, message):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = build(family, vocab_size=len(tokenizer), **changes)
    with torch.no_grad():  # logits that a cap does nothing to
        model.get_output_embeddings().weight.mul_(0.01)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^model\.path=\S+: \w+ {message}"):
        load_policy(config_of(tmp_path), "cpu")


def test_a_damaged_configuration_is_found_before_anything_is_loaded(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^model\.path=.*: its files cannot be read as a causal language model's"):
        config_of(checkpoint)


def test_a_path_that_is_neither_folder_nor_on_a_hub_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.path=models/llama: there is no such folder, and no hub has it"):
        config_of("models/llama")


def test_more_tokens_than_the_checkpoint_has_positions_are_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"max_completion_tokens=100 make .* has 64 positions"):
        compose(["model=huggingface", f"model.path={checkpoint}", "task.max_completion_tokens=100"])


def test_longrope_has_as_many_positions_as_do_not_depend_on_the_micro_batch(checkpoint):
    factors = dict.fromkeys(("short_factor", "long_factor"), [1.0] * 4)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 24, "rope_theta": 10000.0, **factors}
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    lengths = ["model=huggingface", f"model.path={checkpoint}", "task.max_prompt_tokens=20"]
    compose([*lengths, "task.max_completion_tokens=5"])
    with pytest.raises(ConfigError, match=r"up to 25 tokens .* 24 positions \(original_max_position_embeddings"):
        compose([*lengths, "task.max_completion_tokens=6"])
