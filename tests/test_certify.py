"""Certificates: a change of behaviour is refused, by experiment; a rewriting marks nothing."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import normflow_vi
from normflow_vi.reproduce import certify, probe
from normflow_vi.results.meaning import meaning_sha256
from normflow_vi.results.run import Run

PACKAGE = Path(normflow_vi.__file__).parent

# Comparing


def answer(loss=(2.0, 1.0), value=3.0, array=1.0, parameters="a"):
    "A probe of one run, made up."
    curves = {"loss": [x.hex() for x in loss]}
    record = {
        "values": {"F": [value.hex(), None]},
        "arrays": {"x": {"sha256": str(array), "sizes": [array.hex(), array.hex()]}},
    }
    training = {"parameters": [parameters], "curves": curves}
    return {"trainings": [training], "told": [], "records": [record], "again": []}


@pytest.mark.parametrize(
    "change, finding, where",
    [
        ({}, "bitwise", None),
        ({"loss": (2.0, 1.0 + 1e-9)}, "within 1e-6", "curve loss of training 0"),
        ({"loss": (2.0, 1.0 + 1e-5)}, "different", "curve loss of training 0"),
        ({"loss": (2.0, float("nan"))}, "different", "curve loss of training 0"),
        ({"value": 3.0 + 1e-9}, "within 1e-6", "value F"),
        ({"value": 3.1}, "different", "value F"),
        ({"array": 1.1}, "different", "array x"),
        ({"parameters": "b"}, "within 1e-6", "parameters of training 0"),
    ],
)
def test_what_is_compared(change, finding, where):
    found = certify.compare(answer(), answer(**change), 0)
    assert (found["finding"], found.get("where")) == (finding, where)


def test_what_fails_or_is_missing_is_different():
    less = answer()
    less["records"][0]["values"] = {}
    more = answer()
    more["records"][0]["values"]["G"] = [(1.0).hex(), None]
    assert certify.compare(answer(), less, 0)["finding"] == "different"
    assert certify.compare(answer(), more, 0)["finding"] == "bitwise"  # what is new changes nothing
    assert "gone" in certify.compare(answer(), {"error": "gone"}, 0)["where"]


# Probing


def energies(flow="radial", length=2, seeds=(0,), profile="quick"):
    budget = {"optimizer": "adam", "updates": 4000, "anneal": 2000, "learning_rate": 5e-3}
    budget |= {"samples": 256, "evaluation_samples": 50000, "grid": 100}
    return [Run("energies", 2, "U1", "none", "", flow, length, seed, profile, budget) for seed in seeds]


def test_a_budget_is_cut_down():
    small = probe.in_small(energies()[0].to_dict())["budget"]
    assert (small["updates"], small["anneal"], small["samples"], small["grid"]) == (40, 20, 100, 41)
    assert small["learning_rate"] == 5e-3
    budget = {"warmup": 0, "updates": 30, "dims": (2, 4)}
    assert probe.in_small({"budget": budget})["budget"] == {"warmup": 0, "updates": 30, "dims": (16,)}


def test_the_same_code_twice_is_the_same_bit_by_bit():
    runs = [run.to_dict() for run in energies(seeds=(0, 1))]
    first, second = probe.probe(runs), probe.probe(runs)
    assert first == second and len(first["trainings"]) == 1 and len(first["records"]) == 2
    assert [certify.compare(first | {"again": []}, second | {"again": []}, i)["finding"] for i in (0, 1)] == [
        "bitwise"
    ] * 2
    assert probe.digest(first, 0) == probe.digest(second, 0) != probe.digest(first, 1)


# Planted changes


def vae(experiment="vae_mnist"):
    "A small run on images."
    sizes = {"hidden": 16, "depth": 1, "batch_size": 20, "updates": 40, "warmup": 10, "anneal": 20}
    sizes |= {"evaluation_samples": 10, "evaluation_images": 20}
    choices = {"activation": "relu", "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.1}
    choices |= {"objective": "kl", "head": "slow"}
    from normflow_vi.data import content_sha256

    data = content_sha256("digits", "static")
    budget = sizes | choices
    return [Run(experiment, 2, "DLGM", "digits-static", data, "radial", 2, 0, "quick", budget)]


RUNS = {"energies": energies, "vae_mnist": vae}
BOTH = {"energies", "vae_mnist"}


def put(top, place, found, new):
    "Replace a piece of a file of a copied package; it must be there once."
    path = top / place
    text = path.read_text()
    assert len(re.findall(found, text)) == 1, f"{place}: {found} occurs {len(re.findall(found, text))} times"
    path.write_text(re.sub(found, new, text))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    "Makes copies of this package, each in a folder of its own."

    def copy(name):
        top = tmp_path_factory.mktemp(name) / "normflow_vi"
        shutil.copytree(PACKAGE, top, ignore=shutil.ignore_patterns("__pycache__"))
        return top

    return copy


def probed(top, names):
    "The probes of one small run of each experiment by the package below `top`."
    tasks = [
        {"name": name, "runs": [run.to_dict() for run in RUNS[name]()], "weights": []}
        for name in sorted(names)
    ]
    files = top.parent / "tasks.json", top.parent / "answers.json"
    files[0].write_text(json.dumps(tasks))
    command = [sys.executable, "-P", str(PACKAGE / "reproduce/probe.py"), *map(str, files)]
    root = os.environ.get("NORMFLOW_VI_ROOT", str(PACKAGE.parent))
    subprocess.run(command, check=True, env=certify.environment_of(top.parent, root))
    return {found["name"]: found for found in map(json.loads, files[1].read_text().splitlines())}


@pytest.fixture(scope="module")
def base(copies):
    return probed(copies("base"), BOTH)


PLANTED = {
    "a transform": ("transforms/affine.py", r"log_scale\.exp\(\) \* z", "log_scale.exp() * z * 1.001", BOTH),
    "an objective": (
        "objectives/__init__.py",
        r"\(beta - 1\) \* kl",
        "(beta - 1) * kl * 1.001",
        {"vae_mnist"},
    ),
    "the optimiser": ("engine/optimizer.py", r"ramp \* 0\.5 \*", "ramp * 0.501 *", BOTH),
    "the data": (
        "data/batches.py",
        r"self\.split\.pixels\(self\.generator, self\.rows\(\)\)",
        "self.split.pixels(self.generator, self.rows() // 2)",
        {"vae_mnist"},
    ),
    "an evaluator": ("evaluate/__init__.py", r"manual_seed\(seed\)", "manual_seed(seed + 1)", {"vae_mnist"}),
}


@pytest.mark.parametrize("change", PLANTED)
def test_a_change_of_behaviour_is_refused(copies, base, change):
    """Each experiment that reaches the change has another hash; the probe says which do something else."""
    place, found, new, expected = PLANTED[change]
    top = copies("planted")
    put(top, place, found, new)
    marked = {name for name in BOTH if meaning_sha256(name, top) != meaning_sha256(name)}
    assert expected <= marked
    after = probed(top, marked)
    findings = {
        name: certify.compare(base[name] | {"again": []}, after[name] | {"again": []}, 0) for name in marked
    }
    assert {name for name, f in findings.items() if f["finding"] == "different"} == expected, findings


def reformat(top):
    "Every module written anew: other lines, no comments."
    for path in top.rglob("*.py"):
        path.write_text(ast.unparse(ast.parse(path.read_text())))


def rename_helper(top):
    "`clip_gradients` and `rate` by other names, wherever they are."
    for path in top.rglob("*.py"):
        path.write_text(re.sub(r"\bclip_gradients\b", "limit_norms", path.read_text()))


def move_module(top):
    "The transforms' affine layer in another room."
    (top / "transforms/affine.py").rename(top / "models/affine_layer.py")
    for path in top.rglob("*.py"):
        text = path.read_text()
        text = re.sub(r"from \.affine import", "from ..models.affine_layer import", text)
        text = re.sub(r"(normflow_vi|\.)\.transforms\.affine import", r"\1.models.affine_layer import", text)
        path.write_text(text)
    moved = top / "models/affine_layer.py"
    moved.write_text(re.sub(r"from \.(?=[a-z])", "from ..transforms.", moved.read_text()))


def add_transform(top):
    "A new transform that nothing uses."
    (top / "transforms/new.py").write_text("from .base import Transform\n\nclass New(Transform):\n    pass\n")
    put(
        top,
        "transforms/__init__.py",
        r"from \.affine import Affine\n",
        "from .affine import Affine\nfrom .new import New\n",
    )


def change_message(top):
    "An error that says something else."
    path = top / "utils/checks.py"
    path.write_text(path.read_text().replace("allowed is", "allowed would be").replace("expected", "wanted"))


@pytest.mark.parametrize("rewrite", [reformat, rename_helper, move_module, add_transform, change_message])
def test_a_rewriting_marks_nothing(copies, rewrite):
    top = copies("rewritten")
    rewrite(top)
    sources = [path.read_bytes() for path in sorted(top.rglob("*.py"))]
    assert sources != [path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))]
    assert {name: meaning_sha256(name, top) for name in BOTH} == {name: meaning_sha256(name) for name in BOTH}


# From a record to its certificate

MAKE = """
import json, sys
from normflow_vi.results import provenance
from normflow_vi.results.meaning import meaning_sha256
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
run = Run.from_dict(json.loads(sys.argv[1]))
notes = {"meaning_sha256": meaning_sha256("energies"), "commit": provenance.commit(), "engine": "process"}
Record(run, {"F": 1.0}, {}, notes).save("results")
"""


@pytest.fixture
def checkout(copies):
    "A repository with this package, one record of its commit, and a way to run commands in it."
    top = copies("checkout")
    root = top.parent
    shutil.copy(PACKAGE.parent / "settings.ini", root)
    (root / ".gitignore").write_text("runs/\n__pycache__/\n")
    environment = certify.environment_of(root, root)

    def call(*command):
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "the first state")):
        assert call(*git, *words).returncode == 0
    made = call(sys.executable, "-c", MAKE, energies()[0].to_json())
    assert made.returncode == 0, made.stderr
    return root, call


def test_certify_from_the_command_line(checkout):
    """A record stands as it is; after a rewriting it is certified; after a change it is refused."""
    root, call = checkout

    def certified():
        done = call(sys.executable, "-m", "normflow_vi", "certify", "--only", "energies")
        return done.returncode, done.stdout.strip() + done.stderr.strip()

    code, said = certified()
    assert (code, said) == (0, "energies: nothing to probe; 1 records: 1 measured")
    put(
        root / "normflow_vi",
        "objectives/__init__.py",
        r"beta = start \+ step / steps",
        "beta = step / steps + start",
    )
    code, said = certified()
    assert (code, said) == (0, "energies: 1 shapes bitwise; 1 records: 1 measured")
    (given,) = json.loads((root / "results/certificates/energies.json").read_text())
    assert given["platform"]["threads"] == 1 and given["head"] == given["base"] + "+"
    put(root / "normflow_vi", "engine/optimizer.py", r"ramp \* 0\.5 \*", "ramp * 0.501 *")
    code, said = certified()
    assert code == 1 and "1 earlier code" in said and "energies: different: radial-2 U1 quick" in said
    assert not list((root / "runs/worktrees").iterdir())  # the checkouts are gone
