"""Configurations that cannot run stop at composition, naming the key and the mend."""

import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from harness.config import compose, load, save
from harness.entries import conf_dir
from harness.errors import ConfigError

# Parts without settings.
PLAIN = {"advantage": "reward", "ratio": "token", "surrogate": "none", "aggregation": "sequence_sum"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=gpso"], r"algorithm/gpso(?s:.*)gspo"),
        (["algorithm.epochz=2"], r"epochz"),
        (["+algorithm.epochz=2"], r"algorithm\.epochz: no such key; the keys here are .*epochs"),
        (
            ["+algorithm.surrogate.clip_hihg=0.3"],
            r"algorithm\.surrogate\.clip_hihg: 'clip' has no such setting.*clip_high",
        ),
        (["algorithm=base"], r"algorithm\.name is absent: .*; base is no algorithm: glob\(\*,exclude=base\)"),
        (["evaluation.tasks=chain_sum_held_out"], r"expected a list: give evaluation\.tasks=\[…\]"),
        (["~algorithm.surrogate.clip_high"], r"algorithm\.surrogate\.clip_high is absent"),
        (
            ["algorithm.surrogate.clip_high=wide"],
            r"algorithm\.surrogate\.clip_high='wide': expected a finite number at",
        ),
        (["algorithm.advantage.name=gea"], r"algorithm\.advantage\.name=gea: no such part; there are .*gae"),
        (["algorithm.epochs=many"], r"algorithm\.epochs.*'many'.*Integer"),
        (["algorithm.minibatches=1"], r"algorithm\.epochs x algorithm\.minibatches is one optimizer step.*at least 2"),
        (["algorithm.completions_per_prompt=7"], r"completions_per_batch=256 .* groups of .*=7: make it a multiple"),
        (["algorithm.minibatches=3"], r"completions_per_batch=256 .* algorithm\.minibatches=3: make it a multiple"),
        (["algorithm.completions_per_prompt=1"], r"algorithm\.completions_per_prompt=1: .* at least 2, or a critic"),
        (["algorithm=ppo", "algorithm.critic=null"], r"algorithm\.advantage\.name=gae needs a critic"),
        (["algorithm.routing_replay=R4", "model=tiny_moe"], r"algorithm\.routing_replay=R4: choose disabled, R2 or R3"),
        (
            ["algorithm=dapo", "algorithm.shaping.buffer=41"],
            r"algorithm\.shaping\.buffer=41: .* cut at task\.max_completion_tokens=40; use at most that",
        ),
        (
            ["algorithm=dapo", "algorithm.shaping.buffer=0"],
            r"algorithm\.shaping\.buffer=0: expected an integer at least 1",
        ),
        (["algorithm=dr_grpo", "algorithm.aggregation.length=0"], r"algorithm\.aggregation\.length=0: .* at least 1"),
        (["algorithm.surrogate.clip_low=-0.5"], r"surrogate\.clip_low=-0\.5: expected a finite number at least 0"),
        (["algorithm.surrogate.clip_low=nan"], r"surrogate\.clip_low=nan: expected a finite number at least 0"),
        (["algorithm=ppo", "algorithm.advantage.lam=1.5"], r"advantage\.lam=1\.5: .* at least 0 and at most 1"),
        (
            ["algorithm=grpo_icepop", "algorithm.correction.low=6"],
            r"low=6 is above .*correction\.high=5\.0",
        ),
        (["algorithm=cispo", "algorithm.surrogate.lower=9"], r"surrogate\.lower=9 is above .*surrogate\.upper=5"),
        (["algorithm=clip_cov", "algorithm.selection.fraction=-1"], r"selection\.fraction=-1: .* at most 1"),
        (["algorithm.kl.coefficient=inf"], r"algorithm\.kl\.coefficient=inf: must be a finite number"),
        (["algorithm.entropy_coefficient=inf"], r"algorithm\.entropy_coefficient=inf: must be a finite number"),
        (["algorithm.optimizer.warmup_updates=-5"], r"algorithm\.optimizer\.warmup_updates=-5: must not be negative"),
        (["seed=-1"], r"seed=-1: must be from 0 to 9007199254740991, "),
        (["seed=9007199254740992"], r"seed=9007199254740992: must be from 0 to 9007199254740991, "),
        (
            ["model.cold_start.seed=18446744073709551616"],
            r"model\.cold_start\.seed=18446744073709551616: must be from 0",
        ),
        (["evaluation.samples=-1"], r"evaluation\.samples=-1: must not be negative"),
        (["model.cold_start.steps=0"], r"model\.cold_start\.steps=0: must be .* above 0"),
        (["model.cold_start.batch_size=0"], r"model\.cold_start\.batch_size=0: must be .* above 0"),
        (["model.cold_start.noise=7"], r"model\.cold_start\.noise=7.*: must be a probability"),
        (["algorithm=sapo", "algorithm.surrogate.tau_negative=0"], r"algorithm\.surrogate\.tau_negative=0.* above 0"),
        (
            ["algorithm=clip_cov", "~algorithm.selection", "+algorithm.selection={name: none}"],
            r"algorithm\.surrogate\.name=clip_selected and algorithm\.selection\.name=none: name a selection",
        ),
        (
            ["algorithm=clip_cov", "~algorithm.surrogate", "+algorithm.surrogate={name: none}"],
            r"algorithm\.surrogate\.name=none and algorithm\.selection\.name=high_covariance: .* use none",
        ),
        (
            ["algorithm=grpo_kl_in_reward", "algorithm.kl.importance_weighted=true"],
            r"algorithm\.kl\.importance_weighted=true takes a penalty in the loss .* set algorithm\.kl\.placement=loss",
        ),
        (
            ["algorithm=gspo", "algorithm.kl.importance_weighted=true"],
            r"importance_weighted=true .* ratio of each token",
        ),
        (
            ["algorithm=gspo_token", "algorithm.kl.importance_weighted=true"],
            r"importance_weighted=true .* set .* algorithm\.ratio\.name=token",
        ),
        (
            ["algorithm=ppo", "algorithm.ratio.name=sequence"],
            r"ratio\.name=sequence has one .* the critic .*: use algorithm\.ratio\.name=sequence_token$",
        ),
        (
            ["algorithm=ppo", "algorithm.surrogate.name=geometric_mean"],
            r"surrogate\.name=geometric_mean has one loss .* the critic .* use algorithm\.surrogate\.name=clip$",
        ),
        (
            [
                "algorithm=reinforce_plus_plus",
                "algorithm.ratio.name=sequence",
                "algorithm.kl.coefficient=0.1",
                "algorithm.kl.placement=reward",
            ],
            r"ratio\.name=sequence has one importance ratio .* the KL penalty in the reward would",
        ),
        (["algorithm=dual_clip_ppo", "algorithm.surrogate.bound=0.5"], r"surrogate\.bound=0\.5: expected .* above 1"),
        (["algorithm=kl_cov", "algorithm.selection.fraction=0"], r"selection\.fraction=0: .* above 0 and at most 1"),
        (
            ["algorithm=reinforce_plus_plus_baseline", "algorithm.completions_per_prompt=1"],
            r"completions_per_prompt=1: .* at least 2",
        ),
        (["algorithm=gmpo", "algorithm.minibatches=1"], r"the surrogate 'geometric_mean' never clips; use at least 2"),
        (["algorithm=rloo", "algorithm.completions_per_prompt=1"], r"completions_per_prompt=1: .* at least 2"),
        (["algorithm.kl.estimator=k4"], r"algorithm\.kl\.estimator=k4: choose k1, k2 or k3"),
        (["algorithm.optimizer.learning_rate=0"], r"algorithm\.optimizer\.learning_rate=0.*above 0"),
        (["rollout.temperature=nan"], r"rollout\.temperature=nan.*finite"),
        (["budget.axis=hours"], r"budget\.axis=hours: choose auto or one of flops, device_seconds"),
        (["budget.axis=tokens", "budget.limits.tokens=inf"], r"budget\.limits\.tokens=inf: .* finite number above 0"),
        (["+budget.limits.hours=1"], r"budget\.limits\.hours: no such axis"),
        (["evaluation.fractions=[1.5]"], r"evaluation\.fractions has 1\.5"),
        (["evaluation.fractions=[0.0,0.5]"], r"evaluation\.fractions=\[0\.0, 0\.5\]: .* add 1\.0"),
        (["evaluation.tasks=[a,b,a]"], r"evaluation\.tasks has a more than once"),
        ([f"results={__file__}/below"], r"results=.*: .*test_config\.py is a file; name a folder"),
        (["model=huggingface", f"model.path={Path(__file__).parent}"], r"model\.path=.*: .* has no config\.json"),
        (["task.max_completion_tokens=1000"], r"max_completion_tokens=1000 make .* model\.name=tiny_dense has 512 pos"),
        (["device=tpu"], r"device=tpu: choose auto, cpu or cuda"),
        (["plugins=[no_such_module]"], r"plugins: cannot import no_such_module .*PYTHONPATH"),
        (["task.name=openai/gsm8k"], r"task\.name=openai/gsm8k: use letters, digits, '_', '\.' and '-'"),
        (["algorithm.optimizer.beta1=1.0"], r"algorithm\.optimizer\.beta1=1\.0: must be at least 0 and below 1"),
        (["algorithm.optimizer.epsilon=-1"], r"algorithm\.optimizer\.epsilon=-1.*must not be negative"),
        (["algorithm=ppo", "algorithm.critic.max_grad_norm=0"], r"algorithm\.critic\.max_grad_norm=0.*above 0"),
        (["algorithm=ppo", "algorithm.critic.value_clip=-1"], r"algorithm\.critic\.value_clip=-1.*above 0"),
        (["sweep=../elsewhere"], r"sweep=\.\./elsewhere: use letters, digits"),
        (["task=gsm8k"], r"task\.path has no value: give one"),
    ],
)
def test_what_cannot_run_is_refused_naming_key_and_mend(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_a_citation_is_no_part_of_what_affects_numbers():
    cited, otherwise = compose(), compose(["algorithm.source=elsewhere"])
    assert cited.algorithm.source != otherwise.algorithm.source and cited.run_name == otherwise.run_name
    assert cited.run_name != compose(["algorithm.epochs=3"]).run_name


def test_an_entry_of_the_users_own_with_the_name_of_ours_is_refused_but_a_claim_may_have_it(tmp_path):
    for name in ("claims/reward.yaml", "algorithm/grpo.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"--config-dir .*: algorithm/grpo\.yaml has the name of an entry of ours"):
        compose(["algorithm=grpo"], config_dir=tmp_path)
    (tmp_path / "algorithm" / "grpo.yaml").unlink()
    (tmp_path / "algorithm" / "folder.yaml").mkdir()  # which is no entry
    compose(["algorithm=grpo"], config_dir=tmp_path)
    compose(["algorithm=grpo"], config_dir=conf_dir())  # ours are not in their own way


def test_a_setting_that_another_part_has_none_of_is_taken_out_as_the_error_says():
    chosen = ["algorithm=gspo", "algorithm.advantage.name=optimal_baseline"]
    with pytest.raises(ConfigError) as raised:
        compose(chosen)
    remedy = re.findall("'(~[^']+)'", str(raised.value))
    assert compose([*chosen, *remedy]).algorithm.advantage == {"name": "optimal_baseline"}


def test_an_entry_that_inherits_what_another_part_has_none_of_derives_from_base_as_the_error_says(tmp_path):
    (tmp_path / "algorithm").mkdir()
    entry = tmp_path / "algorithm" / "mine.yaml"
    parts = "".join(f"{kind}: {{name: {name}}}\n" for kind, name in PLAIN.items())
    entry.write_text(f"defaults: [grpo, _self_]\nname: mine\nsource: none\nminibatches: 1\n{parts}")
    with pytest.raises(ConfigError, match=r"advantage\.scale: 'reward' has no .* derives from (\w+) instead") as raised:
        compose(["algorithm=mine"], config_dir=tmp_path)
    (base,) = re.findall(r"derives from (\w+) instead", str(raised.value))
    entry.write_text(entry.read_text().replace("[grpo,", f"[{base},"))
    assert compose(["algorithm=mine"], config_dir=tmp_path).algorithm.advantage == {"name": "reward"}


def test_entries_whose_runs_could_not_be_told_apart_are_refused(tmp_path):
    (tmp_path / "algorithm").mkdir()
    entry = tmp_path / "algorithm" / "mine.yaml"
    entry.write_text("defaults:\n  - grpo\n  - _self_\nname: 'grpo' # as ours\n")
    with pytest.raises(ConfigError, match=r"algorithm/mine\.yaml has the name: grpo of an entry of ours"):
        compose(["algorithm=mine"], config_dir=tmp_path)
    entry.write_text("defaults:\n  - grpo\n  - _self_\nname: mine\n")
    compose(["algorithm=mine"], config_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.yaml is lost: remove its run directory and run the cell again"),
        ("", r"config.yaml is damaged \(it has no algorithm\): remove its run directory"),
        ("algorithm: {", r"config.yaml is damaged \(.*\): remove its run directory"),
    ],
)
def test_a_configuration_that_was_lost_or_damaged_says_what_to_do(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "config.yaml")


def test_a_configuration_whose_writing_breaks_off_stays_as_it_was(tmp_path, monkeypatch):
    run = compose(["seed=1"])
    save(run, tmp_path / "config.yaml")
    monkeypatch.setattr("harness.runs.directory.os.fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=save, args=(replace(run, seed=2), tmp_path / "config.yaml")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert load(tmp_path / "config.yaml") == run


@pytest.mark.parametrize("model", ["{}/absent", "./absent"])
def test_a_model_that_is_not_there_is_refused(tmp_path, model):
    path = model.format(tmp_path)
    arguments = [f"model.path={path}", "model.architecture=null", "model.cold_start=null"]
    with pytest.raises(ConfigError, match=r"model\.path=.*absent: no such folder; give a Hugging Face model directory"):
        compose(arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.architecture.model_type=foo", r"model\.architecture: no causal .*\(ValueError: Unrecognized model"),
        ("model.architecture.num_attention_heads=3", r"model\.architecture: no causal .*\(RuntimeError: The size"),
        ("model.architecture.num_experts_per_tok=64", r"model\.architecture: no causal .*out of range\)"),
        ("model.architecture.max_position_embeddings=abc", "expected int, got str"),
        ("+model.architecture.num_layers=6", r"model\.architecture\.num_layers: .* qwen3_moe reads no such field"),
        ("model.experts_implementation=foo", r"model\.experts_implementation=foo \(ValueError: Specified"),
        ("algorithm.ratio.name=[a]", r"algorithm\.ratio\.name=\['a'\]: no such part; there are "),
        ("rollout.decode_sequences=7", r"rollout\.decode_sequences=7: .*completions_per_prompt=8; use at least that"),
    ],
)
def test_what_could_not_be_built_or_run_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose(["model=tiny_moe", override])


def test_an_architecture_of_ones_own_is_taken():
    assert compose(["model.architecture.num_hidden_layers=1"]).model.architecture["num_hidden_layers"] == 1


@pytest.mark.parametrize("key", ["task", "model.cold_start.task"])
def test_problems_that_an_evaluation_asks_in_other_words_are_refused(key):
    message = rf"{key}\.prompt='Compute .*evaluation\.tasks has chain_sum_longer.*conf/task/chain_sum\.yaml.*use that"
    other = [f"{key}.prompt='Compute {{expression}} ='"]
    with pytest.raises(ConfigError, match=message):
        compose([*other, "evaluation.tasks=[chain_sum_longer]"])
    compose([f"{key}.prompt='{{expression}}='"])  # held out alike: white space does not count


def test_a_malformed_line_of_the_data_is_named_by_its_number(tmp_path):
    good = json.dumps({"question": "1+1?", "answer": "#### 2"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{good[:-5]}\n")
    with pytest.raises(ConfigError, match=r"task\.path: .*train\.jsonl, line 2 is not JSON"):
        compose(["task=gsm8k", f"task.path={tmp_path}/train.jsonl"])
