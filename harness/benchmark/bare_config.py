"""A run's configuration from the YAML entries without Hydra, for machines where Hydra is not installed."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import yaml

from harness.config import RunConfig
from harness.entries import entry_files


def bare_config(groups: Mapping[str, str], overrides: Mapping[str, Any]) -> RunConfig:
    """The typed configuration of the groups that are named; all other values are None.

    Args:
        groups: entry by group, e.g. ``{"algorithm": "grpo"}``; entries may build on others of their group.
        overrides: nested values that go before the entries'.
    """
    values = {group: entry(group, name) for group, name in groups.items()}
    return _typed(RunConfig, _merged(values, overrides))


def entry(group: str, name: str) -> dict[str, Any]:
    """The values of an entry, over those of its `defaults` in the same group."""
    values: dict[str, Any] = {}
    for file in entry_files(group, name):
        values = _merged(values, yaml.safe_load(file.read_text(encoding="utf-8")))
    values.pop("defaults", None)
    return values


def _merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if nested else value
    return result


def _typed(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of nested dataclasses."""
    hints = get_type_hints(kind)
    return kind(**{field.name: _nested(hints[field.name], values.get(field.name)) for field in fields(kind)})


def _nested(hint: Any, value: Any) -> Any:
    kind = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
    return _typed(kind, value) if kind and isinstance(value, Mapping) else value
