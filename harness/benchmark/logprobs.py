"""Peak memory and time of one update's log-probabilities and loss, against holding the logits."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.algorithms.objective import policy_loss
from harness.benchmark.measure import collect
from harness.benchmark.memory import peak_memory, reset_peak_memory
from harness.benchmark.sizes import Sizes
from harness.benchmark.table import Cell, Options, Table, at_most
from harness.benchmark.worker import Worker
from harness.config import compose
from harness.policy.logprobs import token_logprobs

MEMORY_GOAL, TIME_GOAL = 1 / 8, 1.2
_SEQUENCES = 8
_TEXT = (
    "From hidden states to gradients of the states and the head: log-probabilities and entropies of {tokens:,} tokens "
    "over a vocabulary of {vocabulary:,} from {hidden:,} hidden units, GRPO's loss, backward, on one core in float32. "
    "Each measurement is a process of its own; memory is the most that it held above what it held before, with weights "
    "and hidden states in place: gradients are counted, weights are not."
)

Logprobs = Callable[[Tensor, nn.Linear, Tensor, float], tuple[Tensor, Tensor]]


def holding_logits(states: Tensor, head: nn.Linear, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As :func:`token_logprobs`, from the logits of all tokens at once; the entropy, which needs no gradient, row by
    row."""
    logprobs = (head(states) / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = torch.cat([-(part.exp() * part).sum(-1) for part in logprobs.split(128)])
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy


class LossAndGradients:
    """Log-probabilities, loss and backward, once."""

    def __init__(self, logprobs: Logprobs, sizes: Sizes) -> None:
        self.logprobs = logprobs
        self.algorithm = compose(["algorithm=grpo"]).algorithm
        torch.manual_seed(0)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        self.states = torch.randn(sizes.tokens, sizes.hidden, requires_grad=True)
        self.tokens = torch.randint(sizes.vocabulary, (sizes.tokens,))
        self.advantages = torch.randn(_SEQUENCES, sizes.tokens // _SEQUENCES)

    def __call__(self) -> dict[str, float]:
        held = reset_peak_memory()
        started = time.perf_counter()
        logprobs, _ = self.logprobs(self.states, self.head, self.tokens, 1.0)
        logprobs = logprobs.view(self.advantages.shape)
        mask = torch.ones_like(self.advantages)
        loss, _ = policy_loss(logprobs, logprobs.detach(), self.advantages, mask, self.algorithm)
        loss.backward()
        return {"seconds": time.perf_counter() - started, "bytes": peak_memory() - held}


def tables(options: Options) -> list[Table]:
    """Chunked log-probabilities and held logits, with the ratios of their memory and time."""
    sides = {"chunked": token_logprobs, "holding the logits": holding_logits}
    measured: dict[str, list] = {name: [] for name in sides}
    for _ in range(options.repetitions):
        for name, logprobs in sides.items():
            measured[name].append(_alone(logprobs, options.sizes))
    spreads = {name: collect(rows) for name, rows in measured.items()}
    ours, theirs = spreads["chunked"], spreads["holding the logits"]
    rows: list[dict[str, Cell]] = [
        _row("memory, MiB", ours["bytes"] * 2**-20, theirs["bytes"] * 2**-20, MEMORY_GOAL),
        _row("time, s", ours["seconds"], theirs["seconds"], TIME_GOAL),
    ]
    sizes = options.sizes
    text = _TEXT.format(tokens=sizes.tokens, vocabulary=sizes.vocabulary, hidden=sizes.hidden)
    return [Table("Log-probabilities and loss of one update", text, rows)]


def _row(what, ours, theirs, goal) -> dict[str, Cell]:
    ratio = ours / theirs
    return {"": what, "chunked": ours, "holding the logits": theirs, "ratio": ratio, **at_most(ratio, goal)}


def _alone(logprobs: Logprobs, sizes: Sizes):
    worker = Worker(LossAndGradients, logprobs=logprobs, sizes=sizes)
    try:
        return worker()
    finally:
        worker.close()
