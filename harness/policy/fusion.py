"""Functions of tensors that a GPU is to compute in a kernel or two: torch launches one for each operation.

Kernels are made by ``torch.compile`` when a function is first called, and serve any number of rows.
"""

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# Kernels of a function that one process may need: for each model's sizes, where torch expects hardly more than one.
_VARIANTS = 64

# Rows that kernels are tuned for, unless a function says otherwise: a prime, so that nothing is made of its divisors.
_ROWS = 4099
# Columns at most, where there may be any number.
_COLUMNS = 8191


def fused(rows: int, columns: int = 0, tuned_for: int = _ROWS) -> Callable[[Function], Function]:
    """Decorates a function of tensors, which stays as it is where they are not on a GPU that torch compiles for.

    It is called with gradients disabled, or where nobody asks for those of what it gives.

    Args:
        rows: so many of its first arguments have a row for each token, sequence or group of them.
        columns: so many of these may have any number of columns, too.
        tuned_for: rows that its kernels are tuned for, whatever it is first called with.
    """

    def decorate(function: Function) -> Function:
        met = set()

        def compiled(arguments: list[Any]) -> Any:
            for index, tensor in enumerate(arguments[:rows]):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
                if index < columns:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
            return _compiled(function)(*arguments)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if not (arguments[0].is_cuda and compiles()):
                return function(*arguments)
            # Without what autograd knows of them, which has no bearing here, and would be compiled for.
            plain = [given.data if isinstance(given, Tensor) else given for given in arguments]
            kind = (plain[0].shape[2 if columns else 1 :], plain[0].dtype, *_state())
            if kind not in met:
                met.add(kind)
                compiled([*(_room(given, index < columns) for index, given in enumerate(plain[:rows])), *plain[rows:]])
            return compiled(plain)

        def _room(given: Tensor, any_columns: bool) -> Tensor:
            shape = (min(given.shape[1], _COLUMNS), *given.shape[2:]) if any_columns else given.shape[1:]
            return given.new_zeros(tuned_for, *shape)

        return call  # type: ignore[return-value]

    return decorate


def autocast_dtype(states: Tensor) -> torch.dtype | None:
    """What functions that autocast on a GPU does not know are to give there; None where it is off."""
    if states.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None


def _state() -> tuple[bool, ...]:
    """What torch compiles a function anew for, though these make no difference to what it computes."""
    autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_cache_enabled()
    return *autocast, torch.are_deterministic_algorithms_enabled()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = _VARIANTS
    return torch.compile(function)


@cache
def compiles() -> bool:
    """Whether there is a GPU that torch compiles for, which takes Triton and a C compiler; it is tried once."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.compile(torch.neg)(torch.ones(2, device="cuda"))
    except Exception as error:  # whatever the compiler misses
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch cannot compile for this GPU, so that more kernels are launched: {reason}", stacklevel=2)
        return False
    return True
