"""Every experiment's notebook under papermill with the smoke profile; the same without data and network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from normflow_vi import experiments
from normflow_vi.reproduce import notebooks, report
from normflow_vi.reproduce.jobs import complete
from normflow_vi.reproduce.notebooks import execution_folder
from normflow_vi.reproduce.planning import make_plan
from normflow_vi.results.store import Store, records_root

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The project's sources in a folder of their own, with no records.

    Nothing here depends on or changes the real ones.
    """
    for name in ("nbs", "data", "site"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path / "settings.ini")
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path))
    return tmp_path


def text_of(notebook):
    "All that an executed notebook shows as text."
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(
        "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/html", []))
        for output in outputs
    )


@pytest.mark.parametrize("name", [experiment.name for experiment in experiments.all()])
def test_notebook_with_the_smoke_profile(checkout, name):
    experiment = experiments.get(name)
    complete(experiment.plan("smoke"), "cpu", progress=False)
    manifest = notebooks.draw(make_plan(experiment, "smoke"))
    assert manifest.good, manifest.cause
    assert set(manifest.products) == set(experiment.products)
    assert not (checkout / "figures").exists() and not (checkout / "results").exists(), (
        "smoke publishes nothing"
    )


@pytest.fixture
def bare(checkout, monkeypatch):
    "Neither data nor a network."
    shutil.rmtree(checkout / "data")
    shutil.copytree(
        ROOT / "data",
        checkout / "data",
        ignore=lambda folder, names: [n for n in names if not n.endswith((".csv", ".md"))],
    )
    monkeypatch.delenv("NORMFLOW_VI_DATA", raising=False)
    monkeypatch.setenv("NORMFLOW_VI_OFFLINE", "1")
    return checkout


def test_without_data_the_digits_stand_in_and_nothing_of_theirs_passes_for_mnist(bare):
    published = bare / "figures" / "table2.png"
    published.parent.mkdir()
    published.write_bytes(b"from MNIST")
    settings = bare / "settings.ini"
    settings.write_text(
        settings.read_text()
        .replace("[vae_mnist.quick]", "[vae_mnist.once]")
        .replace("[vae_mnist.smoke]", "[vae_mnist.quick]")
    )  # quick, at the price of smoke
    experiment = experiments.get("vae_mnist")
    runs = experiment.plan("quick", "auto")
    assert {run.data for run in runs} == {"digits-static"}
    complete(runs, "cpu", progress=False)
    manifest = notebooks.draw(make_plan(experiment, "quick", "auto"))
    assert manifest.good, manifest.cause
    shown = text_of(execution_folder(experiment.notebook, "quick") / "notebook.ipynb")
    assert (
        "data: statically binarised 8x8 digits (MNIST not available)" in shown
        and "No row of the paper is measured" in shown
    )
    assert experiment.rows(Store([records_root("quick")])) == [], (
        "digits are no measurement of a published number"
    )
    assert (
        published.read_bytes() == b"from MNIST"
        and (bare / notebooks.STAND_IN_FIGURES / "table2.png").exists()
    )
    assert report.find_stand_ins("quick") == [experiment.notebook]


def test_asking_for_mnist_without_having_it_is_one_error(bare):
    done = subprocess.run(
        [sys.executable, "-m", "normflow_vi", "reproduce", "--profile", "smoke", "--data", "mnist"],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=60,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and "MNIST was not found" in lines[0], done.stderr
    assert not (bare / "runs" / "smoke").exists()


def test_committed_records_belong_to_current_plans():
    "A record that no plan asks for any more would feed figures that nobody can regenerate."

    def plans(experiment):
        "Also those of its further parameters, such as the published optimiser settings."
        choices = [{}] + [
            {name: value} for name, allowed in experiment.parameters.items() for value in allowed
        ]
        return [
            run
            for profile in ("quick", "paper")
            for choice in choices
            for run in experiment.plan(profile, "mnist", **choice)
        ]

    planned = {run.key for experiment in experiments.all() for run in plans(experiment)}
    kept = [
        record.run
        for experiment in experiments.all()
        for record in Store([ROOT / "results"]).all(experiment.name)
    ]
    assert kept and not [run.slug for run in kept if run.key not in planned]
