"""Kernels for one core of a CPU, compiled by Numba: a layer's small operations at once, where torch calls dozens.

Arrays are float32 and contiguous. A kernel knows no gradients: its counterpart is beside it.
"""

import math

import numpy as np

from harness.policy.kernels.cpu.lanes import (
    FLOATS,
    FLOATS_2,
    FLOATS_3,
    WIDTH,
    fma,
    inlined,
    kernel,
    load,
    repeat,
    store,
    swap,
    total,
)

_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel(FLOATS_2, FLOATS, "float32", FLOATS_2, FLOATS)
def normalize(states, gain, epsilon, normalized, scale):
    """Each vector [D] of states [N, D] over its root mean square, times the gain [D]; and one over that [N]."""
    rows, dim = states.shape
    for row in range(rows):
        square = _ZERO
        for place in range(dim):
            square += states[row, place] * states[row, place]
        inverse = _ONE / math.sqrt(square / np.float32(dim) + epsilon)
        scale[row] = inverse
        for place in range(dim):
            normalized[row, place] = states[row, place] * inverse * gain[place]


@kernel(FLOATS_2, FLOATS_2, FLOATS, FLOATS, FLOATS_2, FLOATS_2, FLOATS)
def normalize_backward(gradient, states, gain, scale, onto, of_states, of_gain):
    """Gradients of the states [N, D], added to [N, D] or [0, D], and of the gain [D], added to what is there."""
    rows, dim = states.shape
    for row in range(rows):
        inverse, along = scale[row], _ZERO
        for place in range(dim):
            product = gradient[row, place] * states[row, place] * inverse
            of_gain[place] += product
            along += product * gain[place]
        along *= inverse / np.float32(dim)
        for place in range(dim):
            # Along the vector itself nothing passes, since its length is divided out.
            of_states[row, place] = (gradient[row, place] * gain[place] - states[row, place] * along) * inverse
        if len(onto):
            for place in range(dim):
                of_states[row, place] += onto[row, place]


@inlined
def _inverse_rms(numbers, start, dim, epsilon):
    square = repeat(_ZERO)
    for place in range(start, start + dim, WIDTH):
        given = load(numbers, place)
        square = fma(given, given, square)
    return repeat(_ONE / math.sqrt(total(square) / np.float32(dim) + epsilon))


@inlined
def _turned(numbers, start, place, dim):
    """Sixteen numbers of a head from ``place`` on, and those half a head away, which they are turned with."""
    given, half = load(numbers, start + place), dim // 2
    if dim == WIDTH:
        return given, swap(given)
    return given, load(numbers, start + (place + half) % dim)


@inlined
def turn_head(states, start, gain, head, epsilon, cos, sin, angle, dim, turned, target):
    """Normalise and rotate one head; arrays are seen as of one dimension, the other arguments say where to begin."""
    inverse = repeat(_ONE)
    if len(gain):
        inverse = _inverse_rms(states, start, dim, epsilon)
    for place in range(0, dim, WIDTH):
        number, other = _turned(states, start, place, dim)
        cosine, sine = load(cos, angle + place) * inverse, load(sin, angle + place) * inverse
        if len(gain):
            own, others = _turned(gain, head * dim, place, dim)
            number, other = number * own, other * others
        store(turned, target + place, fma(number, cosine, other * sine))


@inlined
def _copy(numbers, out, start, count):
    for place in range(start, start + count, WIDTH):
        store(out, place, load(numbers, place))


@inlined
def _flat(states, turned, gain, cos, sin):
    return states.reshape(-1), turned.reshape(-1), gain.reshape(-1), cos.reshape(-1), sin.reshape(-1)


@kernel(FLOATS_3, FLOATS_2, "float32", FLOATS_2, FLOATS_2, "intp", FLOATS_3)
def turn(states, gain, epsilon, cos, sin, rotated, turned):
    """Normalise and rotate the first heads of states [N, heads, D]; the others are copied.

    Args:
        states: queries, keys and values one behind the other; D is a multiple of sixteen.
        gain: [rotated, D] of the normalisation; [0, D] without one.
        epsilon: what is added to the mean square.
        cos: [N, D] cosines.
        sin: [N, D] sines, negative where the second half of a head is turned to.
        rotated: heads of queries and keys.
        turned: [N, heads, D].
    """
    rows, heads, dim = states.shape
    given, out, gains, cosines, sines = _flat(states, turned, gain, cos, sin)
    for row in range(rows):
        for head in range(heads):
            start = (row * heads + head) * dim
            if head < rotated:
                turn_head(given, start, gains, head, epsilon, cosines, sines, row * dim, dim, out, start)
            else:
                _copy(given, out, start, dim)


@kernel(FLOATS_3, FLOATS_3, FLOATS_2, "float32", FLOATS_2, FLOATS_2, "intp", FLOATS_3, FLOATS_2)
def turn_backward(gradient, states, gain, epsilon, cos, sin, rotated, of_states, of_gain):
    """Gradients of the states [N, heads, D], and of the gain [rotated, D] added to what is there."""
    rows, heads, dim = states.shape
    passed, of_gains = gradient.reshape(-1), of_gain.reshape(-1)
    given, out, gains, cosines, sines = _flat(states, of_states, gain, cos, sin)
    product = np.empty(dim, np.float32)
    for row in range(rows):
        for head in range(heads):
            start, angle = (row * heads + head) * dim, row * dim
            if head >= rotated:
                _copy(passed, out, start, dim)
                continue
            inverse, along = repeat(_ONE), repeat(_ZERO)
            if len(gains):
                inverse = _inverse_rms(given, start, dim, epsilon)
            for place in range(0, dim, WIDTH):
                number, other = _turned(passed, start, place, dim)
                _, sine = _turned(sines, angle, place, dim)
                number = fma(number, load(cosines, angle + place), other * sine)
                if len(gains):
                    target = head * dim + place
                    direction, factor = load(given, start + place) * inverse, load(gains, target)
                    store(of_gains, target, fma(number, direction, load(of_gains, target)))
                    number = number * factor
                    along = fma(number, direction, along)
                store(product, place, number)
            mean = repeat(total(along) / np.float32(dim)) * inverse
            for place in range(0, dim, WIDTH):
                number = load(product, place)
                if len(gains):
                    # Along the vector itself nothing passes, since its length is divided out.
                    number = (number - mean * load(given, start + place)) * inverse
                store(out, start + place, number)


@inlined
def add_to(states, update, gain, epsilon, normalized):
    """Add [n, D] in place, and normalise the sum [n, D]."""
    rows, dim = states.shape
    for row in range(rows):
        square = _ZERO
        for place in range(dim):
            number = states[row, place] + update[row, place]
            states[row, place] = number
            square += number * number
        inverse = _ONE / math.sqrt(square / np.float32(dim) + epsilon)
        for place in range(dim):
            normalized[row, place] = states[row, place] * inverse * gain[place]
