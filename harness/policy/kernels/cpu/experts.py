"""Experts with SwiGLU on one core of a CPU, compiled by Numba: four tokens of an expert at a time.

Slots are the pairs of a token and an expert that it is routed to, in the order of the experts. Sizes are multiples of
sixteen.
"""

import numpy as np

from harness.policy.kernels.cpu.lanes import (
    FLOATS_2,
    FLOATS_3,
    INTEGERS,
    INTEGERS_2,
    WIDTH,
    fma,
    inlined,
    kernel,
    load,
    repeat,
    spread,
    store,
    total,
)
from harness.policy.kernels.cpu.products import four_rows, gate, put_four, through_gate

_ZERO = np.float32(0)


@kernel(INTEGERS_2, INTEGERS, INTEGERS)
def sort(chosen, ends, order):
    """One past the last slot of each expert [E], and of each slot [N x k] its place among the choices [N, k]."""
    ends[:] = 0
    flat = chosen.reshape(-1)
    for expert in flat:
        ends[expert] += 1
    starts, before = np.empty_like(ends), 0
    for expert in range(len(ends)):
        starts[expert] = before
        before += ends[expert]
        ends[expert] = before
    for place in range(len(flat)):
        order[starts[flat[place]]] = place
        starts[flat[place]] += 1


@inlined
def _gather(rows, order, choices, begin, end, gathered):
    """Put the rows [N, H] of the tokens of an expert's slots one behind the other."""
    for slot in range(begin, end):
        token = order[slot] // choices
        for place in range(rows.shape[1]):
            gathered[slot - begin, place] = rows[token, place]


@inlined
def _most(ends):
    """Slots of the busiest expert, and room for the last ones to be four."""
    most, begin = 0, 0
    for end in ends:
        most, begin = max(most, end - begin), end
    return most + 3


@inlined
def _add_to_tokens(numbers, order, choices, slot, end, shares, out, width, column):
    """Add sixteen columns of four slots, times their shares, to those of their tokens."""
    for index in range(min(end - slot, 4)):
        place = order[slot + index] // choices * width + column
        store(out, place, fma(load(numbers, index * WIDTH), spread(shares, order[slot + index]), load(out, place)))


@kernel(FLOATS_2, FLOATS_2, INTEGERS, INTEGERS, FLOATS_3, FLOATS_3, FLOATS_2, FLOATS_2)
def combine(hidden, weights, ends, order, gate_up, down, projected, combined):
    """What experts make of tokens.

    Args:
        hidden: [N, H].
        weights: [N, k] of each choice.
        ends: as :func:`sort` gives it.
        order: likewise.
        gate_up: [E, H, 2 x I], transposed.
        down: [E, I, H], transposed.
        projected: [N x k + 3, 2 x I] what goes into each slot's gate, for the gradient.
        combined: [N, H], added to what is there.
    """
    choices, size, width = weights.shape[1], down.shape[1], hidden.shape[1]
    gathered, inner = np.zeros((_most(ends), width), np.float32), np.zeros((4, size), np.float32)
    states, first_weights, second_weights = gathered.reshape(-1), gate_up.reshape(-1), down.reshape(-1)
    both, gated, out, shares = projected.reshape(-1), inner.reshape(-1), combined.reshape(-1), weights.reshape(-1)
    numbers, begin = np.empty(4 * WIDTH, np.float32), 0
    for expert in range(len(ends)):
        end, start = ends[expert], expert * size * width
        _gather(hidden, order, choices, begin, end, gathered)
        for slot in range(begin, end, 4):
            # Rows of the next expert that are written, too, where there are fewer than four, come later.
            a = (slot - begin) * width
            for column in range(0, 2 * size, WIDTH):
                sums = four_rows(
                    states, a, a + width, a + 2 * width, a + 3 * width, 1,
                    first_weights, 2 * start + column, 2 * size, width,
                )  # fmt: skip
                put_four(both, slot * 2 * size + column, 2 * size, *sums)
            gate(projected, inner, slot, min(end - slot, 4), 0)
            for column in range(0, width, WIDTH):
                sums = four_rows(gated, 0, size, 2 * size, 3 * size, 1, second_weights, start + column, width, size)
                put_four(numbers, 0, WIDTH, *sums)
                _add_to_tokens(numbers, order, choices, slot, end, shares, out, width, column)
        begin = end


@kernel(
    FLOATS_2, FLOATS_2, FLOATS_2, INTEGERS, INTEGERS, FLOATS_3, FLOATS_3, FLOATS_2,
    FLOATS_2, FLOATS_2, FLOATS_3, FLOATS_3,
)  # fmt: skip
def combine_backward(
    gradient, hidden, weights, ends, order, gate_up, down, projected, of_hidden, of_weights, of_gate_up, of_down
):
    """Gradients: of the hidden states [N, H] added to what is there; of the weights [N, k]; of the experts, as they
    are: ``gate_up`` [E, 2 x I, H] and ``down`` [E, H, I]."""
    choices, size, width = weights.shape[1], down.shape[2], hidden.shape[1]
    most = _most(ends)
    gathered, passed = np.zeros((most, width), np.float32), np.zeros((most, width), np.float32)
    scaled, of_both = np.zeros(most * size, np.float32), np.zeros(most * 2 * size, np.float32)
    of_inner, numbers = np.empty(4 * size, np.float32), np.empty(4 * WIDTH, np.float32)
    ones = np.ones(len(order), np.float32)
    states, slopes, out, shares = gathered.reshape(-1), passed.reshape(-1), of_hidden.reshape(-1), weights.reshape(-1)
    first_weights, second_weights = gate_up.reshape(-1), down.reshape(-1)
    of_first, of_second, of_shares = of_gate_up.reshape(-1), of_down.reshape(-1), of_weights.reshape(-1)
    both, begin = projected.reshape(-1), 0
    for expert in range(len(ends)):
        end, start = ends[expert], expert * size * width
        _gather(hidden, order, choices, begin, end, gathered)
        _gather(gradient, order, choices, begin, end, passed)
        for slot in range(begin, end, 4):
            a = (slot - begin) * width
            for column in range(0, size, WIDTH):
                sums = four_rows(
                    slopes, a, a + width, a + 2 * width, a + 3 * width, 1,
                    second_weights, start + column, size, width,
                )  # fmt: skip
                put_four(of_inner, column, size, *sums)
            for row in range(slot, min(slot + 4, end)):
                share, along = spread(shares, order[row]), repeat(_ZERO)
                for column in range(0, size, WIDTH):
                    slope, place = load(of_inner, (row - slot) * size + column), row * 2 * size + column
                    given = through_gate(slope * share, load(both, place), load(both, place + size))
                    along = fma(slope, given[2], along)
                    store(scaled, (row - begin) * size + column, given[2] * share)
                    place = (row - begin) * 2 * size + column
                    store(of_both, place, given[0])
                    store(of_both, place + size, given[1])
                of_shares[order[row]] = total(along)
            a = (slot - begin) * 2 * size
            for column in range(0, width, WIDTH):
                sums = four_rows(
                    of_both, a, a + 2 * size, a + 4 * size, a + 6 * size, 1,
                    first_weights, 2 * start + column, width, 2 * size,
                )  # fmt: skip
                put_four(numbers, 0, WIDTH, *sums)
                _add_to_tokens(numbers, order, choices, slot, end, ones, out, width, column)
        count = end - begin
        for row in range(0, 2 * size, 4):
            for column in range(0, width, WIDTH):
                sums = four_rows(of_both, row, row + 1, row + 2, row + 3, 2 * size, states, column, width, count)
                put_four(of_first, 2 * start + row * width + column, width, *sums)
        for row in range(0, width, 4):
            for column in range(0, size, WIDTH):
                sums = four_rows(slopes, row, row + 1, row + 2, row + 3, width, scaled, column, size, count)
                put_four(of_second, start + row * size + column, size, *sums)
        begin = end
