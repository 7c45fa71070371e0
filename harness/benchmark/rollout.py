"""The rollout against transformers' `generate`."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from harness.benchmark.measure import Spread, interleave
from harness.benchmark.sharing import distinct
from harness.benchmark.sizes import NO_TOKEN, Sizes
from harness.benchmark.table import Cell, Options, Table, tokens_row
from harness.benchmark.training import LENGTHS, MODELS, plain_policy, run_config
from harness.benchmark.worker import workers
from harness.policy.loading import load_policy
from harness.rollout.embedded import EmbeddedEngine
from harness.tasks import PromptStream
from harness.torch_setup import set_up_torch

GOALS = {"fixed": 2.0, "natural": 3.0}
_TEXT = (
    "Completion tokens a second of sampling {completions} completions on one core in float32, from the same weights "
    "and prompts, at temperature 1. Ours gives the log-probability of each token; `generate` is measured without them, "
    "and with them taken from the logits that it returns. Completions of a prompt are decoded once by ours for as long "
    "as they are the same: distinct tokens are the share that is left of the batch's."
)


class OurRollout:
    """The embedded engine, log-probabilities included."""

    def __init__(self, model: str, lengths: str, sizes: Sizes) -> None:
        config = run_config(model, sizes)
        set_up_torch(config.threads)
        policy, tokenizer = load_policy(config.model, "cpu")
        problems = PromptStream(config.task, config.seed, "train").take(config.prompts_per_batch)
        self.prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
        self.group_size = config.algorithm.completions_per_prompt
        eos = NO_TOKEN if lengths == "fixed" else tokenizer.eos_token_id
        self.engine = EmbeddedEngine(
            policy, config.rollout, (eos,), tokenizer.pad_token_id, config.task.max_completion_tokens
        )
        self.generator = torch.Generator().manual_seed(0)
        self()

    def __call__(self) -> dict[str, float]:
        started = time.perf_counter()
        batch = self.engine.generate(self.prompts, self.group_size, self.generator)
        seconds = time.perf_counter() - started
        return {**_rates(float(batch.mask.sum()), len(batch.mask), seconds), "distinct tokens": distinct([batch])}


class Generate:
    """transformers' own sampling loop, on transformers' own layers."""

    def __init__(self, model: str, lengths: str, sizes: Sizes, logprobs: bool) -> None:
        config = run_config(model, sizes)
        self.policy, tokenizer = plain_policy(config.model)
        problems = PromptStream(config.task, config.seed, "train").take(config.prompts_per_batch)
        self.inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
        self.eos = NO_TOKEN if lengths == "fixed" else tokenizer.eos_token_id
        self.logprobs = logprobs
        self.settings = GenerationConfig(
            do_sample=True,
            temperature=config.rollout.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.task.max_completion_tokens,
            num_return_sequences=config.algorithm.completions_per_prompt,
            eos_token_id=self.eos,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=logprobs,
        )
        torch.manual_seed(0)
        self()

    def __call__(self) -> dict[str, float]:
        started = time.perf_counter()
        output = cast(Any, self.policy).generate(**self.inputs, generation_config=self.settings)
        completions = output.sequences[:, self.inputs["input_ids"].shape[1] :]
        if self.logprobs:
            logprobs_of(output.logits, completions)
        seconds = time.perf_counter() - started
        ended = (completions == self.eos).int()
        # Everything up to the first end-of-sequence token, itself included.
        return _rates(float((ended.cumsum(1) - ended == 0).sum()), len(completions), seconds)


def logprobs_of(logits: Sequence[Tensor], completions: Tensor) -> Tensor:
    """Log-probabilities [B, T] of ``completions`` [B, T] from the logits [B, V] of each step."""
    steps = zip(logits, completions.unbind(1), strict=True)
    return torch.stack([step.log_softmax(-1).gather(1, tokens[:, None])[:, 0] for step, tokens in steps], 1)


def tables(options: Options) -> list[Table]:
    """Both models, fixed and natural lengths, `generate` without log-probabilities and with them."""
    rows = [row for model in MODELS for lengths in LENGTHS for row in compare(model, lengths, options)]
    return [Table("Rollout against generate", _TEXT.format(completions=options.sizes.completions), rows)]


def compare(model: str, lengths: str, options: Options) -> list[dict[str, Cell]]:
    """The rows of one model and kind of lengths."""
    settings = {"model": model, "lengths": lengths, "sizes": options.sizes}
    theirs = {
        "without log-probabilities": (Generate, {**settings, "logprobs": False}),
        "with log-probabilities": (Generate, {**settings, "logprobs": True}),
    }
    with workers({"ours": (OurRollout, settings), **theirs}) as sides:
        measured = interleave(sides, options.repetitions)
    return [_row(model, lengths, name, measured["ours"], measured[name]) for name in theirs]


def _row(model: str, lengths: str, name: str, ours: dict[str, Spread], theirs: dict[str, Spread]) -> dict[str, Cell]:
    where = {"model": model, "lengths": lengths, "generate": name}
    row = tokens_row(ours, theirs, "generate", GOALS[lengths])
    return {**where, **row, "distinct tokens": ours["distinct tokens"].median}


def _rates(tokens: float, completions: int, seconds: float) -> dict[str, float]:
    return {"tokens/s": tokens / seconds, "tokens a completion": tokens / completions}
