"""Dataclasses from what YAML declares, every key checked."""

from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from harness.errors import ConfigError
from harness.typed_values import fits, says


def build(schema: Any, values: Any, where: str = "") -> Any:
    """An instance of a dataclass from a mapping that has exactly its fields.

    Fields are text, finite numbers, booleans, null, choices (`Literal`), dataclasses, lists (`tuple[X, ...]`), or
    `Annotated[Any, {name: dataclass}]`: the dataclass that the key `kind` names, from the other keys.

    Args:
        where: the mapping's place in the file, for messages: empty, or ending with a dot.

    Raises:
        ConfigError: naming the key, what is wrong with it and what to change; also of the dataclass's own rules.
    """
    hints = get_type_hints(schema, include_extras=True)
    keys = ", ".join(hints)
    if not isinstance(values, dict):
        raise ConfigError(f"{where.rstrip('.') or 'the file'} is {values!r}: give a mapping of the keys {keys}")
    for key in values:
        if key not in hints:
            raise ConfigError(f"{where}{key}: no such key; the keys here are {keys}")
    for key in hints:
        if key not in values:
            raise ConfigError(f"{where}{key} is absent: the keys here are {keys}")
    fields = {key: _value(hint, values[key], f"{where}{key}") for key, hint in hints.items()}
    try:
        return schema(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error


def _value(hint: Any, value: Any, key: str) -> Any:
    if get_origin(hint) is Annotated:
        return _of_a_kind(get_args(hint)[1], value, key)
    if is_dataclass(hint):
        return build(hint, value, f"{key}.")
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value!r}: expected a list")
        return tuple(_value(get_args(hint)[0], item, f"{key}[{place}]") for place, item in enumerate(value))
    if not fits(value, hint):
        raise ConfigError(f"{key}={value!r}: expected {says(hint)}")
    return value


def _of_a_kind(kinds: dict[str, Any], value: Any, key: str) -> Any:
    if not isinstance(value, dict) or value.get("kind") not in kinds:
        given = value.get("kind") if isinstance(value, dict) else value
        raise ConfigError(f"{key}.kind={given}: no such kind; there are {', '.join(kinds)}")
    return build(kinds[value["kind"]], {name: own for name, own in value.items() if name != "kind"}, f"{key}.")
