"""Kernels for one core of a CPU give what torch gives in float64, gradients too, and let pass what is not finite."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from torch.nn import functional

from harness.policy.kernels import arrays, on_one_core, without_kernels
from harness.policy.kernels.cpu import attention, decoding, elements, experts, lanes, products
from harness.policy.kernels.cpu.lanes import FLOATS, OPTIONS, exp, kernel, largest, load, sigmoid, store, version


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_close(ours, exact, tolerance=2e-6):
    """Up to rounding of the largest number."""
    exact = torch.as_tensor(exact).detach().double()
    found = torch.as_tensor(ours).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance * max(1.0, float(exact.abs().max())))


@kernel(FLOATS, FLOATS)
def exps(numbers, out):
    for place in range(0, len(numbers), 16):
        store(out, place, exp(load(numbers, place)))


@kernel(FLOATS, FLOATS)
def sigmoids(numbers, out):
    for place in range(0, len(numbers), 16):
        store(out, place, sigmoid(load(numbers, place)))


def of_each(function, numbers):
    given = np.resize(np.asarray(numbers, np.float32), -(-len(numbers) // 16) * 16)
    out = np.empty_like(given)
    function(given, out)
    return given[: len(numbers)], out[: len(numbers)]


def test_exp_is_exact_to_two_units_in_the_last_place():
    given, found = of_each(exps, np.linspace(-87, 88, 20_001))
    exact = np.exp(given.astype(np.float64))
    assert (np.abs(found - exact) / exact).max() < 2 * 2**-23
    assert of_each(exps, [0.0])[1][0] == 1


def test_exp_of_what_is_not_finite_or_very_small():
    _, found = of_each(exps, [-math.inf, -1e30, -87.5, math.nan])
    assert found[:3].tolist() == [0, 0, 0] and math.isnan(found[3])


def test_sigmoid_of_large_numbers_and_of_none():
    given, found = of_each(sigmoids, [-1e30, -100.0, -3.0, 0.0, 3.0, 100.0, 1e30])
    assert_close(found, torch.tensor(given).double().sigmoid())
    assert math.isnan(of_each(sigmoids, [math.nan])[1][0])


def test_the_largest_of_sixteen():
    @njit(**OPTIONS)
    def of(numbers):
        return largest(load(numbers, 0))

    for place in range(16):
        numbers = -np.arange(1, 17, dtype=np.float32)
        numbers[place] = 0.5
        assert of(numbers) == 0.5


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_products_with_panels(rows, bias):
    left, weight, added = torch.randn(rows, 5), torch.randn(30, 5), torch.randn(32 if bias else 0)
    out = torch.full((rows, 32), torch.nan)
    decoding.project(left.numpy(), decoding.panels(weight), *arrays(added, out))
    exact = left.double() @ weight.double().t() + (added[:30].double() if bias else 0)
    assert_close(out[:, :30], exact)
    assert_close(out[:, 30:], added[30:].expand(rows, 2) if bias else torch.zeros(rows, 2))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dim", [16, 24, 64])
def test_normalization(dim, added):
    states, gain, gradient = torch.randn(7, dim), torch.rand(dim), torch.randn(7, dim)
    normalized, scale, of_states, of_gain = torch.empty(7, dim), torch.empty(7), torch.empty(7, dim), torch.ones(dim)
    elements.normalize(*arrays(states, gain), 0.1, *arrays(normalized, scale))
    onto = torch.randn(7 if added else 0, dim)
    elements.normalize_backward(*arrays(gradient, states, gain, scale, onto, of_states, of_gain))
    exact = [states.double().requires_grad_(), gain.double().requires_grad_()]
    result = functional.rms_norm(exact[0], (dim,), exact[1], 0.1)
    result.backward(gradient.double())
    assert_close(normalized, result)
    assert_close(of_states, exact[0].grad + (onto if added else 0))
    assert_close(of_gain - 1, exact[1].grad)  # added to what is there


def turned_by_torch(states, gain, epsilon, cos, sin, rotated):
    heads, dim = states[:, :rotated], states.shape[-1]
    if gain is not None:
        heads = functional.rms_norm(heads, (dim,), eps=epsilon) * gain
    heads = heads * cos.unsqueeze(1) + heads.roll(dim // 2, -1) * sin.unsqueeze(1)
    return torch.cat([heads, states[:, rotated:]], 1)


@pytest.mark.parametrize("dim", [16, 32, 96])
@pytest.mark.parametrize("normalizes", [False, True])
def test_turned_heads(dim, normalizes):
    states, cos, sin, gradient = (
        torch.randn(5, 8, dim),
        torch.randn(5, dim),
        torch.randn(5, dim),
        torch.randn(5, 8, dim),
    )
    gain = torch.rand(6 if normalizes else 0, dim)
    turned, of_states, of_gain = torch.empty_like(states), torch.empty_like(states), torch.ones_like(gain)
    given = (*arrays(gain), 0.1, *arrays(cos, sin), 6)
    elements.turn(*arrays(states), *given, *arrays(turned))
    elements.turn_backward(*arrays(gradient, states), *given, *arrays(of_states, of_gain))
    exact = [states.double().requires_grad_(), gain.double().requires_grad_()]
    result = turned_by_torch(exact[0], exact[1] if normalizes else None, 0.1, cos.double(), sin.double(), 6)
    result.backward(gradient.double())
    assert_close(turned, result)
    assert_close(of_states, exact[0].grad)
    if normalizes:
        assert_close(of_gain - 1, exact[1].grad)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 130])  # of one block, and of three
def test_feed_forward(rows, added):
    states, gate_up, down = torch.randn(rows, 16) * 3, torch.randn(96, 16), torch.randn(16, 48)
    gradient = torch.randn(rows, 16)
    both, out = torch.empty(rows, 96), torch.full((rows, 16), torch.nan)
    onto = torch.randn(rows if added else 0, 16)
    products.feed_forward(*arrays(states, gate_up, down, both, onto, out))
    found = [torch.full_like(states, torch.nan), torch.ones_like(gate_up), torch.ones_like(down)]
    products.feed_forward_backward(*arrays(gradient, states, gate_up, down, both, *found))
    exact = [each.double().requires_grad_() for each in (states, gate_up, down)]
    gate, up = (exact[0] @ exact[1].t()).chunk(2, -1)
    result = (functional.silu(gate) * up) @ exact[2].t()
    result.backward(gradient.double())
    assert_close(out, result + (onto if added else 0))
    assert_close(found[0], exact[0].grad)
    for ours, leaf in zip(found[1:], exact[1:], strict=True):
        assert_close(ours - 1, leaf.grad, 1e-5)  # added to what is there


def rows_of(lengths, shared):
    """Rows of so many tokens, of which so many are those of the row before: the tokens, and where own ones begin."""
    rows, count = torch.full((len(lengths), max(lengths)), 0), 0
    for row, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        rows[row, :common] = rows[row - 1, :common]
        rows[row, common:length] = torch.arange(count, count + length - common)
        count += length - common
    return rows, torch.tensor(shared), torch.tensor(lengths), count


@pytest.mark.parametrize(("lengths", "shared"), [([1], [0]), ([5, 40, 33], [0, 2, 17]), ([16, 17, 18], [0, 15, 16])])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 16), (3, 3, 32), (6, 1, 16)])
def test_attention(lengths, shared, heads, groups, dim):
    rows, begins, ends, count = rows_of(lengths, shared)
    every = count + 3  # and some that fill up
    states, gradient = torch.randn(every, heads + 2 * groups, dim), torch.randn(every, heads, dim)
    attended, sums, of_states = torch.zeros(every, heads, dim), torch.empty(2, every, heads), torch.zeros_like(states)
    places = arrays(rows, begins, ends)
    attention.attend(*arrays(states), *places, heads, groups, 0.3, *arrays(attended, *sums))
    attention.attend_backward(*arrays(gradient, states), *places, heads, groups, 0.3, *arrays(*sums, of_states))
    exact, result = states.double().requires_grad_(), torch.zeros(every, heads, dim, dtype=torch.float64)
    for row, begin, end in zip(rows, begins, ends, strict=True):
        tokens = row[:end]
        query, key, value = (part.transpose(0, 1) for part in exact[tokens].split([heads, groups, groups], 1))
        key, value = (part.repeat_interleave(heads // groups, 0) for part in (key, value))
        given = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3).transpose(0, 1)
        result = result.index_put((tokens[begin:],), given[begin:])
    result.backward(gradient.double())
    assert_close(attended, result)
    assert_close(of_states, exact.grad)


def test_attention_hides_nothing_that_is_not_a_number():
    rows, begins, ends, count = rows_of([20], [0])
    states = torch.randn(count, 4, 16)
    states[7, 2] = torch.nan  # a key
    attended, sums = torch.zeros(count, 2, 16), torch.empty(2, count, 2)
    attention.attend(*arrays(states, rows, begins, ends), 2, 1, 0.3, *arrays(attended, *sums))
    assert attended[7:].isnan().all()


@pytest.mark.parametrize("tokens", [1, 6, 50])
def test_experts(tokens):
    count, k, width, size = 5, 2, 32, 16
    hidden, gate_up, down = (
        torch.randn(tokens, width),
        torch.randn(count, 2 * size, width),
        torch.randn(count, width, size),
    )
    chosen = torch.rand(tokens, count - 1).topk(k).indices  # of the last one nobody asks for
    weights, gradient = torch.rand(tokens, k), torch.randn(tokens, width)
    ends, order = torch.empty(count, dtype=torch.long), torch.empty(tokens * k, dtype=torch.long)
    experts.sort(*arrays(chosen, ends, order))
    assert order.tolist() == chosen.flatten().argsort(stable=True).tolist()
    assert ends.tolist() == chosen.flatten().bincount(minlength=count).cumsum(0).tolist()
    projected = torch.full((tokens * k + 3, 2 * size), torch.nan)
    combined = torch.zeros(tokens, width)
    experts.combine(*arrays(hidden, weights, ends, order, gate_up.mT, down.mT, projected, combined))
    found = [torch.zeros_like(hidden), *(torch.full_like(each, torch.nan) for each in (weights, gate_up, down))]
    experts.combine_backward(*arrays(gradient, hidden, weights, ends, order, gate_up, down, projected, *found))
    exact = [each.double().requires_grad_() for each in (hidden, weights, gate_up, down)]
    gate, up = torch.einsum("nh,nkih->nki", exact[0], exact[2][chosen]).chunk(2, -1)
    result = torch.einsum("nki,nkhi,nk->nh", functional.silu(gate) * up, exact[3][chosen], exact[1])
    result.backward(gradient.double())
    assert_close(combined, result)
    for ours, leaf in zip(found, exact, strict=True):
        assert_close(ours, leaf.grad)


def test_where_kernels_apply():
    states = torch.zeros(2)
    assert torch.get_num_threads() != 1 or on_one_core(states)
    assert not on_one_core(states.double()) and not on_one_core(states.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not on_one_core(states)
    with without_kernels():
        assert not on_one_core(states)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not on_one_core(states)
    finally:
        torch.set_num_threads(threads)


def test_kernels_are_compiled_again_where_any_of_their_files_has_changed(tmp_path):
    for name in ("one.py", "other.py"):
        (tmp_path / name).write_text("0")
    before = version(tmp_path)
    (tmp_path / "other.py").write_text("1")
    assert version(tmp_path) != before
    assert version(Path(lanes.__file__).parent) in attention.attend.py_func.__qualname__


def test_kernels_are_compiled_where_nothing_can_be_kept(monkeypatch):
    def refuse(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function")
        return njit(*arguments, **options)

    monkeypatch.setattr(lanes, "njit", refuse)

    @kernel(FLOATS, FLOATS)
    def copy(numbers, out):
        for place in range(len(numbers)):
            out[place] = numbers[place]

    assert of_each(copy, [1.0, 2.0])[1].tolist() == [1, 2]
