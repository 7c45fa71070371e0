"""The table on real shapes, and what it computes by itself, against numbers worked out by hand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.benchmark.__main__ import TABLES, main
from harness.benchmark.bare_config import bare_config
from harness.benchmark.device_sides import OurPhases, PlainUpdate, decode_bytes, random_model
from harness.benchmark.model_shapes import REAL, SHAPES, Shape
from harness.benchmark.peaks import data_sheet_peak
from harness.config import compose

DENSE = Shape(
    {
        "model_type": "qwen3",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 32,
        "tie_word_embeddings": True,
    },
    sequences=8,
    group_size=4,
    micro_batch=2,
    prompt=3,
    completion=4,
)
# Query, key, value and output projections, and the three matrices of the feed-forward network, of two layers.
DENSE_WEIGHTS = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)


def test_update_flops_by_hand():
    measured = OurPhases(random_model(DENSE, "cpu"), DENSE, "cpu")()
    fed = 3 + 4 - 1  # the last token is not fed back
    forward = 2 * DENSE_WEIGHTS * fed + 2 * (2 * 2 * 2 * 4) * fed**2 + 2 * 8 * 32 * 4
    # Some micro-batches of two hold two completions of a prompt, which they read once.
    assert 0.5 < measured["distinct tokens"] < 1
    assert measured["update FLOPs"] == pytest.approx(3 * 8 * forward * measured["distinct tokens"])


def test_decode_bytes_by_hand():
    norms = 2 * (8 + 8 + 4 + 4) + 8
    # Tied embeddings are read as the head. In the middle of a completion the context is 5 tokens: a key and a value of
    # 4 numbers each in both layers, for 8 sequences.
    dense = DENSE_WEIGHTS + norms + 32 * 8 + 8 * 5 * 2 * 2 * 4
    assert decode_bytes(random_model(DENSE, "cpu"), DENSE, torch.bfloat16) == 2 * dense


def test_decode_reads_the_experts_that_are_likely_chosen():
    shape = SHAPES["tiny"]
    model = random_model(shape, "cpu")
    experts = 2 * 4 * 3 * 16 * 8
    one, many = (decode_bytes(model, replace(shape, sequences=n), torch.float32) for n in (1, 1000))
    states = 2 * 2 * 1 * 8 * (shape.prompt + shape.completion / 2)
    # One token chooses 2 of 4 experts; a thousand choose all of them.
    assert (many - one) / 4 == pytest.approx(experts / 2 + 999 * states)


def test_ours_and_the_plain_update_move_the_policy_alike():
    """With a learning rate at which it moves: the same gradients, but for what rounding makes of them."""
    moved = []
    for plain in (False, True):
        model = random_model(DENSE, "cpu")
        start = {name: weights.clone() for name, weights in model.state_dict().items()}
        ours = OurPhases(model, DENSE, "cpu")
        side = PlainUpdate(model, ours) if plain else ours.updater
        model.load_state_dict(start)
        ours.generator.manual_seed(1)
        torch.manual_seed(1)
        ours._rollout()
        ours._judge()
        side.optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        ours.config.algorithm.minibatches = 1
        if plain:
            side.ours.shape = replace(DENSE, minibatches=1)
            side._update()
        else:
            side.learning_rate, side.updates = 1.0, side.settings.warmup_updates
            ours._update()
        moved.append({name: model.state_dict()[name] - start[name] for name in start})
    for name, step in moved[0].items():
        torch.testing.assert_close(step, moved[1][name], rtol=1e-3, atol=1e-6)
    assert max(step.abs().max() for step in moved[0].values()) > 1e-3


def test_real_shapes_have_the_published_sizes():
    expected = {"qwen3_0_6b": 596e6, "qwen3_1_7b": 1721e6, "qwen3_30b_a3b_4_layers": 3_114e6}
    expected["qwen3_1_7b_long"] = expected["qwen3_1_7b"]
    assert set(REAL) == set(expected)
    for name in REAL:
        with torch.device("meta"):
            model = random_model(SHAPES[name], "meta")
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected[name], rel=0.01)


def test_configuration_without_hydra_is_the_composed_one():
    bare = bare_config({"algorithm": "grpo", "rollout": "embedded"}, {"rollout": {"temperature": 0.5}})
    composed = compose(["algorithm=grpo", "rollout.temperature=0.5"])
    assert (bare.algorithm, bare.rollout) == (composed.algorithm, composed.rollout)


def test_data_sheet_peaks_go_by_the_name():
    assert data_sheet_peak("NVIDIA H200") == 989e12 and data_sheet_peak("AMD EPYC") is None


BARE = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {absent} else find(name, *rest)
)
from harness.benchmark.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
ABSENT = {
    *("hydra", "omegaconf", "antlr4", "lm_eval", "datasets", "pandas", "pyarrow", "matplotlib", "seaborn", "scipy"),
    *("reasoning_gym", "rich", "jinja2", "math_verify", "trl", "accelerate", "sklearn", "tensorboard", "joblib"),
}


def test_shapes_need_torch_and_transformers_alone(tmp_path):
    arguments = ["shapes", "--tiny", "--repetitions", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-c", BARE.format(absent=ABSENT), *arguments]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for title in ("## Rollout", "## Update", "## Phases"):
        assert title in run.stdout
    assert (tmp_path / "shapes.md").read_text() in run.stdout and (tmp_path / "shapes.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said(capsys, tmp_path):
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_table_is_told_with_those_that_are_known(capsys):
    with pytest.raises(SystemExit):
        main(["stap"])
    assert "no such table: stap; there are step, update" in capsys.readouterr().err


def test_no_repetition_is_refused_before_anything_is_measured(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["shapes", "--repetitions", "0", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "--repetitions 0: must be at least 1" in capsys.readouterr().err


def test_trying_out_replaces_no_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = []
    tables = SimpleNamespace(tables=lambda options: measured.append(options) or [])
    monkeypatch.setattr("harness.benchmark.__main__.import_module", lambda name: tables)
    assert main(["--tiny"]) == main(["shapes"]) == 0
    assert len(measured) == len(TABLES)  # all but that of a sweep, and one more
    assert all(options.shapes == ("tiny",) for options in measured[:-1]) and measured[-1].shapes == tuple(REAL)
    assert sorted(path.name for path in Path("results/benchmarks").iterdir()) == ["shapes.json", "shapes.md"]
    assert len(list(Path("results/benchmarks_tiny").iterdir())) == 2 * len(measured[:-1])


def test_one_table_that_cannot_be_measured_does_not_stop_the_others(capsys, tmp_path):
    arguments = ["sweep", "shapes", "--shapes", "tiny", "--repetitions", "1", "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes.json", "shapes.md"]
    assert "--sweep" in capsys.readouterr().err
