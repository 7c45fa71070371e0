"""Parts by kind and name. A part's settings are the keyword-only arguments of its function."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

from harness.errors import ConfigError
from harness.typed_values import fits, says

Part = TypeVar("Part", bound=Callable[..., Any])
Result = TypeVar("Result")

PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "advantage": {},
    "ratio": {},
    "surrogate": {},
    "aggregation": {},
    "correction": {},
    "selection": {},
    "shaping": {},
}


_FACTS = ("dtype", "shape", "device")  # of a tensor
_OURS = ("advantages", "correction", "objective", "selection", "shaping", "surrogates")


@cache
def load_parts() -> None:
    """Register the parts that come with us. Not on import, since they bring torch, which takes seconds."""
    for module in _OURS:
        import_module(f"harness.algorithms.{module}")


def register(kind: str, name: str, ordered: tuple[str, str] | None = None, **traits: bool) -> Callable[[Part], Part]:
    """Make a function available to `algorithm.<kind>.name`.

    Args:
        kind: one of the kinds in PARTS.
        name: what the configuration calls it.
        ordered: two settings of which the first must not be above the second.
        traits: facts for validation, e.g. ``clips=True`` for a surrogate, ``needs_critic=True`` for an advantage.

    Raises:
        ValueError: for an unknown kind, a name that is taken, or a setting without an annotation.
    """
    if kind not in PARTS:
        raise ValueError(f"unknown kind of part '{kind}'; the kinds are {', '.join(PARTS)}")

    def add(function: Part) -> Part:
        if name in PARTS[kind]:
            raise ValueError(f"{kind} '{name}' is already registered by {PARTS[kind][name].__module__}")
        for setting in inspect.signature(function).parameters.values():
            if setting.kind is setting.KEYWORD_ONLY and setting.annotation is setting.empty:
                raise ValueError(f"{kind} '{name}': annotate its setting {setting.name} with the type that it takes")
        for trait, value in {**traits, "ordered": ordered}.items():
            setattr(function, trait, value)
        PARTS[kind][name] = function
        return function

    return add


def part(kind: str, config: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that a part's configuration names, and its settings."""
    load_parts()
    settings = {key: value for key, value in config.items() if key != "name"}
    return PARTS[kind][config["name"]], settings


def call(kind: str, config: Mapping[str, Any], *arguments: Any, like: Result) -> Result:
    """What a part returns, held against its kind's contract, since a wrong shape may broadcast unnoticed.

    Args:
        kind: one of the kinds in PARTS.
        config: the part's configuration.
        arguments: what parts of this kind are given.
        like: an example of what they return: a tensor, None, or a tuple of these. Its type counts, and of tensors
            dtype, shape and device: nothing that a device would have to be waited for.

    Raises:
        ConfigError: for a part that returns something else, or writes into a tensor that it is given.
    """
    function, settings = part(kind, config)
    before = _versions(arguments)
    result = function(*arguments, **settings)
    who = f"algorithm.{kind}.name={config['name']}"
    if not _is_like(result, like):
        raise ConfigError(f"{who}: its function must return {_form(like)} here, and returned {_form(result)}")
    if _versions(arguments) != before:
        raise ConfigError(
            f"{who}: its function writes into a tensor that it is given and that others read after it; change a "
            "clone() of it instead"
        )
    return result


def _is_like(result: Any, example: Any) -> bool:
    if not isinstance(result, type(example)):
        return False
    if isinstance(example, tuple):
        return len(result) == len(example) and all(map(_is_like, result, example))
    return all(getattr(result, fact, None) == getattr(example, fact, None) for fact in _FACTS)


def _form(value: Any) -> str:
    """What `_is_like` compares, in words."""
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(map(_form, value))})"
    facts = [str(getattr(value, fact)) for fact in _FACTS if hasattr(value, fact)]
    return " ".join(["None" if value is None else type(value).__name__, *facts])


def _versions(arguments: tuple[Any, ...]) -> list[int]:
    """How often each tensor among the arguments, or in a tuple among them, has been written into."""
    flat = (leaf for argument in arguments for leaf in (argument if isinstance(argument, tuple) else (argument,)))
    return [getattr(leaf, "_version", 0) for leaf in flat]


def check_settings(kind: str, config: Mapping[str, Any]) -> None:
    """Hold a part's configuration against its function.

    Raises:
        ConfigError: for an unknown part, or a setting that is misspelt, absent or of another type.
    """
    key = f"algorithm.{kind}"
    name = config.get("name")
    if not isinstance(name, str) or name not in PARTS[kind]:
        raise ConfigError(f"{key}.name={name}: no such part; there are {', '.join(sorted(PARTS[kind]))}")
    function = PARTS[kind][name]
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    expected = {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    listing = ", ".join(expected) or "no settings"
    if strange := [setting for setting in config if setting not in ("name", *expected)]:
        without = " ".join(f"'~{key}.{setting}'" for setting in strange)
        raise ConfigError(
            f"{key}.{strange[0]}: '{name}' has no such setting; it takes {listing}. An entry that "
            f"inherits settings of another part derives from base instead; a single run takes them out with {without}"
        )
    for setting, value in config.items():
        if setting != "name" and not fits(value, expected[setting]):
            raise ConfigError(f"{key}.{setting}={value!r}: expected {says(expected[setting])}")
    for setting in expected:
        if setting not in config:
            raise ConfigError(f"{key}.{setting} is absent: '{name}' takes {listing}")
    low, high = function.ordered or ("", "")  # type: ignore[attr-defined]
    if None not in (config.get(low), config.get(high)) and config[low] > config[high]:
        raise ConfigError(f"{key}.{low}={config[low]} is above {key}.{high}={config[high]}: nothing lies between them")
