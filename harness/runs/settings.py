"""What tells runs of one name apart: the settings in which they differ."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from harness.config import CITATION, NOT_NUMBERS

# Where a run writes, never what it computes; and what a mean is taken over.
_NOT_SETTINGS = (*NOT_NUMBERS, "seed")

_Key = TypeVar("_Key", bound=Hashable)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def distinct(values: list[Any]) -> list[Any]:
    """The different values, in order; works for lists and dicts too."""
    return list({repr(value): value for value in values}.values())


def differences(configs: Mapping[_Key, Mapping[str, Any]]) -> dict[_Key, str]:
    """For each run the settings, but for the seed, that are not the same in all: `minibatches=8, learning_rate=0.0002`.

    Args:
        configs: resolved configurations by run; an empty one is not known, and told apart from nothing.
    """
    flat = {
        run: flatten({key: value for key, value in config.items() if key not in _NOT_SETTINGS})
        for run, config in configs.items()
        if config
    }
    keys = dict.fromkeys(key for settings in flat.values() for key in settings if key != CITATION)
    differing = [key for key in keys if len(distinct([settings.get(key) for settings in flat.values()])) > 1]
    return {
        run: ", ".join(f"{_short(key)}={flat[run].get(key)}" for key in differing) if run in flat else ""
        for run in configs
    }


def _short(key: str) -> str:
    """The end of a dotted key that says what it is: `learning_rate`, but `ratio.name`."""
    return ".".join(key.split(".")[-2 if key.endswith(".name") else -1 :])
