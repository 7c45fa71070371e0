"""The folders of YAML entries that configurations are composed of, and what cannot stand in them."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from harness.config import RunConfig
from harness.errors import ConfigError

if TYPE_CHECKING:
    from hydra.conf import HydraConf


def conf_dir() -> Path:
    """The folder of the YAML entries: inside an installed wheel, or beside the package in a clone."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def entry_files(group: str, name: str) -> list[Path]:
    """The files that an entry is made of: those of its `defaults` in the same group and its own, each over the ones
    before it, as Hydra composes them.

    Raises:
        FileNotFoundError: where there is none of that name.
    """
    file = conf_dir() / group / f"{name}.yaml"
    names = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    names = names if "_self_" in names else [*names, "_self_"]
    return [found for one in names for found in ([file] if one == "_self_" else entry_files(group, one))]


def check_names(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder of further entries where one is taken for one of ours.

    Hydra would silently take ours for a file of the same name, but for claims, which it does not read: there theirs
    replaces ours. Runs are named by the `name` of algorithm, model and task.

    Raises:
        ConfigError: naming the first such entry.
    """
    ours = conf_dir()
    for file in sorted(ours.rglob("*.yaml")):
        name = file.relative_to(ours)
        theirs = Path(folder) / name
        if name.parts[0] != "claims" and theirs.exists() and not theirs.samefile(file):
            raise ConfigError(
                f"--config-dir {folder}: {name.as_posix()} has the name of an entry of ours, which would be taken "
                "instead; give it another name"
            )
    for group in ("algorithm", "model", "task"):
        for file in sorted(path for path in Path(folder, group).glob("*.yaml") if path.is_file()):
            text = file.read_text(encoding="utf-8", errors="replace")
            for called in re.findall(r"^name: *[\"']?([\w.-]+)", text, re.MULTILINE):
                entry = ours / group / f"{called}.yaml"
                if entry.exists() and not entry.samefile(file):
                    raise ConfigError(
                        f"--config-dir {folder}: {group}/{file.name} has the name: {called} of an entry of ours, so "
                        "that their runs could not be told apart; give it another name"
                    )


def check_sources(hydra: "HydraConf") -> None:
    """As :func:`check_names`, for all folders that a command line takes its entries from.

    Args:
        hydra: the command's `hydra` node.
    """
    for source in hydra.runtime.config_sources:
        if source.schema == "file":
            check_names(source.path)


def check_choices(hydra: "HydraConf") -> None:
    """Refuse a list of entries where one is to be chosen, which Hydra would merge, each over the one before it.

    Args:
        hydra: the `hydra` node of what was composed.

    Raises:
        ConfigError: naming the group.
    """
    for group in sorted(entry.name for entry in conf_dir().iterdir() if entry.name in RunConfig.__annotations__):
        if group not in hydra.runtime.choices:
            raise ConfigError(
                f"{group}: name one entry, or with -m several of them without brackets, {group}=A,B; a list in "
                f"brackets would merge its entries into one, and ~{group} leaves none"
            )
