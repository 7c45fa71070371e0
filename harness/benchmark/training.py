"""The harness's own trainer as a side of a comparison: a run on an embedded model."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from harness.benchmark.sharing import distinct, watch_passes
from harness.benchmark.sizes import NO_TOKEN, Sizes
from harness.cell import prepare
from harness.config import ModelConfig, RunConfig, compose
from harness.policy.cold_start import cold_start_dir
from harness.runs.loggers import open_loggers
from harness.torch_setup import set_up_torch
from harness.trainer import Trainer

MODELS = ("tiny_dense", "tiny_moe")
LENGTHS = ("fixed", "natural")
MINIBATCHES = 4  # optimizer steps of a rollout batch


def run_config(model: str, sizes: Sizes, *overrides: str) -> RunConfig:
    """GRPO, or what is overridden, with four optimizer steps of one micro-batch each and no end in sight."""
    return compose(
        [
            "algorithm=grpo",
            f"model={model}",
            *sizes.overrides,
            f"rollout.completions_per_batch={sizes.completions}",
            f"algorithm.minibatches={MINIBATCHES}",
            f"model.micro_batch_sequences={sizes.completions // MINIBATCHES}",
            # So small that the policy, and with it the length of its completions, stays where it is.
            "algorithm.optimizer.learning_rate=1e-12",
            "budget.axis=updates",
            "budget.limits.updates=1e9",
            "evaluation.fractions=[]",
            "checkpoint_every=1000000",
            "device=cpu",
            *overrides,
        ]
    )


def plain_policy(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An embedded model with the weights of a run and transformers' own layers, and its tokenizer."""
    path = cold_start_dir(config)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if config.experts_implementation:
        policy.set_experts_implementation(config.experts_implementation)
    return policy.eval(), AutoTokenizer.from_pretrained(path, padding_side="left")


class WholeSteps:
    """Steps of the trainer as a run has them: rollout, reward, old log-probabilities, update and all bookkeeping."""

    def __init__(self, model: str, lengths: str, sizes: Sizes, overrides: Sequence[str] = ()) -> None:
        self.sizes = sizes
        self.folder = tempfile.TemporaryDirectory()  # gone with this object
        config = run_config(model, sizes, f"results={self.folder.name}", *overrides)
        set_up_torch(config.threads)
        directory = prepare(config)
        self.trainer = Trainer(config, directory)
        self.trainer.resume()
        self.passes = watch_passes(self.trainer.policy_updater)
        self.loggers = ExitStack()
        self.trainer.log = self.loggers.enter_context(open_loggers(config, directory, steps=0))
        if lengths == "fixed":
            self.trainer.engine.ends = (NO_TOKEN,)
        self.trainer.step()

    def __call__(self) -> dict[str, float]:
        """Rates, the share of distinct tokens in the update's passes, and that of each phase in the steps' time."""
        self.passes.clear()
        before = self.trainer.meter.summary()
        started = time.perf_counter()
        for _ in range(self.sizes.batches):
            self.trainer.step()
        self.trainer.tell()
        seconds = time.perf_counter() - started
        after = self.trainer.meter.summary()
        tokens = after["spent"]["tokens"] - before["spent"]["tokens"]
        phases = {
            phase: {unit: amount - before["phases"][phase][unit] for unit, amount in cost.items()}
            for phase, cost in after["phases"].items()
        }
        return {
            "seconds": seconds,
            "tokens/s": tokens / seconds,
            "tokens a completion": tokens / (self.sizes.batches * self.sizes.completions),
            "update FLOP/s": phases["update"]["flops"] / phases["update"]["seconds"],
            "distinct tokens": distinct(self.passes),
            **{f"{phase} share": cost["seconds"] / seconds for phase, cost in phases.items()},
        }
