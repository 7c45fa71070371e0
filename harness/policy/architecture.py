"""What a model's configuration says of it, without its weights."""

import inspect
import json
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from harness.config import ModelConfig
from harness.entries import conf_dir
from harness.errors import ConfigError


def is_moe(model: ModelConfig) -> bool:
    """Whether the model routes tokens to experts, read from its configuration alone."""
    fields = architecture(model)
    fields = fields | (fields.get("ffn_config") or {})  # of DBRX
    return any(fields.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model's transformers configuration: those that were given, or all that its checkpoint has.

    Raises:
        ConfigError: where a checkpoint has none that can be read.
    """
    if model.architecture is not None:
        return model.architecture
    from transformers import AutoConfig

    assert model.path is not None
    try:
        return AutoConfig.from_pretrained(model.path).get_text_config().to_dict()
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        raise ConfigError(unreadable(model.path, error)) from error


def check_architecture(model: ModelConfig) -> None:
    """Build an architecture with a vocabulary of four tokens, and let it read them.

    Raises:
        ConfigError: for a field that its configuration does not have, or a model that cannot be built or run.
    """
    assert model.architecture is not None
    if (model.architecture, model.experts_implementation) not in _ours():  # known without transformers' seconds
        _try_out(json.dumps(model.architecture), model.experts_implementation)


@lru_cache(maxsize=1)
def _ours() -> list[tuple[dict[str, Any], str | None]]:
    """Of the entries in conf/model."""
    entries = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (conf_dir() / "model").glob("*.yaml")]
    return [(entry["architecture"], entry.get("experts_implementation")) for entry in entries]


@lru_cache(maxsize=16)  # cells of a plan share their models
def _try_out(architecture: str, experts: str | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(architecture)
    kind = fields.pop("model_type", None)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields, vocab_size=4))
            if experts:
                built.set_experts_implementation(experts)
            built(input_ids=torch.arange(4).unsqueeze(0))
    except Exception as error:  # whatever the library makes of such values
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(
            f"model.architecture: no causal language model can be made of {architecture} with "
            f"model.experts_implementation={experts} ({reason})"
        ) from error
    known, source = AutoConfig.for_model(kind), inspect.getsource(inspect.getmodule(type(built)))  # type: ignore[arg-type]
    for name in fields:
        # Some are no attribute by default, but read where they are there.
        if not hasattr(known, name) and f"config.{name}" not in source and f'"{name}"' not in source:
            raise ConfigError(f"model.architecture.{name}: a model of model_type {kind} reads no such field")


def unreadable(path: str, error: Exception) -> str:
    """What to say where transformers cannot read what should be a checkpoint."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if Path(path).is_dir():
        return f"model.path={path}: its files cannot be read as a causal language model's ({reason})"
    return f"model.path={path}: there is no such folder, and no hub has it or none can be reached ({reason})"
