"""Importing the package is cheap, and changes nothing but the table of modules."""

import ast
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import normflow_vi
from helpers import MODULES
from normflow_vi import experiments

ROOT = Path(__file__).parent.parent


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_import_is_light():
    "Beyond what torch itself brings, nothing is imported that a user of the library may not have."
    loaded = json.loads(
        python(
            "import json, sys, torch; before = set(sys.modules); import normflow_vi; "
            "print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))"
        )
    )

    def names(modules):
        return {module.split(".")[0] for module in modules}

    allowed = names(loaded[0]) | sys.stdlib_module_names | {"normflow_vi"}
    assert names(loaded[1]) <= allowed, names(loaded[1]) - allowed
    assert not names(loaded[1]) & set(
        "pandas seaborn matplotlib papermill nbdev nbformat numba sklearn scipy sphinx tqdm IPython".split()
    )


def test_import_is_cheap():
    """At most half a second more than torch alone: processor time, median of three, so that a busy
    machine does not decide.
    """
    code = (
        "import time, torch; start = time.process_time(); import normflow_vi; "
        "print(time.process_time() - start)"
    )
    assert statistics.median(float(python(code)) for _ in range(3)) < 0.5


def test_import_has_no_side_effects():
    state = (
        "torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), "
        "torch.backends.cudnn.benchmark, torch.random.get_rng_state().sum().item(), random.getstate(), "
        "signal.getsignal(2), logging.root.handlers, os.getcwd(), "
        "dict(os.environ), warnings.filters, sorted(vars(torch.distributions.Distribution)), "
        "sorted(vars(torch.nn.Module))"
    )
    before, after = python(
        "import os, sys, random, signal, logging, warnings, torch\n"
        f"state = lambda: repr(({state})); random.seed(0); print(state())\nimport normflow_vi; print(state())"
    ).splitlines()
    assert before == after


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_exists(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.{public}"


@pytest.mark.parametrize("name", "Flow Chain Inverse fit load_data VAE VMoNF".split())
def test_front_door(name):
    assert callable(getattr(normflow_vi, name))


def test_version():
    assert normflow_vi.__version__ in (ROOT / "CHANGELOG.md").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "normflow_vi.__version__"


def test_lock():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert "torch==2.13.0" in lines
    assert all("==" in line and "://" not in line and "+" not in line for line in lines)


# The folders of the package are its floors, the lowest first; a module outside a folder stands on a
# floor of its own.
FLOORS = (
    {"utils"},
    {"numerics", "engine", "results", "plots"},
    {"data", "transforms"},
    {"flows", "targets"},
    {"objectives", "models", "testing"},
    {"evaluate"},
    {"fitting"},
    {"experiments"},
    {"reproduce"},
    {"cli"},
)
PACKAGE = ROOT / "normflow_vi"
FRONT = {"__init__", "__main__", "_modidx"}  # the front door opens on every floor


def rooms_of(package=PACKAGE):
    """The folders and single modules of the package, by name."""
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    return folders | {path.stem for path in package.glob("*.py")} - FRONT


def imported_rooms(path, package=PACKAGE):
    """The rooms that the import statements of a file name, inside functions too."""
    parts = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            target = [*base, *node.module.split(".")] if node.module else base
            if target[:1] == [package.name]:
                yield from target[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (name[1] for name in names if name[0] == package.name and len(name) > 1)


def upward_imports(package=PACKAGE):
    """`(file, room)` for each import of a room on a higher floor."""
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room not in FRONT:
            higher = [other for other in imported_rooms(path, package) if floor.get(other, -1) > floor[room]]
            wrong += [(str(path.relative_to(package)), other) for other in higher]
    return wrong


def test_every_room_has_its_floor():
    assert sorted(room for rooms in FLOORS for room in rooms) == sorted(rooms_of())


def test_imports_never_run_upward():
    assert upward_imports() == []


def test_an_import_that_runs_upward_is_noticed(tmp_path):
    """The check above can fail."""
    copy = tmp_path / "normflow_vi"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module = copy / "utils" / "files.py"
    module.write_text(module.read_text() + "\n\ndef late():\n    from ..flows import Flow\n")
    assert upward_imports(copy) == [("utils/files.py", "flows")]


def test_files_are_annotated():
    assert (PACKAGE / "py.typed").exists()


def test_what_a_checker_is_told_to_make_is_made():
    """Each file of codecheck.yml is the product of the experiment that its comment names."""
    text = (ROOT / "codecheck.yml").read_text()
    files = re.findall(r"file: figures/(\S+)\n\s+comment: .*--only (\w+)\)", text)
    assert len(files) == text.count("- file:") >= 10
    for file, name in files:
        assert file in experiments.get(name).products, (file, name)
