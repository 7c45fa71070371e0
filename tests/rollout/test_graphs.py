"""Decoding by recorded steps against the eager engine.

CUDA graphs need a GPU. What stands in for them here records a step's operations, and repeats them on the tensors that
they worked on: as with a graph, nothing else of the step runs again.
"""

import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from harness.config import compose
from harness.errors import ConfigError
from harness.policy import normalization
from harness.policy.attention import _products, is_padding_free
from harness.policy.experts import AUTOCAST_GROUPED_MM, follow_autocast
from harness.policy.logprobs import completion_logprobs
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import drop_padding
from harness.rollout import embedded, graphs
from harness.rollout.embedded import EmbeddedEngine
from harness.rollout.graphs import GraphDecoder, can_record
from harness.rollout.weights import SamplingWeights
from tests.policy.conftest import fresh
from tests.policy.families import FAMILIES, build

EOS, PAD, MOST = 1, 0, 24
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4, 4], [20, 3, 17, 9], [6], [7, 7, 9, 12, 3]]
# On a GPU the host would have to wait for what these tell it, or they could not be recorded at all.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "is_nonzero", "equal"}


class Recorded(TorchDispatchMode):
    """Operations with the tensors that they worked on."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __call__(self):
        now = {}
        for func, args, kwargs, result in self.calls:
            args, kwargs = tree_map(lambda value: now.get(id(value), value), (args, kwargs))
            again = func(*args, **kwargs)
            now.update((id(old), new) for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True))

    def waits(self):
        names = {func.overloadpacket.__name__ for func, *_ in self.calls}
        by_mask = any(
            func.overloadpacket.__name__.startswith("index")
            and any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]))
            for func, args, *_ in self.calls
        )
        return names & WAITS | ({"index by a mask"} if by_mask else set())


class Recorder:
    """In place of CudaGraphs: recording leaves all tensors as they were, as capturing does."""

    def __init__(self):
        self.recorded, self.decoder, self.begun = [], None, 0

    def begin(self):
        self.begun += 1
        return self

    def __call__(self, step):
        rows = self.decoder._rows
        tensors = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
        tensors += [tensor for layer in rows.cache.layers for tensor in layer.states]
        before = [tensor.clone() for tensor in tensors]
        rows.step.zero_()  # capturing runs nothing, so that it may come after the last step; this does
        with torch.no_grad():
            self.recorded.append(Recorded(step))
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        return self.recorded[-1]


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request):
    return ending(fresh(request.param))


@pytest.fixture(autouse=True)
def _small_graphs(monkeypatch):
    """So that sequences that end leave, and graphs of several sizes take turns; with operations of torch alone."""
    monkeypatch.setattr(normalization, "on_one_core", lambda states: False)
    monkeypatch.setattr(graphs, "_LOOK", 2)
    monkeypatch.setattr(graphs, "_ROWS", 2)
    monkeypatch.setattr(graphs, "_COLUMNS", 8)


def ending(network):
    with torch.no_grad():  # so that sequences end at different steps
        network.lm_head.weight[EOS] += 0.05
    fuse_normalization(network)
    drop_padding(network)
    return network


def engines(model, record_routes=False, ends=(EOS,), **changes):
    """The eager engine, and one that repeats recorded steps, with its recorder."""
    config = replace(compose().rollout, **changes)
    eager, recorded = (EmbeddedEngine(model, config, ends, PAD, MOST, record_routes) for _ in range(2))
    recorder = Recorder()
    for engine in (eager, recorded):  # as on a GPU
        engine.policy = SamplingWeights(model)
    forward, routing = recorded.policy, recorded.routing
    recorded.graphs = GraphDecoder(forward, config.temperature, ends, PAD, routing, recorder=recorder.begin)
    recorder.decoder = recorded.graphs
    return eager, recorded, recorder


def sampled(engine, seed=0, prompts=PROMPTS, group_size=4):
    return engine.generate(prompts, group_size, torch.Generator().manual_seed(seed))


def assert_same(batch, expected, tolerance=1e-4):
    assert torch.equal(batch.completions, expected.completions)
    assert torch.equal(batch.mask, expected.mask)
    assert torch.equal(batch.input_ids, expected.input_ids)
    torch.testing.assert_close(batch.rollout_logprobs, expected.rollout_logprobs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("decode_sequences", [24, 8])
def test_recorded_steps_sample_what_the_eager_engine_samples(model, decode_sequences):
    eager, recorded, recorder = engines(model, decode_sequences=decode_sequences, temperature=0.8)
    for seed in range(3):  # the later ones repeat what the first has recorded
        assert_same(sampled(recorded, seed), sampled(eager, seed))
    batch = sampled(eager)
    assert batch.completion_lengths.min() < 5 and len(batch.completion_lengths.unique()) > 4
    sizes = set(recorded.graphs._steps)
    assert len({rows for rows, _ in sizes}) > 1 and len({columns for _, columns in sizes}) > 1
    assert len(recorder.recorded) == len(sizes)  # each once


def test_several_tokens_end_completions_in_recorded_steps_too(model):
    eager, recorded, _ = engines(model, ends=(EOS, 7, 9))
    assert_same(sampled(recorded), sampled(eager))


def test_longer_prompts_and_more_rows_than_before_find_room(model):
    eager, recorded, recorder = engines(model)
    cases = [(PROMPTS[:2], 2, 1), (PROMPTS, 4, 2), ([PROMPTS[1] * 3, [4]], 2, 3), (PROMPTS[:1], 1, 3)]
    for prompts, group_size, begun in cases:
        expected = sampled(eager, prompts=prompts, group_size=group_size)
        assert_same(sampled(recorded, prompts=prompts, group_size=group_size), expected)
        assert recorder.begun == begun  # graphs of what was given up share no memory with new ones


def test_batches_of_two_shapes_in_turn_share_their_room(model, monkeypatch):
    there = []

    class Rows(graphs._Rows):
        def __init__(self, *arguments):
            assert all(rows() is None for rows in there)  # or twice the memory would be needed
            there.append(weakref.ref(self))
            super().__init__(*arguments)

    monkeypatch.setattr(graphs, "_Rows", Rows)
    eager, recorded, recorder = engines(model)
    for _ in range(3):
        for prompts, group_size in ((PROMPTS, 4), ([PROMPTS[1] * 3, [4]], 2)):
            expected = sampled(eager, prompts=prompts, group_size=group_size)
            assert_same(sampled(recorded, prompts=prompts, group_size=group_size), expected)
    assert recorder.begun == len(there) == 2


def test_weights_that_have_changed_are_the_ones_that_sample(model):
    eager, recorded, _ = engines(model)
    before = sampled(recorded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    after = sampled(recorded)
    assert_same(after, sampled(eager))
    assert not torch.equal(before.completions, after.completions)


def test_recorded_routes_are_those_of_the_eager_engine():
    eager, recorded, _ = engines(ending(fresh("tiny_moe")), record_routes=True)
    for seed in range(2):
        batch, expected = sampled(recorded, seed), sampled(eager, seed)
        assert_same(batch, expected)
        for routes, others, length in zip(batch.routes, expected.routes, expected.lengths, strict=True):
            assert torch.equal(routes[:length], others[:length])


def test_no_operation_of_a_recorded_step_waits_for_the_device(model):
    _, recorded, recorder = engines(model, record_routes=len(fresh_experts(model)) > 0)
    sampled(recorded)
    assert recorder.recorded
    for step in recorder.recorded:
        assert step.waits() == set()


def fresh_experts(model):
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


def test_what_waits_is_seen():
    numbers = torch.arange(4.0)
    assert Recorded(lambda: numbers.sum().item()).waits() == {"_local_scalar_dense"}
    assert Recorded(lambda: numbers[numbers > 1]).waits() == {"index by a mask"}
    assert Recorded(lambda: numbers[numbers.long()] + 1).waits() == set()


def test_a_step_that_cannot_be_recorded_names_the_setting(model):
    _, recorded, _ = engines(model)

    def refuse(step):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("the recording could not be ended")  # as torch.cuda.graph does

    recorded.graphs.recorder = lambda: refuse
    with pytest.raises(ConfigError, match=r"rollout.cuda_graphs=true: .* cannot be recorded \(operation not .*false"):
        sampled(recorded)


@pytest.mark.parametrize(
    ("capability", "mixtures"), [((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_a_mixture_is_recorded_where_its_products_need_not_wait(model, monkeypatch, capability, mixtures):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_record(model) == (mixtures or not fresh_experts(model))
    assert not can_record(fresh("tiny_dense"))  # as loaded, with padding


def test_which_models_can(model):
    assert is_padding_free(model)
    assert not is_padding_free(fresh("tiny_dense"))  # as loaded, with padding
    for family in FAMILIES:
        network = build(family)
        fuse_normalization(network)
        drop_padding(network)
        if is_padding_free(network):
            eager, recorded, _ = engines(network)
            assert_same(sampled(recorded), sampled(eager))


# --- in the arithmetic of a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def bfloat16(monkeypatch):
    """Autocast on the CPU as it is on a GPU."""

    @contextmanager
    def autocast(device):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    for module in ("harness.rollout.embedded", "harness.policy.logprobs"):
        monkeypatch.setattr(f"{module}.autocast", autocast)
    assert embedded.autocast is autocast


def test_in_bfloat16_the_sampler_and_the_trainer_agree(model, bfloat16):
    follow_autocast(model)
    eager, recorded, _ = engines(model)
    for seed in range(2):
        batch, expected = sampled(recorded, seed), sampled(eager, seed)
        for other in (batch, expected):
            with torch.no_grad():
                logprobs, _ = completion_logprobs(model, other, 1.0)
            assert ((other.rollout_logprobs - logprobs).abs() * other.mask).sum() / other.mask.sum() < 0.02
    copies = recorded.policy.copies
    assert {copy.dtype for copy in copies.values()} == {torch.bfloat16} and eager.policy.copies.keys() == copies.keys()
    large = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert {"lm_head.weight", *fresh_experts(model)} <= set(copies) and "model.embed_tokens.weight" not in copies
    assert len(copies) >= len(large) - 1 - model.config.num_hidden_layers  # all but embeddings and routers
    assert recorded.graphs._rows.layers[0].states[0].dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_in_bfloat16_a_step_repeats_with_the_weights_of_now(model, bfloat16):
    follow_autocast(model)
    _, recorded, _ = engines(model)
    sampled(recorded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    again = sampled(recorded)
    _, anew, _ = engines(model)
    assert_same(again, sampled(anew), tolerance=0.0)


def test_experts_follow_autocast_and_pass_gradients_to_their_float32_weights():
    model = fresh("tiny_moe")
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(10, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(20).view(10, 2).remainder(experts.num_experts)
    weights = torch.full((10, 2), 0.5)
    exact = experts(hidden, chosen, weights)
    follow_autocast(model)
    assert model.config._experts_implementation == AUTOCAST_GROUPED_MM
    assert torch.equal(experts(hidden, chosen, weights), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = experts(hidden, chosen, weights)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))
    rounded.sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32 and experts.down_proj.grad.abs().sum() > 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [10, 16, 20])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_gpus_attention_of_a_decoded_token_is_the_cpus(groups, length, masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, groups, 4 // groups, 8, generator=generator)
    key, value = (torch.randn(3, groups, length, 8, generator=generator) for _ in range(2))
    mask = (torch.arange(length) < torch.tensor([[length], [4], [7]]))[:, None, None] if masked else None
    ours = _products(query, key, value, mask, scale=0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(ours, theirs)
