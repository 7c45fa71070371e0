"""The whole step against TRL's: rollout and four optimizer steps, one core, float32."""

from importlib.util import find_spec

from harness.benchmark.measure import Spread, interleave
from harness.benchmark.table import Cell, Options, Table, tokens_row
from harness.benchmark.training import LENGTHS, MODELS, WholeSteps
from harness.benchmark.worker import workers
from harness.errors import ConfigError

GOALS = {"fixed": 2.0, "natural": 3.0}
# Where the old log-probabilities of our side come from.
OLD_LOGPROBS = ("trainer", "rollout")
_TEXT = (
    "Completion tokens a second of whole steps: {completions} completions of a GRPO rollout batch and the four "
    "optimizer steps that follow it, the same weights, prompts, reward, loss and optimizer on both sides, each on one "
    "core in float32. TRL's GRPOTrainer has its best CPU settings: activations kept, an optimizer batch in one forward "
    "and backward, nothing logged or saved; ours logs as a run does. Fixed lengths: the end-of-sequence token ends "
    "nothing on either side. With several optimizer steps for a rollout batch TRL always computes old "
    "log-probabilities by a forward pass of the trained model, which is `trainer` here; `rollout` takes the same "
    "numbers from sampling. What several sequences begin with, their prompt and more, ours computes once where they "
    "are decoded or updated together: distinct tokens are the share that is left of those of an optimizer step. The "
    "surer a model is of its answers, the fewer they are."
)


def tables(options: Options) -> list[Table]:
    """Both models, fixed and natural lengths, old log-probabilities computed anew or taken from sampling.

    Raises:
        ConfigError: where TRL is not installed.
    """
    if find_spec("trl") is None:
        raise ConfigError("the table step compares with TRL, which is not installed: pip install 'levelfield[parity]'")
    rows = [row for model in MODELS for lengths in LENGTHS for row in compare(model, lengths, options)]
    return [Table("Whole step against TRL", _TEXT.format(completions=options.sizes.completions), rows)]


def compare(model: str, lengths: str, options: Options) -> list[dict[str, Cell]]:
    """The rows of one model and kind of lengths."""
    from harness.benchmark.trl_side import TrlSteps

    common = {"model": model, "lengths": lengths, "sizes": options.sizes}
    overrides = {where: [f"algorithm.old_logprobs={where}"] for where in OLD_LOGPROBS}
    ours = {where: (WholeSteps, {**common, "overrides": overrides[where]}) for where in OLD_LOGPROBS}
    with workers({"TRL": (TrlSteps, common), **ours}) as sides:
        measured = interleave(sides, options.repetitions)
    return [_row(model, lengths, where, measured[where], measured["TRL"]) for where in OLD_LOGPROBS]


def _row(model: str, lengths: str, where: str, ours: dict[str, Spread], theirs: dict[str, Spread]) -> dict[str, Cell]:
    return {
        "model": model,
        "lengths": lengths,
        "old log-probabilities": where,
        **tokens_row(ours, theirs, "TRL", GOALS[lengths]),
        "distinct tokens": ours["distinct tokens"].median,
        **{f"{phase} share": ours[f"{phase} share"].median for phase in ("rollout", "old_logprobs", "update")},
    }
