"""The command line, end to end in a small project, and its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_project import NOTEBOOK, PRODUCTS, read, snapshot, trial

from normflow_vi import cli
from normflow_vi.reproduce import drawing, pages, report, single, status
from normflow_vi.reproduce.notebooks import Manifest, execute
from normflow_vi.results.record import Record
from normflow_vi.results.store import Store

ROOT = Path(__file__).parent.parent


def call(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "normflow_vi", *arguments], capture_output=True, text=True, cwd=cwd
    )


USAGE = [
    [],
    ["dance"],
    ["reproduce", "--profile", "huge"],
    ["reproduce", "--device", "tpu"],
    ["reproduce", "--data", "../x"],
    ["reproduce", "--engine", "slurm"],
    ["reproduce", "--prof", "smoke"],
    ["reproduce", "extra"],
    ["run"],
    ["merge"],
    ["status", "--yaml"],
    ["reproduce", "--only"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "normflow-vi" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["reproduce", "--only", "77_none"], 2, "--only 77_none.*99_trial"),
        (["plan", "--only", "none"], 2, "99_trial"),
        (["plan", "--set", "setting"], 2, "NAME=VALUE"),
        (["verify", "--share", "much"], 2, "--share much.*percentage"),
        (["verify", "--share", "0%"], 1, "share=0.*above 0"),
        (["plan", "--set", "setting=x"], 2, "no experiment has it"),
        (["merge", "nowhere"], 2, "nowhere"),
        (["run", "nowhere.json"], 1, "nowhere.json"),
        (["notebook", "nbs/nowhere.ipynb"], 2, "nowhere"),
        (["notebook", "nbs/../../x.ipynb"], 2, "below nbs/"),
        (["notebook", "nbs"], 2, "below nbs/"),
        (["notebook", NOTEBOOK], 2, "10_trial.*takes parameters.*--only 99_trial"),
    ],
)
def test_errors_are_one_line(project, capsys, arguments, code, words):
    assert cli.main(arguments) == code
    last = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, last[-1])
    assert arguments[0] == "run" or len(last) == 1


def test_absent_data_is_one_error(project, monkeypatch, capsys):
    """`--data mnist` where MNIST cannot be had: said once, before anything starts."""
    import normflow_vi.data

    def absent(*args, **more):
        raise FileNotFoundError("mnist: not in data/, and it could not be downloaded")

    monkeypatch.setattr(normflow_vi.data, "load_data", absent)
    module = project / "trial_experiment.py"
    module.write_text(module.read_text().replace('"none", "", "planar"', '"mnist", "ab" * 32, "planar"'))
    assert cli.main(["reproduce", "--data", "mnist", "--profile", "smoke"]) == 1
    assert (
        capsys.readouterr().err.strip()
        == "normflow-vi: FileNotFoundError: mnist: not in data/, and it could not be downloaded"
    )
    assert not (project / "runs").exists()


def test_plan_prints_commands_that_make_the_records(project, capsys):
    assert cli.main(["plan", "--profile", "smoke"]) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == 2
    assert all(line.startswith("normflow-vi run runs/plan/") for line in lines)
    for line in lines:
        assert cli.main(line.split()[1:]) == 0
    assert len(Store([project / "runs/smoke/results"]).best("trial")) == 2
    capsys.readouterr()
    assert cli.main(["plan", "--profile", "smoke"]) == 0
    said = capsys.readouterr()
    assert not said.out.strip() and said.err.strip() == "nothing left to train"


def test_a_chapter_without_experiments_leaves_nothing_to_train(project, monkeypatch, capsys):
    monkeypatch.setattr(cli, "select", lambda only: ([], ["98_library"]))
    assert cli.main(["plan", "--only", "98_library"]) == 0
    assert capsys.readouterr().err.strip() == "nothing left to train"


def test_a_plan_as_an_array_job_has_a_task_for_each_command(project, tmp_path, capsys):
    """Each task of the script runs its own command; a program that says its words stands in for ours."""
    assert cli.main(["plan", "--profile", "smoke"]) == 0
    commands = capsys.readouterr().out.strip().splitlines()
    script = tmp_path / "array.sh"
    assert cli.main(["plan", "--profile", "smoke", "--slurm", str(script)]) == 0
    assert "2 tasks" in capsys.readouterr().out and "--array=0-1" in script.read_text()
    stand_in = tmp_path / "normflow-vi"
    stand_in.write_text('#!/bin/sh\necho normflow-vi "$@"\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for task, command in enumerate(commands):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "PATH": path}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == command


def test_merge(project, tmp_path_factory, capsys):
    """Records are verified, taken over if they are new, and left where they differ."""
    other = tmp_path_factory.mktemp("other")
    Record(trial(0), {"F": 1.0}).save(project / "results")
    for seed, F in ((0, 2.0), (1, 3.0), (2, 4.0)):
        Record(trial(seed), {"F": F}).save(other / "results")
    Record(trial(3, "smoke"), {"F": 5.0}).save(other / "deep/down")
    damaged = Record(trial(4), {"F": 6.0}).save(other / "results")
    (damaged / "arrays.npz").write_bytes(b"")
    assert cli.main(["merge", str(other)]) == 1
    seen = capsys.readouterr()
    assert "3 records" in seen.out
    assert len(seen.err.splitlines()) == 2
    assert "seed0" in seen.err
    assert "differs" in seen.err
    assert "seed4" in seen.err
    assert [r.value("F") for r in Store([project / "results"]).best("trial")] == [1, 3, 4]
    assert Store([project / "runs/smoke/results"]).find(trial(3, "smoke")).value("F") == 5
    shutil.rmtree(damaged)
    shutil.rmtree(other / "results/trial" / trial(0).slug)
    assert cli.main(["merge", str(other)]) == 0
    assert "0 records" in capsys.readouterr().out
    (project / "empty").mkdir()
    assert cli.main(["merge", str(project / "empty")]) == 1
    assert "no records" in capsys.readouterr().err


def test_merge_repairs_and_goes_on(project, tmp_path_factory, monkeypatch):
    """A damaged record here is replaced by a good one; arrays with NaN are equal to themselves.

    What cannot be saved does not stop the rest.
    """
    other = tmp_path_factory.mktemp("other")
    holes = {"curve": np.array([1.0, np.nan]), "name": np.array(["a"])}
    for seed in range(4):
        arrays = holes if seed < 3 else holes | {"curve": np.zeros((2, 1))}
        Record(trial(seed), {"F": float(seed)}, arrays).save(other / "results")
        if seed:
            ours = Record(trial(seed), {"F": float(seed)}, holes).save(project / "results")
        if seed == 1:
            (ours / "arrays.npz").write_bytes(b"damaged")
    taken, problems = cli.merge(other)
    assert taken == [trial(0).slug, trial(1).slug]
    assert len(problems) == 1
    assert "seed3" in problems[0]
    assert "differs" in problems[0]
    assert all(Store().find(trial(seed)).arrays["curve"].shape == (2,) for seed in range(4))
    shutil.rmtree(project / "results")
    save = Record.save

    def fails_once(record, root):
        if record.run.seed == 0:
            raise OSError("no space left")
        return save(record, root)

    monkeypatch.setattr(Record, "save", fails_once)
    taken, problems = cli.merge(other)
    assert taken == [trial(seed).slug for seed in (1, 2, 3)]
    assert problems == ["OSError: no space left"]


LIBRARY = json.dumps(
    {
        "cells": [
            {
                "cell_type": "code",
                "id": "a",
                "source": "x = 1",
                "metadata": {},
                "outputs": [],
                "execution_count": None,
            }
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
)


@pytest.mark.parametrize(
    "only, executed, trained",
    [
        (
            None,
            ["nbs/index.ipynb", "nbs/00_a/10_x.ipynb", "nbs/90_b/10_y.ipynb", "nbs/99_trial/20_z.ipynb"],
            2,
        ),
        ("0", ["nbs/00_a/10_x.ipynb"], 0),
        ("90", ["nbs/90_b/10_y.ipynb"], 0),
        ("trial", ["nbs/99_trial/20_z.ipynb"], 2),
        ("99", ["nbs/99_trial/20_z.ipynb"], 2),
        ("99_trial", ["nbs/99_trial/20_z.ipynb"], 2),
    ],
)
def test_only_makes_the_chosen_chapters(project, monkeypatch, capsys, only, executed, trained):
    """Chapters are those of nbs/, with or without an experiment; a failure is said at once and at the end.

    Only all of it is published.
    """
    for path in ("index.ipynb", "00_a/10_x.ipynb", "90_b/10_y.ipynb", "99_trial/20_z.ipynb"):
        (project / "nbs" / path).parent.mkdir(exist_ok=True)
        (project / "nbs" / path).write_text(LIBRARY)
    asked = []
    plans = []
    monkeypatch.setattr(
        drawing, "run_jobs", lambda jobs, **more: asked.extend(job.name for job in jobs) or {}
    )
    monkeypatch.setattr(
        report, "build", lambda profile, failures, whole: plans.append((failures, whole)) or "index.html"
    )
    monkeypatch.setattr(cli, "reproduce_one", lambda plan, *rest: f"all {len(plan.runs)} failed")
    assert cli.main(["reproduce", *(["--only", only] if only else [])]) == bool(trained)
    assert asked == executed
    assert plans == [({NOTEBOOK: "all 2 failed"} if trained else {}, only is None)]
    assert capsys.readouterr().err.count(f"normflow-vi: {NOTEBOOK}: all 2 failed") == (2 if trained else 0)


def test_reproduce_tells_of_damaged_records(project, monkeypatch, capsys):
    monkeypatch.setattr(report, "build", lambda *given, **more: "index.html")
    monkeypatch.setattr(cli, "reproduce_one", lambda *given: None)
    monkeypatch.setattr(status, "rows", lambda: ([], ["results/x/record.json is missing"]))
    assert cli.main(["reproduce"]) == 1
    assert "results/x/record.json" in capsys.readouterr().err


def test_reproduce(project, monkeypatch, capsys):
    """One command: runs are trained, the notebook is executed, the site and the one-file report are built.

    A failing experiment does not stop the others.

    The one-file report is replaced only by a whole one.
    """
    shutil.copytree(ROOT / "site", project / "site")
    broken = (
        (project / "trial_experiment.py")
        .read_text()
        .replace('"trial"', '"broken"')
        .replace("for seed in (0, 1)", "for seed in (13,)")
        .replace("10_trial", "20_broken")
    )
    (project / "broken_experiment.py").write_text(broken)
    (project / "nbs/99_trial/20_broken.ipynb").write_text(
        (project / NOTEBOOK).read_text().replace("# A trial", "# Broken")
    )
    monkeypatch.setenv("NORMFLOW_VI_EXPERIMENTS", "broken_experiment,trial_experiment")
    done = call("reproduce", "--profile", "quick")
    assert done.returncode == 1
    assert "20_broken.ipynb: RunsFailed" in done.stderr
    assert "seed13" in done.stderr
    assert "10_trial.ipynb" not in done.stderr.splitlines()[-1]
    assert f"report: {project}/reports/site/index.html" in done.stdout
    assert "rows" in done.stdout
    assert len(Store([project / "results"]).best("trial")) == 2
    assert read(project / "figures/figure.txt") == "a figure"
    page, other = (read(project / f"reports/site/99_trial/{name}.html") for name in ("10_trial", "20_broken"))
    assert "the end" in page
    assert 'class="math' in page
    assert "tex-svg-full.js" in page
    assert "fault.txt" in page
    assert "no result" in other
    assert "the end" not in other
    assert "report.html is left as it is: these failed: nbs/99_trial/20_broken.ipynb" in done.stderr
    assert not (project / "figures/report.html").exists()
    (project / "nbs/99_trial/20_broken.ipynb").unlink()

    def whole_after(**how):
        report.build("quick", **how)
        return (project / "figures/report.html").exists(), capsys.readouterr().err

    assert whole_after(whole=False) == (
        False,
        "figures/report.html is left as it is: only a part of the report was asked for\n",
    )
    source = read(project / NOTEBOOK)
    (project / NOTEBOOK).write_text(source + "\n")
    assert whole_after() == (
        False,
        f"figures/report.html is left as it is: these have no current good execution: {NOTEBOOK}\n",
    )
    (project / NOTEBOOK).write_text(source)
    with monkeypatch.context() as m:
        m.setattr(report, "find_stand_ins", lambda profile: [NOTEBOOK])
        assert whole_after() == (
            False,
            f"figures/report.html is left as it is: these show the stand-in digits: {NOTEBOOK}\n",
        )
    assert whole_after() == (True, "")
    whole = read(project / "figures/report.html")
    assert "the end" in whole
    assert "MathJax" in whole
    assert single.find_addresses(whole) == []
    assert len(whole) < 20e6
    for path in (project / "reports/site").rglob("*.html"):  # the site needs no network either
        assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["'](https?:)?//""", read(path)), path
    (project / "fault.txt").write_text("raises")  # a later failure: the page stays, with a warning
    before = snapshot(project)
    assert not execute(NOTEBOOK, {"profile": "quick"}, PRODUCTS, profile="quick").good
    pages.write_page(Path(NOTEBOOK), "quick", project / "pages")
    assert "last attempt to execute it failed: code cell" in read(project / "pages/99_trial/10_trial.ipynb")
    assert snapshot(project) == before


def test_report_draws_from_records_without_training(project, monkeypatch, capsys):
    shutil.copytree(ROOT / "site", project / "site")
    monkeypatch.setattr(report, "build", lambda profile, failures: project / "index.html")
    assert cli.main(["report"]) == 1
    assert "records are missing" in capsys.readouterr().err
    assert not (project / "runs/quick").exists()
    for seed in (0, 1):
        Record(trial(seed), {"F": 1.0}).save(project / "results")
    assert cli.main(["report"]) == 0
    assert (
        Manifest.load(project / "figures/manifests/99_trial-10_trial.json").parameters["profile"] == "quick"
    )
