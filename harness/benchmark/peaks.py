"""What the device itself can do: the matrix-product and memory peaks that figures are held against."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from harness.benchmark import memory
from harness.policy.products import onednn_product

# Dense bfloat16 products by the vendor's data sheets, FLOPs a second, of the GPUs whose names hold these words.
_DATA_SHEETS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of a call, the device synchronised at both ends."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def timed_with_memory(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of a call, and the most bytes of the device's memory that it held above what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return timed(work, device), torch.cuda.max_memory_allocated() - held
    held = memory.reset_peak_memory()
    return timed(work, device), memory.peak_memory() - held


def data_sheet_peak(name: str) -> float | None:
    """FLOPs a second in bfloat16 that a GPU is sold with; None for one that is not known."""
    return next((peak for word, peak in _DATA_SHEETS.items() if word in name), None)


def matrix_peak(largest: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second of the fastest ``torch.mm`` of square matrices of a quarter, half and all of that side."""
    return max(_product(side, device, dtype, torch.mm) for side in (largest // 4, largest // 2, largest))


def onednn_peak(largest: int) -> float:
    """Likewise of oneDNN's product in float32 on a CPU, which ``torch.mm`` does not take; 0 where torch has none."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    return max(_product(side, "cpu", torch.float32, onednn_product) for side in (largest // 4, largest // 2, largest))


def memory_peak(size: int, device: str) -> float:
    """Bytes a second, read and written, of copying ``size`` bytes within the device's memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _product(side: int, device: str, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: multiply(left, right), device)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds, after one call that does not count."""
    work()
    return min(timed(work, device) for _ in range(5))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
