"""What was equal in a sweep, checked on what its runs recorded, and what differed by design."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.analysis.sweep import Sweep
from harness.analysis.table import Table
from harness.analysis.tuning import tuning_summary
from harness.config import EQUAL_KEYS
from harness.runs.settings import distinct, flatten

_SIDE_BY_SIDE = 8  # variants that have room beside each other
_UNKNOWN = "not recorded"
_SPEEDS = 1.25  # that the updates of a variant's runs may lie apart, whose work is much the same


@dataclass(frozen=True)
class Check:
    """One line of the fairness contract: whether it held, and the values or the differences."""

    what: str
    equal: bool
    detail: str


def checks(sweep: Sweep) -> list[Check]:
    """Hold the cells that ran against the fairness contract. Skipped and planned cells have run nothing."""
    cells = _that_ran(sweep.cells)
    seeds = [_seeds(setting, group) for setting, group in _by(sweep.cells, "setting")]
    return [*_same_problem(cells), *seeds, *_same_conditions(cells), *speed_checks(sweep), _trials(sweep)]


def comparability(cells: pd.DataFrame) -> list[Check]:
    """The checks without which two runs are not comparable at all, whatever sweeps they are of."""
    cells = _that_ran(cells)
    return [*_same_problem(cells), *_same_conditions(cells)]


def unequal_sentences(sweep: Sweep) -> list[str]:
    """For the reader of a verdict: what made the runs differ beside their algorithms; nothing where nothing did."""
    unequal = [one.what for one in comparability(sweep.cells) if not one.equal and one.detail != _UNKNOWN]
    return [f"Not compared on equal terms, since runs differ in {'; '.join(unequal)}."] if unequal else []


def speed_checks(sweep: Sweep) -> list[Check]:
    """Whether the machine was as fast for one run of a variant as for the others; if not, seconds tell little.

    Variants are not held against each other. What sequences begin with alike is computed once and counted for each, so
    that the update of one variant takes more seconds a model FLOP than that of another.
    """
    if not {"flops/update", "seconds/update"} <= set(sweep.cells):
        return []
    done = sweep.finished(sweep.cells)
    speeds = (done["flops/update"] / done["seconds/update"]).groupby([done["setting"], done["variant"]], sort=False)
    ranges = speeds.agg(["min", "max", "count"]).query("count > 1")
    found = []
    for setting, by_variant in ranges.groupby("setting", sort=False):
        equal = bool((by_variant["max"] <= _SPEEDS * by_variant["min"]).all())
        listed = ", ".join(
            f"{variant} {low * 1e-9:.3g} to {high * 1e-9:.3g}"
            for variant, low, high in by_variant.droplevel("setting")[["min", "max"]].itertuples()
        )
        doubt = "" if equal else "; seconds say as much of what else the machine did as of the algorithms"
        detail = f"{listed} (model GFLOP a second of the update, slowest and fastest run){doubt}"
        found.append(Check(f"speed of the machine on {setting}", equal, detail))
    return found


def algorithm_differences(sweep: Sweep) -> Table:
    """The algorithm settings in which the variants that ran differ, side by side; of many, what is unusual of each."""
    settings: dict[str, dict[str, list[Any]]] = {}
    cells = _that_ran(sweep.cells)
    cells = sweep.cells if cells.empty else cells
    for variant, config in zip(cells["variant"], cells["config"], strict=True):
        for key, value in flatten(_section(config, "algorithm")).items():
            if key not in ("name", "source"):
                settings.setdefault(key, {}).setdefault(variant, []).append(value)
    ran = [variant for variant in sweep.variants if any(variant in values for values in settings.values())]
    rows = []
    for key, values in settings.items():
        if any(other.startswith(f"{key}.") for other in settings):
            continue  # null for some, a group for others: its keys tell
        texts = {variant: " / ".join(map(_plain, distinct(values.get(variant, [])))) for variant in ran}
        if len(set(texts.values())) > 1:
            rows.append({"setting": key, **texts})
    title, frame = "What differs between the algorithms", pd.DataFrame(rows)
    if len(ran) <= _SIDE_BY_SIDE or frame.empty:
        note = "Only the settings that differ. A dash: the algorithm has no such setting. What is not listed is equal."
        return Table("algorithm_settings", title, note, frame)
    usual, part = _unusual(frame, ran)
    note = (
        "Of each algorithm the settings that are not as most have them. A dash: it has no such setting. What is listed "
        "nowhere is equal. The CSV has all settings that differ, side by side."
    )
    return Table("algorithm_settings", title, note, frame, part=part, remarks=[f"Most have {usual}."])


def _unusual(frame: pd.DataFrame, variants: list[str]) -> tuple[str, pd.DataFrame]:
    """The settings that most have, in words, and a line for each variant with those that it has otherwise."""
    texts = frame.set_index("setting")[variants]
    most = {key: Counter(line).most_common(1)[0][0] for key, line in zip(texts.index, texts.to_numpy(), strict=True)}
    rows = [
        {"algorithm": name, "unlike most": _listed({key: own for key, own in texts[name].items() if own != most[key]})}
        for name in variants
    ]
    return _listed({key: text for key, text in most.items() if text}), pd.DataFrame(rows)


def _listed(settings: dict[Any, str]) -> str:
    return "; ".join(f"{key}: {text or '–'}" for key, text in settings.items())


def _that_ran(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[~cells["status"].isin(["skipped", "planned"])]


def _same_problem(cells: pd.DataFrame) -> list[Check]:
    """A model or a task of one name is one model and one task."""
    found = []
    for model, group in _by(cells, "model"):
        found.append(_one_value(f"initial weights of {model}", group["initial_weights"]))
        found.append(_settings(f"model settings of {model}", group, "model"))
    found += [_settings(f"prompts: settings of task {task}", group, "task") for task, group in _by(cells, "task")]
    recorded = [inputs for inputs in cells["inputs"] if isinstance(inputs, dict)]
    for name in dict.fromkeys(name for inputs in recorded for name in inputs):
        found.append(_one_value(f"content of {name}", pd.Series([inputs.get(name) for inputs in recorded])))
    return found


def _same_conditions(cells: pd.DataFrame) -> list[Check]:
    settings = [_settings(f"{section} settings", cells, section) for section in EQUAL_KEYS]
    code, device = _one_value("code that affects numbers", cells["code"]), _one_value("device model", cells["device"])
    return [*settings, code, device, _packages(cells)]


def _packages(cells: pd.DataFrame) -> Check:
    """Whether all ran with the same versions of libraries, which decide prompts, arithmetic and scores."""
    recorded = [packages for packages in cells["packages"] if isinstance(packages, dict)]
    if not recorded:
        return Check("package versions", False, _UNKNOWN)
    names = sorted(set().union(*recorded))
    versions = {name: distinct([packages.get(name) for packages in recorded]) for name in names}
    differing = [f"{name}: {' against '.join(map(_plain, own))}" for name, own in versions.items() if len(own) > 1]
    alike = ", ".join(f"{name} {found[0]}" for name, found in versions.items())
    return Check("package versions", not differing, "; ".join(differing) or alike)


def _by(cells: pd.DataFrame, column: str) -> Iterable[tuple[Any, pd.DataFrame]]:
    return cells.groupby(column, sort=False)


def _one_value(what: str, values: pd.Series) -> Check:
    found = [str(value) for value in values.dropna().unique()]
    if not found:
        return Check(what, False, _UNKNOWN)
    return Check(what, len(found) == 1, ", ".join(found))


def _settings(what: str, cells: pd.DataFrame, section: str) -> Check:
    """Whether a section of config.yaml is the same in all cells; of equal limits that which ended the runs is told."""
    flat = [flatten(_section(config, section), f"{section}.") for config in cells["config"] if config]
    if not flat:
        return Check(what, False, _UNKNOWN)
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: distinct([settings.get(key) for settings in flat]) for key in keys}
    differing = [f"{key}: {' against '.join(map(_plain, found))}" for key, found in values.items() if len(found) > 1]
    if differing:
        return Check(what, False, "; ".join(differing))
    limits = f"{section}.limits."
    acting = f"{limits}{values.get(f'{section}.axis', [''])[0]}"
    told = [key for key in keys if key == acting or not key.startswith(limits)]
    return Check(what, True, "; ".join(f"{key.removeprefix(f'{section}.')}: {_plain(values[key][0])}" for key in told))


def _section(config: dict[str, Any], section: str) -> dict[str, Any]:
    value = config.get(section)
    return value if isinstance(value, dict) else {section: value}


def _seeds(setting: str, cells: pd.DataFrame) -> Check:
    """Whether every variant has the same seeds, and so the same stream of prompts."""
    seeds = {variant: tuple(sorted(group["seed"].dropna().astype(int))) for variant, group in _by(cells, "variant")}
    different = set(seeds.values())
    if len(different) == 1:
        return Check(f"seeds on {setting}", True, ", ".join(map(str, next(iter(different)))))
    return Check(f"seeds on {setting}", False, "; ".join(f"{name}: {own}" for name, own in seeds.items()))


def _trials(sweep: Sweep) -> Check:
    """Whether every algorithm got as many tuning trials as the others, from its own declared space."""
    return Check("tuning trials", *tuning_summary(sweep))


def _plain(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
