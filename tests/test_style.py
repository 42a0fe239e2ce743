"""The text of the code: its form, its width, its names; measured as `benchmarks/style.py` prints them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import style  # noqa: E402

PACKAGE = style.sources(ROOT / "normflow_vi")
WIDE = 100
COMMENT = re.compile(r"\s*(#|__all__|'|\")")  # lines that nbdev writes, or that hold a text alone


def ruff(*arguments):
    """What ruff says of notebooks, tests and benchmarks."""
    command = [Path(sys.executable).parent / "ruff", *arguments, "nbs", "tests", "benchmarks"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_format():
    done = ruff("format", "--check", "-q")
    assert done.returncode == 0, done.stdout + "run: make export"


def test_lint():
    done = ruff("check", "-q", "--output-format", "concise")
    assert done.returncode == 0, done.stdout


def test_lint_can_fail(tmp_path):
    (tmp_path / "bad.py").write_text("import os\nx = 1; y = 2\n")
    command = [Path(sys.executable).parent / "ruff", "check", "--config", ROOT / "pyproject.toml", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "F401" in done.stdout and "E702" in done.stdout


def test_width():
    """At most 5 % of the lines of code over 100 columns."""
    widths = style.widths(PACKAGE)
    assert sum(width > WIDE for width in widths) <= 0.05 * len(widths)


@pytest.mark.parametrize("folder", ["normflow_vi", "tests", "benchmarks"])
def test_one_thought_a_line(folder):
    assert sum(map(style.count_semicolons, style.sources(ROOT / folder))) == 0


def test_density():
    """Syntax nodes a line, over all lines of the package."""
    assert style.nodes_per_line(PACKAGE) <= 7


def test_parameters_one_keeps_in_mind():
    assert style.crowded(PACKAGE) == []


def test_no_deep_ladder():
    deep = {name: depth for name, depth in style.ladders().items() if depth > 3}
    assert not deep


def test_public_names_are_few():
    assert len(style.public_names()) <= 200


def test_public_names_are_annotated():
    missing = [entry for name in style.public_names() for entry in style.unannotated(name)]
    assert not missing


def test_nothing_is_evaluated_for_its_side_effect():
    """No statement that is a comparison, a condition or a boolean."""
    import ast

    kinds = (ast.BoolOp, ast.IfExp, ast.Compare, ast.ListComp)
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr):
                assert not isinstance(node.value, kinds), f"{path.name}, line {node.lineno}"
