"""Products by oneDNN and by our own kernels are the products, gradients too, and are made where they are faster."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.policy import products
from harness.policy.kernels import WIDEST, takes_products
from harness.policy.products import MULTIPLE, Linear, choose_products, favours_onednn, product
from tests.policy.conftest import fresh
from tests.policy.test_packing import assert_same, passes

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN multiplies, however small they are."""
    multiplied, multiply = [], products.onednn_product

    def counted(left, right, bias=None):
        multiplied.append((tuple(left.shape), tuple(right.shape)))
        return multiply(left, right, bias)

    monkeypatch.setattr(products, "onednn_product", counted)
    monkeypatch.setattr(products, "takes_products", lambda *given: False)
    monkeypatch.setattr(products, "favours_onednn", lambda: True)
    monkeypatch.setattr(products, "_RECURRING", 0)
    return multiplied


def layers(inner, outer, bias):
    torch.manual_seed(0)
    plain = nn.Linear(inner, outer, bias=bias)
    ours = Linear(nn.Linear(inner, outer, bias=bias))
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("rows", [(), (1,), (MULTIPLE,), (1, 2 * MULTIPLE), (2, 3, 7)])
def test_values_and_gradients_are_those_of_torch(calls, rows, inner, outer, bias):
    plain, ours = layers(inner, outer, bias)
    results = []
    for layer in (plain, ours):
        states = torch.linspace(-1, 2, torch.Size(rows).numel() * inner).view(*rows, inner).requires_grad_()
        values = layer(states)
        (values * torch.linspace(-2, 1, values.numel()).view(values.shape)).sum().backward()
        results.append([values.detach(), states.grad, *(parameter.grad for parameter in layer.parameters())])
        with torch.no_grad():
            torch.testing.assert_close(layer(states), values.detach())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4  # both ways, two gradients, and once without them


def test_gradients_that_nobody_asks_for_are_not_computed(calls):
    _, layer = layers(16, 24, bias=False)
    layer.weight.requires_grad_(False)
    states = torch.ones(8, 16, requires_grad=True)
    layer(states).sum().backward()
    assert calls == [((8, 16), (24, 16)), ((8, 24), (16, 24))] and layer.weight.grad is None


def test_states_that_are_not_contiguous(calls):
    plain, ours = layers(16, 24, bias=True)
    states = torch.randn(16, MULTIPLE).t()
    torch.testing.assert_close(ours(states), plain(states))
    expanded = torch.randn(16).expand(MULTIPLE, 16)
    torch.testing.assert_close(ours(expanded), plain(expanded))
    assert len(calls) == 2


def test_factors_and_biases_that_are_parts_of_others():
    left, right, bias = torch.randn(8, 48)[:, 16:32], torch.randn(24, 48)[:, 16:32], torch.randn(48)[::2]
    expected = functional.linear(left, right, bias)
    torch.testing.assert_close(products.onednn_product(left, right, bias), expected)
    single = torch.randn(1).expand(24)
    torch.testing.assert_close(products.onednn_product(left, right, single), functional.linear(left, right, single))


def test_a_gradient_that_is_expanded_and_states_that_are_part_of_others(calls):
    plain, ours = layers(16, 24, bias=True)
    results = []
    for layer in (plain, ours):
        wide = torch.linspace(-1, 2, MULTIPLE * 48).view(1, MULTIPLE, 48).requires_grad_()
        layer(wide[..., 16:32]).sum().backward()
        results.append([wide.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


def test_under_autocast_they_are_torchs(calls):
    plain, ours = layers(16, 24, bias=True)
    states = torch.randn(MULTIPLE, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(states), plain(states)) and ours(states).dtype == torch.bfloat16
    assert not calls


def test_the_smaller_factor_of_a_weights_gradient_is_the_one_that_is_copied(calls):
    for inner, outer in ((16, 24), (24, 16)):
        calls.clear()
        layers(inner, outer, bias=False)[1](torch.ones(MULTIPLE, inner)).sum().backward()
        assert calls[-1] == ((16, MULTIPLE), (24, MULTIPLE))


@pytest.mark.parametrize(
    ("rows", "pays"),
    [(128, False), (512, True), (511, True), (513, False), (576, True), (577, False), (2**14 + 1, True)],
)
def test_what_is_small_or_does_not_come_again_is_left_to_mkl(rows, pays):
    # 64 x 64 multiplications a row: 2^21 of them are 512 rows, 2^26 are 16,384.
    assert products._pays(torch.empty(rows, 64), 64 if rows != 511 else 128) == pays


def test_other_precisions_and_devices_are_torchs(calls):
    plain, ours = layers(16, 24, bias=True)
    states = torch.randn(MULTIPLE, 16, dtype=torch.float64)
    assert torch.equal(ours.double()(states), plain.double()(states))
    assert ours.to("meta")(states.to("meta")).shape == (MULTIPLE, 24)
    assert not calls


@pytest.mark.parametrize("favoured", [True, False])
def test_a_product_is_by_the_library_that_the_processor_favours(calls, monkeypatch, favoured):
    monkeypatch.setattr(products, "favours_onednn", lambda: favoured)
    left, right, bias = torch.randn(MULTIPLE, 16), torch.randn(24, 16), torch.randn(24)
    torch.testing.assert_close(product(left, right, bias), functional.linear(left, right, bias))
    assert bool(calls) == favoured


@pytest.mark.parametrize(
    ("processor", "capability", "favoured"),
    [
        ("AMD EPYC 9B45", "AVX512", True),
        ("AMD EPYC 7763", "AVX2", False),  # MKL has its kernels of 256 bits for it
        ("Intel(R) Xeon(R) Platinum 8481C", "AVX512", False),
        ("aarch64", "DEFAULT", False),
    ],
)
def test_which_processors_favour_onednn(monkeypatch, processor, capability, favoured):
    monkeypatch.setattr(products, "device_name", lambda device: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert favours_onednn.__wrapped__() == favoured


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_a_model_gives_the_same_with_them(calls, name, batch):
    model = fresh(name)
    expected = passes(model, batch)
    assert not calls
    choose_products(model)
    assert_same(passes(model, batch), expected)
    assert calls
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 3, 70)])
def test_kernels_of_our_own_give_values_and_gradients_of_torch(one_core, monkeypatch, rows, bias):
    monkeypatch.setattr(functional, "linear", None)
    monkeypatch.setattr(products, "onednn_product", None)
    plain, ours = layers(48, 32, bias)
    states = torch.linspace(-1, 2, torch.Size(rows).numel() * 48).view(*rows, 48)
    given, exact = states.clone().requires_grad_(), states.double().requires_grad_()
    values, expected = ours(given), exact @ plain.weight.double().t() + (plain.bias.double() if bias else 0)
    weight = torch.linspace(-2, 1, values.numel()).view(values.shape)
    (values * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    for parameter, right in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, right.grad, rtol=1e-4, atol=1e-3)


def test_which_products_kernels_of_our_own_take(one_core):
    states = torch.zeros(2, 16)
    assert takes_products(states, 16, WIDEST) and not takes_products(states, 16, 2 * WIDEST)
    assert not takes_products(states, 24, 16) and not takes_products(states.double(), 16, 16)


def test_shapes_that_do_not_fit_are_refused_and_no_rows_are_none(one_core):
    with pytest.raises(RuntimeError):
        product(torch.zeros(2, 32), torch.zeros(16, 64))
    with pytest.raises(RuntimeError):
        product(torch.zeros(2, 64), torch.zeros(16, 64), torch.zeros(3))
    assert product(torch.zeros(2, 0, 64), torch.zeros(16, 64)).shape == (2, 0, 16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [32, 24])  # by kernels of our own, and by a library
def test_a_product_that_is_added_to_something(one_core, columns, bias):
    torch.manual_seed(0)
    left, right, onto = torch.randn(2, 7, 48), torch.randn(columns, 48), torch.randn(2, 7, columns)
    added = torch.randn(columns) if bias else None
    before = onto.clone()
    torch.testing.assert_close(product(left, right, added, onto), functional.linear(left, right, added) + onto)
    assert torch.equal(onto, before)
