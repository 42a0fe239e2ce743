"""The runner: bad parameters are refused before anything runs.

Workers and notebooks fail in every way, and earlier results stay.
"""

import json
import platform
import random
import signal
import string
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from small_project import NOTEBOOK, PRODUCTS, read, snapshot, trial

from normflow_vi import experiments
from normflow_vi.reproduce.jobs import (
    Job,
    RunsFailed,
    complete,
    count_slots,
    run_jobs,
    split_into_units,
    work,
    work_folder,
    write_unit,
)
from normflow_vi.reproduce.notebooks import Manifest, execute, execution_folder
from normflow_vi.reproduce.parameters import ParameterError, check_notebook, check_parameter, check_parameters
from normflow_vi.results import provenance
from normflow_vi.results.meaning import meaning_sha256
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
from normflow_vi.results.store import Store
from normflow_vi.utils.files import Busy, exclusive


def start(code, **more):
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more
    )


def gone(pid):
    return (
        not Path(f"/proc/{pid}").exists()
        or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    )


def all_gone(pids):
    return all(map(gone, pids))


def until(condition, seconds=20.0):
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


# Parameters

GOOD = {"profile": "smoke", "data": "digits", "device": "cpu", "output": "runs/x"}
CODE = [
    "x=1; import os; os.system('touch executed')",
    "profile\nopen('executed','w')",
    "__import__('os').system('touch executed')",
    "a b",
    "x=",
    "1x",
    "",
    "é",
    "profile ",
]
BAD = (
    [
        {name: value}
        for name in GOOD
        for value in (
            float("nan"),
            float("inf"),
            -1,
            0,
            10**400,
            1e-3,
            True,
            None,
            "true",
            "1e-3",
            "nan",
            "ünïcode",
            "../x",
            ["smoke"],
            {"a": 1},
            b"x",
            "x" * 10_000,
        )
    ]
    + [
        {"output": v}
        for v in (
            "/tmp/x",
            "figures",
            "results/x",
            "runs/../x",
            "runs/a b",
            "runs",
            "reports/x/../../y",
            "runs/x\n",
            "~/x",
            "runs//x",
        )
    ]
    + [{name: "smoke"} for name in ("profle", "Profile", "seed", "nn", "self", "experiment_", *CODE)]
)


def test_bad_parameters_are_refused(project):
    """Each is refused by the check before execution, at once, naming the parameter.

    The values are refused also by the notebook's own check; nothing is executed.
    """
    begin = time.monotonic()
    assert len(BAD) > 90
    for bad in BAD:
        name, value = next(iter(bad.items()))
        with pytest.raises(ParameterError) as refused:
            execute(NOTEBOOK, GOOD | bad, PRODUCTS, profile="smoke")
        assert repr(name[:60]) in str(refused.value)
        assert "allowed" in str(refused.value)
        assert len(str(refused.value)) < 400
        if name.isidentifier():
            with pytest.raises(ParameterError, match=name):
                check_parameters(**(GOOD | bad))
    assert time.monotonic() - begin < 5
    assert not list(project.rglob("executed*"))
    assert not (project / "reports").exists()
    assert not (project / "runs").exists()


def test_random_parameters_are_refused():
    chance = random.Random(0)
    rules = {"n": (int, 1, 1000), "rate": (float, 0.0, 1.0), "kind": ("a", "b")}
    makers = [
        lambda: chance.uniform(-1e9, -1e-9),
        lambda: -chance.randrange(1, 10**6),
        lambda: chance.randrange(1001, 10**12),
        lambda: float("nan"),
        lambda: float("-inf"),
        lambda: "".join(chance.choices(string.printable, k=chance.randrange(2, 40))),
        lambda: chance.choice([None, True, False, [], {}, (1,), b"a", 1j, object()]),
        lambda: chance.choice(["true", "1e-3", "1", "nan", "../x", "A", "a "]),
    ]
    for _ in range(500):
        name = chance.choice(list(rules))
        value = chance.choice(makers)()
        with pytest.raises(ParameterError, match=name):
            check_parameter(name, value, rules[name])
    for name, value in [("n", 1), ("n", 1000), ("rate", 0), ("rate", 1e-3), ("kind", "b")]:
        check_parameter(name, value, rules[name])


def test_the_notebooks_own_parameters_are_respected(project):
    rules = {"profile": ("smoke",), "steps": (int, 1, 10)}
    with pytest.raises(ParameterError, match="steps.*no such parameter.*profile"):
        check_notebook(project / NOTEBOOK, {"steps": 3}, rules)
    book = json.loads((project / NOTEBOOK).read_text())
    book["cells"][0]["source"] = 'profile: str = "smoke"\nsteps: float = 1.0'
    (project / NOTEBOOK).write_text(json.dumps(book))
    with pytest.raises(ParameterError, match="steps.*declares it as float"):
        check_notebook(project / NOTEBOOK, {"steps": 3}, rules)


def test_parameters_give_a_context(project):
    context = check_parameters("trial", **GOOD)
    assert (context.profile, context.device, context.output) == (
        "smoke",
        "cpu",
        project / "runs/x",
    )
    assert context.path("a.png") == project / "runs/x/a.png"
    assert context.output.is_dir()
    assert context.store.roots == [project / "runs/smoke/results"]
    assert check_parameters(profile="quick").store.roots == [project / "results"]


def test_absent_gpu_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ParameterError, match="device.*cuda.*allowed"):
        check_parameters(device="cuda")


# Training


def test_complete_trains_what_lacks_a_record(project):
    """One run has a record, one fails, one is trained.

    The failure is named, noted and counted, and the others are kept.
    """
    Record(trial(0), {"F": -5.0}).save(project / "results")
    (work_folder([trial(1)]) / "checkpoints").mkdir(parents=True)
    (work_folder([trial(1)]) / "checkpoints/place").write_text(
        "12"
    )  # a checkpoint of unknown code: not resumed
    with pytest.raises(RunsFailed, match="seed13.*loss is not finite at step 7.*log.txt") as failed:
        complete([trial(0), trial(13), trial(1)], "cpu", progress=False)
    assert "seed1-" not in str(failed.value)
    found = [r.value("F") for r in complete([trial(0), trial(1)], "cpu", progress=False)]
    assert found == [-5, 1]
    record = Store().find(trial(1))
    assert record.value("began") == 0
    assert record.info["threads"] == 1
    assert record.info["threads_asked"] == "1"
    assert [record.info["meaning_sha256"]] == record.info["codes"] == [meaning_sha256("trial")]
    assert [r.seed for r in Store().failed("trial")] == [13]
    assert not (work_folder([trial(1)]) / "checkpoints").exists()
    assert json.loads((work_folder([trial(1)]) / "progress.json").read_text())["step"] == 20


def test_a_log_starts_afresh_and_a_signal_is_named(project, monkeypatch):
    """A failure message quotes this run's log only; a process that was killed is said to be."""
    job = Job("kills itself", [], project / "runs/job")
    job.folder.mkdir(parents=True)
    job.log.write_text("ValueError: an earlier run\n")
    real = subprocess.Popen
    for number, words in ((9, "killed by signal 9, perhaps out of memory;"), (10, "killed by signal 10;")):
        ends_itself = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]
        start = partial(real, ends_itself)
        monkeypatch.setattr(subprocess, "Popen", lambda command, start=start, **more: start(**more))
        why = run_jobs([job], quiet=True)["kills itself"]
        assert why.startswith(f"no output ({words}")
        assert str(job.log) in why


def test_records_name_one_device(project):
    """What an experiment notes about its device does not make a second name for it."""
    module = project / "trial_experiment.py"
    module.write_text(
        module.read_text().replace(
            '{"threads_asked"', '{"device": "cpu (old)", "hardware": "?", "threads_asked"'
        )
    )
    info = work(write_unit([trial(0)], "cpu")) and Store().find(trial(0)).info
    assert info["device"] == "cpu"
    assert info["hardware"] == platform.machine()


def test_retrain_repeats_what_is_of_earlier_code(project):
    "A record of earlier code stays until somebody asks for more; one of the present code stays then, too."
    Record(trial(0), {"F": -5.0}, {}, {"code_sha256": "old"}).save(project / "results")
    Record(trial(1), {"F": -5.0}, {}, {"meaning_sha256": meaning_sha256("trial")}).save(project / "results")
    both = [trial(0), trial(1)]
    for retrain, values in (("none", [-5, -5]), ("earlier", [0, -5]), ("all", [0, 1])):
        found = complete(both, "cpu", progress=False, retrain=retrain)
        assert [r.value("F") for r in found] == values, retrain
    with pytest.raises(ValueError, match="retrain='some'.*none, earlier, all"):
        complete(both, "cpu", retrain="some")


def test_a_resumed_training_notes_its_codes(project, capsys):
    """A training goes on under other code, and its record names both."""

    def resumed():
        (work_folder([trial(0)]) / "checkpoints").mkdir(parents=True, exist_ok=True)
        (work_folder([trial(0)]) / "checkpoints/place").write_text("12")
        work(write_unit([trial(0)], "cpu"))
        record = Store().find(trial(0))
        return record.value("began"), record.info["codes"]

    first = meaning_sha256("trial")
    work(write_unit([trial(0)], "cpu"))
    assert resumed() == (12, [first])
    sources = project / "trial_experiment.py"
    sources.write_text("# a remark\n" + sources.read_text())
    assert resumed() == (12, [first])
    sources.write_text(sources.read_text().replace("range(start + 1, 21)", "range(1 + start, 21)"))
    assert resumed() == (12, [first, meaning_sha256("trial")])
    assert meaning_sha256("trial") != first
    assert "begun with other code" in capsys.readouterr().out


def test_training_for_publication_starts_from_a_commit(project, monkeypatch):
    """With changes that no commit holds, only smoke runs train; the error says what to do."""
    monkeypatch.setattr(provenance, "changed_code", lambda: ["nbs/a.ipynb", "nbs/b.ipynb"])
    with pytest.raises(provenance.UncommittedChanges, match="nbs/a.ipynb, nbs/b.ipynb.*--at COMMIT"):
        complete([trial(0)], "cpu", progress=False)
    with pytest.raises(provenance.UncommittedChanges):
        work(write_unit([trial(0)], "cpu"))
    assert not Store().failed("trial")
    assert complete([trial(0, "smoke")], "cpu", progress=False)
    Record(trial(1), {"F": 1.0}).save(project / "results")
    assert complete([trial(1)], "cpu", progress=False)[0].value("F") == 1  # nothing to train


def test_units_follow_the_experiments_engine(project, monkeypatch):
    runs = [trial(0), trial(1), Run(**(trial(0).to_dict() | {"length": 8}))]
    assert [len(u) for u in split_into_units(runs, "cpu")] == [1, 1, 1]
    assert split_into_units(runs, "cpu")[0][0].length == 8
    module = sys.modules[experiments.module_of("trial")]
    for engine, device, sizes in (
        ("batched", "cpu", [1, 2]),
        ("auto", "cpu", [1, 1, 1]),
        ("auto", "cuda", [1, 2]),
    ):
        monkeypatch.setattr(
            module,
            "experiment",
            experiments.Experiment(**{**vars(experiments.get("trial")), "engine": engine}),
        )
        assert [len(u) for u in split_into_units(runs, device)] == sizes
    assert work_folder(runs[:2]) != work_folder(runs[:1])


def test_auto_takes_what_measures_faster_and_goes_on_as_it_began(project, monkeypatch):
    """With a `trainer` the choice is measured.

    Runs that were begun in one way are not begun again in the other.
    """
    from normflow_vi.engine import choosing

    runs = [trial(0), trial(1)]
    module = sys.modules[experiments.module_of("trial")]
    asked = []
    monkeypatch.setattr(
        module,
        "experiment",
        experiments.Experiment(
            **{**vars(experiments.get("trial")), "engine": "auto", "trainer": lambda runs, device: runs}
        ),
    )

    def measured(name):
        def choose(make, seeds, processes):
            asked.append((make(seeds[:1]), list(seeds), processes))
            return choosing.Engine(name, 1.0, 1.0)

        monkeypatch.setattr(choosing, "choose_engine", choose)

    for name, sizes in (("batched", [2]), ("processes", [1, 1])):
        measured(name)
        assert [len(unit) for unit in split_into_units(runs, "cpu")] == sizes
    assert asked[0] == (runs[:1], [0, 1], count_slots("cpu"))
    work_folder(runs[1:]).mkdir(parents=True)
    measured("batched")
    assert [len(unit) for unit in split_into_units(runs, "cpu")] == [1, 1]
    assert len(asked) == 2


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"runs": []}', '{"runs": [{"experiment": "trial"}], "device": "cpu"}']
)
def test_a_bad_file_of_runs_is_refused(project, text):
    (project / "runs.json").write_text(text)
    with pytest.raises(ValueError, match="runs.json"):
        work(project / "runs.json")


def test_one_process_a_unit(project):
    with exclusive(work_folder([trial(0)])), pytest.raises(Busy):
        work(write_unit([trial(0)], "cpu"))
    assert Store().find(trial(0)) is None


COMPLETE = """import signal
import sys
from normflow_vi import cli
from normflow_vi.reproduce.jobs import complete
from normflow_vi.results.store import Run
signal.signal(signal.SIGTERM, cli._terminate)
complete([Run("trial", 1, "none", "none", "", "planar", 2, {seed}, "quick", {{"updates": 20}})], "cpu")"""


def test_workers_end_with_their_parent(project):
    """Kill -9, SIGTERM and Ctrl-C of the waiting process: each time its worker ends, and its checkpoint
    stays.
    """
    signals = {101: signal.SIGKILL, 102: signal.SIGTERM, 103: signal.SIGINT}
    parents = {seed: start(COMPLETE.format(seed=seed)) for seed in signals}
    places = {seed: work_folder([trial(seed)]) / "checkpoints/place" for seed in signals}

    def children(pid):
        return [int(p) for p in read(Path(f"/proc/{pid}/task/{pid}/children")).split()]

    for place in places.values():
        until(place.exists, 40)
    for seed, parent in parents.items():
        begin = time.monotonic()
        workers = children(parent.pid)
        assert workers
        parent.send_signal(signals[seed])
        parent.communicate(timeout=20)
        until(partial(all_gone, workers), 5)
        assert parent.returncode not in (0, None)
        assert time.monotonic() - begin < 6
        assert places[seed].exists()
        assert Store().find(trial(seed)) is None


# Notebooks


def test_every_way_to_fail_leaves_the_earlier_result(project):
    """First a good execution.

    Then a killed kernel, exit(0), an exception, a time-out, a missing product, SIGINT and SIGTERM to the
    runner: all reported as failed.
    """
    Record(trial(0), {"F": 1.0}).save(project / "results")
    Record(trial(1), {"F": 1.0}).save(project / "results")

    def go(timeout=60):
        return execute(NOTEBOOK, {"profile": "quick"}, PRODUCTS, profile="quick", timeout=timeout)

    good = go()
    assert good.good
    assert good.products.keys() == set(PRODUCTS)
    assert Manifest.load(execution_folder(NOTEBOOK, "quick") / "manifest.json") == good
    assert (project / "figures/figure.txt").read_text() == "a figure"
    assert Manifest.load(project / "figures/manifests/99_trial-10_trial.json") == good
    before = snapshot(project)
    note = execution_folder(NOTEBOOK, "quick").with_name("10_trial.failed.json")
    causes = {
        "killed": "kernel was killed",
        "leaves": "left early",
        "raises": "ArithmeticError: it went wrong",
        "hangs": "longer than 2 s",
        "forgets": "figure.txt is missing",
    }
    for fault, cause in causes.items():
        (project / "fault.txt").write_text(fault)
        failed = go(timeout=2 if fault == "hangs" else 60)
        assert not failed.good, (fault, failed.cause)
        assert cause in failed.cause, (fault, failed.cause)
        assert snapshot(project) == before, (fault, failed.cause)
        assert Manifest.load(note).cause == failed.cause
    (project / "fault.txt").write_text("wait")
    for number in (signal.SIGINT, signal.SIGTERM):
        runner = subprocess.Popen(
            [sys.executable, "-m", "normflow_vi", "reproduce", "--only", "trial"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        kernel = int(until(lambda: read(project / "waiting"), 40))
        time.sleep(0.2)
        runner.send_signal(number)
        out, err = runner.communicate(timeout=20)
        assert runner.returncode == 128 + number, (runner.returncode, err)
        assert err.splitlines()[-1].startswith("normflow-vi: "), (runner.returncode, err)
        assert snapshot(project) == before
        assert Manifest.load(note).cause == "interrupted"
        until(partial(gone, kernel), 5)
        (project / "waiting").unlink()
    assert not [p for p in (project / "reports/.work").iterdir()]
    (project / "fault.txt").write_text("none")
    again = go()
    assert again.good
    assert not note.exists()
    assert snapshot(project) != before
    assert snapshot(project).keys() == before.keys()


def test_smoke_publishes_nothing(project):
    manifest = execute(NOTEBOOK, {"profile": "smoke"}, PRODUCTS, profile="smoke")
    assert manifest.good
    assert (project / "runs/smoke/figures/figure.txt").exists()
    assert not (project / "figures").exists()
    assert not (project / "reports").exists()


def test_the_same_notebook_is_not_executed_twice_at_once(project):
    with exclusive(project / "runs/locks/reports-99_trial-10_trial"), pytest.raises(Busy):
        execute(NOTEBOOK, {"profile": "quick"}, PRODUCTS)


def test_a_kernel_that_dies_before_its_first_cell_gets_a_second_try(project, monkeypatch):
    import papermill

    real = papermill.execute_notebook
    calls = []

    def flaky(*args, **more):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(*args, **more)

    monkeypatch.setattr(papermill, "execute_notebook", flaky)
    assert execute(NOTEBOOK, {"profile": "smoke"}, PRODUCTS, profile="smoke").good
    assert len(calls) == 2


def test_ray_is_optional(project):
    try:
        import ray
    except ImportError:
        ray = None
    if ray:
        pytest.skip("Ray is installed")
    with pytest.raises(RuntimeError, match="pip install"):
        complete([trial(0)], "cpu", engine="ray")
    assert run_jobs([]) == {}
