"""What cannot be composed is told in a line."""

import json

import pytest
from hydra.errors import MissingConfigException

from harness.config import compose
from harness.errors import ConfigError
from harness.refusals import refusal


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=grop"], "algorithm/grop: no such entry; near it are grpo"),
        (["experiment=xyz"], "experiment/xyz: no such entry; there are all_algorithms, embedded, "),
        (["algoritm=grpo"], "algoritm: no such key; near it are algorithm"),
        (["algorithm.optimizer.lr=1"], "algorithm.optimizer.lr: no such key; there are learning_rate, beta1, "),
        (
            ["algorithm.surrogate.clip_hihg=1"],
            "algorithm.surrogate.clip_hihg: no such key; near it are clip_high; +algorithm.surrogate.clip_hihg=… adds",
        ),
        (["algorithm.critic.value_clip=1"], "algorithm.critic.value_clip: no such key; algorithm.critic is null, or "),
        (["seed.low=1"], "seed.low: no such key; seed is null, or one value"),
        (["seed"], "seed: not KEY=VALUE as Hydra reads it: "),
        (["claims=reward"], "Could not override 'claims'. No match in the defaults list."),
        (["seed=${gone}"], "Interpolation key 'gone' not found"),
        (["algorithm=[grpo,gspo]"], "algorithm: name one entry, or with -m several of them without brackets, algo"),
        (["~model"], "model: name one entry, or with -m several of them without brackets, model=A,B; a list in"),
        (["algorithm=null"], "an entry is chosen by its name, e.g. algorithm=grpo; null and numbers are no names"),
        (["model=3"], "an entry is chosen by its name"),
        (["+seed=3"], "Could not append to config. An item is already at 'seed'. Either remove + prefix: 'seed=3'"),
    ],
)
def test_a_misspelt_override_is_told_in_one_line_with_what_is_near_it(overrides, message):
    with pytest.raises(ConfigError) as raised:
        compose(overrides)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "extra"), [("submitit_slurm", "slurm"), ("submitit_local", "slurm"), ("ray", "ray")])
def test_a_launcher_of_an_extra_that_is_not_installed_is_told_with_it(name, extra):
    missing = MissingConfigException("", f"hydra/launcher/{name}", ["basic", "joblib"])
    assert str(refusal(missing)) == (
        f"hydra/launcher/{name}: no such entry; there are basic, joblib; it comes with pip install -e '.[{extra}]'"
    )


@pytest.mark.parametrize("value", ["a b/é", "a{b"])
def test_a_value_that_wants_quotes_is_told_so_and_taken_with_them(value):
    with pytest.raises(ConfigError, match="; quote a value with spaces, accents or braces: \"KEY='…'\"$"):
        compose([f"results={value}"])
    assert compose([f"results='{value}'"]).results == value


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_configuration():
    with pytest.raises(json.JSONDecodeError):
        try:
            json.loads("{")
        except ValueError as error:
            refusal(error)


def test_only_keys_that_the_schema_leaves_open_are_offered_to_be_added():
    with pytest.raises(ConfigError) as raised:
        compose(["algorithm.optimizer.lr=1"])
    assert "+algorithm" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [mine\nsource: x\n", "algorithm/mine.yaml, line 2: this is not YAML: expected ',' or ']'"),
        ("name: mine\nname: mine\n", "algorithm/mine.yaml, line 2: this is not YAML: found duplicate key name"),
        ("name: ${mine\n", "no viable alternative at input '${mine'"),
        ("defaults:\n  - grop\n", "In 'algorithm/mine': Could not load 'algorithm/grop'."),
        ("defaults: grpo\n", "Invalid defaults list in 'algorithm/mine', defaults must be a list (got str)"),
        ("defaults:\n  - grpo\n  - 3\n", "Unsupported type in defaults : int"),
        ("defaults:\n  - mine\n", "an entry has itself among its defaults, or among theirs"),
        ("name: caf\xe9\n", "an entry is not UTF-8 ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_an_entry_that_cannot_be_read_is_told_in_one_line(tmp_path, content, message):
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm" / "mine.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as raised:
        compose(["algorithm=mine"], config_dir=tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
