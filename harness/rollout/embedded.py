"""The embedded engine: sampling with transformers in the training process.

Each prompt is read once for its whole group, whose completions are one row for as long as they are the same; finished
sequences leave the batch at once, and log-probabilities are taken from the logits that the tokens are drawn from. The
random numbers of a completion depend on (seed, step, its place in the rollout batch) alone: never on the algorithm, on
other completions or on how many are decoded at once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from harness.config import RolloutConfig
from harness.policy.attention import decoding_mask, is_padding_free
from harness.policy.loading import autocast
from harness.policy.routing import Routing, padding_routes
from harness.rollout import one_core
from harness.rollout.batch import Batch, join, send, stack_rows
from harness.rollout.cache import SlotCache
from harness.rollout.decoding import Completions, Prompts, draw, each_sees_one, lives, next_rows
from harness.rollout.graphs import GraphDecoder, can_record
from harness.rollout.one_core import OneCoreDecoder
from harness.rollout.single_token import SingleTokenDecoder
from harness.rollout.weights import SamplingWeights


class EmbeddedEngine:
    """Samples from the policy that is trained; there are no weights to transfer."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RolloutConfig,
        ends: Sequence[int],
        pad: int,
        max_tokens: int,
        record_routes: bool = False,
        uncharged: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            model: the policy.
            config: temperature and batch sizes.
            ends: the tokens that end a completion, one or more.
            pad: the token that fills up rows.
            max_tokens: completions are cut at this length.
            record_routes: whether batches hold the experts that each token was routed to (for R3, arXiv 2510.11370).
            uncharged: a context for what belongs to start-up.
        """
        self.model, self.config, self.ends, self.pad, self.max_tokens = model, config, ends, pad, max_tokens
        self.routing = Routing(model) if record_routes else None
        self.device = model.device
        decoders = (kind for kind in (OneCoreDecoder, SingleTokenDecoder) if kind.suits(model))
        self.policy = next(decoders, SamplingWeights)(model)
        self.graphs: GraphDecoder | None = None
        if config.cuda_graphs and self.device.type == "cuda" and can_record(model):
            self.graphs = GraphDecoder(self.policy, config.temperature, ends, pad, self.routing, uncharged)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], group_size: int, generator: torch.Generator) -> Batch:
        """Sample ``group_size`` completions of each prompt.

        Args:
            prompts: token ids.
            group_size: completions a prompt.
            generator: a CPU generator; all random numbers are drawn from it before sampling begins.

        Returns:
            the completions in the order of the prompts.
        """
        total = len(prompts) * group_size
        noise = self._send(torch.rand(total, self.max_tokens, generator=generator, dtype=torch.float64))
        completions = Completions.empty(total, self.max_tokens, self.pad, self.device)
        at_once = max(1, self.config.decode_sequences // group_size)
        decode = self._decode if self.graphs is None else self.graphs.decode
        routes: list[Tensor] = []
        with autocast(self.device), nullcontext() if self.routing is None else self.routing.watch():
            self.policy.refresh()
            for first in range(0, len(prompts), at_once):
                chunk = prompts[first : first + at_once]
                rows = slice(first * group_size, (first + len(chunk)) * group_size)
                recorded = decode(self._read(chunk, group_size), group_size, noise[rows], completions[rows])
                if recorded is not None:
                    routes.append(recorded)
        group_ids = torch.arange(len(prompts)).repeat_interleave(group_size)
        repeated = [prompt for prompt in prompts for _ in range(group_size)]
        tokens, logprobs, mask = (tensor.cpu() for tensor in vars(completions).values())
        batch = join(repeated, tokens, mask, logprobs, group_ids, self.pad)
        if routes:
            batch.routes = stack_rows(routes)[:, : batch.input_ids.shape[1]].cpu()
        return batch

    def _read(self, prompts: list[list[int]], group_size: int) -> Prompts:
        """Each prompt once for its whole group."""
        width = max(map(len, prompts))
        padded = [[self.pad] * (width - len(prompt)) + prompt for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        present = torch.arange(width) >= (width - lengths).unsqueeze(1)
        positions = (present.cumsum(1) - 1).clamp(min=0)
        if self.graphs is None:
            cache = SlotCache(self.model.config, len(prompts) * group_size, width + self.max_tokens)
        else:  # which have room of their own for what follows
            cache = SlotCache(self.model.config, len(prompts), width)
        there = self._send(present)
        mask: Tensor | None = there
        if is_padding_free(self.model):  # made where it is needed: for long prompts it is large
            mask = None if present.all() else each_sees_one(there)
        logits = self._forward(self._send(torch.tensor(padded)), mask, self._send(positions), cache)
        routes = None if self.routing is None else self._prompt_routes(self.routing.choices(), present)
        return Prompts(cache, there, self._send(lengths), logits, routes)

    def _send(self, tensor: Tensor) -> Tensor:
        return send(tensor, self.device)

    def _decode(self, prompts: Prompts, group_size: int, noise: Tensor, completions: Completions) -> Tensor | None:
        """Fill ``completions`` of n = P x group_size sequences by ``noise`` [n, T]; returns their routes
        [n, L, layers, k] if they are recorded.

        Sequences that have ended are given up. Those of a prompt are decoded in one row until they differ.
        """
        cache, width, logits, positions = prompts.cache, prompts.present.shape[1], prompts.logits, prompts.lengths
        routes = None if prompts.routes is None else prompts.routes.repeat_interleave(group_size, 0)
        # Room for every later token: the mask of a step is a view of this one.
        attention = torch.cat([prompts.present, prompts.present.new_ones(len(positions), self.max_tokens)], 1)
        if is_padding_free(self.model):  # as its layers want it, so that transformers need not make one at every token
            attention = decoding_mask(attention)
        active = torch.arange(len(noise), device=self.device)
        row = active // group_size
        alone = one_core.draws(logits)
        draw_, next_ = (one_core.draw, one_core.next_rows) if alone else (draw, next_rows)
        drawn: list[tuple[Tensor, ...]] = []
        for step in range(self.max_tokens):
            tokens, logprobs = draw_(logits, row, noise[active, step], self.config.temperature)
            drawn.append((active, torch.full_like(active, step), tokens, logprobs))
            alive = lives(tokens, self.ends).nonzero().squeeze(1)
            if step + 1 == self.max_tokens or not len(alive):
                break
            if len(alive) < len(active):
                active, row, tokens = active[alive], row[alive], tokens[alive]
            source, latest, row = next_(row, tokens, logits.shape[1])
            if len(source) != len(positions) or not torch.equal(source, torch.arange(len(source), device=self.device)):
                cache.batch_select_indices(source)
                attention, positions = attention[source], positions[source]
            logits = self._forward(
                latest.unsqueeze(1), attention[..., : width + step + 1], (positions + step).unsqueeze(1), cache
            )
            if routes is not None and self.routing is not None:
                routes[active, positions[row] + step] = self.routing.choices()[row]
        rows, steps, tokens, logprobs = map(torch.cat, zip(*drawn, strict=True))
        completions.tokens[rows, steps] = tokens
        completions.logprobs[rows, steps] = logprobs
        completions.mask[rows, steps] = 1.0
        return routes

    def _prompt_routes(self, choices: Tensor, present: Tensor) -> Tensor:
        """Routes [P, L, layers, k] of the prompts just read, which ``present`` [P, W] marks in host memory, and room
        for later tokens; a row's first token is at 0."""
        rows, width = present.shape
        recorded = choices.unflatten(0, (rows, width))
        routes = padding_routes(rows, width + self.max_tokens - 1, like=recorded)
        starts = (~present).sum(1)
        prompts, columns = present.nonzero(as_tuple=True)
        places = self._send(prompts), self._send(columns - starts[prompts])
        routes.index_put_(places, recorded[places[0], self._send(columns)])
        return routes

    def _forward(self, input_ids: Tensor, attention: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """Logits [n, V] of each row's next token."""
        return self.policy(
            input_ids=input_ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
