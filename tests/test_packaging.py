"""What a clone and an installed wheel hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import harness
from harness.config import compose

ROOT = Path(__file__).parent.parent
ENTRIES = sorted((ROOT / "conf").rglob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked as an installation would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    (archive,) = folder.glob("*.whl")
    zipfile.ZipFile(archive).extractall(folder / "site")
    return folder / "site"


def data_files(folder: Path) -> set[str]:
    """Everything below a folder that is not code, relative to it."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.suffix != ".py" and "__pycache__" not in path.parts}


def test_wheel_holds_every_configuration_entry(wheel):
    assert data_files(wheel / "harness" / "conf") == data_files(ROOT / "conf")


def test_wheel_holds_every_template_and_lm_eval_task(wheel):
    in_wheel = {name for name in data_files(wheel / "harness") if not name.startswith("conf/")}
    assert in_wheel == data_files(ROOT / "harness")


def test_wheel_installs_the_package_and_nothing_beside_it(wheel):
    assert {path.name for path in wheel.iterdir()} == {"harness", f"levelfield-{harness.__version__}.dist-info"}


def test_installed_wheel_composes_from_its_own_entries(wheel, tmp_path):
    imports = "from harness.config import compose; from harness.entries import conf_dir"
    code = f"{imports}; print(conf_dir()); print(compose(['algorithm=grpo']).label)"
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert printed.stdout.splitlines() == [str(wheel / "harness" / "conf"), "grpo-tiny_dense-chain_sum-s0"]


def test_every_imported_package_is_a_declared_dependency():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    extras = [line for extra, lines in PROJECT["optional-dependencies"].items() if extra != "dev" for line in lines]
    optional = {canonicalize_name(Requirement(line).name) for line in extras}
    brought = {"triton"}  # by torch's builds for a GPU, of the version that they want; imported where there is one
    distributions = packages_distributions()
    for path in (ROOT / "harness").rglob("*.py"):
        for package in imported_packages(path) - set(sys.stdlib_module_names) - {"harness"}:
            names = {canonicalize_name(name) for name in distributions.get(package, [package])}
            assert names & (declared | optional | brought), f"{path.relative_to(ROOT)} imports {package}: declare it"


def imported_packages(path: Path) -> set[str]:
    """The top-level names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt pins no {name}"
        assert pins[name] in requirement.specifier, f"constraints.txt pins {name}=={pins[name]}, outside {requirement}"


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_key_of_a_configuration_entry_is_explained(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "the first line says what the entry is"
    assert list(unexplained_keys(yaml.compose(text), text.splitlines())) == []


def unexplained_keys(node: yaml.MappingNode, lines: list[str], prefix: str = ""):
    """Keys with no comment on their line, right above it (the file's header aside), or on an ancestor."""
    header = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    for key, value in node.value:
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        end = key.end_mark if block else value.end_mark
        above = key.start_mark.line - 1
        commented_above = above >= header and lines[above].lstrip().startswith("#")
        if key.value == "defaults" or "#" in lines[end.line][end.column :] or commented_above:
            continue
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        groups = [part for part in parts if block and isinstance(part, yaml.MappingNode) and part.value]
        for group in groups:
            yield from unexplained_keys(group, lines, f"{prefix}{key.value}.")
        if not groups:
            yield f"{prefix}{key.value}"


def test_an_unexplained_key_is_found():
    text = "# Header.\nfirst: 1\nsecond: '# text' # why\nthird:\n  # why\n  inner: 1\n  outer: [1]\n"
    text += "fourth: # why\n  - inner: 1\nfifth:\n  - inner: 1 # why\n    outer: 1\n"
    assert list(unexplained_keys(yaml.compose(text), text.splitlines())) == ["first", "third.outer", "fifth.outer"]


def kept_results() -> list[str]:
    """Folders below results/ that are committed."""
    return re.findall(r"^!results/(\w+)/$", (ROOT / ".gitignore").read_text(encoding="utf-8"), re.MULTILINE)


def test_no_preset_runs_in_a_folder_of_kept_results():
    """Runs of later code would be refused there."""
    presets = [yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    assert "tuned" in kept_results()
    assert {preset["sweep"] for preset in presets}.isdisjoint(kept_results())


def test_no_file_mentions_a_path_of_one_machine():
    personal = re.compile(rb"(?<![\w.~-])/(?:home|root|work|workspace|scratch|private|tmp|Users)/\w")
    folders = [ROOT / name for name in (".ci", "conf", "harness", "scripts", "tests")]
    folders += [ROOT / "results" / name for name in kept_results()]
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    mentions = [path for path in files if "__pycache__" not in path.parts and personal.search(path.read_bytes())]
    assert mentions == []


@pytest.mark.parametrize("name", ["benchmark", "compare", "test"])
@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_a_script_prints_its_usage_before_it_sets_up_anything(tmp_path, name, asked):
    scripts = shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shown = subprocess.run([scripts / name, "first", asked], capture_output=True, text=True, cwd=scripts)
    assert shown.returncode == 0 and shown.stdout.startswith("Sets up what is missing, ") and shown.stderr == ""
    assert f"\n  scripts/{name} " in shown.stdout and "set -euo" not in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_compare_reports_on_the_folder_that_its_overrides_name(tmp_path, quote):
    scripts, python = shutil.copytree(ROOT / "scripts", tmp_path / "scripts"), tmp_path / ".venv" / "bin" / "python"
    (scripts / "_setup").write_text("setup_environment() { :; }\n")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$*\"\n")
    python.chmod(0o755)
    results = tmp_path / ("a b" if quote else "ab")
    (results / "mine").mkdir(parents=True)
    overrides = [f"results={quote}{results}{quote}", f"sweep={quote}mine{quote}"]
    shown = subprocess.run([scripts / "compare", *overrides], capture_output=True, text=True, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[1:] == [f"-m harness.report {results}/mine"]


def test_the_map_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_the_algorithm_of_the_readme_composes(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    entry = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0]
    name = yaml.safe_load(entry)["name"]
    assert f"algorithm=gspo,{name} " in text
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm" / f"{name}.yaml").write_text(entry, encoding="utf-8")
    algorithm = compose([f"algorithm={name}"], config_dir=tmp_path).algorithm
    assert algorithm.name == name and algorithm.advantage["scale"] == "none" and algorithm.kl.coefficient > 0


def test_scripts_take_the_first_python_that_has_what_they_need(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)

    def found(code: str, *candidates: str) -> str:
        command = ["bash", "-c", 'source scripts/_setup; find_python "$0"', code]
        environment = {**os.environ, "PYTHON": " ".join(candidates)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.strip()

    assert found("", "/nowhere/python", str(bare), sys.executable) == str(bare)
    assert found("import yaml", str(bare), sys.executable) == sys.executable
    assert found("import yaml", str(bare)) == ""
