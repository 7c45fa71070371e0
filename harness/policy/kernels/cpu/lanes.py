"""Sixteen float32 numbers at a time in functions that Numba compiles, which has no type for them.

Compilers turn loops over single elements into this by themselves, but not the loops of matrix products, whose sums have
to stay in registers. LLVM makes of sixteen numbers what the processor has: one register of 512 bits, two of 256, four
of 128.
"""

import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, overload, register_model

from harness.policy.kernels import LANES

WIDTH = LANES
_NUMBER, _INTEGER = ir.FloatType(), ir.IntType(32)
_NUMBERS, _INTEGERS = ir.VectorType(_NUMBER, WIDTH), ir.VectorType(_INTEGER, WIDTH)

# Sums may be in any order; numbers that are not finite stay what they are.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "nogil": True}

# Types of arrays of one to four dimensions.
FLOATS, FLOATS_2 = "float32[::1]", "float32[:, ::1]"
FLOATS_3, FLOATS_4 = "float32[:, :, ::1]", "float32[:, :, :, ::1]"
DOUBLES = "float64[::1]"
INTEGERS, INTEGERS_2 = "int64[::1]", "int64[:, ::1]"


# A function that is part of kernels: called as one it would pass its numbers through memory.
inlined = njit(**OPTIONS, forceinline=True)


def version(folder: Path) -> str:
    """Changes with every file of code in a folder."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:8]


_VERSION = version(Path(__file__).parent)


def kernel(*arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a function of arguments of these types, which is compiled when it is first imported on a machine, and
    read from a file from then on."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        # Numba compiles again what has changed in the function's own file, but not where it calls functions of another.
        function.__qualname__ += f"_{_VERSION}"
        kind = f"void({', '.join(arguments)})"
        try:
            return njit(kind, cache=True, **OPTIONS)(function)
        except RuntimeError:  # there is no folder that it may be kept in
            return njit(kind, **OPTIONS)(function)

    return decorate


class _Lanes(types.Type):
    pass


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _NUMBERS)


_LANES = _Lanes("lanes")


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _repeated(builder: Any, number: Any) -> Any:
    empty = ir.Constant(_NUMBERS, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(_INTEGER, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTEGERS, [0] * WIDTH))


@intrinsic
def load(typing, array, index):
    """The sixteen elements of an array of one dimension from ``index`` on."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(place, _NUMBERS.as_pointer()), align=4)

    return _LANES(array, types.intp), generate


@intrinsic
def store(typing, array, index, numbers):
    """Put sixteen numbers where :func:`load` takes them from."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(place, _NUMBERS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _LANES), generate


@intrinsic
def spread(typing, array, index):
    """The element at ``index`` sixteen times."""

    def generate(context, builder, signature, arguments):
        return _repeated(builder, builder.load(_place(context, builder, signature.args[0], *arguments)))

    return _LANES(array, types.intp), generate


@intrinsic
def repeat(typing, number):
    """A number sixteen times."""
    return _LANES(types.float32), lambda context, builder, signature, arguments: _repeated(builder, *arguments)


@intrinsic
def fma(typing, left, right, addend):
    """left x right + addend, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.call(_llvm(builder, "llvm.fma.v16f32", _NUMBERS, [_NUMBERS] * 3), arguments)

    return _LANES(_LANES, _LANES, _LANES), generate


@intrinsic
def larger(typing, left, right):
    """The larger one of each two, the left one where neither is."""

    def generate(context, builder, signature, arguments):
        left, right = arguments
        return builder.select(builder.fcmp_ordered("<", left, right), right, left)

    return _LANES(_LANES, _LANES), generate


@intrinsic
def total(typing, numbers):
    """The sum of the sixteen."""

    def generate(context, builder, signature, arguments):
        function = _llvm(builder, "llvm.vector.reduce.fadd.v16f32", _NUMBER, [_NUMBER, _NUMBERS])
        return builder.call(function, [ir.Constant(_NUMBER, -0.0), *arguments], fastmath=("reassoc",))

    return types.float32(_LANES), generate


@intrinsic
def largest(typing, numbers):
    """The largest of the sixteen."""

    def generate(context, builder, signature, arguments):
        return builder.call(_llvm(builder, "llvm.vector.reduce.fmax.v16f32", _NUMBER, [_NUMBERS]), arguments)

    return types.float32(_LANES), generate


@intrinsic
def swap(typing, numbers):
    """The last eight, then the first eight."""

    def generate(context, builder, signature, arguments):
        order = [*range(WIDTH // 2, WIDTH), *range(WIDTH // 2)]
        return builder.shuffle_vector(*arguments, ir.Constant(_NUMBERS, ir.Undefined), ir.Constant(_INTEGERS, order))

    return _LANES(_LANES), generate


@intrinsic
def _floor(typing, numbers):
    def generate(context, builder, signature, arguments):
        return builder.call(_llvm(builder, "llvm.floor.v16f32", _NUMBERS, [_NUMBERS]), arguments)

    return _LANES(_LANES), generate


@intrinsic
def _scale(typing, numbers, exponents, given):
    """numbers x 2^exponents, and 0 where what was given is so small that there is no such number."""

    def generate(context, builder, signature, arguments):
        numbers, exponents, given = arguments
        integers = builder.fptosi(exponents, _INTEGERS)
        biased = builder.add(integers, ir.Constant(_INTEGERS, [127] * WIDTH))
        powers = builder.bitcast(builder.shl(biased, ir.Constant(_INTEGERS, [23] * WIDTH)), _NUMBERS)
        least = ir.Constant(_NUMBERS, [_LEAST] * WIDTH)
        zeros = ir.Constant(_NUMBERS, [0.0] * WIDTH)
        return builder.select(builder.fcmp_ordered("<", given, least), zeros, builder.fmul(numbers, powers))

    return _LANES(_LANES, _LANES, _LANES), generate


def _llvm(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _operator(function: Callable[..., Any], instruction: str) -> None:
    @intrinsic
    def generated(typing, left, right):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments, flags=("contract", "reassoc"))

        return _LANES(_LANES, _LANES), generate

    @overload(function)
    def _typed(left, right):
        if isinstance(left, _Lanes) and isinstance(right, _Lanes):
            return lambda left, right: generated(left, right)
        return None


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")

_LARGEST = np.float32(88)
_LEAST = -87.0  # e^-87 is about the smallest float32 of full precision

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
# 1/2!, 1/3! and so on, but fitted to the interval that is left.
_C2, _C3, _C4 = np.float32(5.0000001e-1), np.float32(1.6666665e-1), np.float32(4.1665796e-2)
_C5, _C6, _C7 = np.float32(8.3334519e-3), np.float32(1.3981999e-3), np.float32(1.9875691e-4)


@inlined
def exp(numbers):
    """e to the power of numbers of at most 88, to two units in the last place; below -87 it is 0."""
    exponents = _floor(fma(numbers, repeat(_LOG2_E), repeat(_HALF)))
    rest = fma(exponents, repeat(-_LN2_LOW), fma(exponents, repeat(-_LN2_HIGH), numbers))
    sums = fma(repeat(_C7), rest, repeat(_C6))
    sums = fma(sums, rest, repeat(_C5))
    sums = fma(sums, rest, repeat(_C4))
    sums = fma(sums, rest, repeat(_C3))
    sums = fma(sums, rest, repeat(_C2))
    return _scale(fma(sums * rest, rest, rest + repeat(_ONE)), exponents, numbers)


@inlined
def sigmoid(numbers):
    """1 / (1 + e^-x)."""
    return repeat(_ONE) / (repeat(_ONE) + exp(repeat(_ZERO) - larger(numbers, repeat(-_LARGEST))))
