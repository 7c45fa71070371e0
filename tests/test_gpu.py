"""The same code on a CUDA device. These tests need one."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch

from harness.algorithms.metrics import Metrics
from harness.config import compose
from harness.policy.fusion import compiles
from harness.policy.loading import prepare_layers
from harness.policy.logprobs import _add_block_fused, _differentiate_block_fused, completion_logprobs
from harness.policy.normalization import _normalize, _normalize_backward
from harness.policy.projections import _gate, _gate_backward, _turn, _turn_backward
from harness.policy.tokenizer import build_tokenizer
from harness.rollout.decoding import _sample_by_blocks
from harness.rollout.embedded import EmbeddedEngine
from harness.rollout.single_token import SingleTokenDecoder
from harness.runs.directory import METRICS
from harness.torch_setup import set_up_torch
from harness.trainer import Trainer
from harness.update import PolicyUpdater, Targets
from tests.policy.conftest import fresh
from tests.tiny_run import lines, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EOS, PAD, MOST = 1, 0, 48


@pytest.fixture(autouse=True)
def _as_a_run_has_it():
    set_up_torch(1)


@pytest.mark.parametrize(
    "cell",
    [
        "algorithm=gspo model=tiny_dense",
        "algorithm=ppo model=tiny_moe",
        "algorithm=grpo_routing_replay model=tiny_moe",
        "algorithm=grpo_rollout_routing_replay model=tiny_moe",
        "algorithm=gspo model=tiny_moe rollout.cuda_graphs=false",
        "algorithm=gspo model=tiny_dense model.activation_checkpointing=true evaluation.fractions=[1.0]",
    ],
)
def test_a_run_on_the_gpu_is_done_and_its_sampler_and_trainer_agree(cold_starts, tmp_path, cell):
    directory = run(tmp_path, "device=cuda", *cell.split())
    rows = lines(directory, METRICS)
    assert len(rows) == 2
    assert all(row["mismatch/logprob_abs_mean"] < 0.05 for row in rows)  # bfloat16 keeps two to three digits


@pytest.mark.parametrize("algorithm", ["gspo", "ppo", "kl_cov"])
def test_nothing_is_compiled_in_charged_time(cold_starts, tmp_path, monkeypatch, algorithm):
    known = []

    def noting(method, first):
        def noted(trainer):
            if first:
                method(trainer)
            known.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            if not first:
                method(trainer)

        return noted

    monkeypatch.setattr(Trainer, "warm_up", noting(Trainer.warm_up, first=True))
    monkeypatch.setattr(Trainer, "finish", noting(Trainer.finish, first=False))
    # So that micro-batches have more logits than are held, and the warm-up has not.
    monkeypatch.setattr("harness.policy.logprobs.HELD_ELEMENTS", 60 * len(build_tokenizer()))
    run(tmp_path, "device=cuda", f"algorithm={algorithm}", "model=tiny_dense")
    before, after = known
    assert before == after > 0


def on_gpu(name):
    model = fresh(name)
    with torch.no_grad():  # so that sequences end at different steps
        model.lm_head.weight[EOS] += 0.05
    prepare_layers(model, "cuda")
    return model


def sample(model, seed, graphs=True, record_routes=False):
    config = compose().rollout
    config.cuda_graphs = graphs
    engine = EmbeddedEngine(model, config, (EOS,), PAD, MOST, record_routes)
    prompts = [[5 + row % 9, 6, 7][: 1 + row % 3] for row in range(32)]
    return [engine.generate(prompts, 8, torch.Generator().manual_seed(seed)) for _ in range(2)], engine


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_graphs_sample_what_the_trainer_finds_likely(name, monkeypatch):
    monkeypatch.setattr("harness.rollout.graphs._LOOK", 4)  # so that graphs of fewer rows take over
    model = on_gpu(name)
    (first, again), engine = sample(model, 0, record_routes=name == "tiny_moe")
    assert isinstance(engine.policy, SingleTokenDecoder) and len(engine.graphs._steps) > 1
    assert torch.equal(first.completions, again.completions)  # recorded while it ran first
    for batch in (first, *sample(model, 0, graphs=False)[0]):
        with torch.no_grad():
            logprobs = completion_logprobs(model, batch, 1.0)[0].cpu()
        assert ((batch.rollout_logprobs - logprobs).abs() * batch.mask).sum() / batch.mask.sum() < 0.05


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_an_update_waits_for_the_device_once(name):
    """When it asks whether all of its steps were finite."""
    model = on_gpu(name)
    (batch, _), _ = sample(model, 0)
    advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    targets = Targets(batch.rollout_logprobs, advantages)
    updater = PolicyUpdater(copy.deepcopy(model), compose(["algorithm=gspo", f"model={name}"]), nullcontext)
    updater.update(batch, targets, torch.Generator().manual_seed(0), Metrics())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            updater.update(batch, targets, torch.Generator().manual_seed(0), Metrics())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


N, D = 70, 48
STATES = (N, 8, D)
TOKENS = torch.zeros(N, 1, dtype=torch.long)
HALF = torch.bfloat16
COMPILED = {
    "normalize": (_normalize, lambda: (random(N, D), random(D), random(()).abs(), HALF)),
    "turn": (_turn, lambda: (random(*STATES, dtype=HALF), random(N, 1, D), random(N, 1, D), None, None, 4, 2)),
    "turn and normalize": (
        _turn,
        lambda: (random(*STATES, dtype=HALF), random(N, 1, D), random(N, 1, D), random(6, D), random(()).abs(), 4, 2),
    ),
    "turn back": (
        _turn_backward,
        lambda: (
            *(random(N, heads, D, dtype=HALF) for heads in (4, 2, 2, 8)),
            *(random(N, 1, D), random(N, 1, D), random(6, D), random(()).abs()),
        ),
    ),
    "gate": (_gate, lambda: (random(N, 2 * D, dtype=HALF),)),
    "gate back": (_gate_backward, lambda: (random(N, D, dtype=HALF), random(N, 2 * D, dtype=HALF))),
    "add block": (
        _add_block_fused,
        lambda: (random(N, D, dtype=HALF), TOKENS.cuda(), random(N) > 0, *(random(N).abs() for _ in range(4)), 0.7),
    ),
    "differentiate block": (
        _differentiate_block_fused,
        lambda: (
            *(random(N, D, dtype=HALF), TOKENS.cuda(), random(N) > 0, random(N) + 9),
            *(random(N, 1), random(N).abs(), random(N, 1), 0.7, True),
        ),
    ),
    "sample": (_sample_by_blocks, lambda: (random(N, 1300), random(N).sigmoid().double(), 0.7)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_give_what_they_give_uncompiled(name):
    """Where a compiled kernel does not round in between, numbers differ by a rounding to bfloat16 or less."""
    function, draw = COMPILED[name]
    assert compiles()
    given = draw()
    found, right = function(*given), function.__wrapped__(*given)
    for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (found, right)), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("group", "dim", "width"), [(2, 128, 128), (1, 16, 24), (5, 80, 64)])
def test_attention_of_one_token(group, dim, width):
    from harness.policy.kernels.gpu import attend_once

    query, seen = random(7, 3, group, dim, dtype=HALF), torch.rand(7, 200, device="cuda") > 0.3
    keys, values = random(9, 3, 256, dim, dtype=HALF), random(9, 3, 256, width, dtype=HALF)
    seen[0, :130], seen[:, 150] = False, True
    found = attend_once(query, keys, values, seen, torch.tensor([150], device="cuda"), 0.2)
    seen[:, 151:] = False
    states = (query.float(), keys[:7, :, :200].float(), values[:7, :, :200].float())
    right = torch.nn.functional.scaled_dot_product_attention(*states, seen[:, None, None], scale=0.2)
    torch.testing.assert_close(found.float(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("normalizes", [False, True])
def test_states_that_are_placed(normalizes):
    from harness.policy.kernels.gpu import place_states

    states, cos, sin = random(7, 8, D, dtype=HALF), random(7, D), random(7, D)
    gain, epsilon = (random(6, D), torch.tensor(0.1, device="cuda")) if normalizes else (None, None)
    keys, values = (torch.zeros(9, 2, 10, D, device="cuda", dtype=HALF) for _ in range(2))
    query = place_states(states, gain, epsilon, cos, sin, keys, values, torch.tensor([4], device="cuda"), 4)
    right = _turn.__wrapped__(states, cos.unsqueeze(1), sin.unsqueeze(1), gain, epsilon, 4, 2)
    for found, expected in zip((query.flatten(1, 2), keys[:7, :, 4], values[:7, :, 4]), right, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    for buffer in (keys, values):
        assert int(buffer.ne(0).any(3).sum()) == 7 * 2


def test_rows_that_are_added_and_normalised():
    from harness.policy.kernels.gpu import add_and_normalize, normalization_gradients, sum_of_rows

    states, update, weight, epsilon = random(N, D), random(N, D, dtype=HALF), random(D), random(()).abs()
    summed, normalized = add_and_normalize(states, update, weight, epsilon)
    torch.testing.assert_close(summed, states + update)
    right = torch.nn.functional.rms_norm(summed, (D,), weight, float(epsilon))
    torch.testing.assert_close(normalized, right.to(HALF), rtol=1e-2, atol=1e-2)
    # More than programs, and parts of wider ones.
    rows, gradient = random(3000, 2 * D)[:, :D], random(3000, 3 * D, dtype=HALF)[:, D : 2 * D]
    for found, expected in zip(
        normalization_gradients(gradient, rows, weight, epsilon),
        _normalize_backward(gradient, rows, weight, epsilon),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    chosen, starts = torch.tensor([0, 3, 6, 1, 2]).cuda(), torch.tensor([0, 3, 4, 5, 5]).cuda()
    expected = torch.stack([rows[[0, 3, 6]].sum(0), rows[1], rows[2], *torch.zeros(2, D, device="cuda")])
    torch.testing.assert_close(sum_of_rows(rows, chosen, starts), expected)
