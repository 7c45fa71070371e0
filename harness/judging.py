"""What a rollout batch is judged by before the update: old and reference log-probabilities, values, advantages."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.algorithms.divergence import kl_divergence
from harness.algorithms.registry import call
from harness.budget import Meter
from harness.config import RunConfig
from harness.policy.critic import Critic
from harness.policy.flops import ForwardCost
from harness.policy.loading import decoder
from harness.policy.logprobs import completion_logprobs
from harness.policy.packing import Packing
from harness.policy.routing import Routing, padding_routes
from harness.reward import Rewards
from harness.rollout.batch import Batch, send
from harness.update import Targets

# Passes that keep no activations take so many times the sequences of those that do.
_SEQUENCES = 4


class Judge:
    """Runs the forward passes that an algorithm asks for, and charges them."""

    def __init__(
        self,
        config: RunConfig,
        meter: Meter,
        policy: PreTrainedModel,
        policy_cost: ForwardCost,
        reference: PreTrainedModel | None,
        critic: Critic | None,
        critic_cost: ForwardCost | None,
    ) -> None:
        self.config, self.meter = config, meter
        self.policy, self.reference, self.critic = policy, reference, critic
        self.policy_cost, self.critic_cost = policy_cost, critic_cost

    @torch.no_grad()
    def judge(self, batch: Batch, rewards: Rewards) -> Targets:
        """The constants of the update.

        Args:
            batch: the rollout batch.
            rewards: what its completions earned.
        """
        if batch.routes is not None:
            with self.meter.phase("old_logprobs"):
                batch = replace(batch, routes=batch.alike(batch.routes))
        old_logprobs, routes = batch.rollout_logprobs, batch.routes
        if self.config.algorithm.old_logprobs == "trainer":
            old_logprobs, routes = self._old_logprobs(batch)
        ref_logprobs = self._reference(batch)
        old_values = self._values(batch)
        kl = self.config.algorithm.kl
        with self.meter.phase("reward"):
            earned = rewards.tokens
            if ref_logprobs is not None and kl.in_reward:
                earned = earned - (
                    kl.coefficient * kl_divergence(old_logprobs, ref_logprobs, kl.estimator) * batch.mask
                )
            advantages, returns = call(
                "advantage",
                self.config.algorithm.advantage,
                earned,
                rewards.ends,
                batch.group_ids,
                batch.mask,
                old_values,
                like=(batch.mask, old_values),
            )
        return Targets(old_logprobs, advantages, ref_logprobs, old_values, returns, routes=routes)

    def _old_logprobs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """[B, T], and on MoE models the expert choices [B, L, layers, k] that they rest on: those of the rollout where
        it has recorded any (R3), else this pass's own."""
        routing = Routing(self.policy)
        recorded: list[Tensor] = []
        # Replay pays for its recording; without it the routes are kept for a metric alone.
        recording = self.meter.paused if self.config.algorithm.routing_replay == "disabled" else nullcontext

        def forward(micro: Batch) -> Tensor:
            packing = Packing(decoder(self.policy), micro)
            routing.replay = None if micro.routes is None else packing.of_tokens(send(micro.routes, self.policy.device))
            logprobs = completion_logprobs(self.policy, micro, self.config.rollout.temperature, packing=packing)[0]
            if routing.layers and micro.routes is None:
                with recording():
                    choices = routing.choices()
                    recorded.append(packing.of_positions(choices))
            return logprobs

        with self.meter.phase("old_logprobs"), routing.watch():
            logprobs = self._in_micro_batches(forward, batch)
            with recording():
                routes = self._assemble_routes(batch, recorded) if recorded else batch.routes
        self.meter.charge_flops("old_logprobs", self.policy_cost.batch(batch))
        return logprobs, routes

    def _reference(self, batch: Batch) -> Tensor | None:
        if self.reference is None:
            return None
        reference, temperature = self.reference, self.config.rollout.temperature
        with self.meter.phase("reference"):
            logprobs = self._in_micro_batches(
                lambda micro: completion_logprobs(reference, micro, temperature)[0], batch
            )
        self.meter.charge_flops("reference", self.policy_cost.batch(batch))
        return logprobs

    def _values(self, batch: Batch) -> Tensor | None:
        if self.critic is None or self.critic_cost is None:
            return None
        with self.meter.phase("critic"):
            values = self._in_micro_batches(self.critic, batch)
        self.meter.charge_flops("critic", self.critic_cost.batch(batch))
        return values

    def _in_micro_batches(self, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """[B, T] from a forward pass over micro-batches of sequences of like length."""
        parts = [(rows, forward(batch.select(rows))) for rows in self._micro_rows(batch)]
        result = torch.zeros_like(batch.mask)
        for rows, part_result in parts:  # only now that all of the work is under way may a copy wait for it
            result[rows, : part_result.shape[1]] = part_result.cpu()
        return result

    def _micro_rows(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.lengths.argsort(stable=True).split(_SEQUENCES * self.config.model.micro_batch_sequences)

    def _assemble_routes(self, batch: Batch, routes: list[Tensor]) -> Tensor:
        """The micro-batches' choices in the batch's order."""
        rows, length = batch.input_ids.shape
        routes = [part_routes.cpu() for part_routes in routes]
        result = padding_routes(rows, length, like=routes[0])
        for micro_rows, part_routes in zip(self._micro_rows(batch), routes, strict=True):
            result[micro_rows, : part_routes.shape[1]] = part_routes
        return batch.alike(result)
