"""The update phase against the matrix-product peak of its core."""

from harness.benchmark.measure import interleave
from harness.benchmark.peaks import matrix_peak, onednn_peak
from harness.benchmark.sizes import Sizes
from harness.benchmark.table import Cell, Options, Table, at_least
from harness.benchmark.training import LENGTHS, MODELS, WholeSteps
from harness.benchmark.worker import workers

GOALS = {"tiny_dense": 0.5}
_TEXT = (
    "Model FLOPs of the update phase (harness/policy/flops.py: padding costs none) over its seconds, on one core in "
    "float32, against the best float32 product of square matrices up to {matrix} on the same core, measured in turn in "
    "the same process: torch.mm's or oneDNN's, whichever is faster. The algorithm is reinforce_plus_plus, where each "
    "completion has a prompt of its own. What several sequences of a pass begin with is computed once, so that only "
    "the share of distinct tokens is counted of their model FLOPs."
)


class UpdateAndPeak:
    """FLOPs a second of the update phase, then of matrix products."""

    def __init__(self, model: str, lengths: str, sizes: Sizes) -> None:
        self.steps, self.sizes = WholeSteps(model, lengths, sizes, ["algorithm=reinforce_plus_plus"]), sizes

    def __call__(self) -> dict[str, float]:
        torch_mm, onednn = matrix_peak(self.sizes.matrix), onednn_peak(self.sizes.matrix)
        measured = self.steps()
        return {
            "update": measured["update FLOP/s"] * measured["distinct tokens"],
            "distinct tokens": measured["distinct tokens"],
            "torch.mm": torch_mm,
            "peak": max(torch_mm, onednn),
        }


def tables(options: Options) -> list[Table]:
    """Both models, fixed and natural lengths."""
    rows = [compare(model, lengths, options) for model in MODELS for lengths in LENGTHS]
    return [Table("Update against the matrix-product peak", _TEXT.format(matrix=options.sizes.matrix), rows)]


def compare(model: str, lengths: str, options: Options) -> dict[str, Cell]:
    """The row of one model and kind of lengths."""
    settings = {"model": model, "lengths": lengths, "sizes": options.sizes}
    with workers({"ours": (UpdateAndPeak, settings)}) as sides:
        measured = interleave(sides, options.repetitions)["ours"]
    share = measured["update"] / measured["peak"]
    goal = at_least(share, GOALS[model]) if model in GOALS else {"goal": None, "reached": None}
    return {
        "model": model,
        "lengths": lengths,
        "distinct tokens": measured["distinct tokens"].median,
        "update, GFLOP/s": measured["update"] * 1e-9,
        "peak, GFLOP/s": measured["peak"] * 1e-9,
        "share": share,
        **goal,
        "torch.mm, GFLOP/s": measured["torch.mm"] * 1e-9,
        "share of torch.mm": measured["update"] / measured["torch.mm"],
    }
