"""The supervised start that every algorithm shares, built once and cached by the hash of what determines it."""

import fcntl
import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.config import ColdStartConfig, ModelConfig
from harness.errors import ConfigError
from harness.machine import cache_dir, package_versions
from harness.policy import loading
from harness.policy.routing import routers
from harness.policy.tokenizer import build_tokenizer
from harness.runs.provenance import fingerprint
from harness.tasks import PromptStream
from harness.tasks.worked_solutions import WORKED_SOLUTIONS


def cold_start_dir(config: ModelConfig) -> Path:
    """The Hugging Face model directory of the cold-started model, built if it is not there."""
    path = cache_dir() / f"{config.name}-{cold_start_hash(config)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first run of a sweep builds it, the others wait for it
        if not path.exists():
            _build(config, path)
    return path


def check_weights(model: PreTrainedModel, path: Path) -> None:
    """Hold a loaded cold start against the hash that was written with it.

    Raises:
        ConfigError: if the cached weights are not the ones that were written.
    """
    if loading.weights_hash(model) != (path / "weights.sha256").read_text():
        raise ConfigError(f"the cached cold start {path} was altered; delete that folder to rebuild it")


def cold_start_hash(config: ModelConfig) -> str:
    """Twelve hexadecimal digits over architecture, recipe, code and library versions."""
    assert config.cold_start is not None
    determines = {
        "architecture": config.architecture,
        "experts": config.experts_implementation,
        "recipe": asdict(config.cold_start),
        "code": fingerprint(
            ["policy/cold_start.py", "policy/loading.py", "policy/routing.py", "policy/tokenizer.py", "tasks"]
        ),
        "packages": package_versions(("torch", "transformers", "reasoning-gym")),  # arithmetic, layers, problems
    }
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:12]


def _build(config: ModelConfig, path: Path) -> None:
    assert config.architecture is not None and config.cold_start is not None
    print(f"building the cold start of {config.name} (once; kept in {path})", flush=True)
    started = time.perf_counter()
    tokenizer = build_tokenizer()
    model = loading.build_model(config.architecture, tokenizer, config.cold_start.seed)
    if config.experts_implementation:
        model.set_experts_implementation(config.experts_implementation)
    losses = train(model, tokenizer, config.cold_start)
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    seconds = time.perf_counter() - started
    (partial / "weights.sha256").write_text(loading.weights_hash(model))
    (partial / "cold_start.json").write_text(json.dumps({"seconds": seconds, "losses": losses}))
    print(f"cold start of {config.name} built in {seconds:.0f} s, loss {losses[-1]:.3f}", flush=True)
    partial.rename(path)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ColdStartConfig) -> list[float]:
    """Train on worked solutions; returns the loss of every 50th step, in nats a token.

    Mixture-of-experts models may pay `router_penalty` times the mean squared router logit, in the manner of the z-loss
    of ST-MoE (arXiv 2202.08906, eq. 5): it keeps the experts' scores close to each other.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    losses = []
    router_logits: list[Tensor] = []
    handles = [
        router.register_forward_hook(lambda _module, _inputs, outputs: router_logits.append(outputs[0]))
        for router in routers(model)
    ]
    for step, (input_ids, labels) in enumerate(_batches(tokenizer, config)):
        progress = step / config.steps
        warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if router_logits and config.router_penalty > 0:
            valid = (input_ids != tokenizer.pad_token_id).flatten()
            loss = loss + config.router_penalty * torch.stack(router_logits)[:, valid].square().mean()
        router_logits.clear()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == config.steps - 1:
            losses.append(loss.item())
    for handle in handles:
        handle.remove()
    return losses


def _batches(tokenizer: PreTrainedTokenizerBase, config: ColdStartConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """`config.steps` pairs of token ids [B, L] (padded on the right) and labels [B, L] (-100 where not a solution)."""
    stream = PromptStream(config.task, config.seed, "cold_start")
    assert config.task.worked_solution is not None
    solve = WORKED_SOLUTIONS[config.task.worked_solution]
    rng = random.Random(config.seed)
    for step in range(config.steps):
        noise = config.noise * step / config.steps  # the arithmetic is learned first, the mistakes after it
        batch = []
        for problem in stream.take(config.batch_size):
            prompt = tokenizer(problem.prompt)["input_ids"]
            solution = tokenizer(solve(problem.fields, rng, noise))["input_ids"]
            batch.append((prompt, [*solution, tokenizer.eos_token_id]))
        yield _collate(batch, tokenizer.pad_token_id)


def _collate(batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(prompt) + len(solution) for prompt, solution in batch)
    input_ids = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), -100)
    for row, (prompt, solution) in enumerate(batch):
        input_ids[row, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
    return input_ids, labels
