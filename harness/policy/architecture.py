"""What a model's configuration says of it, without its weights."""

from pathlib import Path
from typing import Any

from harness.config import ModelConfig
from harness.errors import ConfigError


def is_moe(model: ModelConfig) -> bool:
    """Whether the model routes tokens to experts, read from its configuration alone."""
    fields = architecture(model)
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


def unreadable(path: str, error: Exception) -> str:
    """What to say where transformers cannot read what should be a checkpoint."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if Path(path).is_dir():
        return f"model.path={path}: its files cannot be read as a causal language model's ({reason})"
    return f"model.path={path}: there is no such folder, and no hub has it or none can be reached ({reason})"
