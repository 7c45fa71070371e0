"""The update: the optimizer steps that follow one rollout batch, the same code for every algorithm."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.algorithms.correction import mismatch_metrics
from harness.algorithms.metrics import Metrics
from harness.algorithms.objective import aggregation_weights, selected_tokens, weighted_policy_loss
from harness.algorithms.value import value_loss
from harness.config import OptimizerConfig, RunConfig
from harness.errors import Diverged
from harness.policy.critic import Critic
from harness.policy.loading import decoder
from harness.policy.logprobs import completion_logprobs, completion_states, recomputes
from harness.policy.packing import Packing
from harness.policy.routing import Routing, changes
from harness.rollout.batch import Batch, send


@dataclass
class Targets:
    """What the rollout batch is judged by; constants of the update, [B, T] each, in host memory as the batch is."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None  # of each element in its optimizer batch's loss
    selected: Tensor | None = None  # bool, tokens of the optimizer batch that the surrogate treats apart
    routes: Tensor | None = None  # [B, L, layers, k] experts that the old policy's pass used, on MoE models

    def select(self, rows: Tensor, micro: Batch) -> "Targets":
        """The given rows, cut to the micro-batch that was selected by them."""
        width, length = micro.mask.shape[1], micro.input_ids.shape[1]
        cut = {
            field.name: tensor[rows, :width]
            for field in fields(self)
            if field.name != "routes" and (tensor := getattr(self, field.name)) is not None
        }
        return Targets(**cut, routes=None if self.routes is None else self.routes[rows, :length])

    def to(self, device: torch.device) -> "Targets":
        """On another device."""
        there = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return Targets(**{name: send(tensor, device) for name, tensor in there.items()})


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """Let the layers that were prepared for it keep no activations, as they do in training mode; dropout stays off."""
    # Modules around them are prepared, too, but in training mode all that they would do is drop out.
    prepared = [layer for layer in network.modules() if getattr(layer, "gradient_checkpointing", False)]
    layers: list[Any] = [layer for layer in prepared if isinstance(layer, GradientCheckpointingLayer)]
    given = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, given, strict=True):
        layer.training = True
        layer._gradient_checkpointing_func = partial(_without_dropout, layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, given, strict=True):
            layer.training = False
            layer._gradient_checkpointing_func = checkpoint


def _without_dropout(layer: nn.Module, checkpoint: Callable, forward: Callable, *inputs: Any) -> Any:
    """What ``checkpoint`` makes of a layer's forward pass, now and again, with the layer itself in evaluation mode."""

    def evaluated(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(evaluated, *inputs)


class Updater(ABC):
    """A network and its optimizer; subclasses say what its loss is."""

    prefix = ""  # of its metrics' names
    recomputed = 0.0  # tokens of the latest rollout batch whose logits were computed again in backward passes

    def __init__(self, network: nn.Module, config: RunConfig, learning_rate: float, max_grad_norm: float) -> None:
        self.network, self.config, self.max_grad_norm = network, config, max_grad_norm
        self.parameters = list(network.parameters())  # listed once, since that takes as long as clipping them
        self.settings: OptimizerConfig = config.algorithm.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.epsilon,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        self.learning_rate = learning_rate
        self.updates = 0
        self.device = self.parameters[0].device

    def update(self, batch: Batch, targets: Targets, generator: torch.Generator, metrics: Metrics) -> None:
        """Make `epochs` x `minibatches` optimizer steps.

        Args:
            batch: the rollout batch.
            targets: its advantages and what else stays constant.
            generator: a CPU generator that shuffles the completions into minibatches.
            metrics: what is measured is added to these; a step that diverges leaves with all of them.

        Raises:
            Diverged: for a loss or gradient that is not finite; neither it nor what follows it reaches the weights.
        """
        taken = []
        # The fused optimizer reads it as mixed precision's scalers set it: 1 leaves weights and moments as they are.
        self.optimizer.found_inf = torch.zeros((), device=self.device)  # type: ignore[attr-defined]
        with recomputing(self.network):
            for _ in range(self.config.algorithm.epochs):
                order = torch.randperm(len(batch.mask), generator=generator)
                for rows in order.chunk(self.config.algorithm.minibatches):
                    loss = self.backward(batch, targets, rows, metrics)
                    taken.append(self._step(loss, metrics))
        # Only now that all steps are under way may the device be asked about them.
        for index, (loss, norm) in enumerate(torch.stack(taken).tolist(), self.updates - len(taken) + 1):
            if not math.isfinite(loss + norm):
                self.updates = index - 1
                message = f"optimizer step {index}: {self.prefix}loss is {loss} and {self.prefix}grad_norm {norm}"
                raise Diverged(message, metrics.compute())

    @abstractmethod
    def backward(self, batch: Batch, targets: Targets, rows: Tensor, metrics: Metrics) -> Tensor:
        """Gradients of one optimizer batch, the given rows; returns its loss."""

    def micro_batches(self, batch: Batch, targets: Targets, rows: Tensor) -> Iterator[tuple[Batch, Targets]]:
        """The micro-batches of the given rows and their targets; sequences of like length share one: less padding."""
        rows = rows[batch.lengths[rows].argsort(stable=True)]
        for micro_rows in rows.split(self.config.model.micro_batch_sequences):
            micro = batch.select(micro_rows)
            yield micro, targets.select(micro_rows, micro)

    def _step(self, loss: Tensor, metrics: Metrics) -> Tensor:
        """Clip the gradient and step, unless one was not finite; returns loss and gradient norm [2]."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        metrics.mean(f"{self.prefix}loss", loss, 1)
        metrics.mean(f"{self.prefix}grad_norm", norm, 1)
        self.optimizer.found_inf.add_((loss + norm).isfinite().logical_not()).clamp_(max=1)  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.updates + 1) / max(self.settings.warmup_updates, 1))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return torch.stack((loss, norm))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


class CriticUpdater(Updater):
    """Regresses the critic's values on the returns."""

    prefix = "critic/"

    def __init__(self, critic: Critic, config: RunConfig) -> None:
        settings = config.algorithm.critic
        assert settings is not None
        super().__init__(critic, config, settings.learning_rate, settings.max_grad_norm)
        self.critic, self.value_clip = critic, settings.value_clip

    def backward(self, batch: Batch, targets: Targets, rows: Tensor, metrics: Metrics) -> Tensor:
        tokens = batch.mask[rows].sum()
        total = torch.zeros((), device=self.device)
        for micro, judged in self.micro_batches(batch, targets, rows):
            values, judged, mask = self.critic(micro), judged.to(self.device), send(micro.mask, self.device)
            assert judged.old_values is not None and judged.returns is not None
            loss, clipped = value_loss(values, judged.old_values, judged.returns, mask, self.value_clip)
            (loss / tokens).backward()
            total += loss.detach() / tokens
            metrics.mean("critic/clip_fraction", clipped, micro.mask.sum())
        return total


class PolicyUpdater(Updater):
    """Improves the policy by the algorithm's objective."""

    def __init__(
        self, policy: PreTrainedModel, config: RunConfig, uncharged: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """
        Args:
            policy: the network.
            config: the run.
            uncharged: a context for what only measures.
        """
        super().__init__(
            policy, config, config.algorithm.optimizer.learning_rate, config.algorithm.optimizer.max_grad_norm
        )
        self.policy, self.uncharged = policy, uncharged
        self.routing = Routing(policy)

    def update(self, batch: Batch, targets: Targets, generator: torch.Generator, metrics: Metrics) -> None:
        self.recomputed = 0.0
        super().update(batch, targets, generator, metrics)

    def backward(self, batch: Batch, targets: Targets, rows: Tensor, metrics: Metrics) -> Tensor:
        algorithm, mask = self.config.algorithm, batch.mask[rows]
        weights = torch.zeros_like(batch.mask)
        weights[rows] = aggregation_weights(mask, algorithm)
        selected = torch.zeros_like(batch.mask, dtype=torch.bool)
        selected[rows] = selected_tokens(targets.advantages[rows], targets.old_logprobs[rows], mask, algorithm)
        targets = replace(targets, weights=weights, selected=selected)
        total = torch.zeros((), device=self.device)
        for micro, judged in self.micro_batches(batch, targets, rows):
            total += self._micro_backward(micro, judged.to(self.device), mask.sum(), metrics)
        return total

    def _micro_backward(self, micro: Batch, targets: Targets, tokens: Tensor, metrics: Metrics) -> Tensor:
        """Gradients of a micro-batch in host memory, whose targets are on the device; returns its share of the loss."""
        assert targets.weights is not None and targets.selected is not None
        mask, rollout_logprobs = send(micro.mask, self.device), send(micro.rollout_logprobs, self.device)
        algorithm, temperature = self.config.algorithm, self.config.rollout.temperature
        bonus = algorithm.entropy_coefficient
        packing = Packing(decoder(self.policy), micro)
        replayed = targets.routes if algorithm.routing_replay != "disabled" else None
        routing = self.routing
        routing.replay = None if replayed is None else packing.of_tokens(replayed)
        # The rollout batch's first step still has the weights that it was sampled with.
        first = self.updates % algorithm.steps_per_batch == 0
        with routing.watch():  # around the backward pass too: recomputed activations must take the same routes
            logprobs, entropy = completion_logprobs(self.policy, micro, temperature, bonus > 0, packing)
            loss, loss_metrics = weighted_policy_loss(
                logprobs,
                targets.old_logprobs,
                targets.advantages,
                mask,
                targets.weights,
                targets.selected,
                algorithm,
                rollout_logprobs=rollout_logprobs if algorithm.old_logprobs == "trainer" else None,
                ref_logprobs=targets.ref_logprobs,
            )
            if bonus > 0:
                loss = loss - bonus * entropy.sum() / tokens
            if targets.routes is not None and not first:  # where it would only measure rounding
                with self.uncharged():
                    old = packing.of_tokens(targets.routes)[packing.completion]
                    if routing.replay is None:
                        _expert_changes(routing.native, packing, old, metrics, ["expert", "used_expert"], ["token"])
                    else:
                        _expert_changes(routing.native, packing, old, metrics, ["expert"], ["token"])
                        _expert_changes(routing.used, packing, old, metrics, ["used_expert"], [])
            loss.backward()
        if first and algorithm.old_logprobs == "rollout":
            loss_metrics.update(mismatch_metrics(logprobs.detach(), rollout_logprobs, mask))
        tokens_here = int(micro.completion_lengths.sum())
        if recomputes(self.policy.get_output_embeddings(), tokens_here):
            self.recomputed += tokens_here
        metrics.update(loss_metrics)
        metrics.mean("entropy", entropy.detach().sum(), micro.mask.sum())
        return loss.detach()

    @torch.no_grad()
    def probe_expert_changes(self, batch: Batch, routes: Tensor, metrics: Metrics) -> None:
        """Measure expert choices after the last optimizer step, natively routed, on a minibatch's worth of sequences.

        The steps before it are measured for free in the forward pass of the step that follows each; this one has none.
        """
        rows = torch.arange(0, len(batch.mask), self.config.algorithm.minibatches)
        for micro_rows in rows.split(self.config.model.micro_batch_sequences):
            micro = batch.select(micro_rows)
            packing, self.routing.replay = Packing(decoder(self.policy), micro), None
            with self.routing.watch():
                completion_states(decoder(self.policy), packing)
            old = routes[micro_rows][micro.positions()].to(self.device)
            experts = ["expert", "update_expert"]
            if self.config.algorithm.routing_replay == "disabled":  # the next update would use the same
                experts.append("used_expert")
            _expert_changes(self.routing.native, packing, old, metrics, experts, ["token", "update_token"])


def _expert_changes(
    layers: list[Tensor], packing: Packing, old: Tensor, metrics: Metrics, experts: list[str], tokens: list[str]
) -> None:
    """Compare choices, a tensor for each layer, with the old [M, layers, k] ones of the tokens that completion tokens
    are predicted from, under the metrics' names for choices and for tokens with any that is new."""
    new = torch.stack(layers, 1)[packing.completion]
    choices, touched = changes(new, old)
    for name in experts:
        metrics.mean(f"moe/{name}_change_fraction", choices, float(old.numel()))
    for name in tokens:
        metrics.mean(f"moe/{name}_change_fraction", touched, float(len(old)))
