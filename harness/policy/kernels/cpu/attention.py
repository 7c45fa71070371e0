"""Attention on one core of a CPU, compiled by Numba: four queries at a time, sixteen keys at a time."""

import numpy as np

from harness.policy.kernels.cpu.lanes import (
    FLOATS_2,
    FLOATS_3,
    INTEGERS,
    INTEGERS_2,
    WIDTH,
    exp,
    fma,
    inlined,
    kernel,
    larger,
    largest,
    load,
    repeat,
    spread,
    store,
    total,
)
from harness.policy.kernels.cpu.products import add_outer_products, four_rows, put_four

_ZERO, _ONE = np.float32(0), np.float32(1)
# Scores of keys that are not seen, so that their weights are 0.
_HIDDEN = np.float32(-1e30)


@inlined
def unseen():
    """What is added to scores: zeros, and then as many for keys that are not seen."""
    hidden = np.zeros(2 * WIDTH, np.float32)
    hidden[WIDTH:] = _HIDDEN
    return hidden


@inlined
def hide(hidden, scores, visible):
    """Hide all but so many of the first of sixteen scores; they may be fewer than none, or more than all."""
    return scores + load(hidden, WIDTH - min(max(visible, 0), WIDTH))


@kernel(FLOATS_3, INTEGERS_2, INTEGERS, INTEGERS, "intp", "intp", "float32", FLOATS_3, FLOATS_2, FLOATS_2)
def attend(states, rows, begins, ends, heads, groups, scaling, attended, peaks, shares):
    """Causal attention of tokens that stand one behind the other, in rows that may begin with tokens of other rows.

    Args:
        states: [N, heads + 2 x groups, D] queries, keys and values; D is a multiple of sixteen.
        rows: [R, L] the token at each place of a row.
        begins: [R] the first place of each row whose token is its own: those from there on follow each other in N.
        ends: [R] one past its last place.
        heads: of queries.
        groups: heads of keys and values.
        scaling: of scores.
        attended: [N, heads, D].
        peaks: [N, heads] the largest score of each query, for the gradient.
        shares: [N, heads] one over the sum that its weights were divided by, likewise.
    """
    every, dim = states.shape[1:]
    length = (rows.shape[1] + WIDTH - 1) // WIDTH * WIDTH
    flat, out, hidden = states.reshape(-1), attended.reshape(-1), unseen()
    stride, shared = every * dim, heads // groups
    keys, values = np.zeros(dim * length, np.float32), np.zeros(length * dim, np.float32)  # keys transposed
    scores = np.empty(4 * length, np.float32)
    for row in range(len(rows)):
        begin, end = begins[row], ends[row]
        for group in range(groups):
            for place in range(end):
                start = rows[row, place] * stride + (heads + group) * dim
                for index in range(dim):
                    keys[index * length + place] = flat[start + index]
                for index in range(0, dim, WIDTH):
                    store(values, place * dim + index, load(flat, start + groups * dim + index))
            for head in range(group * shared, (group + 1) * shared):
                for first in range(begin, end, 4):
                    last = min(first + 3, end - 1)
                    columns = (last // WIDTH + 1) * WIDTH
                    token = rows[row, first]
                    a = token * stride + head * dim
                    b = a + stride * int(first + 1 <= last)
                    c = b + stride * int(first + 2 <= last)
                    d = c + stride * int(first + 3 <= last)
                    m = n = o = p = repeat(_HIDDEN)
                    for column in range(0, columns, WIDTH):
                        e, f, g, h = four_rows(flat, a, b, c, d, 1, keys, column, length, dim)
                        seen, scale = first + 1 - column, repeat(scaling)
                        e, f = hide(hidden, e * scale, seen), hide(hidden, f * scale, seen + 1)
                        g, h = hide(hidden, g * scale, seen + 2), hide(hidden, h * scale, seen + 3)
                        m, n, o, p = larger(e, m), larger(f, n), larger(g, o), larger(h, p)
                        put_four(scores, column, length, e, f, g, h)
                    most = (largest(m), largest(n), largest(o), largest(p))
                    i, j, k, r = repeat(most[0]), repeat(most[1]), repeat(most[2]), repeat(most[3])
                    m = n = o = p = repeat(_ZERO)
                    for column in range(0, columns, WIDTH):
                        e, f = exp(load(scores, column) - i), exp(load(scores, column + length) - j)
                        g, h = exp(load(scores, column + 2 * length) - k), exp(load(scores, column + 3 * length) - r)
                        m, n, o, p = m + e, n + f, o + g, p + h
                        put_four(scores, column, length, e, f, g, h)
                    parts = (_ONE / total(m), _ONE / total(n), _ONE / total(o), _ONE / total(p))
                    for index in range(last - first + 1):
                        peaks[token + index, head] = most[index]
                        shares[token + index, head] = parts[index]
                    place = (token * heads + head) * dim
                    for column in range(0, dim, WIDTH):
                        e, f, g, h = four_rows(
                            scores, 0, length, 2 * length, 3 * length, 1, values, column, dim, last + 1
                        )
                        store(out, place + column, e * repeat(parts[0]))
                        if first + 1 <= last:
                            store(out, place + heads * dim + column, f * repeat(parts[1]))
                        if first + 2 <= last:
                            store(out, place + 2 * heads * dim + column, g * repeat(parts[2]))
                        if first + 3 <= last:
                            store(out, place + 3 * heads * dim + column, h * repeat(parts[3]))


@kernel(FLOATS_3, FLOATS_3, INTEGERS_2, INTEGERS, INTEGERS, "intp", "intp", "float32", FLOATS_2, FLOATS_2, FLOATS_3)
def attend_backward(gradient, states, rows, begins, ends, heads, groups, scaling, peaks, shares, of_states):
    """Gradients of the states [N, heads + 2 x groups, D]: of queries, and of keys and values added to what is there."""
    every, dim = states.shape[1:]
    length = (rows.shape[1] + WIDTH - 1) // WIDTH * WIDTH
    flat, given, out, hidden = states.reshape(-1), gradient.reshape(-1), of_states.reshape(-1), unseen()
    stride, shared = every * dim, heads // groups
    keys, values = np.zeros(dim * length, np.float32), np.zeros(dim * length, np.float32)  # both transposed
    plain = np.zeros(length * dim, np.float32)
    of_keys, of_values = np.zeros(length * dim, np.float32), np.zeros(length * dim, np.float32)
    most, parts = peaks.reshape(-1), shares.reshape(-1)
    weights, of_scores = np.empty(4 * length, np.float32), np.empty(4 * length, np.float32)
    for row in range(len(rows)):
        begin, end = begins[row], ends[row]
        for group in range(groups):
            for place in range(end):
                start = rows[row, place] * stride + (heads + group) * dim
                for index in range(dim):
                    keys[index * length + place] = flat[start + index]
                    values[index * length + place] = flat[start + groups * dim + index]
                for index in range(0, dim, WIDTH):
                    target = place * dim + index
                    store(plain, target, load(flat, start + index))
                    store(of_keys, target, repeat(_ZERO))
                    store(of_values, target, repeat(_ZERO))
            for head in range(group * shared, (group + 1) * shared):
                for first in range(begin, end, 4):
                    last = min(first + 3, end - 1)
                    columns = (last // WIDTH + 1) * WIDTH
                    token = rows[row, first]
                    a, e = token * stride + head * dim, (token * heads + head) * dim
                    # Where there are fewer than four queries, the others see nothing, so that they change nothing.
                    second, third, fourth = int(first + 1 <= last), int(first + 2 <= last), int(first + 3 <= last)
                    seen = (first + 1, (first + 2) * second, (first + 3) * third, (first + 4) * fourth)
                    b, f = a + second * stride, e + second * heads * dim
                    c, g = b + third * stride, f + third * heads * dim
                    d, h = c + fourth * stride, g + fourth * heads * dim
                    lines = (token, token + second, token + second + third, token + second + third + fourth)
                    sums = (repeat(_ZERO), repeat(_ZERO), repeat(_ZERO), repeat(_ZERO))
                    for column in range(0, columns, WIDTH):
                        scale = repeat(scaling)
                        i, j, k, m = four_rows(flat, a, b, c, d, 1, keys, column, length, dim)
                        i = exp(hide(hidden, i * scale, seen[0] - column) - spread(most, lines[0] * heads + head))
                        i = i * spread(parts, lines[0] * heads + head)
                        j = exp(hide(hidden, j * scale, seen[1] - column) - spread(most, lines[1] * heads + head))
                        j = j * spread(parts, lines[1] * heads + head)
                        k = exp(hide(hidden, k * scale, seen[2] - column) - spread(most, lines[2] * heads + head))
                        k = k * spread(parts, lines[2] * heads + head)
                        m = exp(hide(hidden, m * scale, seen[3] - column) - spread(most, lines[3] * heads + head))
                        m = m * spread(parts, lines[3] * heads + head)
                        put_four(weights, column, length, i, j, k, m)
                        n, o, p, q = four_rows(given, e, f, g, h, 1, values, column, length, dim)
                        put_four(of_scores, column, length, n, o, p, q)
                        sums = (fma(i, n, sums[0]), fma(j, o, sums[1]), fma(k, p, sums[2]), fma(m, q, sums[3]))
                    mean = (total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3]))
                    for index in range(4):
                        start, shift = index * length, repeat(mean[index])
                        for place in range(start, start + columns, WIDTH):
                            numbers = load(weights, place) * (load(of_scores, place) - shift)
                            store(of_scores, place, numbers * repeat(scaling))
                    for column in range(0, dim, WIDTH):
                        i, j, k, m = four_rows(
                            of_scores, 0, length, 2 * length, 3 * length, 1, plain, column, dim, last + 1
                        )
                        store(out, a + column, i)
                        if second:
                            store(out, b + column, j)
                        if third:
                            store(out, c + column, k)
                        if fourth:
                            store(out, d + column, m)
                    starts = (0, length, 2 * length, 3 * length)
                    add_outer_products(of_scores, *starts, flat, a, b, c, d, dim, of_keys, dim, last + 1)
                    add_outer_products(weights, *starts, given, e, f, g, h, dim, of_values, dim, last + 1)
            for place in range(end):
                start = rows[row, place] * stride + (heads + group) * dim
                for index in range(0, dim, WIDTH):
                    source, target = place * dim + index, start + index
                    store(out, target, load(out, target) + load(of_keys, source))
                    target += groups * dim
                    store(out, target, load(out, target) + load(of_values, source))
