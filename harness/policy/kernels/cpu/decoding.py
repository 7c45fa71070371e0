"""Decoding on one core of a CPU, compiled by Numba: half of a layer at once, for one token a sequence.

Weights are in panels, as :func:`panels` makes them. The sizes of states and heads are multiples of sixteen.
"""

import numpy as np
from torch import Tensor
from torch.nn import functional

from harness.policy.kernels.cpu.attention import hide, unseen
from harness.policy.kernels.cpu.elements import add_to, turn_head
from harness.policy.kernels.cpu.lanes import (
    FLOATS,
    FLOATS_2,
    FLOATS_3,
    FLOATS_4,
    INTEGERS,
    WIDTH,
    exp,
    inlined,
    kernel,
    larger,
    largest,
    load,
    repeat,
    store,
    total,
)
from harness.policy.kernels.cpu.products import gate, multiply, one_row

_ZERO, _ONE = np.float32(0), np.float32(1)


def panels(weight: Tensor) -> np.ndarray:
    """[rows / 16, K, 16] of a matrix [rows, K]; rows of zeros fill up the last panel."""
    rows, count = weight.shape
    padded = functional.pad(weight.detach(), (0, 0, 0, -rows % WIDTH))
    return padded.view(-1, WIDTH, count).transpose(1, 2).contiguous().numpy()


@inlined
def _softmax(scores, start, columns):
    """Weights in the place of scores, but for their sum, which is returned."""
    most = load(scores, start)
    for place in range(start + WIDTH, start + columns, WIDTH):
        most = larger(most, load(scores, place))
    peak = repeat(largest(most))
    summed = repeat(_ZERO)
    for place in range(start, start + columns, WIDTH):
        weights = exp(load(scores, place) - peak)
        store(scores, place, weights)
        summed = summed + weights
    return total(summed)


@inlined
def _attend(states, gain, epsilon, cos, sin, keys, values, begins, column, heads, scaling, attended):
    """What a token of each sequence attends to, whose key and value are put where the others are."""
    (groups, dim, columns), every = keys.shape[1:], states.shape[1]
    shared, hidden = heads // groups, unseen()
    query, scores = np.empty(dim, np.float32), np.empty(columns, np.float32)
    given, out, gains, cosines, sines = (
        states.reshape(-1), attended.reshape(-1), gain.reshape(-1), cos.reshape(-1), sin.reshape(-1)
    )  # fmt: skip
    held, other, last = keys.reshape(-1), values.reshape(-1), (column // WIDTH + 1) * WIDTH
    for row in range(len(begins)):
        first, angle, base = begins[row] // WIDTH * WIDTH, row * dim, row * every
        before = begins[row] - first
        for group in range(groups):
            head = heads + group
            turn_head(given, base + head * dim, gains, head, epsilon, cosines, sines, angle, dim, query, 0)
            start = (row * groups + group) * dim * columns
            for place in range(dim):
                held[start + place * columns + column] = query[place]
                other[start + column * dim + place] = given[base + (head + groups) * dim + place]
            for head in range(group * shared, (group + 1) * shared):
                turn_head(given, base + head * dim, gains, head, epsilon, cosines, sines, angle, dim, query, 0)
                for place in range(first, last, WIDTH):
                    sums = one_row(query, 0, 1, held, start + place, columns, dim) * repeat(scaling)
                    store(scores, place, hide(hidden, sums, column + 1 - place))
                if before:
                    unhidden = load(hidden, WIDTH) - load(hidden, WIDTH - before)
                    store(scores, first, load(scores, first) + unhidden)
                summed = _softmax(scores, first, last - first)
                for place in range(0, dim, WIDTH):
                    sums = one_row(scores, first, 1, other, start + first * dim + place, dim, column + 1 - first)
                    store(out, (row * heads + head) * dim + place, sums * repeat(_ONE / summed))


@kernel(
    FLOATS_2, FLOATS_2, FLOATS_3, FLOATS, FLOATS_2, "float32", FLOATS_2, FLOATS_2, FLOATS_4, FLOATS_4, INTEGERS,
    "intp", "intp", "float32", FLOATS_3, FLOATS, FLOATS, "float32",
)  # fmt: skip
def attend(
    states, normalized, projection, bias, gain, epsilon, cos, sin, keys, values, begins, column, heads, scaling,
    output, output_bias, next_gain, next_epsilon,
):  # fmt: skip
    """Add to states [n, H] what their heads attend to.

    Args:
        states: of one token a sequence.
        normalized: [n, H] the same normalised; afterwards that of their sum, for what follows.
        projection: panels of queries, keys and values.
        bias: of these, or [0].
        gain: [heads + key heads, D] of the normalisation of queries and keys; [0, D] without one.
        epsilon: what is added to the mean square.
        cos: [n, D] cosines.
        sin: [n, D] sines, negative where the second half of a head is turned to.
        keys: [n or more, key heads, D, columns], transposed; columns are a multiple of sixteen, all of them finite.
        values: [n or more, key heads, columns, D].
        begins: [n] the first column of each sequence.
        column: that the tokens' keys and values are put in.
        heads: of queries.
        scaling: of scores.
        output: panels.
        output_bias: likewise.
        next_gain: [H] of the normalisation that follows.
        next_epsilon: likewise.
    """
    rows, dim = len(states), keys.shape[2]
    projected = np.empty((rows, len(projection) * WIDTH), np.float32)
    attended, update = np.empty((rows, heads * dim), np.float32), np.empty((rows, states.shape[1]), np.float32)
    multiply(normalized, 0, rows, projection, bias, normalized[:0], projected, 0)
    _attend(projected, gain, epsilon, cos, sin, keys, values, begins, column, heads, scaling, attended)
    multiply(attended, 0, rows, output, output_bias, normalized[:0], update, 0)
    add_to(states, update, next_gain, next_epsilon, normalized)


@kernel(FLOATS_2, FLOATS_2, FLOATS_3, FLOATS_3, FLOATS, "float32")
def feed(states, normalized, gate_up, down, next_gain, next_epsilon):
    """Add to states [n, H] what a SwiGLU layer makes of them; arguments as above."""
    rows, size = len(states), len(gate_up) * WIDTH // 2
    both, gated = np.empty((rows, 2 * size), np.float32), np.empty((rows, size), np.float32)
    update, none = np.empty((rows, states.shape[1]), np.float32), next_gain[:0]
    multiply(normalized, 0, rows, gate_up, none, normalized[:0], both, 0)
    gate(both, gated, 0, rows, 0)
    multiply(gated, 0, rows, down, none, normalized[:0], update, 0)
    add_to(states, update, next_gain, next_epsilon, normalized)


@kernel(FLOATS_2, FLOATS_2, FLOATS_2, FLOATS, "float32")
def add(states, normalized, update, next_gain, next_epsilon):
    """Add to states [n, H] what other layers give."""
    add_to(states, update, next_gain, next_epsilon, normalized)


@kernel(INTEGERS, INTEGERS, "intp", INTEGERS, INTEGERS, INTEGERS, INTEGERS)
def regroup(row, tokens, vocabulary, source, latest, place, count):
    """The m rows in which n sequences go on: one for all that were in the same row and have drawn the same token.

    Args:
        row: [n] of each sequence the row that it was in.
        tokens: [n] what it has drawn.
        vocabulary: how many tokens there are.
        source: [n], of which the first m become the row that each continues, in whose place as many are as can be.
        latest: [n], of which the first m become the token that it goes on with.
        place: [n] becomes the row of each sequence.
        count: [1] becomes m.
    """
    drawn = row * vocabulary + tokens
    order = np.argsort(drawn)
    groups = 0
    for index in range(len(order)):
        sequence = order[index]
        if index and drawn[sequence] != drawn[order[index - 1]]:
            groups += 1
        place[sequence] = groups
    groups += 1
    taken, target = np.zeros(groups, np.bool_), np.full(groups, -1)
    for sequence in order:
        group = place[sequence]
        if row[sequence] < groups and not taken[row[sequence]] and target[group] < 0:
            target[group] = row[sequence]
            taken[row[sequence]] = True
    free = 0
    for group in range(groups):
        if target[group] < 0:
            while taken[free]:
                free += 1
            target[group], taken[free] = free, True
    for sequence in order:
        place[sequence] = target[place[sequence]]
        source[place[sequence]], latest[place[sequence]] = row[sequence], tokens[sequence]
    count[0] = groups


@kernel(FLOATS_4, FLOATS_4, INTEGERS, INTEGERS, "intp")
def copy_rows(keys, values, sources, targets, length):
    """Give the places ``targets`` to what the rows ``sources`` hold in their first columns, all at once."""
    count, groups = len(sources), keys.shape[1]
    held = np.empty((count, groups, keys.shape[2], length), np.float32)
    others = np.empty((count, groups, length, values.shape[3]), np.float32)
    for index in range(count):
        held[index] = keys[sources[index], :, :, :length]
        others[index] = values[sources[index], :, :length]
    for index in range(count):
        keys[targets[index], :, :, :length] = held[index]
        values[targets[index], :, :length] = others[index]


@kernel(FLOATS_2, FLOATS_3, FLOATS, FLOATS_2)
def project(left, right, bias, out):
    """[n, N] from [n, K], the panels of a matrix [N, K], and [N] or [0]."""
    multiply(left, 0, len(left), right, bias, left[:0], out, 0)
