"""A model of a real shape on the device: the harness's phases, transformers' `generate`, and a plain update."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from harness.algorithms.advantages import last_tokens
from harness.algorithms.metrics import Metrics
from harness.benchmark.bare_config import bare_config
from harness.benchmark.measure import Measure
from harness.benchmark.model_shapes import Shape
from harness.benchmark.peaks import timed, timed_with_memory
from harness.benchmark.sharing import distinct, watch_passes
from harness.benchmark.sizes import NO_TOKEN
from harness.budget import Meter
from harness.config import BudgetConfig, RunConfig
from harness.judging import Judge
from harness.policy.flops import BACKWARD, policy_cost
from harness.policy.loading import autocast, prepare_layers
from harness.reward import Rewards
from harness.rollout.batch import Batch
from harness.rollout.embedded import EmbeddedEngine
from harness.update import PolicyUpdater

_LEARNING_RATE = 1e-12  # the policy stays where it is


def random_model(shape: Shape, device: str) -> PreTrainedModel:
    """The architecture with random float32 weights, made on the device."""
    architecture = dict(shape.architecture)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def shape_config(shape: Shape) -> RunConfig:
    """GRPO on the shape's rollout batch."""
    return bare_config(
        {"algorithm": "grpo", "rollout": "embedded"},
        {
            "algorithm": {
                "completions_per_prompt": shape.group_size,
                "minibatches": shape.minibatches,
                "optimizer": {"learning_rate": _LEARNING_RATE},
            },
            "rollout": {"completions_per_batch": shape.sequences, "decode_sequences": shape.sequences},
            "model": {"micro_batch_sequences": shape.micro_batch},
        },
    )


class OurPhases:
    """Rollout, old log-probabilities and update, as the trainer does them."""

    def __init__(self, model: PreTrainedModel, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        prepare_layers(model, device)
        self.config, self.cost = shape_config(shape), policy_cost(model)
        self.prompts = random_prompts(shape, model)
        self.engine = EmbeddedEngine(model, self.config.rollout, (NO_TOKEN,), 0, shape.completion)
        meter = Meter(BudgetConfig("updates", {"updates": 1e9}), torch.device(device))
        self.judge = Judge(self.config, meter, model, self.cost, None, None, None)
        self.updater = PolicyUpdater(model, self.config, meter.paused)
        self.passes = watch_passes(self.updater)
        self.generator = torch.Generator().manual_seed(0)
        self.batch: Batch
        self()

    def __call__(self) -> dict[str, float]:
        torch.use_deterministic_algorithms(True, warn_only=True)  # as a run has it
        rollout = timed(self._rollout, self.device)
        old_logprobs = timed(self._judge, self.device)
        self.passes.clear()
        update, memory = timed_with_memory(self._update, self.device)
        # What sequences of a pass begin with is computed once.
        share = distinct(self.passes)
        return {
            "rollout": rollout,
            "old_logprobs": old_logprobs,
            "update": update,
            "update FLOPs": (1 + BACKWARD) * self.cost.batch(self.batch) * share,
            "distinct tokens": share,
            "memory": memory,
        }

    def phases(self) -> dict[str, Callable[[], None]]:
        """Each phase by itself, as it is measured."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        return {"rollout": self._rollout, "old_logprobs": self._judge, "update": self._update}

    def _rollout(self) -> None:
        self.batch = self.engine.generate(self.prompts, self.shape.group_size, self.generator)

    def _judge(self) -> None:
        mask = self.batch.mask
        outcome = torch.rand(len(mask))
        ends = last_tokens(mask)
        unjudged = torch.full_like(outcome, torch.nan)
        self.targets = self.judge.judge(self.batch, Rewards(ends * outcome[:, None], ends, outcome, outcome, unjudged))

    def _update(self) -> None:
        self.updater.update(self.batch, self.targets, self.generator, Metrics())


class Generate:
    """transformers' `generate` on a copy of the model in the precision of the device's matrix products."""

    def __init__(self, model: PreTrainedModel, shape: Shape, device: str) -> None:
        self.device = device
        self.model = random_model(shape, device).to(compute_dtype(device))  # type: ignore[arg-type]
        self.input_ids = torch.tensor(random_prompts(shape, model), device=device)
        self.settings = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=shape.completion,
            num_return_sequences=shape.group_size,
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
        )
        self()

    def __call__(self) -> dict[str, float]:
        torch.use_deterministic_algorithms(False)
        return {"rollout": timed(self._generate, self.device)}

    def _generate(self) -> None:
        mask = torch.ones_like(self.input_ids)
        cast(Any, self.model).generate(self.input_ids, attention_mask=mask, generation_config=self.settings)


class PlainUpdate:
    """The optimizer steps of a loop that holds its logits: no chunks, no metrics but the loss.

    Network, with its fused normalisations, and optimizer are ours.
    """

    def __init__(self, model: PreTrainedModel, ours: OurPhases) -> None:
        self.model, self.ours, self.device = model, ours, torch.device(ours.device)
        self.optimizer = ours.updater.optimizer  # a second one's moments may not fit beside it
        self()

    def __call__(self) -> dict[str, float]:
        torch.use_deterministic_algorithms(False)
        seconds, memory = timed_with_memory(self._update, self.device.type)
        return {"update": seconds, "memory": memory}

    def _update(self) -> None:
        shape = self.ours.shape
        batch, self.targets = self.ours.batch, self.ours.targets.to(self.device)
        self.input_ids, self.completions = batch.input_ids.to(self.device), batch.completions.to(self.device)
        for rows in torch.randperm(shape.sequences, device=self.device).chunk(shape.minibatches):
            for micro in rows.split(shape.micro_batch):
                (self._loss(micro) / len(rows)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, rows: Tensor) -> Tensor:
        targets, temperature = self.targets, self.ours.config.rollout.temperature
        with autocast(self.device):
            logits = self.model(input_ids=self.input_ids[rows], use_cache=False).logits
        # All prompts and completions have the same lengths.
        logprobs = (logits[:, self.ours.shape.prompt - 1 :].float() / temperature).log_softmax(-1)
        ratio = (logprobs.gather(2, self.completions[rows, :, None])[..., 0] - targets.old_logprobs[rows]).exp()
        advantages = targets.advantages[rows]
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.27) * advantages).mean(1).sum()


def compute_dtype(device: str) -> torch.dtype:
    """What matrix products are computed in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def random_prompts(shape: Shape, model: PreTrainedModel) -> list[list[int]]:
    """One for each group."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.sequences // shape.group_size, shape.prompt)
    return torch.randint(model.config.vocab_size, size, generator=generator).tolist()


def decode_bytes(model: PreTrainedModel, shape: Shape, dtype: torch.dtype) -> float:
    """Bytes that one decoding step of all sequences must read: the weights that they use, and their keys and values.

    Experts count by the share of them that the sequences are expected to choose, if each chooses evenly. The context
    is that in the middle of the completion.
    """
    config = model.config.get_text_config()
    embeddings = sum(p.numel() for p in model.get_input_embeddings().parameters())
    looked_up = 0 if config.tie_word_embeddings else embeddings
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    weights = sum(p.numel() for p in model.parameters()) - experts - looked_up
    if experts:
        chosen = config.num_experts_per_tok / config.num_experts
        weights += experts * (1 - (1 - chosen) ** shape.sequences)
    context = shape.prompt + shape.completion / 2
    states = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return dtype.itemsize * (weights + states * context * shape.sequences)


def sides(model: PreTrainedModel, shape: Shape, device: str) -> Mapping[str, Measure]:
    """What is measured in turn, each after one call that does not count."""
    ours = OurPhases(model, shape, device)
    generate = {"generate": Generate(model, shape, device)} if shape.generates else {}
    return {"ours": ours, **generate, "plain": PlainUpdate(model, ours)}
