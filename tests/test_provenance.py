"""The hash of meaning, certificates as steps between codes, and what they make of a record."""

import ast
from pathlib import Path

import pytest

import normflow_vi
from normflow_vi.results.meaning import meaning_of_source, meaning_sha256, reached_by
from normflow_vi.results.provenance import codes_of, state_of, worst_state

PACKAGE = Path(normflow_vi.__file__).parent
EXPERIMENTS = ("energies", "vae_mnist", "vae_cifar", "vae_convolution", "vae_evaluation", "posteriors")

SMALL = {
    "__init__.py": "",
    "records.py": "class Record: pass\n",
    "experiments/__init__.py": "class Experiment: pass\n",
    "experiments/one.py": """
from . import Experiment
from .. import tools
from ..layers import Layer as Used, STEPS
from ..records import Record

def train(runs, folder, device, progress=None):
    layer, made = Used(STEPS), []
    for run in runs:
        made.append(Record(tools.double(layer(run))))
    return made

experiment = Experiment("one", "c", "n", (), None, train)
""",
    "tools.py": """
import math as m
from functools import cache

A, B = 2, 3
TABLE = {}

@cache
def double(x):
    "Twice."
    if x is None:
        raise ValueError(f"x={x}: told by {describe(x)}")
    return TABLE["f"](x) * A + m.pi

def describe(x):
    return "what only a message says"

def other(x):
    return B

TABLE["f"] = lambda x: x + 1
""",
    "layers.py": """
from dataclasses import KW_ONLY, dataclass

STEPS = 5

@dataclass
class Base:
    steps: int
    _: KW_ONLY
    rate: float = 0.1

class Layer(Base):
    kind = "layer"

    def __call__(self, x):
        return self.half(x) * self.steps

    def half(self, x):
        return x / 2
""",
}


@pytest.fixture
def small(tmp_path):
    "`small(file=(found, new), ...)` is the hash of a small package after replacing a piece of a file."

    def write(**changes):
        top = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "normflow_vi"
        for name, text in SMALL.items():
            key = name.removesuffix(".py").replace("/", "_")
            found, new = changes.pop(key, ("", ""))
            assert not found or text.count(found) == 1, f"{name}: {found!r}"
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(found, new) if found else text)
        for name, text in changes.items():
            (top / f"{name}.py").write_text(text)
        return meaning_sha256("one", top)

    return write


CALL = "    def __call__(self, x):\n        return self.half(x) * self.steps\n"
HALF = "    def half(self, x):\n        return x / 2\n"

SAME = {
    "a docstring and a comment": {"tools": ('"Twice."', '"Two times."  # so')},
    "annotations": {"tools": ("def double(x):", "def double(x: float) -> float:")},
    "an annotated attribute": {"layers": ('kind = "layer"', 'kind: str = "layer"')},
    "two assignments in one": {"tools": ("A, B = 2, 3", "B, A = 3, 2")},
    "an assignment taken apart": {
        "experiments_one": ("layer, made = Used(STEPS), []", "layer = Used(STEPS)\n    made = []")
    },
    "a message": {"tools": ("x={x}: told by {describe(x)}", "not {x}")},
    "what a message says": {"tools": ("what only a message says", "something else")},
    "a definition beside it": {"tools": ("def other", "def more(): return 1\n\ndef other")},
    "an unused constant": {"tools": ("A, B = 2, 3", "A, B = 2, 4")},
    "a constant of its own": {"tools": ("A, B = 2, 3", "A = 2\nB = 3")},
    "block form": {"tools": ("    return B", "    x = B\n    return x")},
    "__all__": {"tools": ("TABLE = {}", 'TABLE = {}\n__all__ = ["double"]')},
    "an alias": {"tools": ("import math as m", "import math")},
    "a renamed local": {
        "experiments_one": (
            "for run in runs:\n        made.append(Record(tools.double(layer(run))))",
            "for r in runs:\n        made.append(Record(tools.double(layer(r))))",
        )
    },
    "a function for a lambda": {
        "tools": (
            'TABLE["f"] = lambda x: x + 1',
            'def f(x):\n    return x + 1\n\nTABLE["f"] = lambda x: x + 1',
        )
    },
    "the order of methods": {
        "layers": (
            CALL + "\n" + HALF,
            HALF + "\n" + CALL,
        )
    },
    "a method patched in": {
        "layers": (
            "    def half(self, x):\n        return x / 2",
            "from .patching import patch\n\n@patch\ndef half(self: Layer, x):\n    return x / 2",
        )
    },
    "the books": {"records": ("pass", "size = 1")},
    "an import from elsewhere": {
        "experiments_one": (
            "from ..layers import Layer as Used, STEPS",
            "from ..layers import STEPS\nfrom ..rooms import Layer as Used",
        ),
        "rooms": "from .layers import Layer\n",
    },
}
SAME["an alias"]["tools"] = ("import math as m\n", "from math import pi\nimport math as m\n")


OTHER = {
    "one statement more": {"layers": ("return x / 2", "x, y = 1, x\n        return x / 2 + y")},
    "a number": {"tools": ("* A", "* 3 * A")},
    "a constant": {"tools": ("A, B = 2, 3", "A, B = 5, 3")},
    "a default": {"experiments_one": ("progress=None", "progress=1")},
    "a decorator": {"tools": ("@cache\n", "")},
    "a base class": {"layers": ("class Layer(Base)", "class Layer")},
    "a field's order": {
        "layers": (
            "    steps: int\n    _: KW_ONLY\n    rate: float = 0.1",
            "    rate: float = 0.1\n    _: KW_ONLY\n    steps: int = 0",
        )
    },
    "a field's default": {"layers": ("rate: float = 0.1", "rate: float = 0.2")},
    "keywords only": {"layers": ("    _: KW_ONLY\n", "")},
    "a class's attribute": {"layers": ('kind = "layer"', 'kind = "other"')},
    "a method's name": {"layers": ("def half", "def halve")},
    "what is registered": {"tools": ("x + 1", "x + 2")},
    "what is registered elsewhere": {"more": 'from .tools import TABLE\nTABLE["f"] = abs\n'},
    "the kind of an error": {"tools": ("raise ValueError", "raise TypeError")},
    "whether it is raised": {"tools": ("if x is None", "if x is True")},
    "a name from outside": {"tools": ("m.pi", "m.e")},
    "a method patched in": {
        "more": "from .layers import Layer\nfrom .tools import patch\n@patch\ndef f(self: Layer): return 1\n"
    },
}


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_count(small, change):
    assert small(**SAME[change]) == small()


@pytest.mark.parametrize("change", OTHER)
def test_what_counts(small, change):
    assert small(**OTHER[change]) != small()


def test_names_of_helpers_and_modules_do_not_count(small):
    "A helper renamed where it is defined and used; a module that moved."
    renamed = (
        SMALL["tools.py"].replace("double", "twice"),
        SMALL["experiments/one.py"].replace("double", "twice"),
    )
    before = small()
    assert (
        small(
            tools=(SMALL["tools.py"], renamed[0]), experiments_one=(SMALL["experiments/one.py"], renamed[1])
        )
        == before
    )
    assert (
        small(
            rooms=SMALL["tools.py"], experiments_one=("from .. import tools", "from .. import rooms as tools")
        )
        == before
    )


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    "This package with every module written anew from its syntax tree: no comment and no line as it was."
    top = tmp_path_factory.mktemp("rewritten") / "normflow_vi"
    for path in PACKAGE.rglob("*.py"):
        file = top / path.relative_to(PACKAGE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ast.unparse(ast.parse(path.read_text())))
    return top


def test_the_layout_of_this_package_does_not_count(copied):
    assert [meaning_sha256(name, copied) for name in EXPERIMENTS] == [
        meaning_sha256(name) for name in EXPERIMENTS
    ]


def test_what_an_experiment_reaches():
    "The energies use planar layers, splines and the trainer; no evaluator of images, no fit, no record."
    reached = dict.fromkeys(name for _, name in reached_by("energies")[1])
    assert {"Planar", "SplineCoupling", "Trainer", "free_energy", "Optimizer"} <= reached.keys()
    assert not {"Record", "fit", "ais", "VAE"} & reached.keys()
    with pytest.raises(KeyError, match="nothing"):
        reached_by("nothing")


def test_a_page_depends_on_what_it_takes():
    page = "from normflow_vi.transforms import Planar\nPlanar(2, 4)"
    assert meaning_of_source(page) == meaning_of_source("# so\n" + page + "  # and so\n")
    assert meaning_of_source(page) != meaning_of_source(page.replace("Planar", "Radial"))


# Certificates


def step(start, end, **shapes):
    return {"from": start, "to": end, "shapes": {name: {"finding": f} for name, f in shapes.items()}}


CHAIN = [
    step("a", "b", s="bitwise", t="bitwise", u="different"),
    step("b", "c", s="bitwise", t="within 1e-6", u="bitwise"),
    step("a", "c", u="within 1e-6"),
]


@pytest.mark.parametrize(
    "codes, shape, present, state",
    [
        (["a"], "s", "a", "measured"),
        (["a"], "s", "c", "measured"),
        (["a"], "t", "c", "re-certified"),
        (["a"], "u", "b", "re-certified"),  # a step may be taken both ways
        (["a"], "v", "c", "earlier code"),
        (["a", "b"], "t", "b", "measured"),
        (["a", "b"], "t", "c", "re-certified"),
        (["a", "x"], "s", "c", "earlier code"),
        (["unknown"], "s", "c", "earlier code"),
    ],
)
def test_a_record_stands_as_far_as_certificates_lead(codes, shape, present, state):
    assert state_of(codes, shape, present, CHAIN) == state


def test_the_worst_state_counts():
    assert worst_state(["measured", "earlier code", "re-certified"]) == "earlier code"
    assert worst_state(["measured", "re-certified"]) == "re-certified" and worst_state([]) == "measured"


def test_codes_of_a_record():
    "All codes of a resumed training; the one of others; of old ones, what is known about their text."
    assert codes_of({"codes": ["a", "b"], "meaning_sha256": "b"}, "energies") == ("a", "b")
    assert codes_of({"meaning_sha256": "b"}, "energies") == ("b",)
    assert codes_of({"code_sha256": "0" * 64}, "energies") == ("unknown",) == codes_of({}, "energies")
