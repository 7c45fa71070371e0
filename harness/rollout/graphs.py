"""Decoding on a GPU: a step is one launch of a CUDA graph, and nobody waits for the device.

A graph works on tensors that stay where they are, of shapes that stay as they are. So keys and values have buffers for
all rows and columns, of which a step reads the first; sequences that have ended are decoded on, unrecorded, until half
of the rows have ended and a graph of half the rows takes over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from harness.errors import ConfigError
from harness.policy.attention import is_padding_free
from harness.policy.routing import Routing, expert_layers
from harness.rollout.cache import FixedLayer, SlotLayer
from harness.rollout.decoding import Completions, Prompts, lives, sample
from harness.rollout.weights import SamplingWeights

Step = Callable[[], None]

_COLUMNS = 128  # graphs read keys up to a multiple of it: what is read in vain, against how many graphs there are
_ROWS = 8  # fewer rows are not decoded any faster
_LOOK = 16  # steps between two looks at how many sequences live


def can_record(model: PreTrainedModel) -> bool:
    """Whether a graph can hold a decoding step of a model on a GPU.

    A mixture's grouped products ask the device how many tokens each expert has, but for the kernels that torch has for
    compute capability 9 and 10.
    """
    grouped = not expert_layers(model) or torch.cuda.get_device_capability(model.device)[0] in (9, 10)
    return is_padding_free(model) and grouped


class CudaGraphs:
    """Records steps; all graphs share their memory, since one runs at a time."""

    def __init__(self) -> None:
        # Not those that torch shares with others, whose end would be felt here.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), _capture_stream()

    def __call__(self, step: Step) -> Step:
        """The step as one launch. It must have run before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph.replay


class GraphDecoder:
    """Samples the completions of prompts that were read."""

    def __init__(
        self,
        forward: SamplingWeights,
        temperature: float,
        ends: Sequence[int],
        pad: int,
        routing: Routing | None,
        uncharged: Callable[[], AbstractContextManager[None]] = nullcontext,
        recorder: Callable[[], Callable[[Step], Step]] = CudaGraphs,
    ) -> None:
        """
        Args:
            forward: of a model that does without padding.
            temperature: of sampling.
            ends: the tokens that end a completion, one or more.
            pad: the token that fills up rows.
            routing: watches the experts that are chosen, where they are recorded.
            uncharged: a context for recording graphs.
            recorder: makes what makes, of a step that has run, one that can be repeated.
        """
        self.forward, self.temperature, self.ends, self.pad, self.routing = forward, temperature, ends, pad, routing
        self.uncharged, self.recorder = uncharged, recorder
        self.device = forward.model.device
        self._rows: _Rows | None = None
        self._steps: dict[tuple[int, int], Step] = {}

    def decode(self, prompts: Prompts, group_size: int, noise: Tensor, completions: Completions) -> Tensor | None:
        """Fill ``completions`` of n = P x group_size rows by ``noise`` [n, T]; returns their routes if recorded."""
        (count, length), width = noise.shape, prompts.present.shape[1]
        with _any_order():
            rows = self._begin(prompts, group_size, noise)
            self._record(rows, count, prompts.logits.repeat_interleave(group_size, 0))
            alive, running = _Late(self.device), count
            for step in range(1, length):
                if step % _LOOK == 0:
                    running = self._drop_ended(rows, running, alive(rows.alive[:running].sum()))
                    if not running:
                        break
                self._advance(rows, running, _multiple(width + step, _COLUMNS))
            place = rows.place[:count].argsort()
            completions.tokens.copy_(rows.tokens[:count][place])
            completions.logprobs.copy_(rows.logprobs[:count][place])
            completions.mask.copy_(rows.mask[:count][place])
            return None if rows.routes is None else rows.routes[:count][place][:, : width + length - 1]

    def _begin(self, prompts: Prompts, group_size: int, noise: Tensor) -> "_Rows":
        (count, length), width = noise.shape, prompts.present.shape[1]
        rows = self._rows
        if rows is None or not rows.has_room(count, width + length, length):
            most, columns = count, _multiple(width + length, _COLUMNS)
            if rows is not None:  # no less than there was: batches of two shapes in turn would record every time
                most, columns = max(most, len(rows.place)), max(columns, rows.present.shape[1])
            self._steps.clear()  # they work on the old one's memory
            self._record_step = self.recorder()  # memory that graphs shared cannot be shared again once all are gone
            rows = self._rows = None  # it is most of the memory, and goes before the new one comes
            self._rows = rows = _Rows(prompts, most, columns, length, self.pad)
        rows.fill(prompts, group_size, noise, self.pad)
        return rows

    def _advance(self, rows: "_Rows", count: int, columns: int) -> None:
        """Feed the first ``count`` rows their latest token and draw the next one."""

        def step() -> None:
            self._step(rows, count, columns)

        if (count, columns) in self._steps:
            self._steps[count, columns]()
            return
        step()
        with self.uncharged():
            try:
                self._steps[count, columns] = self._record_step(step)
            except RuntimeError as error:
                first = error.__context__ or error  # what broke off the recording, not that it could not be ended
                raise ConfigError(
                    f"rollout.cuda_graphs=true: a decoding step of {type(self.forward.model).__name__} cannot be "
                    f"recorded ({str(first).splitlines()[0]}); set it to false"
                ) from error

    def _step(self, rows: "_Rows", count: int, columns: int) -> None:
        kind = self.device.type
        rows.look_at(columns)
        seen = rows.present[:count, :columns] & (torch.arange(columns, device=self.device) <= rows.column)
        # What autocast caches would be gone when a graph runs again.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            logits = self.forward(
                input_ids=rows.latest[:count, None],
                attention_mask=seen[:, None, None],
                position_ids=rows.position[:count, None],
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if rows.routes is not None and self.routing is not None:
            every = torch.arange(count, device=self.device)
            rows.routes.index_put_((every, rows.position[:count]), self.routing.choices())
        rows.column.add_(1)
        rows.position[:count].add_(1)
        self._record(rows, count, logits)

    def _record(self, rows: "_Rows", count: int, logits: Tensor) -> None:
        """Draw the next token of the first ``count`` rows, and keep those of sequences that live."""
        noise = rows.noise[:count].index_select(1, rows.step).squeeze(1)
        tokens, logprobs = sample(logits, noise, self.temperature)
        alive = rows.alive[:count]
        rows.tokens[:count].index_copy_(1, rows.step, tokens.where(alive, self.pad).unsqueeze(1))
        rows.logprobs[:count].index_copy_(1, rows.step, (logprobs * alive).unsqueeze(1))
        rows.mask[:count].index_copy_(1, rows.step, alive.float().unsqueeze(1))
        rows.latest[:count].copy_(tokens)
        alive.logical_and_(lives(tokens, self.ends))
        rows.step.add_(1)

    def _drop_ended(self, rows: "_Rows", count: int, alive: int | None) -> int:
        """How many rows still run, the living ones first, by how many lived a look ago."""
        if alive is None or alive == 0:
            return count if alive is None else 0
        fewer = count
        while fewer // 2 >= max(alive, _ROWS):
            fewer //= 2
        if fewer < count:
            rows.move_first(rows.alive[:count].int().argsort(descending=True, stable=True), fewer)
        return fewer


class _Rows:
    """The state of sequences that are decoded together, in tensors that stay where they are."""

    def __init__(self, prompts: Prompts, most: int, columns: int, length: int, pad: int) -> None:
        device = prompts.logits.device
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # where the next keys and values go
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # which completion token is drawn next
        self.place = torch.arange(most, device=device)  # of each row among the completions
        self.latest = torch.zeros(most, dtype=torch.long, device=device)  # token
        self.position = torch.zeros(most, dtype=torch.long, device=device)  # of the latest token in its sequence
        self.alive = torch.ones(most, dtype=torch.bool, device=device)
        self.present = torch.ones(most, columns, dtype=torch.bool, device=device)  # where a token is or will be
        self.noise = torch.zeros(most, length, dtype=torch.double, device=device)
        self.tokens, self.logprobs, self.mask = vars(Completions.empty(most, length, pad, device)).values()
        self.routes: Tensor | None = None
        if prompts.routes is not None:
            self.routes = prompts.routes.new_zeros(most, columns, *prompts.routes.shape[2:])
        self.layers = [FixedLayer(states, most, columns, self.column) for states in _key_values(prompts.cache)]
        self.cache = Cache(layers=[*self.layers])

    def has_room(self, count: int, columns: int, length: int) -> bool:
        """Whether it fits so many rows, columns of keys and values, and exactly so many completion tokens."""
        most, longest = self.present.shape
        return count <= most and columns <= longest and length == self.noise.shape[1]

    def fill(self, prompts: Prompts, group_size: int, noise: Tensor, pad: int) -> None:
        """Start anew."""
        (count, _), width = noise.shape, prompts.present.shape[1]
        self.column.fill_(width)
        self.step.zero_()
        torch.arange(len(self.place), out=self.place)
        self.position[:count].copy_(prompts.lengths.repeat_interleave(group_size))
        self.alive.fill_(True)
        self.present.fill_(True)
        self.present[:count, :width].copy_(prompts.present.repeat_interleave(group_size, 0))
        self.noise[:count].copy_(noise)
        self.tokens.fill_(pad)
        self.logprobs.zero_()
        self.mask.zero_()
        if self.routes is not None and prompts.routes is not None:
            known = prompts.routes.repeat_interleave(group_size, 0)
            self.routes[:count, : known.shape[1]].copy_(known)
        for layer, states in zip(self.layers, _key_values(prompts.cache), strict=True):
            layer.fill(states, group_size)

    def look_at(self, columns: int) -> None:
        """Read the first columns of keys and values alone."""
        for layer in self.layers:
            layer.columns = columns

    def move_first(self, order: Tensor, kept: int) -> None:
        """Put the first rows into this order; keys and values of those behind ``kept`` are lost."""
        count = len(order)
        moved = [self.place, self.latest, self.position, self.alive, self.present, self.noise, self.tokens]
        moved += [self.logprobs, self.mask, *([] if self.routes is None else [self.routes])]
        for tensor in moved:
            tensor[:count] = tensor[:count].index_select(0, order)
        for layer in self.layers:
            layer.batch_select_indices(order[:kept])


def _key_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Of all tokens that its layers hold, [P, heads, W, dim] each."""
    layers = [layer for layer in cache.layers if isinstance(layer, SlotLayer)]
    return [layer.states() for layer in layers]


class _Late:
    """Numbers on the device, each told when the next one is asked for: by then nobody has to wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._earlier: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, number: Tensor) -> int | None:
        earlier, self._earlier = self._earlier, self._send(number)
        if earlier is None:
            return None
        told, event = earlier
        if event is not None:
            event.synchronize()
        return int(told)

    def _send(self, number: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if not self._on_gpu:
            return number, None
        told = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return told, event


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all recorders: for each stream that multiplies, torch keeps memory."""
    return torch.cuda.Stream()


def _multiple(number: int, of: int) -> int:
    """The next one that is not smaller."""
    return -(-number // of) * of


@contextmanager
def _any_order() -> Iterator[None]:
    """Without deterministic kernels: each place is written once, and theirs are slower."""
    debug_mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(debug_mode)
