"""Where a GPU's time goes in each phase, by kinds of kernels."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

# Words in the names of their kernels, in small letters; the first kind that has one of a name's counts.
KINDS = {
    "attention": ("fmha", "flash", "attend_once"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitk", "cublas"),
    "optimizer and other lists of tensors": ("multi_tensor", "foreach"),
    "compiled, and kernels of ours": (
        *("triton_", "place_states", "add_and_normalize"),
        *("normalization_gradients", "sum_of_rows"),
    ),
    "copies, casts and gathering": ("copy", "memcpy", "memset", "fill", "cat", "gather", "index", "scatter"),
}
REST = "the rest"


def kind(name: str) -> str:
    """Of the kernel that has this name."""
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), REST)


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each kind, from names and seconds of kernels."""
    seconds = dict.fromkeys((*KINDS, REST), 0.0)
    for name, each in kernels:
        seconds[kind(name)] += each
    return seconds


def profiled(work: Callable[[], object]) -> Mapping[str, float]:
    """Seconds that a call keeps the GPU at work, by kind."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        work()
        torch.cuda.synchronize()
    return by_kind((event.key, event.self_device_time_total * 1e-6) for event in watched.key_averages())
