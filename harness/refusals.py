"""What Hydra and YAML refuse of an override or an entry, in a line that says what may have been meant."""

import traceback
from collections.abc import Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from harness.config import RunConfig
from harness.errors import ConfigError

# What composing a configuration raises of its own; of entries without an end, Python's error.
REFUSED = (HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError)
_NO_ENTRY = "Config group override"  # how Hydra's error for null or a number in place of an entry begins
# Entries that are there where an extra of ours is installed, and which.
_EXTRAS = {
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
}


def refusal(error: Exception) -> ConfigError:
    """One of :data:`REFUSED`, as the error of a configuration that cannot run.

    Raises:
        ValueError: as it came where it is not Hydra's: a ConfigError, which says it already, or a mistake of ours.
    """
    cause = error.__cause__
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return ConfigError(f"{mark.name}, line {mark.line + 1}: this is not YAML: {error.problem}")
    if isinstance(error, UnicodeDecodeError):
        return ConfigError(f"an entry is not UTF-8 ({error}): save it as UTF-8")
    if isinstance(error, RecursionError):
        return ConfigError("an entry has itself among its defaults, or among theirs: take it out of there")
    if type(error) is ValueError and str(error).startswith(_NO_ENTRY):
        return ConfigError("an entry is chosen by its name, e.g. algorithm=grpo; null and numbers are no names")
    if isinstance(error, ValueError) and not _is_hydras(error):
        raise error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        name = error.missing_cfg_file.rpartition("/")[2]
        extra = _EXTRAS.get(error.missing_cfg_file)
        comes = f"; it comes with pip install -e '.[{extra}]'" if extra else ""
        return ConfigError(f"{error.missing_cfg_file}: no such entry; {_nearest(name, error.options)}{comes}")
    if isinstance(error, OverrideParseException):
        quote = "; quote a value with spaces, accents or braces: \"KEY='…'\"" if "=" in error.override else ""
        return ConfigError(f"{error.override}: not KEY=VALUE as Hydra reads it: {_first(error.message)}{quote}")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return ConfigError(_no_such_key(str(cause.full_key), [str(key) for key in cause.parent_node]))
    return ConfigError(_first(f"{error}\n\n{cause or ''}"))


def _is_hydras(error: Exception) -> bool:
    """Whether Hydra or OmegaConf raised it: the harness raises ValueErrors too, while a configuration is checked."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals["__name__"].partition(".")[0] in ("hydra", "omegaconf")


def _no_such_key(key: str, others: list[str]) -> str:
    above, _, name = key.rpartition(".")
    if not others:
        return f"{key}: no such key; {above} is null, or one value without keys"
    adding = f"; +{key}=… adds it, where its part or entry takes it" if _is_open(key) else ""
    return f"{key}: no such key; {_nearest(name, others)}{adding}"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, names)
    return f"near it are {', '.join(near)}" if near else f"there are {', '.join(names)}"


def _is_open(key: str) -> bool:
    """Whether the schema leaves it to an entry which keys stand beside this one."""
    schema: Any = RunConfig
    for name in key.split(".")[:-1]:
        annotation = get_type_hints(schema).get(name)
        schema = next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)
        if schema is None:
            return True
    return False


def _first(text: str) -> str:
    """The first paragraph on one line, without Hydra's advice to add what would be refused."""
    paragraph = text.strip().partition("\n\n")[0]
    lines = (line for line in paragraph.splitlines() if not line.startswith(("To append", "See https")))
    return " ".join(" ".join(lines).split())
