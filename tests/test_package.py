"""Importing the package is cheap, and changes nothing but the table of modules."""

import importlib
import json
import pkgutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import normflow_vi

ROOT = Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(normflow_vi.__path__, "normflow_vi."))


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
    names = lambda modules: {module.split(".")[0] for module in modules}
    allowed = names(loaded[0]) | sys.stdlib_module_names | {"normflow_vi"}
    assert names(loaded[1]) <= allowed, names(loaded[1]) - allowed
    assert not names(loaded[1]) & set(
        "pandas seaborn matplotlib papermill nbdev nbformat numba sklearn scipy sphinx tqdm IPython".split()
    )


def test_import_is_cheap():
    "At most half a second more than torch alone: processor time, median of three, so that a busy machine does not decide."
    code = "import time, torch; start = time.process_time(); import normflow_vi; print(time.process_time() - start)"
    assert statistics.median(float(python(code)) for _ in range(3)) < 0.5


def test_import_has_no_side_effects():
    state = (
        "torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark, "
        "torch.random.get_rng_state().sum().item(), random.getstate(), signal.getsignal(2), logging.root.handlers, os.getcwd(), "
        "dict(os.environ), warnings.filters, sorted(vars(torch.distributions.Distribution)), sorted(vars(torch.nn.Module))"
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


@pytest.mark.parametrize("name", "Flow Chain Inverse fit load_data VAE".split())
def test_front_door(name):
    assert callable(getattr(normflow_vi, name))


def test_version():
    assert normflow_vi.__version__ in (ROOT / "CHANGELOG.md").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        settings["project"]["dynamic"] == ["version"]
        and settings["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "normflow_vi.__version__"
    )


def test_lock():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert "torch==2.13.0" in lines and all(
        "==" in line and "://" not in line and "+" not in line for line in lines
    )


FLOORS = [
    "files settings",
    "testing transforms networks plots targets schools contract cases",
    "flows tracing",
    "objectives gradients annealed evaluate placing diagnosis",
    "data checkpoint training records fitted fitting calibration",
    "likelihoods posteriors",
    "vae",
    "gaps",
    "experiments",
    "runner status report cli readme",
]


def test_imports_never_run_upward():
    "Each module's floor is at least as high as that of every module of the package that it names in an import."
    import ast

    floor = {name: height for height, names in enumerate(FLOORS) for name in names.split()}
    wrong = []
    for path in (ROOT / "normflow_vi").rglob("*.py"):
        name = path.relative_to(ROOT / "normflow_vi").parts[0].removesuffix(".py")
        if name.startswith("_"):
            continue
        package = ["normflow_vi", *path.relative_to(ROOT / "normflow_vi").parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module or "").split(".")] if node.module else base
            if target[:1] != ["normflow_vi"]:
                continue
            names = [target[1]] if len(target) > 1 else [alias.name for alias in node.names]
            wrong += [
                f"{name} imports {other}" for other in names if other in floor and floor[other] > floor[name]
            ]
    assert not wrong
