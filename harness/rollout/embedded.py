"""The embedded engine: sampling with transformers in the training process.

Each prompt is read once for its whole group, finished sequences leave the batch at once, and log-probabilities are
taken from the logits that the tokens are drawn from. The random numbers of a completion depend on (seed, step, its
place in the rollout batch) alone: never on the algorithm, on other completions or on how many are decoded at once.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from harness.config import RolloutConfig
from harness.policy.loading import autocast
from harness.policy.routing import Routing, padding_routes
from harness.rollout.batch import Batch, join, stack_rows
from harness.rollout.cache import build_cache


class EmbeddedEngine:
    """Samples from the policy that is trained; there are no weights to transfer."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RolloutConfig,
        eos: int,
        pad: int,
        max_tokens: int,
        record_routes: bool = False,
    ) -> None:
        """
        Args:
            model: the policy.
            config: temperature and batch sizes.
            eos: the token that ends a completion.
            pad: the token that fills up rows.
            max_tokens: completions are cut at this length.
            record_routes: whether batches hold the experts that each token was routed to (for R3, arXiv 2510.11370).
        """
        self.model, self.config, self.eos, self.pad, self.max_tokens = model, config, eos, pad, max_tokens
        self.record_routes, self.routing = record_routes, Routing(model)
        self.device = model.device

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], group_size: int, generator: torch.Generator) -> Batch:
        """Sample ``group_size`` completions of each prompt.

        Args:
            prompts: token ids.
            group_size: completions a prompt.
            generator: a CPU generator; all random numbers are drawn from it before sampling begins.

        Returns:
            the completions in the order of the prompts, on the model's device.
        """
        total = len(prompts) * group_size
        noise = torch.rand(total, self.max_tokens, generator=generator, dtype=torch.float64).to(self.device)
        completions = torch.full((total, self.max_tokens), self.pad, device=self.device)
        logprobs = torch.zeros(total, self.max_tokens, device=self.device)
        mask = torch.zeros(total, self.max_tokens, device=self.device)
        at_once = max(1, self.config.decode_sequences // group_size)
        routes: list[Tensor] = []
        with autocast(self.device), self.routing.watch() if self.record_routes else nullcontext():
            for first in range(0, len(prompts), at_once):
                chunk = prompts[first : first + at_once]
                rows = slice(first * group_size, (first + len(chunk)) * group_size)
                routes += self._decode(chunk, group_size, noise[rows], completions[rows], logprobs[rows], mask[rows])
        group_ids = torch.arange(len(prompts)).repeat_interleave(group_size)
        repeated = [prompt for prompt in prompts for _ in range(group_size)]
        batch = join(repeated, completions.cpu(), mask.cpu(), logprobs.cpu(), group_ids, self.pad)
        if self.record_routes:
            batch.routes = stack_rows(routes)[:, : batch.input_ids.shape[1]]
        return batch.to(self.device)

    def _decode(
        self,
        prompts: list[list[int]],
        group_size: int,
        noise: Tensor,
        completions: Tensor,
        logprobs: Tensor,
        mask: Tensor,
    ) -> list[Tensor]:
        """Fill the rows of one chunk, in place; returns its routes [rows, L, layers, k] if they are recorded."""
        width = max(map(len, prompts))
        padded = [[self.pad] * (width - len(prompt)) + prompt for prompt in prompts]
        input_ids = torch.tensor(padded, device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        attention = torch.arange(width, device=self.device) >= (width - lengths).unsqueeze(1)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = build_cache(self.model.config, width + self.max_tokens)
        logits = self._forward(input_ids, attention, positions, cache)
        routes = [self._prompt_routes(attention).repeat_interleave(group_size, 0)] if self.record_routes else []

        cache.batch_repeat_interleave(group_size)
        logits = logits.repeat_interleave(group_size, 0)
        # Room for every later token: the mask of a step is a view of this one.
        attention = torch.cat([attention, attention.new_ones(len(prompts), self.max_tokens)], 1).repeat_interleave(
            group_size, 0
        )
        positions = lengths.repeat_interleave(group_size)
        active = torch.arange(len(positions), device=self.device)
        for step in range(self.max_tokens):
            tokens, token_logprobs = _sample(logits / self.config.temperature, noise[active, step])
            completions[active, step], logprobs[active, step], mask[active, step] = tokens, token_logprobs, 1.0
            alive = tokens != self.eos
            if step + 1 == self.max_tokens or not alive.any():
                break
            if not alive.all():
                order = _closing_gaps(alive)
                cache.batch_select_indices(order)
                active, tokens, attention, positions = active[order], tokens[order], attention[order], positions[order]
            logits = self._forward(
                tokens.unsqueeze(1), attention[:, : width + step + 1], (positions + step).unsqueeze(1), cache
            )
            for recorded in routes:
                recorded[active, positions + step] = self.routing.choices()
        return routes

    def _prompt_routes(self, attention: Tensor) -> Tensor:
        """Routes [P, L, layers, k] of the prompts just read, which ``attention`` [P, width] marks, and room for later
        tokens; a row's first token is at 0."""
        rows, width = attention.shape
        recorded = self.routing.choices().unflatten(0, (rows, width))
        routes = padding_routes(rows, width + self.max_tokens - 1, like=recorded)
        starts = (~attention).sum(1)
        prompts, columns = attention.nonzero(as_tuple=True)
        routes[prompts, columns - starts[prompts]] = recorded[prompts, columns]
        return routes

    def _forward(self, input_ids: Tensor, attention: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Float32 logits [n, V] of each row's next token."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def _sample(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n] by the inverse of the distribution function at ``noise`` [n], and their log-probabilities [n]."""
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = noise.unsqueeze(1) * cumulative[:, -1:]
    tokens = (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _closing_gaps(alive: Tensor) -> Tensor:
    """Indices of the rows that live, with the last ones moved into the places of those that ended."""
    count = int(alive.sum())
    order = torch.arange(count, device=alive.device)
    order[~alive[:count]] = alive[count:].nonzero().squeeze(1) + count
    return order
