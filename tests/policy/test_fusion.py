"""Functions that a GPU computes in a kernel or two: what they give, and how often they are compiled."""

import pytest
import torch

from harness.policy import fusion, logprobs
from harness.policy.fusion import autocast_dtype, compiles, fused
from harness.policy.logprobs import _add_block, _add_block_fused, _differentiate_block, _differentiate_block_fused
from harness.policy.normalization import _normalize, _normalize_backward
from harness.policy.projections import _gate, _gate_backward, _turn, _turn_backward
from harness.rollout.decoding import _sample_by_blocks, sample


@pytest.fixture
def compiled(monkeypatch):
    """As where there is a GPU, with a compiler that notes what it is given and changes nothing."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(fusion, "compiles", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function: plain(function, backend=note))
    yield graphs
    fusion._compiled.cache_clear()
    torch._dynamo.reset()


def product(rows, others, factor):
    return rows * others + factor


def test_one_kernel_serves_any_number_of_rows_with_and_without_gradients(compiled):
    function, others = fused(rows=1)(product), torch.randn(4, requires_grad=True)
    for count in (7, 64, 3, 1000):
        for rows in (torch.randn(count, 4), torch.randn(2, count, 4)[1], torch.randn(count, 4, requires_grad=True)):
            torch.testing.assert_close(function(rows, others, 2.0), product(rows.detach(), others.detach(), 2.0))
    assert len(compiled) == 1
    function(torch.randn(7, 5), torch.randn(5), 2.0)
    assert len(compiled) == 2


def test_blocks_of_any_width_are_one_kernel(compiled):
    function = fused(rows=2, columns=1)(lambda logits, sums: logits.sum(1) + sums)
    for count, width in ((7, 9), (64, 300), (3, 4099)):
        torch.testing.assert_close(
            function(torch.ones(count, width), torch.ones(count)), torch.full((count,), width + 1.0)
        )
    assert len(compiled) == 1


def test_kernels_are_tuned_for_many_rows_whatever_comes_first(monkeypatch):
    given = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(fusion, "compiles", lambda: True)
    monkeypatch.setattr(fusion, "_compiled", lambda function: function)  # so that it says what it is called with
    function = fused(rows=1, tuned_for=67)(lambda rows, others: given.append((rows.shape, others.shape)))
    for count in (2, 5):
        function(torch.ones(count, 4), torch.ones(4))
    function(torch.ones(2, 3), torch.ones(3))
    assert given == [((67, 4), (4,)), ((2, 4), (4,)), ((5, 4), (4,)), ((67, 3), (3,)), ((2, 3), (3,))]


def test_on_a_cpu_functions_are_what_they_were(monkeypatch):
    monkeypatch.setattr(fusion, "_compiled", lambda function: pytest.fail("compiled"))
    rows, others = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    assert fused(rows=1)(product)(rows, others, 2.0).requires_grad
    assert autocast_dtype(rows) is None


def fail(*_):
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


def test_where_torch_cannot_compile_functions_are_what_they_were(monkeypatch):
    compiles.cache_clear()
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    try:
        with pytest.warns(UserWarning, match="cannot compile for this GPU.*: Failed to find C compiler.$"):
            found = fused(rows=1)(product)(ones(2, 2), ones(2), 3.0)
        torch.testing.assert_close(found, torch.full((2, 2), 4.0))
        assert not compiles()
        monkeypatch.setattr(torch, "compile", lambda function: function)
        compiles.cache_clear()
        assert compiles()
    finally:
        compiles.cache_clear()


def test_kernels_are_tuned_again_where_torch_compiles_again(compiled):
    """Which it does for each state of its switches."""
    sizes = []

    def noted(rows):
        sizes.append(len(rows))
        return rows + 1

    function = fused(rows=1)(torch._dynamo.disable(noted))
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            function(torch.ones(3, 2))
        finally:
            torch.use_deterministic_algorithms(False)
    assert sizes == [4099, 3, 4099, 3, 3]


def assert_gradients(function, backward, inputs, arguments=()):
    """``backward`` gives those that autograd does."""
    inputs = [given.double().requires_grad_() for given in inputs]
    results = function(*inputs, *arguments)
    results = results if isinstance(results, tuple) else (results,)
    gradients = [torch.randn_like(result) for result in results]
    expected = torch.autograd.grad(results, inputs, gradients)
    found = backward(gradients, *(given.detach() for given in inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalizes", [False, True])
def test_turned_heads(normalizes):
    states, cos, sin = torch.randn(5, 8, 6), torch.randn(5, 1, 6), torch.randn(5, 1, 6)
    gain, epsilon = torch.rand(6, 6), torch.tensor(0.1)
    query, key, value = _turn(states, cos, sin, *((gain, epsilon) if normalizes else (None, None)), 4, 2)
    rotated = states[:, :6]
    if normalizes:
        rotated = torch.nn.functional.rms_norm(rotated, (6,), eps=0.1) * gain
    rotated = rotated * cos + torch.cat([rotated[..., 3:], rotated[..., :3]], -1) * sin
    torch.testing.assert_close(torch.cat([query, key, value], 1), torch.cat([rotated, states[:, 6:]], 1))
    if normalizes:
        assert_gradients(
            lambda states, gain: _turn(states, cos, sin, gain, epsilon, 4, 2),
            lambda gradients, states, gain: _turn_backward(*gradients, states, cos, sin, gain, epsilon),
            (states, gain),
        )
    else:
        assert_gradients(
            lambda states: _turn(states, cos, sin, None, None, 4, 2),
            lambda gradients, states: _turn_backward(*gradients, states, cos, sin, None, None)[:1],
            (states,),
        )


def test_gates():
    assert_gradients(_gate, lambda gradients, both: (_gate_backward(*gradients, both),), (torch.randn(5, 12),))


def test_normalization_rounds_what_it_gives_and_not_what_it_takes():
    states, weight, epsilon = torch.randn(5, 12), torch.rand(12), torch.tensor(0.1)
    exact = torch.nn.functional.rms_norm(states, (12,), weight, 0.1)
    assert torch.equal(_normalize(states, weight, epsilon, torch.bfloat16), exact.bfloat16())
    assert_gradients(
        lambda states, weight: torch.nn.functional.rms_norm(states, (12,), weight, 0.1),
        lambda gradients, states, weight: _normalize_backward(*gradients, states, weight, epsilon),
        (states, weight),
    )


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_blocks_of_logits(entropy_gradient):
    tokens, width = 9, 30
    logits, index = 4 * torch.randn(tokens, width), torch.randint(width, (tokens, 1))
    inside = torch.arange(tokens) % 3 > 0
    sums = [torch.randn(tokens), torch.rand(tokens), torch.randn(tokens), torch.randn(tokens)]
    added = (_add_block(logits.clone(), index, inside, *sums, 0.7), _add_block_fused(logits, index, inside, *sums, 0.7))
    for one, other in zip(*added, strict=True):
        torch.testing.assert_close(one, other)
    by_logprob, by_entropy = torch.randn(tokens, 1), torch.randn(tokens, 1)
    given = (index, inside, logits.logsumexp(1), by_logprob, torch.rand(tokens), by_entropy, 0.7, entropy_gradient)
    torch.testing.assert_close(_differentiate_block_fused(logits, *given), _differentiate_block(logits.clone(), *given))
    assert set(logprobs._ADD) == set(logprobs._DIFFERENTIATE) == set(logprobs.BLOCK_ELEMENTS)


@pytest.mark.parametrize("vocabulary", [5, 512, 1300])
def test_tokens_drawn_by_blocks(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    noise = torch.rand(500, generator=generator, dtype=torch.double)
    noise[0], noise[1] = 0, 1 - 1e-16
    tokens, chosen = _sample_by_blocks(logits, noise, 0.8)
    expected, logprobs = sample(logits, noise, 0.8)
    assert torch.equal(tokens, expected)
    assert (tokens % 3 > 0).all()
    torch.testing.assert_close(chosen, logprobs)
