"""Kernels of our own: for a CPU in Numba, for a GPU in Triton."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

# Numbers that kernels for a CPU work on at once: sizes of states and layers are multiples of it.
LANES = 16
# Of larger matrices libraries multiply such blocks as fit the cache.
WIDEST = 512

# The logit of what only fills up a vocabulary; infinity times its probability of 0 would be no number.
NO_LOGIT = -1e30

_LEFT_OUT = ContextVar("left_out", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Leave out those for a CPU, for a model that is to be moved to a GPU."""
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)


def on_one_core(states: Tensor) -> bool:
    """Whether the kernels for one core of a CPU take states of this kind."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and torch.get_num_threads() == 1
        and not torch.is_autocast_enabled("cpu")
        and not _LEFT_OUT.get()
    )


def takes_products(states: Tensor, *sizes: int) -> bool:
    """Whether they multiply states by matrices of these sizes."""
    return on_one_core(states) and max(sizes) <= WIDEST and not any(size % LANES for size in sizes)


def takes_vocabulary(states: Tensor, head: Tensor) -> bool:
    """Whether they score tokens by states and the weight [V, H] of a head."""
    return takes_products(states, head.shape[1], -(-len(head) // LANES) * LANES)


def takes_heads(dim: int) -> bool:
    """Whether they take heads of this size, whose halves are turned with each other."""
    return dim == LANES or not dim % (2 * LANES)


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Tensors as such kernels take them: the same memory, unless it is not contiguous."""
    # Either call costs as much as a small kernel.
    plain = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    return [tensor.numpy() if tensor.is_contiguous() else tensor.contiguous().numpy() for tensor in plain]
