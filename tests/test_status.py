"""Status: a row for every published number and figure, joined with what was measured."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import normflow_vi.results.verdicts as records
from normflow_vi import cli, experiments
from normflow_vi.reproduce import status
from normflow_vi.reproduce.notebooks import Manifest, notebook_code
from normflow_vi.results import provenance
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
from normflow_vi.results.verdicts import Measured
from normflow_vi.utils.files import sha256

ROOT = Path(__file__).parent.parent
KEYS = [
    "source",
    "item",
    "row",
    "published",
    "published_se",
    "value",
    "se",
    "seeds",
    "failed",
    "updates",
    "device",
    "profile",
    "state",
    "verdict",
]
REZENDE = "Rezende & Mohamed 2015 (1505.05770)"


def measured(item="Fig 4c", row="NF K=10", value=87.6, metric="", data="", **more):
    return Measured(
        REZENDE,
        item,
        row,
        metric,
        value,
        0.1,
        (0, 1, 2),
        0,
        500_000,
        "cpu",
        "paper",
        data=data,
        **({"shortened": False} | more),
    )


class Trial:
    name = "trial"
    notebook = "nbs/none.ipynb"

    def __init__(self, *found):
        self.found = found

    def rows(self, store):
        return list(self.found)


@pytest.fixture
def with_experiments(monkeypatch):
    monkeypatch.setattr(experiments, "module_of", lambda name: "normflow_vi.utils.files")
    return lambda *found: monkeypatch.setattr(experiments, "all", lambda: list(found))


def test_a_row_for_every_published_number_and_figure(with_experiments, capsys):
    with_experiments()
    assert cli.main(["status", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    numbers = status.read_csv("published.csv")
    figures = status.read_csv("figures.csv")
    assert all(list(row) == KEYS for row in table)
    assert len(table) == len(numbers) + len(figures)
    assert len({(r["source"], r["item"], r["row"]) for r in table}) == len(table)
    have = Counter((r["source"], r["item"], r["published"], r["published_se"]) for r in table)

    def number(text):
        return float(text) if text else None

    assert (
        not Counter(
            (n["paper"], n["table_or_figure"], number(n["value"]), number(n["error"])) for n in numbers
        )
        - have
    )
    for f in figures:
        assert (f["source"], f["item"]) in {
            (r["source"], r["item"]) for r in table if r["row"].startswith("figure: ")
        }
    assert all(r["value"] is None and r["seeds"] == [] for r in table)
    assert {r["verdict"] for r in table} == {
        "published only",
        "out of budget",
        "no published number",
    }


def test_measured_rows_are_joined(with_experiments, capsys):
    with_experiments(
        Trial(measured(), measured("Table 2", "DLGM+NF planar K=10", 80.0, shortened=True)),
        Trial(measured("Fig 4c", "ours K=10", 85.0)),
    )
    table, problems = status.rows()
    found = {(r["item"], r["row"]): r for r in table if r["value"] is not None}
    assert not problems
    assert {k: r["verdict"] for k, r in found.items()} == {
        ("Fig 4c", "NF K=10"): "reproduced",
        ("Table 2", "DLGM+NF planar K=10"): "shortened",
        ("Fig 4c", "ours K=10"): "no published number",
    }
    row = found["Fig 4c", "NF K=10"]
    assert (row["published"], row["published_se"], row["value"], row["se"], row["seeds"], row["updates"]) == (
        87.54,
        0.27,
        87.6,
        0.1,
        [0, 1, 2],
        500_000,
    )
    assert cli.main(["status"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 2 + len(status.select_shown(table)) + 2
    assert len(found) == 3
    assert "reproduced" in text
    assert f"{len(table)} rows" in text
    assert cli.main(["status", "--all"]) == 0
    assert capsys.readouterr().out.count("\n") == len(table) + 4


def test_earlier_code_is_marked(with_experiments, monkeypatch):
    """A row is as good as the worst of its records."""
    monkeypatch.setattr(provenance, "meaning_sha256", lambda experiment: "now")

    def noted(*codes):
        run = Run("trial", 1, "none", "none", "", "planar", 2, 0, "quick", {})
        return tuple((run, {"meaning_sha256": code}) for code in codes)

    with_experiments(
        Trial(
            measured(records=noted("now", "other")),
            measured("Fig 4c", "NF K=20", records=noted("now", "now")),
        )
    )
    assert {r["row"]: r["state"] for r in status.rows()[0] if r["value"] is not None} == {
        "NF K=10": "earlier code",
        "NF K=20": "measured",
    }


def test_names_that_fit_several_numbers_are_refused(with_experiments):
    with_experiments(Trial(measured("Fig 3d", "PF K=2")))
    with pytest.raises(ValueError, match="PF K=2.*3 published numbers"):
        status.rows()
    with_experiments(Trial(measured("Fig 3d", "PF K=2", data="2-D energy U2")))
    assert [r["row"] for r in status.rows()[0] if r["value"] is not None] == ["PF K=2 (2-D energy U2)"]
    with_experiments(Trial(measured(), measured()))
    with pytest.raises(ValueError, match="twice"):
        status.rows()


class Kept(Trial):
    "Measures Fig. 4(c) from the records in the store."

    def rows(self, store):
        found = [
            records.measured(
                store,
                store.best("trial", length=K),
                "nll",
                source=REZENDE,
                item="Fig 4c",
                row=f"NF K={K}",
                shortened=False,
            )
            for K in (10, 20)
        ]
        return [row for row in found if row]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two seeds each of two flow lengths; a function to save one more record."""
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "settings.ini").write_text("")
    for name in ("published.csv", "figures.csv"):
        (tmp_path / "data" / name).write_bytes((ROOT / "data" / name).read_bytes())

    def save(length, seed, folder="results", **info):
        run = Run(
            "trial",
            1,
            "DLGM",
            "mnist",
            "",
            "planar",
            length,
            seed,
            "quick" if folder == "results" else "smoke",
            {"updates": 10},
        )
        return Record(
            run, {"nll": {"value": 88.0 + seed, "std_error": 0.0005}}, {}, {"device": "cpu"} | info
        ).save(tmp_path / folder)

    for length, seed in ((10, 0), (10, 1), (20, 0), (20, 1)):
        save(length, seed)
    return save


@pytest.mark.parametrize("name", ["record.json", "arrays.npz"])
def test_damage_is_reported_and_the_rest_shown(with_experiments, results, capsys, name):
    """A damaged record drops only itself: the other seed and the other length are shown, and the problem is
    listed once.
    """
    with_experiments(Kept())
    (results(10, 1) / name).write_text("{")
    assert cli.main(["status"]) == 1
    seen = capsys.readouterr()
    assert seen.err.count("\n") == 1
    assert "planar-10-seed1" in seen.err
    assert name in seen.err
    assert "--retrain" in seen.err
    table, problems = status.rows()
    assert len(problems) == 1
    assert {r["row"]: r["seeds"] for r in table if r["value"] is not None} == {
        "NF K=10": [0],
        "NF K=20": [0, 1],
    }


def test_smoke_records_are_no_results(with_experiments, results):
    with_experiments(Kept())
    results(20, 2, folder="runs/smoke/results")
    assert {r["row"]: r["seeds"] for r in status.rows()[0] if r["value"] is not None} == {
        "NF K=10": [0, 1],
        "NF K=20": [0, 1],
    }


def test_small_errors_and_single_seeds_are_told(with_experiments, results, capsys):
    """Two significant digits of an error; with one seed a star and a footnote.

    Early records' device reads like the others'.
    """
    with_experiments(Kept())
    (results(20, 1) / "record.json").unlink()
    results(10, 1, device="cpu (x86_64)")
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line)[4:9] for line in lines if "NF K" in line] == [
        ["88.50 ± 0.50", "+0.96", "2", "10", "cpu"],
        ["88.00000 ± 0.00050*", "+1.45", "1", "10", "cpu"],
    ]
    assert "device" in lines[0]
    assert lines[-3] == "* standard error over images or draws, one seed"
    shown = status.markdown([r for r in status.rows()[0] if r["value"] is not None])
    assert "0.00050\\* |" in shown
    assert shown.endswith("\n\n\\* standard error over images or draws, one seed")


@pytest.mark.parametrize(
    "value, error, text",
    [
        (87.654321, 0.03, "87.654 ± 0.030"),
        (87.654321, 0.0005, "87.65432 ± 0.00050"),
        (87.6543, 0.0996, "87.65 ± 0.10"),
        (87.6543, 12.3, "88 ± 12"),
        (87.6543, None, "87.65"),
        (87.6543, 0.0, "87.65 ± 0.00"),
    ],
)
def test_errors_have_two_significant_digits(value, error, text):
    assert status.number(value, error, status.count_places(error)) == text


def test_figures_go_out_of_date(tmp_path, monkeypatch):
    """A figure is up to date only while its notebook, the code behind it and its own file are those of its
    manifest.
    """
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path))
    (tmp_path / "settings.ini").write_text("[limits]\ntimeout = 3600\n")
    notebook = tmp_path / "nbs/01_x/10_y.ipynb"
    figure = tmp_path / "figures/a.png"

    def write(text):
        notebook.write_text(json.dumps({"cells": [{"cell_type": "code", "source": text, "metadata": {}}]}))
        status._present.cache_clear()

    def state():
        return status.figure_state("nbs/01_x/10_y.ipynb", "a.png")[0]

    for folder in (notebook.parent, figure.parent):
        folder.mkdir(parents=True)
    write("from normflow_vi.utils.files import sha256")
    assert state() == "not made"
    figure.write_bytes(b"picture")
    manifest = Manifest(
        "nbs/01_x/10_y.ipynb",
        "good",
        "",
        {"profile": "quick"},
        1.0,
        sha256(notebook),
        notebook_code(notebook),
        {"a.png": sha256(figure)},
        {},
    )
    manifest.save(tmp_path / "figures/manifests/01_x-10_y.json")
    assert state() == "made"
    assert status.figure_state("nbs/01_x/10_y.ipynb", "b.png")[0] == "not made"
    row = status.figure_row(
        {"source": "s", "item": "i", "shows": "x", "notebook": "nbs/01_x/10_y.ipynb", "product": "a.png"}
    )
    assert (row["state"], row["profile"], row["verdict"]) == ("made", "quick", "no published number")
    figure.write_bytes(b"another")
    assert state() == "damaged"
    figure.write_bytes(b"picture")
    assert state() == "made"
    write("from normflow_vi.utils.files import atomic_write")
    assert state() == "out of date"
    write("from normflow_vi.utils.files import sha256")
    assert state() == "made"
    monkeypatch.setattr(status, "notebook_code", lambda path: "another")
    status._present.cache_clear()
    assert state() == "out of date"


@pytest.mark.parametrize(
    "error, kind, expected",
    [
        (0.08, "s.d. of 4 runs", 0.04),
        (0.08, "s.e. of 3 runs, presumably", 0.08),
        (0.5, "2 s.e. over test images", 0.25),
        (0.3, "unknown", 0.3),
        (None, "", None),
    ],
)
def test_printed_errors_become_standard_errors(error, kind, expected):
    assert status.standard_error(error, kind) == expected


def test_every_printed_error_says_of_what_kind_it_is():
    for line in status.read_csv("published.csv"):
        assert bool(line["error"]) == bool(line["error_kind"]), line
    assert all(number["se"] is None or number["se"] > 0 for number in status.published())
    with pytest.raises(ValueError, match="error_kind='variance'"):
        status.standard_error(0.1, "variance")
