"""Models and tokenizers: embedded ones with their cold start, or any Hugging Face causal language model."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from harness.config import ModelConfig
from harness.errors import ConfigError
from harness.policy.architecture import unreadable
from harness.policy.decoder_layer import join_halves
from harness.policy.experts import follow_autocast, use_closed_form
from harness.policy.kernels import without_kernels
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import drop_padding
from harness.policy.products import choose_products
from harness.policy.projections import join_projections


def load_policy(config: ModelConfig, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy in float32 (the master weights) and its tokenizer, the same for every algorithm.

    Raises:
        ConfigError: if the path holds no causal language model, or a tokenizer without an end-of-sequence token.
    """
    if config.architecture is not None:
        from harness.policy import cold_start

        path = str(cold_start.cold_start_dir(config))
    else:
        assert config.path is not None
        path = config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        raise ConfigError(unreadable(path, error)) from error
    room = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > room:
        raise ConfigError(
            f"model.path={path}: its tokenizer has {len(tokenizer)} tokens and its embedding rows for {room}; put the "
            "tokenizer there that the model was made with"
        )
    if config.architecture is not None:
        cold_start.check_weights(model, Path(path))
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path={path}: its tokenizer has no end-of-sequence token, so no completion could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    # Not that of its generation settings: once changed, transformers would refuse to save what is odd in them.
    model.config.pad_token_id = tokenizer.pad_token_id
    if config.experts_implementation:
        model.set_experts_implementation(config.experts_implementation)
    with supported(model):
        _check_head(model, path)
    if config.activation_checkpointing:
        _checkpoint_activations(model, path)
    prepare_layers(model, device)
    # Dropout would make the old policy's log-probabilities a different draw from the new one's.
    return model.eval(), tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's end of sequence, and those of the model's generation settings,
    which of a chat model may be the end of a turn."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = [] if named is None else named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *named]))


def prepare_layers(model: PreTrainedModel, device: str) -> None:
    """Let the layers of a model compute in the ways that are fastest on the device, and move it there.

    Numbers change by rounding alone: what a layer is replaced by is tried against it.
    """
    if device == "cpu":
        choose_products(model)
    with nullcontext() if device == "cpu" else without_kernels():
        fuse_normalization(model)
        drop_padding(model)
        join_projections(model)
        if device == "cpu":
            join_halves(model)
    model.to(torch.device(device))  # type: ignore[arg-type]
    if device == "cuda":
        follow_autocast(model)
    else:
        use_closed_form(model)


@contextmanager
def supported(model: PreTrainedModel) -> Iterator[None]:
    """Say of which model an error is that a trial meets.

    Raises:
        ConfigError: instead of whatever is raised inside.
    """
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another architecture lacks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"model: {type(model).__name__} is not supported ({reason}); choose a model of another architecture"
        ) from error


@torch.no_grad()
def _check_head(model: PreTrainedModel, path: str) -> None:
    """Refuse models whose logits are more than a linear head on the decoder: ours would not be their probabilities."""
    input_ids = torch.arange(8).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
    states = decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()
    given: list[Tensor] = []

    def exchange(_head: nn.Module, _states: Any, logits: Tensor) -> Tensor:
        given.append(logits)
        return torch.linspace(-1e3, 1e3, logits.numel()).view_as(logits)  # a cap hardly shows on those of fresh weights

    handle = head.register_forward_hook(exchange)
    after = model(input_ids=input_ids).logits
    handle.remove()
    (logits,) = given
    if not logits.isfinite().all():
        raise ConfigError(f"model.path={path}: its logits are not finite; are its weights damaged?")
    more = None
    if not torch.allclose(linear(states, head.weight, head.bias), logits, rtol=1e-3, atol=1e-3):
        more = "computes more than a linear layer between its decoder and its logits"
    elif not torch.equal(after, exchange(head, None, logits)):
        more = "scales or caps its logits after the output layer"
    if more:
        raise ConfigError(
            f"model.path={path}: {type(model).__name__} {more}, which the trainer's log-probabilities do not; choose a "
            "model of another architecture"
        )


def _checkpoint_activations(model: PreTrainedModel, path: str) -> None:
    """Prepare the layers; they do so where :func:`harness.update.recomputing` lets them."""
    # The new name is younger than the oldest transformers that we support.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"model.activation_checkpointing=true: {type(model).__name__} of model.path={path} cannot compute its "
            "activations again; set it to false, and model.micro_batch_sequences lower where memory is short"
        ) from error


def build_model(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """An embedded model with fresh weights, drawn from ``seed`` without touching the global random state."""
    fields = {key: value for key, value in architecture.items() if key != "model_type"}
    config = AutoConfig.for_model(
        architecture["model_type"],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The network below the language-model head."""
    return getattr(model, model.base_model_prefix)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on a GPU, float32 on a CPU; weights and log-probabilities are float32 on both."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
