"""What is made of logits on one core of a CPU, compiled by Numba: log-probabilities, their gradients, and draws.

Vocabularies are filled up to a multiple of sixteen by a bias that leaves a filling token no probability.
"""

import math

import numpy as np

from harness.policy.kernels import NO_LOGIT
from harness.policy.kernels.cpu.lanes import (
    DOUBLES,
    FLOATS,
    FLOATS_2,
    INTEGERS,
    WIDTH,
    exp,
    fma,
    inlined,
    kernel,
    larger,
    largest,
    load,
    repeat,
    store,
    total,
)
from harness.policy.kernels.cpu.products import add_outer, columns_of, multiply, rows_of

_ZERO = np.float32(0)
_NONE = np.float32(NO_LOGIT)
# Rows that are worked on at once, so that their gradients stay in the cache.
_BLOCK = 64


@inlined
def _log_softmax(logits, start, count, scale):
    """``count`` logits times a scale, less the logarithm of their exponentials' sum, in their place; returns the
    entropy."""
    factor = repeat(scale)
    peaks = load(logits, start) * factor
    for place in range(start, start + count, WIDTH):
        numbers = load(logits, place) * factor
        store(logits, place, numbers)
        peaks = larger(peaks, numbers)
    peak = largest(peaks)
    summed = moment = repeat(_ZERO)
    for place in range(start, start + count, WIDTH):
        below = load(logits, place) - repeat(peak)
        weights = exp(below)
        summed, moment = summed + weights, fma(weights, below, moment)
    whole = total(summed)
    logarithm = np.float32(math.log(whole))
    shift = repeat(peak + logarithm)
    for place in range(start, start + count, WIDTH):
        store(logits, place, load(logits, place) - shift)
    return logarithm - total(moment) / whole


@kernel(FLOATS_2, FLOATS_2, FLOATS, INTEGERS, "float32", FLOATS_2, FLOATS, FLOATS)
def score(states, weight, bias, tokens, scale, every, chosen, entropies):
    """Log-probabilities of tokens under a linear head.

    Args:
        states: [M, H].
        weight: [V, H]; V is a multiple of sixteen.
        bias: [V], so low where there is no token that it has no probability.
        tokens: [M].
        scale: what logits are multiplied by.
        every: [M, V] log-probabilities of all tokens, for the gradient.
        chosen: [M] of ``tokens``.
        entropies: [M].
    """
    rows, count = every.shape
    multiply(states, 0, rows, rows_of(weight), bias, weight[:0], every, 0)
    flat = every.reshape(-1)
    for row in range(rows):
        entropies[row] = _log_softmax(flat, row * count, count, scale)
        chosen[row] = every[row, tokens[row]]


@kernel(
    FLOATS, FLOATS, FLOATS_2, FLOATS, INTEGERS, FLOATS_2, FLOATS_2, "float32", FLOATS_2, FLOATS_2, FLOATS
)  # fmt: skip
def score_backward(
    by_chosen, by_entropy, every, entropies, tokens, states, weight, scale, of_states, of_weight, of_bias
):  # fmt: skip
    """Gradients of the states [M, H], and of the weight and the bias added to what is there.

    d log p_t / d x_j = [j = t] - p_j and d entropy / d x_j = -p_j (log p_j + entropy).
    """
    rows, count = every.shape
    panels, none = columns_of(weight), entropies[:0]
    gradient, flat = np.empty((_BLOCK, count), np.float32), every.reshape(-1)
    out = gradient.reshape(-1)
    for first in range(0, rows, _BLOCK):
        here = min(_BLOCK, rows - first)
        for index in range(here):
            row = first + index
            factor, entropy = repeat(by_entropy[row]), repeat(entropies[row])
            rest = repeat(by_chosen[row])
            for place in range(0, count, WIDTH):
                logprobs = load(flat, row * count + place)
                slope = fma(factor, logprobs + entropy, rest)
                store(out, index * count + place, repeat(-scale) * slope * exp(logprobs))
            gradient[index, tokens[row]] += scale * by_chosen[row]
            for place in range(0, count, WIDTH):
                store(of_bias, place, load(of_bias, place) + load(out, index * count + place))
        multiply(gradient, 0, here, panels, none, weight[:0], of_states, first)
        add_outer(gradient, 0, states, first, here, of_weight)


@kernel(FLOATS_2, "intp", INTEGERS, DOUBLES, "float32", INTEGERS, FLOATS)
def draw(logits, vocabulary, rows, noise, scale, tokens, chosen):
    """Draw tokens by the inverse of the distribution function, and say how likely they were.

    Args:
        logits: [R, V] of each row; V is a multiple of sixteen. Changed.
        vocabulary: tokens that there are; the others have no probability.
        rows: [n] whose logits each sequence draws by.
        noise: [n] from 0 to 1.
        scale: what logits are multiplied by.
        tokens: [n].
        chosen: [n] their log-probabilities.
    """
    count = logits.shape[1]
    flat, sums = logits.reshape(-1), np.empty((len(logits), vocabulary), np.float64)
    for row in range(len(logits)):
        for place in range(vocabulary, count):
            logits[row, place] = _NONE
        _log_softmax(flat, row * count, count, scale)
        summed = 0.0
        for token in range(vocabulary):
            summed += math.exp(np.float64(logits[row, token]))
            sums[row, token] = summed
    for index in range(len(rows)):
        row = rows[index]
        threshold, token = noise[index] * sums[row, vocabulary - 1], 0
        while token < vocabulary - 1 and sums[row, token] <= threshold:
            token += 1
        tokens[index], chosen[index] = token, logits[row, token]
