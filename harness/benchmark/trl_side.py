"""TRL's GRPOTrainer as a side of a comparison, at its best settings on a CPU."""

import tempfile
import time

import yaml
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from harness.benchmark.sizes import NO_TOKEN, Sizes
from harness.benchmark.training import MINIBATCHES, plain_policy, run_config
from harness.exporting.trl import export
from harness.tasks import VERIFIERS, PromptStream


class TrlSteps:
    """Whole steps on the same weights and prompts, by the exported configuration of the same run.

    Each measurement is one call of `train()`, of which the first rollout batch is not counted: what TRL sets up for a
    training is no part of a step. Nothing is logged or saved, activations are kept, an optimizer batch is one forward
    and backward.
    """

    def __init__(self, model: str, lengths: str, sizes: Sizes) -> None:
        self.sizes = sizes
        self.folder = tempfile.TemporaryDirectory()  # gone with this object
        config = run_config(model, sizes)
        policy, tokenizer = plain_policy(config.model)
        problems = PromptStream(config.task, config.seed, "train").take(config.prompts_per_batch * (1 + sizes.batches))
        verify = VERIFIERS[config.task.verifier]
        self.clock = _Clock()

        def reward(completions, completion_ids, problem, **_):
            self.clock.tokens += sum(map(len, completion_ids))
            return [verify(text, problems[index]) for text, index in zip(completions, problem, strict=True)]

        self.trainer = GRPOTrainer(
            model=policy,
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": p.prompt, "problem": i} for i, p in enumerate(problems)]),
            callbacks=[self.clock],
            args=GRPOConfig(
                **yaml.safe_load(export(config)),
                output_dir=self.folder.name,
                max_steps=MINIBATCHES * (1 + sizes.batches),
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                shuffle_dataset=False,
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        self.trainer.remove_callback(PrinterCallback)
        if lengths == "fixed":
            self.trainer.eos_token_ids = [NO_TOKEN]
            self.trainer.generation_config.eos_token_id = NO_TOKEN
            self.trainer.generation_kwargs["eos_token_id"] = NO_TOKEN

    def __call__(self) -> dict[str, float]:
        """Rates of all rollout batches but the first."""
        self.trainer.train()
        seconds, tokens = self.clock.since_first_batch()
        return {
            "seconds": seconds,
            "tokens/s": tokens / seconds,
            "tokens a completion": tokens / (self.sizes.batches * self.sizes.completions),
        }


class _Clock(TrainerCallback):
    """When the optimizer steps of a training ended, and the completion tokens sampled until then."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ends: list[tuple[float, int]] = []

    def on_train_begin(self, args, state, control, **_) -> None:
        self.tokens, self.ends = 0, []

    def on_step_end(self, args, state, control, **_) -> None:
        self.ends.append((time.perf_counter(), self.tokens))

    def since_first_batch(self) -> tuple[float, int]:
        """Seconds and completion tokens from the last optimizer step of the first rollout batch on."""
        (started, before), (ended, tokens) = self.ends[MINIBATCHES - 1], self.ends[-1]
        return ended - started, tokens - before
