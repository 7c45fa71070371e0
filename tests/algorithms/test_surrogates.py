"""Surrogates against values worked out by hand: loss, gradient, and which elements count as clipped."""

import math

import pytest
import torch

from harness.algorithms.objective import Elements, Surrogate
from harness.algorithms.registry import part
from harness.config import compose

compose()  # registers the parts
OLD = -1.0  # old log-probability wherever it does not matter


def elements_of(ratios, advantages, old=OLD, lengths=None, selected=None):
    """Elements with these token ratios [B, T], one advantage a row, and old log-probabilities (one or [B, T])."""
    ratios = torch.tensor(ratios, dtype=torch.float64)
    old_logprobs = torch.as_tensor(old, dtype=torch.float64).expand_as(ratios)
    rows, width = ratios.shape
    mask = (torch.arange(width) < torch.tensor(lengths or [width] * rows).unsqueeze(1)).double()
    logprobs = (old_logprobs + ratios.log()).mul(mask).requires_grad_()
    ratio = (logprobs - old_logprobs * mask).exp()
    chosen = torch.zeros_like(mask, dtype=torch.bool) if selected is None else torch.tensor(selected)
    advantages = torch.tensor(advantages, dtype=torch.float64).unsqueeze(1) * mask
    return Elements(ratio, logprobs, old_logprobs * mask, advantages, mask, chosen)


def evaluate(name, elements, **settings) -> tuple[Surrogate, list[list[float]]]:
    """The surrogate of a part, and the gradient of its sum with respect to the log-probabilities."""
    function, _ = part("surrogate", {"name": name})
    result = function(elements, **settings)
    (gradient,) = torch.autograd.grad(result.loss.sum(), elements.logprobs)
    return result, gradient.tolist()


def rows(*expected):
    """Rows of numbers to compare a nested list with."""
    return [pytest.approx(row) for row in expected]


def test_none_is_the_plain_policy_gradient():
    result, gradient = evaluate("none", elements_of([[1.0, 3.0]], [2.0]))
    assert result.loss.tolist() == rows([2.0, -2 * (OLD + math.log(3))])
    assert gradient == rows([-2.0, -2.0])


def test_clip_keeps_the_worse_of_plain_and_clipped():
    elements = elements_of([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]], [2.0, -2.0])
    result, gradient = evaluate("clip", elements, clip_low=0.2, clip_high=0.3)
    assert result.loss.tolist() == rows([-1.0, -2.0, -2.6], [1.6, 2.0, 3.0])
    assert gradient == rows([-1.0, -2.0, 0.0], [0.0, 2.0, 3.0])
    assert result.clipped_high.tolist() == [[False, False, True], [False] * 3]
    assert result.clipped_low.tolist() == [[False] * 3, [True, False, False]]
    assert result.outside.tolist() == [[True, False, True]] * 2


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    elements = elements_of([[1.5, 4.0], [1.5, 4.0]], [-2.0, 2.0])
    result, gradient = evaluate("dual_clip", elements, clip_low=0.2, clip_high=0.2, bound=3.0)
    assert result.loss.tolist() == rows([3.0, 6.0], [-2.4, -2.4])
    assert gradient == rows([3.0, 0.0], [0.0, 0.0])
    assert result.clipped_high.tolist() == [[False, True], [True, True]]
    assert not result.clipped_low.any()


def test_masked_clip_leaves_out_bad_sequences_that_have_become_unlikely():
    # Mean log-ratios: (log 0.9 + log 0.3) / 2 = -0.65, and -0.40 of the second.
    ratios = [[0.9, 0.3], [0.9, 0.5], [0.9, 0.3]]
    elements = elements_of(ratios, [-1.0, -1.0, 1.0])
    result, gradient = evaluate("masked_clip", elements, clip_low=0.2, clip_high=0.2, divergence=0.5)
    assert result.loss.tolist() == rows([0.0, 0.0], [0.9, 0.8], [-0.9, -0.3])
    assert gradient == rows([0.0, 0.0], [0.9, 0.0], [-0.9, -0.3])
    assert result.clipped_low.tolist() == [[True, True], [False, True], [False, False]]
    assert result.outside.tolist() == [[False, True]] * 3


def test_masked_clip_takes_the_mean_over_valid_tokens():
    elements = elements_of([[0.5, 1.0, 1.0]], [-1.0], lengths=[1])
    result, _ = evaluate("masked_clip", elements, clip_low=0.9, clip_high=0.2, divergence=0.5)
    assert result.loss[0, 0] == 0.0  # -log 0.5 = 0.69, though 0.23 over the whole width


def test_ratio_mask_leaves_out_what_is_outside_whatever_the_advantage():
    elements = elements_of([[0.4, 1.0, 6.0], [0.4, 1.0, 6.0], [0.4, 1.0, 6.0]], [2.0, -2.0, 0.0])
    result, gradient = evaluate("ratio_mask", elements, lower=0.5, upper=5.0)
    assert result.loss.tolist() == rows([0.0, -2.0, 0.0], [0.0, 2.0, 0.0], [0.0] * 3)
    assert gradient == rows([0.0, -2.0, 0.0], [0.0, 2.0, 0.0], [0.0] * 3)
    assert result.clipped_low.tolist() == [[True, False, False]] * 2 + [[False] * 3]
    assert result.clipped_high.tolist() == [[False, False, True]] * 2 + [[False] * 3]
    assert result.outside.tolist() == [[True, False, True]] * 3


def test_total_variation_bounds_the_probability_and_not_the_ratio():
    # A rare token may treble (0.01 to 0.03), a common one may not rise by 0.2 (0.5 to 0.7, a ratio of 1.4).
    old = [math.log(0.01), math.log(0.5)]
    settings = {"divergence": "tv", "low": 0.15, "high": 0.15, "cap": 20.0}
    result, gradient = evaluate("divergence_mask", elements_of([[3.0, 1.4]], [1.0], old), **settings)
    assert result.loss.tolist() == rows([-3 * math.log(0.03), 0.0])
    assert gradient == rows([-3.0, 0.0])
    assert result.clipped_high.tolist() == result.outside.tolist() == [[False, True]]
    result, gradient = evaluate("divergence_mask", elements_of([[3.0, 1.4]], [-1.0], old), **settings)
    assert gradient == rows([3.0, 1.4])
    assert not (result.clipped_high | result.clipped_low).any()


def test_a_probability_that_has_fallen_is_held_where_the_advantage_is_negative():
    settings = {"divergence": "tv", "low": 0.15, "high": 0.3, "cap": 20.0}
    elements = elements_of([[0.6, 0.8], [0.6, 0.8]], [-1.0, 1.0], math.log(0.5))  # falls by 0.2 and by 0.1
    result, gradient = evaluate("divergence_mask", elements, **settings)
    assert gradient == rows([0.0, 0.8], [-0.6, -0.8])
    assert result.clipped_low.tolist() == [[True, False], [False, False]]
    assert result.outside.tolist() == [[True, False]] * 2


def test_the_binary_kl_divergence_by_hand():
    # KL((0.5, 0.5), (0.7, 0.3)) = 0.5 log(25 / 21) = 0.0872; to (0.6, 0.4): 0.5 log(25 / 24) = 0.0204.
    elements = elements_of([[1.4, 1.2]], [1.0], math.log(0.5))
    for bound, clipped in ((0.0871, [True, False]), (0.0873, [False, False]), (0.0203, [True, True])):
        result, _ = evaluate("divergence_mask", elements, divergence="kl", low=9.0, high=bound, cap=20.0)
        assert result.clipped_high.tolist() == [clipped]


def test_the_ratio_of_the_divergence_mask_is_capped_and_keeps_its_gradient():
    elements = elements_of([[30.0]], [1.0], math.log(0.001))
    result, gradient = evaluate("divergence_mask", elements, divergence="tv", low=0.15, high=0.15, cap=20.0)
    assert result.loss.tolist() == rows([-20 * math.log(0.03)])
    assert gradient == rows([-20.0])


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    result, gradient = evaluate("cispo", elements_of([[0.5, 1.0, 9.0]], [-2.0]), lower=0.8, upper=5.0)
    assert result.loss.tolist() == rows([1.6 * (OLD + math.log(0.5)), 2 * OLD, 10 * (OLD + math.log(9))])
    assert gradient == rows([1.6, 2.0, 10.0])
    assert not (result.clipped_low | result.clipped_high).any()
    assert result.outside.tolist() == [[True, False, True]]


def test_sapo_gates_by_the_sign_of_the_advantage():
    # f(2) = 4 sigmoid(1) with tau 1, and 2 sigmoid(2) with tau 2; f'(2) = 4 s (1 - s).
    result, gradient = evaluate("sapo", elements_of([[2.0], [2.0]], [1.0, -1.0]), tau_positive=1.0, tau_negative=2.0)
    one, two = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert result.loss.tolist() == rows([-4 * one], [2 * two])
    assert gradient == rows([-2 * 4 * one * (1 - one)], [2 * 4 * two * (1 - two)])  # d rho / d l = rho = 2
    assert not (result.clipped_low | result.clipped_high | result.outside).any()


def test_geometric_mean_clips_log_ratios_before_the_mean():
    elements = elements_of([[math.exp(0.2), math.exp(0.9)], [math.exp(-0.9), math.exp(0.9)]], [1.0, -1.0])
    result, gradient = evaluate("geometric_mean", elements, clip_low=0.4, clip_high=0.5)
    first, second = math.exp((0.2 + 0.5) / 2), math.exp((-0.4 + 0.9) / 2)
    assert result.loss.tolist() == rows([-first] * 2, [second] * 2)
    # Each of the two elements is the same mean, of which a token that is not clipped moves a half.
    assert gradient == rows([-first, 0.0], [0.0, second])
    assert result.clipped_high.tolist() == [[False, True], [False, False]]
    assert result.clipped_low.tolist() == [[False, False], [True, False]]
    assert result.outside.tolist() == [[False, True], [True, True]]


def test_vespo_weights_by_the_product_of_the_ratios():
    # W = 2 x 0.75 = 1.5 and 0.5 x 0.5 = 0.25, the third token being masked.
    elements = elements_of([[2.0, 0.75, 9.0], [0.5, 0.5, 9.0]], [1.0, -1.0], lengths=[2, 2])
    settings = {"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0}
    result, gradient = evaluate("vespo", elements, **settings)
    first, second = 1.5**2 * math.exp(3 * -0.5), 0.25**3 * math.exp(2 * 0.75)
    assert gradient == rows([-first, -first, 0.0], [second, second, 0.0])
    assert result.loss[0].tolist() == pytest.approx([-first * (OLD + math.log(r)) for r in (2, 0.75)] + [0.0])
    assert not (result.clipped_low | result.clipped_high | result.outside).any()


def test_taper_weights_bad_sequences_alone_and_by_one_at_most():
    elements = elements_of([[0.5, 0.5], [3.0, 1.0], [0.5, 0.5]], [-2.0, -2.0, 2.0])
    _, gradient = evaluate("taper", elements, cap=1.0)
    assert gradient == rows([0.5, 0.5], [2.0, 2.0], [-2.0, -2.0])


def test_squared_log_ratio_pulls_back_to_the_old_policy():
    result, gradient = evaluate("squared_log_ratio", elements_of([[math.exp(0.5)]], [2.0]), coefficient=3.0)
    assert result.loss.tolist() == rows([-2 * (OLD + 0.5) + 1.5 * 0.25])
    assert gradient == rows([-2 + 3 * 0.5])


def test_clip_selected_leaves_out_selected_tokens_and_counts_them():
    elements = elements_of([[1.0, 1.0], [1.0, 3.0], [1.0, 1.0]], [1.0, -1.0, 0.0], selected=[[True, False]] * 3)
    result, gradient = evaluate("clip_selected", elements, clip_low=1.0, clip_high=1.0)
    assert result.loss.tolist() == rows([0.0, -1.0], [0.0, 3.0], [0.0, 0.0])
    assert gradient == rows([0.0, -1.0], [0.0, 3.0], [0.0, 0.0])
    assert result.clipped_high.tolist() == [[True, False], [False, False], [False, False]]
    assert result.clipped_low.tolist() == [[False, False], [True, False], [False, False]]
    assert result.outside.tolist() == [[False, False], [False, True], [False, False]]


def test_kl_selected_penalises_selected_tokens_alone():
    elements = elements_of([[2.0, 0.5, 0.5]], [1.0], selected=[[True, True, False]])
    result, gradient = evaluate("kl_selected", elements, coefficient=3.0)
    log = math.log(2)
    assert result.loss.tolist() == rows([-2 + 3 * log, -0.5 + 3 * log, -0.5])
    assert gradient == rows([-2.0 + 3, -0.5 - 3, -0.5])
    assert not (result.clipped_low | result.clipped_high | result.outside).any()
