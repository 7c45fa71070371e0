"""Models of real shapes with random weights: rollout and update on the device, against `generate` and a plain update.

Needs torch and transformers, with what these install, and nothing else.
"""

import gc

import torch
from transformers import PreTrainedModel

from harness.benchmark.device_sides import OurPhases, compute_dtype, decode_bytes, random_model, sides
from harness.benchmark.kernels import profiled
from harness.benchmark.measure import Measure, Spread, interleave
from harness.benchmark.model_shapes import SHAPES, Shape
from harness.benchmark.peaks import data_sheet_peak, matrix_peak, memory_peak
from harness.benchmark.table import Cell, Options, Table, at_least, at_most
from harness.errors import ConfigError
from harness.machine import device_name
from harness.policy.flops import active_parameters
from harness.torch_setup import set_up_torch

DECODE_GOAL = 2.0
MFU_GOALS = {"qwen3_1_7b": 0.4, "qwen3_1_7b_long": 0.4}
# Sides of the matrices and bytes of the copies that the peaks are measured with.
_MATRIX, _COPY = {"cuda": 8192, "cpu": 512}, {"cuda": 2**32, "cpu": 2**24}
_ROLLOUT = (
    "Completion tokens a second; all completions have the full length. Ours gives their log-probabilities and samples "
    "from the float32 weights that are trained; `generate` (transformers) gives none and holds weights in {dtype}. The "
    "bound is what reading the used weights and the keys and values once a step, in {dtype}, allows at {bandwidth:.3g} "
    "TB/s, the rate of a copy within the device's memory, read and written."
)
_UPDATE = (
    "The optimizer steps on a rollout batch, against a loop that holds its logits; both with random float32 weights, "
    "gradients and AdamW, and matrix products in {dtype}. What sequences of a pass begin with, such as their prompt, "
    "ours computes once: distinct tokens are the share that is left. MFU: model FLOPs of those (padding and "
    "recomputation count none) over seconds, of the {peak:.3g} TFLOP/s of a {dtype} matrix product measured in the "
    "same run, and of the vendor's data sheet; the goal is held against the latter where it is known. Memory: the most "
    "above what was held before, with weights and optimizer state in place."
)
# The profiler keeps each kernel of each token: of more there are several hundred thousand.
_PROFILED_TOKENS = 256
_PHASES = "Seconds of a rollout batch in each phase, and their shares."
_KERNELS = (
    "Seconds that each phase keeps the GPU at work, by kinds of kernels, in one call of it under torch's profiler. "
    "What a phase takes beyond their sum the GPU waits for the host. Rollouts of long completions are left out."
)


def tables(options: Options) -> list[Table]:
    """Rollout, update, and the phases' shares, of every shape.

    Raises:
        ConfigError: where the device is not there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; run where there is one, or leave the option out")
    set_up_torch(1)  # as cells have it
    dtype = compute_dtype(options.device)
    bandwidth = memory_peak(_COPY[options.device], options.device)
    peak = matrix_peak(_MATRIX[options.device], options.device, dtype)
    rollout, update, phases, kernels = [], [], [], []
    for name in options.shapes:
        shape, model = SHAPES[name], random_model(SHAPES[name], options.device)
        compared = sides(model, shape, options.device)
        measured = interleave(compared, options.repetitions)
        about = _about(name, shape, model)
        rollout.append(about | _rollout_columns(shape, measured, bandwidth / decode_bytes(model, shape, dtype)))
        update.append(about | _update_columns(name, shape, measured, peak, options.device))
        phases.append(about | _phase_columns(measured["ours"]))
        if options.device == "cuda":
            kernels += _kernel_rows(name, shape, compared["ours"])
        del model, measured, compared
        _release(options.device)
    numbers = {"dtype": str(dtype).removeprefix("torch."), "bandwidth": bandwidth * 1e-12, "peak": peak * 1e-12}
    return [
        Table("Rollout", _ROLLOUT.format(**numbers), rollout),
        Table("Update", _UPDATE.format(**numbers), update),
        Table("Phases", _PHASES, phases),
        *([Table("Kernels", _KERNELS, kernels)] if kernels else []),
    ]


def _about(name: str, shape: Shape, model: PreTrainedModel) -> dict[str, Cell]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "shape": name,
        "parameters, M": parameters * 1e-6,
        "active, M": active_parameters(model) * 1e-6,
        "sequences": shape.sequences,
        "prompt + completion": f"{shape.prompt} + {shape.completion}",
    }


def _rollout_columns(shape: Shape, measured: dict[str, dict[str, Spread]], steps_per_second: float) -> dict[str, Cell]:
    tokens = shape.sequences * shape.completion
    ours = _rate(tokens, measured["ours"]["rollout"])
    theirs = _rate(tokens, measured["generate"]["rollout"]) if shape.generates else None
    bound = shape.sequences * steps_per_second
    behind = Spread(tuple(bound / rate for rate in ours.values))
    return {
        "ours, tokens/s": ours,
        "generate, tokens/s": theirs,
        "ratio": ours / theirs if theirs else None,
        "bound, tokens/s": bound,
        "bound / ours": behind,
        **at_most(behind, DECODE_GOAL),
    }


def _update_columns(
    name: str, shape: Shape, measured: dict[str, dict[str, Spread]], peak: float, device: str
) -> dict[str, Cell]:
    ours, plain = measured["ours"], measured["plain"]
    tokens = shape.sequences * (shape.prompt + shape.completion - 1)
    rates = [_rate(tokens, side["update"]) for side in (ours, plain)]
    achieved = ours["update FLOPs"] / ours["update"]
    sold = data_sheet_peak(device_name(device))
    mfu, data_sheet_mfu = achieved * (1 / peak), achieved * (1 / sold) if sold else None
    goal = at_least(data_sheet_mfu or mfu, MFU_GOALS[name]) if name in MFU_GOALS else {"goal": None, "reached": None}
    return {
        "optimizer steps": shape.minibatches,
        "ours, tokens/s": rates[0],
        "plain, tokens/s": rates[1],
        "ratio": rates[0] / rates[1],
        "distinct tokens": ours["distinct tokens"].median,
        "TFLOP/s": achieved * 1e-12,
        "MFU, measured peak": mfu,
        "MFU, data sheet": data_sheet_mfu,
        **goal,
        "ours, GiB": ours["memory"] * 2**-30,
        "plain, GiB": plain["memory"] * 2**-30,
    }


def _phase_columns(ours: dict[str, Spread]) -> dict[str, Cell]:
    phases = ("rollout", "old_logprobs", "update")
    whole = sum(ours[phase].median for phase in phases)
    seconds = {f"{phase}, s": ours[phase] for phase in phases}
    return {**seconds, **{f"{phase} share": ours[phase].median / whole for phase in phases}}


def _kernel_rows(name: str, shape: Shape, ours: Measure) -> list[dict[str, Cell]]:
    assert isinstance(ours, OurPhases)
    rows: list[dict[str, Cell]] = []
    for phase, work in ours.phases().items():
        if phase == "rollout" and shape.completion > _PROFILED_TOKENS:
            continue
        seconds = profiled(work)
        rows.append({"shape": name, "phase": phase, "all, s": sum(seconds.values()), **seconds})
    return rows


def _rate(tokens: int, seconds: Spread) -> Spread:
    return Spread(tuple(tokens / value for value in seconds.values))


def _release(device: str) -> None:
    """Give back the memory of a model that is gone."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
