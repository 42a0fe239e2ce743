"""A small project for the tests of the runner and the command line: settings, an experiment, its notebook."""

from normflow_vi.results.run import Run

NOTEBOOK = "nbs/99_trial/10_trial.ipynb"
PRODUCTS = ("table.json", "figure.txt")

EXPERIMENT = """
import os, time
from pathlib import Path

from normflow_vi.experiments import Experiment
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run


def plan(profile, data="auto"):
    rest = ("none", "none", "", "planar", 2)
    return [Run("trial", 1, *rest, seed, profile, {"updates": 20}) for seed in (0, 1)]


def train(runs, folder, device, progress):
    "Counts to 20 and keeps its place in a file; seed 13 fails, seeds above 100 take a minute."
    place = Path(folder) / "place"
    start = int(place.read_text()) if place.exists() else 0
    for step in range(start + 1, 21):
        if runs[0].seed > 100:
            time.sleep(1)
        place.write_text(str(step))
        progress(step, 20, step / 10, {"loss": 1 / step})
        if any(run.seed == 13 for run in runs) and step == 7:
            raise ArithmeticError("loss is not finite at step 7")
    info = {"threads_asked": os.environ.get("OMP_NUM_THREADS", "")}
    return [Record(run, {"F": float(run.seed), "began": start}, {}, info) for run in runs]


experiment = Experiment(
    "trial",
    "99_trial",
    "nbs/99_trial/10_trial.ipynb",
    ("table.json", "figure.txt"),
    plan,
    train,
    lambda store: [],
    engine="processes",
)
"""

SETUP = """import json, os, signal, sys, time
from pathlib import Path
fault = Path("fault.txt").read_text()
Path(output, "figure.txt").write_text("a figure")
Path(output, "table.json").write_text(json.dumps([profile, time.time()]))"""

FAULTS = {
    "killed": "os.kill(os.getpid(), 9)",
    "leaves": "sys.exit(0)",
    "raises": "raise ArithmeticError('it went wrong')",
    "hangs": "time.sleep(100)",
    "forgets": "Path(output, 'figure.txt').unlink()",
    "wait": "Path('waiting').write_text(str(os.getpid())); time.sleep(100)",
}


def make_project(root):
    """A small project: settings, an experiment, its notebook, an empty list of published numbers."""
    import nbformat
    from nbformat import v4

    for folder in ("nbs/99_trial", "data"):
        (root / folder).mkdir(parents=True)
    (root / "settings.ini").write_text(
        "[limits]\ntimeout = 60\n[trial.smoke]\n[trial.quick]\n[trial.paper]\n"
    )
    (root / "trial_experiment.py").write_text(EXPERIMENT)
    (root / "data/published.csv").write_text(
        "paper,table_or_figure,dataset,model,metric,value,error,notes,confirmed\n"
    )
    (root / "data/figures.csv").write_text("source,item,shows,notebook,product\n")
    (root / "fault.txt").write_text("none")
    cells = [
        v4.new_code_cell(
            'profile: str = "smoke"\ndata: str = "auto"\ndevice: str = "auto"\noutput: str = ""',
            metadata={"tags": ["parameters"]},
        ),
        v4.new_markdown_cell("# A trial\nwith $x^2$"),
        v4.new_code_cell(SETUP),
        *(v4.new_code_cell(f"if fault == {name!r}: {code}") for name, code in FAULTS.items()),
        v4.new_code_cell("print('the end')"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), root / "nbs/99_trial/10_trial.ipynb")


def trial(seed, profile="quick"):
    return Run("trial", 1, "none", "none", "", "planar", 2, seed, profile, {"updates": 20})


def read(path):
    return path.read_text() if path.exists() else ""


def snapshot(root):
    """The bytes of everything that an execution publishes or draws from."""
    return {
        p.relative_to(root): p.read_bytes()
        for top in ("figures", "reports/executed", "results")
        for p in sorted((root / top).rglob("*"))
        if p.is_file() and not p.name.endswith(".failed.json")
    }
