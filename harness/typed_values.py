"""Whether a value from YAML is what an annotation says, and what to say where it is not."""

import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

_NAMES = {str: "text", int: "an integer", float: "a finite number", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, as the metadata of an annotation; without ``least`` itself if ``above``."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.least < value if self.above else self.least <= value) and value <= self.most

    def __str__(self) -> str:
        most = f" and at most {self.most:g}" if math.isfinite(self.most) else ""
        return f"{'above' if self.above else 'at least'} {self.least:g}{most}"


NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
AboveOne = Annotated[float, Range(1, above=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Count = Annotated[int, Range(1)]


def fits(value: Any, hint: Any) -> bool:
    """Whether it is of the type: text, an integer, a finite number, a truth value, null, a choice (`Literal`), one of
    several (`X | Y`), or a number in a range (`Annotated` with :class:`Range`)."""
    if get_origin(hint) is Annotated:
        kind, *ranges = get_args(hint)
        return fits(value, kind) and all(value in allowed for allowed in ranges)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def says(hint: Any) -> str:
    """The type in words."""
    if get_origin(hint) is Annotated:
        kind, *ranges = get_args(hint)
        return " ".join([says(kind), *map(str, ranges)])
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if isinstance(hint, UnionType):
        return " or ".join(map(says, get_args(hint)))
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
