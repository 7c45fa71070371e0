"""Print docs/ALGORITHMS.md, what each entry of conf/algorithm is made of: ``python -m harness.algorithms``."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from harness.config import AlgorithmConfig, compose
from harness.entries import conf_dir

INTRODUCTION = """\
# Algorithms

Each is an entry of [conf/algorithm](../conf/algorithm) made of parts, the functions in
[harness/algorithms](../harness/algorithms), whose settings stand in brackets. The comments of an entry say where public
implementations differ from it. This page is generated, for the task `chain_sum`:
`python -m harness.algorithms > docs/ALGORITHMS.md`.

*Group* is the number of completions a prompt; *steps* are the optimizer steps that follow a rollout batch; *old
log-probabilities* are from a forward pass of the trainer, or the rollout engine's own. — stands for none.
"""
NONE = "—"


def entries() -> list[str]:
    """The names of the entries of conf/algorithm."""
    return sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml") if path.stem != "base")


def entry(name: str) -> AlgorithmConfig:
    """The algorithm of that name, on a mixture-of-experts model, which none declines."""
    return compose([f"algorithm={name}", "model=tiny_moe"]).algorithm


def document(algorithms: Sequence[AlgorithmConfig]) -> str:
    """The page, as Markdown."""
    rows = [[column(algorithm) for column in COLUMNS.values()] for algorithm in algorithms]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "\n".join([INTRODUCTION, *(f"| {' | '.join(line)} |" for line in lines)])


def _part(config: Mapping[str, Any]) -> str:
    """A part's name, and its settings in brackets."""
    if config["name"] == "none":
        return NONE
    settings = _settings({key: value for key, value in config.items() if key != "name"})
    return f"{config['name']} ({settings})" if settings else str(config["name"])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _kl(algorithm: AlgorithmConfig) -> str:
    kl = algorithm.kl
    if kl.coefficient == 0:
        return NONE
    return f"{kl.estimator} x {kl.coefficient} in {kl.placement}{', x ratio' if kl.importance_weighted else ''}"


def _filters(algorithm: AlgorithmConfig) -> str:
    dynamic = algorithm.dynamic_sampling
    sampling = f"dynamic sampling ({_settings(asdict(dynamic))})" if dynamic else NONE
    chosen = [_part(algorithm.selection), _part(algorithm.shaping), sampling]
    return "; ".join(text for text in chosen if text != NONE) or NONE


COLUMNS: dict[str, Callable[[AlgorithmConfig], str]] = {
    "algorithm": lambda algorithm: f"[{algorithm.name}](../conf/algorithm/{algorithm.name}.yaml)",
    "source": lambda algorithm: _linked(algorithm.source),
    "group": lambda algorithm: str(algorithm.completions_per_prompt),
    "advantage": lambda algorithm: _part(algorithm.advantage),
    "ratio": lambda algorithm: _part(algorithm.ratio),
    "surrogate": lambda algorithm: _part(algorithm.surrogate),
    "aggregation": lambda algorithm: _part(algorithm.aggregation),
    "KL penalty": _kl,
    "correction": lambda algorithm: _part(algorithm.correction),
    "selection, shaping, sampling": _filters,
    "routing replay": lambda algorithm: algorithm.routing_replay.replace("disabled", NONE),
    "old log-probabilities": lambda algorithm: algorithm.old_logprobs,
    "critic": lambda algorithm: "yes" if algorithm.critic else NONE,
    "steps": lambda algorithm: str(algorithm.steps_per_batch),
}

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m harness.algorithms", description=__doc__).parse_args()
    print(document([entry(name) for name in entries()]))
