"""One thread a process, one seed a test; `--fast` leaves out the tests that `slow.txt` names."""

import os
import signal
import sys
from pathlib import Path

# The suite runs as several processes, and results must not depend on how many cores there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from small_project import make_project

# Ctrl-C is ignored in what a shell runs in the background, and by what that starts; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = Path(__file__).parent / "slow.txt"
SECONDS = 0.3  # a test that takes longer, over all its parameters together, is slow


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only tests that slow.txt does not name")
    parser.addoption("--note-slow", action="store_true", help="write slow.txt from the times of this run")


def name_of(nodeid):
    """A test's file and function, without its parameters."""
    return nodeid.partition("[")[0]


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--fast"):
        return
    slow = set(SLOW.read_text().split())
    left = [item for item in items if name_of(item.nodeid) in slow]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if name_of(item.nodeid) not in slow]


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--note-slow"):
        return
    seconds = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports(""):
        name = name_of(report.nodeid)
        seconds[name] = seconds.get(name, 0) + report.duration
    slow = sorted(name for name, total in seconds.items() if total > SECONDS)
    SLOW.write_text("\n".join(slow) + "\n")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "The folder of a small project, in which the test runs."
    make_project(tmp_path)
    for name, value in {"ROOT": tmp_path, "EXPERIMENTS": "trial_experiment"}.items():
        monkeypatch.setenv(f"NORMFLOW_VI_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMFLOW_VI_PARENT", raising=False)
    sys.modules.pop("trial_experiment", None)
    yield tmp_path
    sys.modules.pop("trial_experiment", None)
