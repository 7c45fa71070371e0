"""The one training loop. It is blind to which algorithm runs: all it sees are parts and settings."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from harness.algorithms.metrics import Metrics
from harness.algorithms.value import explained_variance
from harness.budget import Meter
from harness.config import RunConfig
from harness.errors import ConfigError, Diverged
from harness.evaluation import evaluate, prepare_evaluation
from harness.judging import Judge
from harness.policy.critic import Critic
from harness.policy.flops import BACKWARD, ForwardCost, active_parameters, critic_cost, policy_cost
from harness.policy.loading import end_tokens, load_policy, supported, weights_hash
from harness.policy.logprobs import compile_blocks, completion_logprobs
from harness.policy.routing import check_routing, expert_layers
from harness.reward import Grader, Rewards
from harness.rollout.batch import Batch
from harness.rollout.decoding import lives
from harness.rollout.embedded import EmbeddedEngine
from harness.runs.directory import RunDirectory
from harness.runs.loggers import Log, open_loggers
from harness.tasks import Problem, PromptStream
from harness.tasks.problem import derived_seed
from harness.update import CriticUpdater, PolicyUpdater, Targets, Updater
from harness.validation import check_positions

# Policy, optimizer moments and the new checkpoint beside the old one, with room to spare.
_CHECKPOINT_COPIES = 12

# Of a generator's prompts, those that are held against the limit of their length before anything is sampled.
_FIRST_PROMPTS = 256

# Seconds between two times that what is new of a run is written, for those who watch; metrics.jsonl gets every step.
_PROGRESS = 2.0


def train(config: RunConfig, directory: RunDirectory) -> None:
    """Train until the budget is spent, from the start or from the directory's checkpoint.

    Raises:
        ConfigError: for a model or disk that cannot do, before any compute, and for a prompt that is too long.
        Diverged: for a loss or gradient that is not finite; what was measured is in metrics.jsonl.
    """
    trainer = Trainer(config, directory)
    trainer.resume()
    with open_loggers(config, directory, trainer.steps) as trainer.log:
        trainer.warm_up()
        try:
            trainer.evaluate_reached(trainer.inside, trainer.inside)
            while trainer.meter.fraction < 1:
                trainer.step()
        finally:
            trainer.tell()
        trainer.finish()


class Trainer:
    """One run: networks, optimizers, prompts and the meter."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self.config, self.directory, self.algorithm = config, directory, config.algorithm
        self.policy, self.tokenizer = load_policy(config.model, config.device)
        self.device, self.ends = self.policy.device, end_tokens(self.policy, self.tokenizer)
        self._check_model()
        self.meter = Meter(config.budget, self.device)
        self.critic = Critic(self.policy) if self.algorithm.critic else None
        reference = copy.deepcopy(self.policy) if self.algorithm.kl.coefficient > 0 else None
        self.policy_cost = policy_cost(self.policy)
        self.critic_cost = critic_cost(self.critic, self.policy.config) if self.critic else None
        self.judge = Judge(config, self.meter, self.policy, self.policy_cost, reference, self.critic, self.critic_cost)
        self.policy_updater = PolicyUpdater(self.policy, config, self.meter.paused)
        self.critic_updater = CriticUpdater(self.critic, config) if self.critic else None
        self.engine = EmbeddedEngine(
            self.policy,
            config.rollout,
            self.ends,
            self.tokenizer.pad_token_id,
            config.task.max_completion_tokens,
            record_routes=self.algorithm.routing_replay == "R3",
            uncharged=self.meter.paused,
        )
        self.prompts = PromptStream(config.task, config.seed, "train")
        # One that is too long is found now, not when its turn comes; of prompts that are generated, among the first.
        self._prompt_tokens(self.prompts.known or PromptStream(config.task, config.seed, "train").take(_FIRST_PROMPTS))
        self.grader = Grader(config, self.tokenizer)
        self.fractions = sorted(set(config.evaluation.fractions))
        self.evaluated = 0  # how many of the fractions are behind us
        self.steps = 0
        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl, not written yet
        self.told = -math.inf  # when they were last written
        self.samples: list[dict[str, Any]] = []
        self.log: Log = lambda values, step: None  # train() puts the configured loggers here
        self.inside = self.snapshot()  # the latest state that lies inside the budget

    def _check_model(self) -> None:
        if self.algorithm.routing_replay != "disabled" and not expert_layers(self.policy):
            raise ConfigError(
                f"algorithm.routing_replay={self.algorithm.routing_replay}: {type(self.policy).__name__} has no layer "
                "whose experts are known (a module with a child named experts), so nothing would be replayed; set it "
                "to disabled"
            )
        with supported(self.policy):
            check_routing(self.policy)
            policy_cost(self.policy)
            rollout = replace(self.config.rollout, cuda_graphs=False)
            engine = EmbeddedEngine(self.policy, rollout, self.ends, self.tokenizer.pad_token_id, 3)
            engine.generate([[0], [0, 1]], 2, torch.Generator())
        limit = "max_position_embeddings"  # here by any name that a configuration has for it
        room = getattr(self.policy.config.get_text_config(), limit, None)
        check_positions(self.config.task, room, type(self.policy).__name__, limit)
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.policy.parameters())
        self.directory.check_space(size * _CHECKPOINT_COPIES * (2 if self.algorithm.critic else 1))

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Task -> rollout -> reward -> advantage -> objective -> update -> meter -> run directory."""
        before, phases_before = self.inside, copy.deepcopy(self.meter.phases)
        sampled, rewards = self._sample()
        row: dict[str, Any] = {"step": self.steps + 1}
        failure = None
        try:
            row |= self._learn(*self._chosen(sampled, rewards))
        except Diverged as error:
            failure, row = error, row | error.metrics
        self.steps += 1
        self.rows.append(row | self._batch_metrics(sampled, rewards) | self._costs(phases_before))
        if failure:
            raise failure
        if time.monotonic() - self.told >= _PROGRESS:
            self.tell()
        now = self.snapshot()
        self.evaluate_reached(before, now)
        self.inside = before if self.meter.fraction > 1 else now
        # The step that passes the limit is not a state to continue from: the one before it is what counts.
        if self.steps % self.config.checkpoint_every == 0 and self.meter.fraction < 1:
            self.checkpoint()

    def tell(self) -> None:
        """Write what is new of the run, if there is anything: its rows, and how far it is."""
        if not self.rows:
            return
        self.directory.append_metrics(self.rows)
        rows, self.rows, self.told = self.rows, [], time.monotonic()
        for row in rows:
            self.log({name: value for name, value in row.items() if name != "step"}, row["step"])
        self.directory.update_status(budget=self.meter.summary())

    def _sample(self) -> tuple[Batch, Rewards]:
        """All that is sampled and graded for this step; with dynamic sampling until enough groups are informative."""
        dynamic, parts = self.algorithm.dynamic_sampling, [self._sample_batch(0)]
        if dynamic is None:
            return parts[0]
        while True:
            with self.meter.phase("reward"):
                batch = Batch.concatenate([part for part, _ in parts])
                rewards = Rewards.concatenate([part for _, part in parts])
                informative = int(rewards.informative(batch.group_ids).sum())
            if informative >= self.config.rollout.completions_per_batch or len(parts) == dynamic.max_batches:
                return batch, rewards
            parts.append(self._sample_batch(len(parts)))

    def _sample_batch(self, attempt: int) -> tuple[Batch, Rewards]:
        again = f" {attempt}" if attempt else ""
        problems, batch = self._rollout(f"rollout{again}")
        rewards = self._reward(problems, batch, f"reward{again}")
        self.meter.count(tokens=float(batch.mask.sum()), queries=len(problems))
        return batch, rewards

    def _chosen(self, batch: Batch, rewards: Rewards) -> tuple[Batch, Rewards]:
        """What is learned from: all that was sampled, or with dynamic sampling the informative groups first."""
        if self.algorithm.dynamic_sampling is None:
            return batch, rewards
        with self.meter.phase("reward"):
            first = (~rewards.informative(batch.group_ids)).int().argsort(stable=True)
            rows = first[: self.config.rollout.completions_per_batch]
            return batch.select(rows), rewards.select(rows)

    def _rollout(self, purpose: str) -> tuple[list[Problem], Batch]:
        """The next prompts and their completions; that an algorithm takes more prompts than others is charged."""
        group_size = self.algorithm.completions_per_prompt
        with self.meter.phase("rollout"):
            problems = self.prompts.take(self.config.prompts_per_batch)
            prompts = self._prompt_tokens(problems)
            batch = self.engine.generate(prompts, group_size, self._generator(purpose))
        flops = self.policy_cost.sampling(batch.prompt_lengths, batch.completion_lengths, group_size)
        self.meter.charge_flops("rollout", flops)
        return problems, batch

    def _prompt_tokens(self, problems: Sequence[Problem]) -> list[list[int]]:
        prompts = [self.tokenizer(problem.prompt)["input_ids"] for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            if len(prompt) > self.config.task.max_prompt_tokens:
                raise ConfigError(
                    f"task.max_prompt_tokens={self.config.task.max_prompt_tokens}: a prompt has {len(prompt)} tokens; "
                    f"raise the limit, or see to it that the data have none so long: {problem.prompt[:80]!r}"
                )
        return prompts

    def _reward(self, problems: list[Problem], batch: Batch, purpose: str) -> Rewards:
        with self.meter.phase("reward"):
            texts = self.tokenizer.batch_decode(batch.completions, skip_special_tokens=True)
            asked = [problem for problem in problems for _ in range(self.algorithm.completions_per_prompt)]
            rewards = self.grader.grade(texts, asked, batch, self._generator(purpose))
        true = rewards.true.tolist()
        self.samples = [
            {"prompt": asked[i].prompt, "completion": texts[i], "answer": asked[i].answer, "reward": true[i]}
            for i in range(min(self.config.evaluation.samples, len(texts)))
        ]
        return rewards

    def _learn(self, batch: Batch, rewards: Rewards) -> dict[str, float]:
        """Judge the rollout batch and update on it; returns the metrics of the update."""
        targets = self.judge.judge(batch, rewards)
        metrics = Metrics()
        self.meter.count(updates=self.algorithm.steps_per_batch)
        self._update("update", self.policy_updater, self.policy_cost, batch, targets, metrics)
        extra = {"learning_rate": self.policy_updater.optimizer.param_groups[0]["lr"]}
        if self.critic_updater and self.critic_cost:
            assert targets.old_values is not None and targets.returns is not None
            extra["critic/explained_variance"] = float(
                explained_variance(targets.old_values, targets.returns, batch.mask)
            )
            self._update("critic", self.critic_updater, self.critic_cost, batch, targets, metrics)
        if targets.routes is not None:
            self.policy_updater.probe_expert_changes(batch, targets.routes, metrics)
        return metrics.compute() | extra

    def _update(
        self, phase: str, updater: Updater, cost: ForwardCost, batch: Batch, targets: Targets, metrics: Metrics
    ) -> None:
        """Make the optimizer steps of a network, which cost the same where one of them diverges."""
        try:
            with self.meter.phase(phase):
                updater.update(batch, targets, self._generator("minibatches"), metrics)
        finally:
            self.meter.charge_flops(phase, self._update_flops(cost, batch) + cost.head * updater.recomputed)

    def _update_flops(self, cost: ForwardCost, batch: Batch) -> float:
        """Forward and backward passes over the batch; layers once more where their activations are not kept."""
        again = cost.full(batch.lengths, 0) if self.config.model.activation_checkpointing else 0.0
        return self.algorithm.epochs * ((1 + BACKWARD) * cost.batch(batch) + again)

    def _batch_metrics(self, batch: Batch, rewards: Rewards) -> dict[str, float]:
        """Of all that was sampled, chosen to learn from or not."""
        last = batch.completions.gather(1, batch.completion_lengths.unsqueeze(1) - 1)
        grouped = self.algorithm.completions_per_prompt > 1
        optional = {}
        if grouped:
            optional["reward/zero_std_fraction"] = float((~rewards.informative(batch.group_ids)).float().mean())
        if self.config.task.step_verifier:
            optional["reward/step_mean"] = float(rewards.steps.nanmean())
        return optional | {
            "reward/mean": float(rewards.outcome.mean()),
            "reward/std": float(rewards.outcome.std(correction=1)),
            "reward/true_mean": float(rewards.true.mean()),
            "completion/length_mean": float(batch.completion_lengths.float().mean()),
            "completion/truncated_fraction": float(lives(last, self.ends).float().mean()),
        }

    def _costs(self, phases_before: dict[str, dict[str, float]]) -> dict[str, float]:
        """Every budget axis so far, and this step's share of each phase."""
        costs = {f"budget/{axis}": amount for axis, amount in self.meter.spent.items()}
        for phase, cost in self.meter.phases.items():
            for unit, amount in cost.items():
                costs[f"{unit}/{phase}"] = amount - phases_before[phase][unit]
        return costs

    def _generator(self, purpose: str) -> torch.Generator:
        """Random numbers that depend on seed, purpose and step alone, so that every algorithm is dealt the same."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, purpose, self.steps) >> 1)

    # --- evaluation and state ----------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """The policy as it is now, and what it has cost."""
        weights = copy.deepcopy(self.policy.state_dict())  # tied weights stay one tensor, as clones would not
        return {"step": self.steps, "spent": dict(self.meter.spent), "weights": weights, "samples": self.samples}

    def evaluate_reached(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Evaluate at each fraction of the budget that was reached: the last state that lies inside it.

        Args:
            before: the state before the latest step, for a fraction that this step has passed.
            now: the state after it.
        """
        reached = [fraction for fraction in self.fractions[self.evaluated :] if self.meter.fraction >= fraction]
        if not reached:
            return
        self.tell()
        scores: list[dict[str, Any]] = []
        evaluated: dict[str, Any] | None = None
        for fraction in reached:
            state = before if self.meter.fraction > fraction else now
            if state is not evaluated:  # a step may pass several fractions
                self.policy.load_state_dict(state["weights"])
                scores = evaluate(self.policy, self.tokenizer, self.config.evaluation, self.config.seed)
                self.policy.load_state_dict(now["weights"])
                evaluated = state
            where = {"fraction": fraction, "step": state["step"]}
            costs = {f"budget/{axis}": amount for axis, amount in state["spent"].items()}
            self.directory.append_evaluations([where | score | costs for score in scores])
            self.log({f"eval/{score['task']}": score["score"] for score in scores}, state["step"])
            self.directory.append_samples([where | sample for sample in state["samples"]])
            self.evaluated += 1
        if reached[-1] == self.fractions[-1]:
            final = {score["task"]: {key: score[key] for key in ("score", "stderr", "n")} for score in scores}
            self.directory.update_status(scores=final)

    def finish(self) -> None:
        """Leave the last state inside the budget as a Hugging Face model."""
        self.policy.load_state_dict(self.inside["weights"])
        self.policy.save_pretrained(self.directory.policy_dir)
        self.tokenizer.save_pretrained(self.directory.policy_dir)

    def checkpoint(self) -> None:
        """Save all that the next step depends on."""
        self.tell()
        self.directory.save_state(
            {
                "policy": self.policy_updater.state_dict(),
                "critic": self.critic_updater.state_dict() if self.critic_updater else None,
                "meter": self.meter.state_dict(),
                "prompts": self.prompts.position,
                "steps": self.steps,
                "evaluated": self.evaluated,
                "samples": self.samples,
                "lines": self.directory.line_counts(),
            }
        )

    def resume(self) -> None:
        """Continue from the checkpoint, or begin; describes the run in run.json either way."""
        initial = weights_hash(self.policy)
        self._describe(initial)
        state = self.directory.load_state()
        if state is None:
            self.directory.truncate({})
            return
        self.policy_updater.load_state_dict(state["policy"])
        if self.critic_updater:
            self.critic_updater.load_state_dict(state["critic"])
        self.meter.load_state_dict(state["meter"])
        self.prompts.seek(state["prompts"])
        self.steps, self.evaluated, self.samples = state["steps"], state["evaluated"], state["samples"]
        self.directory.truncate(state["lines"])
        self.inside = self.snapshot()

    def warm_up(self) -> None:
        """Do everything once, uncharged and without an optimizer step: start-up must not fall into the first step."""
        problems = PromptStream(self.config.task, self.config.seed, "train").take(2)
        prompts = [self.tokenizer(problem.prompt)["input_ids"] for problem in problems]
        batch = self.engine.generate(prompts, 2, self._generator("warm-up"))
        self.grader.verify(f"#{problems[0].answer}", problems[0])  # an answer, whose judge may be a process to start
        temperature, bonus = self.config.rollout.temperature, self.algorithm.entropy_coefficient > 0
        logprobs, entropy = completion_logprobs(self.policy, batch, temperature, bonus)
        (logprobs + entropy).sum().backward()
        compile_blocks(self.policy.get_output_embeddings(), temperature, bonus)
        self.policy.zero_grad(set_to_none=True)
        if self.fractions:
            prepare_evaluation(self.policy, self.config.evaluation)

    def _describe(self, initial_weights: str) -> None:
        provenance = self.directory.read_status().get("provenance", {})
        known = provenance.get("initial_weights", initial_weights)
        if known != initial_weights:
            raise ConfigError(
                f"model {self.config.model.name}: this run began from other weights ({known[:12]}, now "
                f"{initial_weights[:12]}); restore them, or start afresh with another sweep=NAME"
            )
        self.directory.update_status(
            provenance=provenance | {"initial_weights": initial_weights},
            parameters={
                "policy": count_parameters(self.policy),
                "active": active_parameters(self.policy),
                "critic": count_parameters(self.critic) if self.critic else 0,
            },
        )


def count_parameters(network: torch.nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in network.parameters())
