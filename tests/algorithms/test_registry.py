"""Parts of every kind are held against the kind's contract where a training step calls them."""

import re
from dataclasses import replace

import pytest
import torch

from harness.algorithms.objective import Surrogate, policy_loss
from harness.algorithms.registry import PARTS, part
from harness.budget import Meter
from harness.config import compose
from harness.errors import ConfigError
from harness.judging import Judge
from harness.policy.tokenizer import build_tokenizer
from harness.reward import Grader
from harness.tasks import Problem
from tests.policy.conftest import make_batch

RUN = compose(["algorithm=gspo_rollout_logprobs"])  # what was sampled is judged without a pass of the policy


def step(kind, name):
    """Rewards, advantages and the loss of a small batch [6, 9], with the part of that name in place of its kind's."""
    settings = {**getattr(RUN.algorithm, kind), "name": name}
    run = replace(RUN, algorithm=replace(RUN.algorithm, **{kind: settings}))
    batch, meter = make_batch(group_size=3), Meter(RUN.budget, torch.device("cpu"))
    texts, problems = ["4"] * len(batch.mask), [Problem("1 + 3 =", "4", {})] * len(batch.mask)
    rewards = Grader(run, build_tokenizer()).grade(texts, problems, batch, torch.Generator().manual_seed(0))
    advantages = Judge(run, meter, None, None, None, None, None).judge(batch, rewards).advantages
    logprobs = batch.rollout_logprobs.clone().requires_grad_()
    old = rollout = batch.rollout_logprobs
    return policy_loss(logprobs, old, advantages, batch.mask, run.algorithm, rollout_logprobs=rollout)[0]


def form(dtype, shape):
    return re.escape(f"Tensor torch.{dtype} torch.Size({shape}) cpu")


FLOATS, BOOLS = form("float32", [6, 9]), form("bool", [6, 9])


def surrogate(elements, **changed):
    nowhere = torch.zeros_like(elements.mask, dtype=torch.bool)
    return Surrogate(elements.ratio, nowhere, nowhere, nowhere)._replace(**changed)


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        ("shaping", lambda rewards, *_: rewards.mean(), rf"{form('float32', [6])} here, and returned .*Size\(\[\]\)"),
        ("shaping", lambda rewards, *_: rewards.tolist(), r"and returned list$"),
        ("advantage", lambda rewards, *_, **__: (rewards.sum(1, keepdim=True), None), r"Size\(\[6, 1\]\) cpu, None\)$"),
        ("advantage", lambda rewards, *_, **__: rewards, rf"tuple\({FLOATS}, None\) here, and returned {FLOATS}$"),
        ("advantage", lambda rewards, *_, **__: (rewards, rewards), rf"returned tuple\({FLOATS}, {FLOATS}\)$"),
        ("advantage", lambda rewards, *_, **__: (rewards.double(), None), r"returned tuple\(Tensor torch\.float64"),
        ("selection", lambda advantages, old_logprobs, mask: mask, rf"{BOOLS} here, and returned {FLOATS}$"),
        ("aggregation", lambda mask: 1 / mask.sum(), rf"{FLOATS} here, and returned {form('float32', [])}$"),
        ("aggregation", lambda mask: 0.1, rf"{FLOATS} here, and returned float$"),
        ("ratio", lambda logprobs, *_: logprobs.sum().exp(), rf"{FLOATS} here, and returned {form('float32', [])}$"),
        ("surrogate", lambda e, **_: surrogate(e, loss=e.ratio.sum()), rf"returned Surrogate\({form('float32', [])}"),
        ("surrogate", lambda e, **_: surrogate(e, outside=e.mask), rf"{BOOLS}, {FLOATS}\)$"),
        ("surrogate", lambda e, **_: tuple(surrogate(e)), r"must return Surrogate\(.*and returned tuple\("),
        ("correction", lambda log_ratio, mask: None, rf"{FLOATS} here, and returned None$"),
    ],
)
def test_a_part_that_returns_another_form_than_its_kind_is_told_by_name(kind, function, message, monkeypatch):
    monkeypatch.setitem(PARTS[kind], "mine", function)
    with pytest.raises(ConfigError, match=rf"^algorithm\.{kind}\.name=mine: .*{message}"):
        step(kind, "mine")


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_that_writes_into_what_it_is_given_is_told_by_name(kind, monkeypatch):
    name = getattr(RUN.algorithm, kind)["name"]
    ours, _ = part(kind, {"name": name})

    def writes(*arguments, **settings):
        given = arguments[0] if kind == "surrogate" else arguments
        tensor = [value for value in given if isinstance(value, torch.Tensor)][-1]
        result = ours(*arguments, **settings)
        tensor.copy_(tensor.clone())
        return result

    monkeypatch.setitem(PARTS[kind], "mine", writes)
    assert step(kind, name).isfinite()
    with pytest.raises(ConfigError, match=rf"^algorithm\.{kind}\.name=mine: .* writes into a tensor .* clone\(\)"):
        step(kind, "mine")
