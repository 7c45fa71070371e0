"""Matrix products on one core of a CPU, compiled by Numba, for matrices that fit its caches.

Tiles of four rows and sixteen columns stay in registers. Libraries come as close to what a processor can do for large
matrices alone.
"""

import numpy as np

from harness.policy.kernels.cpu.lanes import (
    FLOATS,
    FLOATS_2,
    WIDTH,
    fma,
    inlined,
    kernel,
    load,
    repeat,
    sigmoid,
    spread,
    store,
)

_ZERO = np.float32(0)
# Rows that are worked on at once, so that what is between two products stays in the cache.
_BLOCK = 64


@inlined
def four_rows(left, a, b, c, d, step, right, place, stride, count):
    """Sixteen columns of four rows of a product: sums over ``count`` of left[row + i step] right[place + i stride]."""
    first = second = third = fourth = repeat(_ZERO)
    for _ in range(count):
        numbers = load(right, place)
        first = fma(spread(left, a), numbers, first)
        second = fma(spread(left, b), numbers, second)
        third = fma(spread(left, c), numbers, third)
        fourth = fma(spread(left, d), numbers, fourth)
        a, b, c, d, place = a + step, b + step, c + step, d + step, place + stride
    return first, second, third, fourth


@inlined
def put_four(out, place, stride, first, second, third, fourth):
    """Sixteen numbers of each of four rows."""
    store(out, place, first)
    store(out, place + stride, second)
    store(out, place + 2 * stride, third)
    store(out, place + 3 * stride, fourth)


@inlined
def one_row(left, a, step, right, place, stride, count):
    """Likewise of one row; four sums that are added up in the end, since each waits for the one before."""
    first = second = third = fourth = repeat(_ZERO)
    for _ in range(count // 4):
        first = fma(spread(left, a), load(right, place), first)
        second = fma(spread(left, a + step), load(right, place + stride), second)
        third = fma(spread(left, a + 2 * step), load(right, place + 2 * stride), third)
        fourth = fma(spread(left, a + 3 * step), load(right, place + 3 * stride), fourth)
        a, place = a + 4 * step, place + 4 * stride
    for _ in range(count % 4):
        first = fma(spread(left, a), load(right, place), first)
        a, place = a + step, place + stride
    return (first + second) + (third + fourth)


@inlined
def add_outer_products(left, a, b, c, d, right, e, f, g, h, columns, out, stride, count):
    """Add to ``count`` rows of sixteen or more columns the outer products of four rows of weights and of numbers."""
    for column in range(0, columns, WIDTH):
        first, second = load(right, e + column), load(right, f + column)
        third, fourth = load(right, g + column), load(right, h + column)
        for row in range(count):
            place = row * stride + column
            numbers = fma(spread(left, a + row), first, load(out, place))
            numbers = fma(spread(left, b + row), second, numbers)
            numbers = fma(spread(left, c + row), third, numbers)
            store(out, place, fma(spread(left, d + row), fourth, numbers))


@inlined
def multiply(left, first, rows, panels, bias, onto, out, target):
    """So many rows, from the first one on, of a product of [n, K] and a matrix [N, K], into rows of [., N].

    Args:
        left: [n, K].
        first: row of these.
        rows: how many.
        panels: [N / 16, K, 16], in which the matrix' rows are columns.
        bias: [N], or [0].
        onto: [., N] what they are added to, in the rows where they are put; or [0, .].
        out: where to put them.
        target: the first row there.
    """
    count, stride = left.shape[1], out.shape[1]
    given, weights, result, there = left.reshape(-1), panels.reshape(-1), out.reshape(-1), onto.reshape(-1)
    for panel in range(len(panels)):
        start, column = panel * count * WIDTH, panel * WIDTH
        one = two = three = four = repeat(_ZERO)
        if len(bias):
            one = two = three = four = load(bias, column)
        for row in range(0, rows, 4):
            # Where there are fewer than four, the last one is computed again.
            second, third, fourth = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
            sums = four_rows(
                given, (first + row) * count, (first + second) * count, (first + third) * count,
                (first + fourth) * count, 1, weights, start, WIDTH, count,
            )  # fmt: skip
            a, b = (target + row) * stride + column, (target + second) * stride + column
            c, d = (target + third) * stride + column, (target + fourth) * stride + column
            if len(there):
                one, two, three, four = load(there, a), load(there, b), load(there, c), load(there, d)
                if len(bias):
                    added = load(bias, column)
                    one, two, three, four = one + added, two + added, three + added, four + added
            store(result, a, sums[0] + one)
            store(result, b, sums[1] + two)
            store(result, c, sums[2] + three)
            store(result, d, sums[3] + four)


@inlined
def columns_of(matrix):
    """Panels [K / 16, N, 16] of a matrix [N, K]: columns of it."""
    rows, columns = matrix.shape
    panels = np.empty((columns // WIDTH, rows, WIDTH), np.float32)
    given, out = matrix.reshape(-1), panels.reshape(-1)
    for row in range(rows):
        for column in range(0, columns, WIDTH):
            store(out, column * rows + row * WIDTH, load(given, row * columns + column))
    return panels


@inlined
def rows_of(matrix):
    """Panels [N / 16, K, 16] of a matrix [N, K]: rows of it."""
    rows, columns = matrix.shape
    panels = np.empty((rows // WIDTH, columns, WIDTH), np.float32)
    for panel in range(rows // WIDTH):
        for column in range(columns):
            for lane in range(WIDTH):
                panels[panel, column, lane] = matrix[panel * WIDTH + lane, column]
    return panels


@inlined
def add_outer(left, first, right, second, rows, out):
    """Add to [N, K] the sum of outer products of so many rows of [., N] and of [., K], from two first ones on."""
    height, width = out.shape
    given, numbers, result = left.reshape(-1), right.reshape(-1), out.reshape(-1)
    for row in range(0, height, 4):
        for column in range(0, width, WIDTH):
            place = row * width + column
            a, b = load(result, place), load(result, place + width)
            c, d = load(result, place + 2 * width), load(result, place + 3 * width)
            one, other = first * height + row, second * width + column
            for _ in range(rows):
                factor = load(numbers, other)
                a, b = fma(spread(given, one), factor, a), fma(spread(given, one + 1), factor, b)
                c, d = fma(spread(given, one + 2), factor, c), fma(spread(given, one + 3), factor, d)
                one, other = one + height, other + width
            put_four(result, place, width, a, b, c, d)


@kernel(FLOATS_2, FLOATS_2, FLOATS, FLOATS_2, FLOATS_2)
def linear(states, weight, bias, onto, out):
    """[n, N] from [n, K], [N, K] and [N] or [0]; added to [n, N] or [0, .]."""
    multiply(states, 0, len(states), rows_of(weight), bias, onto, out, 0)


@kernel(FLOATS_2, FLOATS_2, FLOATS_2)
def outer(left, right, out):
    """Add to [N, K] the sum of the outer products of [n, N] and [n, K]."""
    for first in range(0, len(left), _BLOCK):
        add_outer(left, first, right, first, min(_BLOCK, len(left) - first), out)


@inlined
def gate(both, gated, first, rows, target):
    """SwiGLU of so many rows [., I] of a gate and what it gates [., 2 x I]."""
    size = gated.shape[1]
    given, out = both.reshape(-1), gated.reshape(-1)
    for row in range(rows):
        for column in range(0, size, WIDTH):
            place = 2 * (first + row) * size + column
            numbers = load(given, place)
            store(out, (target + row) * size + column, numbers * sigmoid(numbers) * load(given, place + size))


@inlined
def through_gate(slope, numbers, gated):
    """Gradients of what comes into a gate and of what it gates, from that of what comes out; and what comes out."""
    share = sigmoid(numbers)
    opened = numbers * share
    return slope * gated * (share + opened - opened * share), slope * opened, opened * gated


@kernel(FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2)
def feed_forward(states, gate_up, down, both, onto, out):
    """A SwiGLU layer.

    Args:
        states: [n, H].
        gate_up: [2 x I, H] the weights of the gate, then of what it gates.
        down: [H, I].
        both: [n, 2 x I] what comes into the gate, for the gradient.
        onto: [n, H] what the layer's output is added to, or [0, .].
        out: [n, H].
    """
    first_panels, second_panels, none, nothing = rows_of(gate_up), rows_of(down), gate_up[0, :0], gate_up[:0]
    gated = np.empty((_BLOCK, down.shape[1]), np.float32)
    for first in range(0, len(states), _BLOCK):
        rows = min(_BLOCK, len(states) - first)
        multiply(states, first, rows, first_panels, none, nothing, both, first)
        gate(both, gated, first, rows, 0)
        multiply(gated, 0, rows, second_panels, none, onto, out, first)


@kernel(FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2, FLOATS_2)
def feed_forward_backward(gradient, states, gate_up, down, both, of_states, of_gate_up, of_down):
    """Gradients of the states [n, H], and of the weights added to what is there."""
    size, first_panels, second_panels, none = len(down[0]), columns_of(gate_up), columns_of(down), gate_up[0, :0]
    nothing = gate_up[:0]
    of_gated, of_both = np.empty((_BLOCK, size), np.float32), np.empty((_BLOCK, 2 * size), np.float32)
    passed, given, out = of_gated.reshape(-1), both.reshape(-1), of_both.reshape(-1)
    for first in range(0, len(states), _BLOCK):
        rows = min(_BLOCK, len(states) - first)
        multiply(gradient, first, rows, second_panels, none, nothing, of_gated, 0)
        for row in range(rows):
            for column in range(0, size, WIDTH):
                place, target = 2 * (first + row) * size + column, 2 * row * size + column
                slope = load(passed, row * size + column)
                slopes = through_gate(slope, load(given, place), load(given, place + size))
                store(out, target, slopes[0])
                store(out, target + size, slopes[1])
                store(passed, row * size + column, slopes[2])
        multiply(of_both, 0, rows, first_panels, none, nothing, of_states, first)
        add_outer(of_both, 0, states, first, rows, of_gate_up)
        add_outer(gradient, first, of_gated, 0, rows, of_down)  # by now what came out of the gate
