"""The notebooks are the source: clean, of one kind each, in step with the package, and they run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
MAX_LINES, MAX_CLASS_LINES, MAX_COLUMNS = 40, 60, 110  # of an export cell
APPENDIX = ("80_plans", "90_engine")
LINES_AN_ASSERTION = 60  # of exported code, at most, for each cell that asserts, and one besides


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def is_export(cell):
    return cell["cell_type"] == "code" and re.search(r"^#\|\s*export", source(cell), re.M)


def is_experiment(path):
    return any("parameters" in tags(cell) for cell in cells(path))


LIBRARY = [path for path in NOTEBOOKS if any(map(is_export, cells(path)))]
SHOWS = [
    path for path in NOTEBOOKS if not (path in LIBRARY or is_experiment(path) or path.name == "index.ipynb")
]


@each
def test_is_clean(path):
    book = json.loads(path.read_text())
    ids = [cell.get("id") for cell in book["cells"]]
    assert all(ids), "every cell has an id of its own"
    assert len(set(ids)) == len(ids), "every cell has an id of its own"
    for cell in book["cells"]:
        assert set(cell["metadata"]) <= {"tags"}, "cells carry no metadata but tags"
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "no outputs in the source"
            assert cell["execution_count"] is None, "no outputs in the source"
    assert path.read_text() == json.dumps(book, sort_keys=True, indent=1, ensure_ascii=False) + "\n", (
        "as nbdev writes it"
    )


@each
def test_is_of_one_kind(path):
    """A library page exports, an experiment has one parameters cell, a page that only shows asserts."""
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    exports = [cell for cell in code if is_export(cell)]
    parameters = [cell for cell in code if "parameters" in tags(cell)]
    default_exp = [cell for cell in code if re.search(r"^#\|\s*default_exp", source(cell), re.M)]
    if path.name == "index.ipynb":
        assert not exports
        assert not parameters
    elif parameters:
        assert len(parameters) == 1
        assert not exports
        assert not default_exp
    elif exports:
        assert len(default_exp) == 1
    else:
        assert not default_exp
        assert any(re.search(r"\bassert\b", source(cell)) for cell in code)


def count_code(text):
    """The lines of a cell that hold code: no comments, no docstrings, no empty lines."""
    lines = sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines -= ast.get_docstring(node, clean=False).count("\n") + 1
    return lines


def check_size(text):
    """An export cell fits a screen: its lines, those of a class, and their width."""
    lines = [line for line in text.splitlines() if not line.startswith("#|")]
    allowed = MAX_CLASS_LINES if re.search(r"^class ", text, re.M) else MAX_LINES
    assert len(lines) <= allowed, f"{len(lines)} lines: {lines[0]}"
    assert max(map(len, lines)) <= MAX_COLUMNS, max(lines, key=len)


def test_size_can_fail():
    check_size("#| export\n" + "x = 1\n" * MAX_LINES)
    check_size("#| export\nclass A:\n" + "    x = 1\n" * (MAX_CLASS_LINES - 1))
    for text in ("x = 1\n" * (MAX_LINES + 1), "x" * (MAX_COLUMNS + 1)):
        with pytest.raises(AssertionError):
            check_size(text)


@each
def test_is_written_to_be_read(path):
    exports = [source(cell) for cell in cells(path) if is_export(cell)]
    for text in exports:
        check_size(text)
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    asserting = sum(bool(re.search(r"\bassert\b|expect_fail", text)) for text in code)
    if path.parent.name not in APPENDIX:
        assert asserting >= 0.5 * len(exports), f"{len(exports)} export cells, {asserting} cells that assert"
    lines = sum(map(count_code, exports))
    assert lines <= LINES_AN_ASSERTION * (asserting + 1), (
        f"{lines} exported lines, {asserting} cells that assert"
    )
    first = cells(path)[0]
    assert first["cell_type"] == "markdown", "begins with a title"
    assert source(first).startswith("# "), "begins with a title"


DRAWS = r"torch\.(rand|randn|randperm|randint|bernoulli)\b|\b(Flow|Trainer|VAE|MLP|Planar)\("


@pytest.mark.parametrize("path", LIBRARY + SHOWS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_draws_the_same_numbers_at_every_run(path):
    """Torch starts with a seed of its own in every process; a page that draws begins by setting it,
    so that what it asserts does not depend on luck.
    """
    seeded = False
    for cell in cells(path):
        if cell["cell_type"] != "code" or is_export(cell):
            continue
        seeded = seeded or "torch.manual_seed(" in source(cell)
        assert seeded or not re.search(DRAWS, source(cell))


@each
def test_names_no_machine(path):
    assert not re.search(r"(?<![\w.])/(home|root|work|Users)/", path.read_text()), (
        "a path of somebody's machine"
    )


@each
def test_a_cell_that_must_not_run_runs_nowhere(path):
    for cell in cells(path):
        if re.search(r"^#\|\s*eval:\s*false", source(cell), re.M):
            assert "skip-execution" in tags(cell), "papermill would run it"


def modules_of_pages():
    """The page that exports each module, `{module: page}`."""
    found = {}
    for path in NOTEBOOKS:
        for name in re.findall(r"^#\|\s*default_exp (\S+)", "\n".join(map(source, cells(path))), re.M):
            found["normflow_vi." + name.removesuffix(".__init__")] = path
    return found


def imports_of(text):
    """The modules that the import statements of a piece of code name, as dotted names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forward_imports(pages, modules):
    """`(page, later page)` for exported code that imports from a page further on."""
    place = {path: i for i, path in enumerate(pages)}
    wrong = []
    for path in pages:
        exported = "\n".join(source(cell) for cell in cells(path) if is_export(cell))
        later = {modules[name] for name in imports_of(exported) if name in modules}
        wrong += [(path.name, other.name) for other in later if place.get(other, -1) > place[path]]
    return wrong


CHAPTERS = [path for path in NOTEBOOKS if path.parent.name not in APPENDIX and path.parent.name != "nbs"]


def test_reading_order_is_dependency_order():
    """What a page exports needs earlier pages only, and the appendix, which explains the tools."""
    assert forward_imports(CHAPTERS, modules_of_pages()) == []


def test_an_import_from_a_later_page_is_noticed():
    """The check above can fail."""
    assert forward_imports(CHAPTERS[::-1], modules_of_pages())


def export_into(folder):
    """The package as the committed notebooks export it."""
    for name in ("nbs", "normflow_vi"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    environment = {
        key: value for key, value in os.environ.items() if key != "IN_TEST"
    }  # nbdev exports nothing where it is set
    command = Path(sys.executable).parent / "nbdev-export"
    subprocess.run([command], cwd=folder, env=environment, check=True, capture_output=True, timeout=120)


def test_the_package_is_what_the_notebooks_export(tmp_path):
    export_into(tmp_path)
    exported, committed = (
        {path.relative_to(root): path.read_text() for path in (root / "normflow_vi").rglob("*.py")}
        for root in (tmp_path, ROOT)
    )
    assert exported.keys() == committed.keys()
    assert not [str(name) for name in exported if exported[name] != committed[name]], (
        "edit notebooks, then run nbdev-export"
    )


def test_an_edited_module_is_noticed(tmp_path, monkeypatch):
    """The check above can fail."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copytree(ROOT / "normflow_vi", tmp_path / "normflow_vi")
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    module = tmp_path / "normflow_vi" / "models" / "networks.py"
    module.write_text(module.read_text() + "\nx = 1\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_the_package_is_what_the_notebooks_export(tmp_path / "again")


# Twelve pages share one process, which imports torch once and runs each of them in a fork.
PAGES = LIBRARY + SHOWS
GROUPS = [PAGES[i : i + 12] for i in range(0, len(PAGES), 12)]
RUN = sys.executable, "-m", "tests.run_pages"


@pytest.mark.parametrize(
    "paths", GROUPS, ids=lambda paths: f"{paths[0].relative_to(ROOT / 'nbs')}, {len(paths)}"
)
def test_library_notebooks_run(paths):
    """As nbdev-test runs them; the names of those that fail come last."""
    done = subprocess.run([*RUN, *paths], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_a_page_that_fails_is_named(tmp_path):
    """The check above can fail."""
    good = PAGES[0]
    bad = tmp_path / "bad.ipynb"
    book = json.loads(good.read_text())
    next(cell for cell in book["cells"] if cell["cell_type"] == "code" and not is_export(cell))["source"] = [
        "assert False"
    ]
    bad.write_text(json.dumps(book))
    done = subprocess.run(
        [*RUN, bad, good],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode
    assert done.stderr.strip().endswith(str(bad))


def test_settings_of_notebook_tools():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["nbdev"]["allowed_cell_metadata_keys"] == ["tags"], (
        "nbdev-clean would delete the parameters tags"
    )
    assert any(
        re.fullmatch(r"nbdev==[\d.]+", need) for need in settings["project"]["optional-dependencies"]["dev"]
    ), "nbdev is pinned exactly"


def without_outputs(text):
    """A README without printed numbers and without the table of measured rows, which follows the records."""
    return re.sub(r"(?m)^\|.*\n", "", re.sub(r"```text\n.*?```\n", "", text, flags=re.S))


def test_readme_is_that_of_the_index():
    from normflow_vi.reproduce.readme import readme

    committed = (ROOT / "README.md").read_text()
    assert without_outputs(readme()).split() == without_outputs(committed).split(), "run make readme"
    assert "make test" in committed
    assert "smoke |" not in committed
