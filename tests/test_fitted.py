"A fit in words, in a file, for ArviZ and as a picture."

import builtins
import functools
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Laplace, MultivariateNormal, constraints

import normflow_vi.utils.files
from helpers import damage
from normflow_vi.engine.checkpoint import MAGIC, Damaged, pack
from normflow_vi.engine.history import History
from normflow_vi.evaluate import diagnosis
from normflow_vi.evaluate.witness import Witness
from normflow_vi.fitting.files import FORMAT, trusted_classes
from normflow_vi.fitting.fitted import Fit
from normflow_vi.fitting.verdict import verdict_in_words
from normflow_vi.flows import Flow
from normflow_vi.objectives import Estimate, estimate
from normflow_vi.testing.cases import CASES
from normflow_vi.transforms import Affine, Chain, Planar, Transform
from normflow_vi.transforms.laws import Law
from normflow_vi.utils.files import sha256

LOG_Z = math.log(2 * math.pi)


def history(name="elbo", runs=2, T=20):
    curve = 2 - 2 * np.exp(-np.arange(T) / 5)[:, None] * (1 + 0.5 * np.arange(runs))
    held = (np.array([], int), {}) if name == "elbo" else (np.array([500, 1000]), {"nll": -curve[[9, 19]]})
    return History(np.arange(50, 50 * T + 1, 50), {name: curve, "loss": -curve}, *held, 1.5)


def gaussian(
    shift=0.0,
    scale=1.0,
    draws=4000,
    dim=2,
    target=lambda z: -0.5 * (z * z).sum(-1),
    seed=1,
    **fields,
):
    "A fit of N(shift, scale^2) to a standard normal target without its constant."
    q = Flow(Affine(dim=dim)).eval()
    q.place.loc += shift
    q.place.scale *= scale
    with torch.no_grad():
        z, log_q = q.rsample_and_log_prob((draws,), torch.Generator().manual_seed(seed))
    log_w = target(z) - log_q
    return Fit(
        q,
        history(),
        1000,
        **{
            "z": z,
            "log_w": log_w,
            "bounds": (
                estimate(log_w),
                Estimate(torch.tensor(1.2), torch.tensor(0.01)),
            ),
            **fields,
        },
    )


SAMPLED = history("log_likelihood", 1)


def of_samples(held=-2.8, q=None, history=SAMPLED, **fields):
    value = Estimate(torch.tensor(held), torch.tensor(0.02))
    return Fit(
        q or Flow(Affine(dim=2)).eval(),
        history,
        1000,
        **{"bounds": (value,), "log_likelihood": value, **fields},
    )


HALF = torch.tensor([0.5, 0.0])


def test_derived_values():
    fit = gaussian(HALF, log_z=LOG_Z)  # KL = .5^2 / 2, chi^2 = exp(.25) - 1
    assert abs(fit.kl.value - 0.125) < 4 * fit.kl.std_error
    assert abs(fit.elbo.value + fit.kl.value - LOG_Z) < 1e-9
    assert abs(fit.evidence.value - LOG_Z) < 4 * fit.evidence.std_error
    assert abs(fit.ess / 4000 - math.exp(-0.25)) < 0.05
    assert fit.k_hat < 0.7
    assert (fit.moments.mean.abs() < 4 * fit.moments.mean_error).all()
    assert ((fit.moments.sd - 1).abs() < 4 * fit.moments.sd_error).all()
    assert gaussian().kl is None
    for name in ("elbo", "evidence", "kl", "k_hat", "ess", "moments"):
        assert getattr(of_samples(), name) is None
    with pytest.raises(AttributeError):
        fit.steps = 3  # frozen


VERDICTS = [
    (dict(log_z=LOG_Z), "good: q can be used as it is", ""),
    ({}, "good: q can be used as it is", "(as far as its own draws can tell)"),
    (
        dict(shift=HALF),
        "usable with importance weights: KL(q||p) is about 0.1",
        "its mean of z[0] is off by 0.5",
    ),
    (dict(scale=1.25), "usable with importance weights: ", "its sd of z["),
    (dict(scale=0.4), "not to be trusted: k-hat", ""),
    (dict(scale=0.85), "usable with importance weights: ", "its sd"),
    (dict(scale=1.04), "good: q can be used as it is, but its sd of z[", "is off by 0.0"),
    (dict(scale=2.0), "usable with importance weights: its 4,000 draws are worth", "KL(q||p) is about"),
    (dict(scale=3.0), "not to be trusted: its ELBO lies 5.", "nats below the evidence"),
    (dict(log_z=LOG_Z + math.log(2)), "not to be trusted: it misses about 50% of the target's mass", ""),
    (dict(log_z=LOG_Z + 0.03), "good", ""),
    (dict(log_z=LOG_Z - 0.1), "not to be trusted: ELBO or evidence lies above log_z", ""),
    (dict(draws=50), "not to be trusted: its 50 draws are worth only 50", ""),
    (
        dict(target=lambda z: torch.where(z[:, 0] > -1, -0.5 * (z * z).sum(-1), -math.inf)),
        "usable with importance weights: 1",
        "of its draws lie outside the target's support, most of them below -1 in z[0]",
    ),
]


@pytest.mark.parametrize("given, expected, reason", VERDICTS)
def test_verdicts(given, expected, reason):
    fit = gaussian(**given)
    first, second = fit.summary().splitlines()[:2]
    assert first.startswith("verdict: " + expected)
    assert reason in first
    assert expected.startswith(fit.verdict)
    assert second.startswith("next: ")
    is_slightly_off = fit.verdict == "good" and ", but its" in first
    assert (second == "next: draw from q") == (fit.verdict == "good" and not is_slightly_off)
    assert (second == "next: draw from q; for moments use the weights") == is_slightly_off
    assert len(fit.summary().splitlines()) <= 13
    assert repr(fit) == fit.summary()
    assert max(map(len, fit.summary().splitlines()[1:])) < 200


def test_verdicts_do_not_flicker():
    """A fit well inside its level is judged alike for every set of draws.

    (With 4,000 draws k-hat of the last spreads from 0.7 to 1.2.)
    """
    for given, word in (
        (dict(scale=1.05), "good"),
        (dict(shift=HALF), "usable"),
        (dict(scale=0.2, draws=40_000), "not to be trusted"),
    ):
        assert all(verdict_in_words(gaussian(**given, seed=seed)).startswith(word) for seed in range(20))


def test_every_line_of_a_summary():
    lines = gaussian(HALF, log_z=LOG_Z, converged=True).summary().splitlines()
    for line, start in zip(
        lines,
        (
            "verdict: ",
            "next: a longer flow",
            "ELBO: 1.7",
            "KL(q||p): 0.1",
            "evidence: 1.8",
            "k-hat: 0.",
            "ESS: 3,",
            "restarts: 2, bounds 1.200",
            "training: converged after 1,000",
            "z[0]: mean 0.5",
            "z[1]: mean",
        ),
        strict=True,
    ):
        assert line.startswith(start), line
    assert "good (below 0.70)" in lines[5]
    assert "1 of 2 reach the best" in lines[7]
    assert "standard errors" in lines[9]
    assert "standard errors" not in lines[10]
    text = gaussian(
        converged=False,
        bounds=[Estimate(torch.tensor(v), torch.tensor(0.01)) for v in (1.84, 1.83, 1.80)],
        scale=0.4,
    ).summary()
    assert "up to a constant" in text
    assert "KL(q||p):" not in text
    assert "they agree" in text
    assert "stopped at the limit of 1,000 steps" in text
    assert "unreliable (not below 0.70)" in text
    assert "1,000 steps, as asked" in gaussian(bounds=gaussian().bounds[:1]).summary()
    assert "nothing to compare" in gaussian(bounds=gaussian().bounds[:1]).summary()
    assert len(gaussian(dim=9).summary().splitlines()) <= 13
    assert gaussian(dim=1).summary().count("z[") == 1


def test_a_fit_to_samples():
    past = history("log_likelihood", 1)
    seen = past.values["log_likelihood"][-1, 0]
    assert "overfits by 0.50" in of_samples(seen - 0.5).summary()
    assert "overfits" not in of_samples(seen - 0.05).summary()
    assert of_samples().summary().startswith("verdict: fitted to samples")
    early = replace(
        past, best_step=np.array([200]), best_value=np.array([3.0])
    )  # the fourth of twenty values is the one that counts
    assert "overfits" not in of_samples(past.values["log_likelihood"][3, 0], history=early).summary()
    assert "cannot show overfitting" in of_samples(history=replace(past, valid={})).summary()


def test_restarts():
    def line(*values):
        return next(
            line
            for line in gaussian(bounds=[Estimate(torch.tensor(v), torch.tensor(0.01)) for v in values])
            .summary()
            .splitlines()
            if line.startswith("restarts")
        )

    assert line(1.0).endswith("nothing to compare it with")
    assert line(1.0, 0.98, 0.96).endswith("bounds 0.960 to 1.000 nats: they agree")
    assert "2 of 3 reach the best" in line(1.0, 0.98, 0.5)
    assert "1 without a finite bound" in line(1.0, 0.99, math.nan)
    assert "they agree" in line(1.0, 0.99, math.nan)
    assert line(-math.inf, -math.inf) == "restarts: 2, 2 without a finite bound"


def test_weights_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match="log_w.*1 of 4000"):
        gaussian(target=lambda z: torch.where(torch.arange(4000) == 7, math.nan, z[:, 0])).summary()


# Files


def same(a, b):
    "Two fits with equal fields, and flows that draw and evaluate alike."
    for x, y in ((a.z, b.z), (a.log_w, b.log_w)):
        assert x is y is None or torch.equal(x, y)
    assert (a.steps, a.converged, a.log_z, len(a.bounds)) == (
        b.steps,
        b.converged,
        b.log_z,
        len(b.bounds),
    )
    assert not b.q.training
    for x, y in zip((*a.bounds, a.log_likelihood), (*b.bounds, b.log_likelihood), strict=True):
        assert (
            (x is y is None)
            or torch.equal(x.value, y.value)
            and torch.equal(x.std_error, y.std_error)
            and x.terms == y.terms
        )
    for x, y in (
        (a.history.values, b.history.values),
        (vars(a.history), vars(b.history)),
    ):
        assert x.keys() == y.keys()
        assert all(
            type(x[n]) is type(y[n])
            and (not isinstance(x[n], np.ndarray) or x[n].dtype == y[n].dtype and np.array_equal(x[n], y[n]))
            for n in x
        )
    return alike(a.q, b.q)


def alike(p, q):
    with torch.no_grad():
        draws = []
        for flow in (p, q):
            torch.manual_seed(3)
            draws.append(flow.rsample_and_log_prob((20,), torch.Generator().manual_seed(2)))
        (z, log_q), (y, log_r) = draws
        return (
            torch.equal(z, y)
            and torch.equal(log_q, log_r)
            and (
                p.transform.inverse_kind == "none"
                or all(
                    torch.equal(
                        flow.log_prob(z, torch.Generator().manual_seed(4)),
                        p.log_prob(z, torch.Generator().manual_seed(4)),
                    )
                    for flow in (p, q)
                )
            )
        )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "one.fit"


def test_what_is_saved_is_loaded(path):
    for fit in (
        gaussian(HALF, log_z=LOG_Z, converged=True),
        gaussian(draws=30),
        of_samples(),
        gaussian(bounds=(estimate(torch.randn(9), {"log_q": torch.randn(9)}),)),
    ):
        assert fit.save(path) == path
        assert same(fit, Fit.load(path))
        assert type(Fit.load(str(path))) is Fit
        assert Fit.load(path).summary() == fit.summary()


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name != "indexed, frozen noise"],
    ids=lambda case: case.name,
)
def test_every_transform_comes_back(case, path):
    q = Flow(case.draw(case.dims[-1])).double().eval()
    of_samples(q=q).save(path)
    back = Fit.load(path).q
    assert alike(q, back)
    assert str(q) == str(back)
    assert all(
        torch.equal(x, y) and x.dtype == y.dtype
        for x, y in zip(q.state_dict().values(), back.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "support",
    [
        constraints.real_vector,
        constraints.positive,
        constraints.greater_than(2.0),
        constraints.less_than(-1.0),
        constraints.interval(-1.0, 2.0),
        constraints.unit_interval,
        constraints.simplex,
        constraints.independent(constraints.positive, 1),
        constraints.cat(
            [
                constraints.independent(constraints.real, 1),
                constraints.independent(constraints.positive, 1),
            ],
            dim=-1,
            lengths=[1, 2],
        ),
        constraints.independent(constraints.interval(torch.zeros(3), torch.ones(3)), 1),
    ],
    ids=str,
)
def test_every_support_comes_back(support, path):
    q = Flow(Chain(Affine(dim=3), Planar(dim=3, length=2)), support=support).eval()
    of_samples(q=q).save(path)
    assert alike(q, Fit.load(path).q)


@pytest.mark.parametrize(
    "base",
    [
        MultivariateNormal(torch.ones(3), 2 * torch.eye(3)),
        Independent(Laplace(torch.zeros(3), torch.ones(3)), 1),
        Flow(Planar(dim=3, length=2), base=Flow(Affine(dim=3))),
    ],
    ids=lambda base: type(base).__name__,
)
def test_every_base_comes_back(base, path):
    q = Flow(Affine(dim=3), base=base).eval()
    of_samples(q=q).save(path)
    assert alike(q, Fit.load(path).q)


def test_a_view_of_many_runs_is_saved_alone(path):
    q = Flow(Affine(dim=2)).eval()
    small = of_samples(q=q).save(path).stat().st_size
    for tensor in (*q.parameters(), *q.buffers()):
        tensor.data = tensor.data.expand(100_000, *tensor.shape).contiguous()[7]
    assert of_samples(q=q).save(path).stat().st_size < small + 2000
    assert alike(q, Fit.load(path).q)


class Mine(Transform):
    "A user's own transform."

    def initial(self):
        return {"a": torch.full((self.length, self.dim), 0.5)}

    def push(self, z, a):
        return z * a.exp(), a.sum(-1).expand(z.shape[:-1])

    def pull(self, y, a):
        return y * (-a).exp(), -a.sum(-1).expand(y.shape[:-1])


def test_a_class_of_ones_own_must_be_named(path, monkeypatch):
    q = Flow(Mine(dim=2, length=3)).eval()
    of_samples(q=q).save(path)
    with pytest.raises(Damaged, match=rf"{path.name}.*{__name__}.Mine.*classes=\["):
        Fit.load(path)
    assert alike(q, Fit.load(path, classes=[Mine]).q)
    monkeypatch.setattr(Mine, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Mine, raising=False)
    of_samples(q=q).save(path)
    monkeypatch.undo()
    with pytest.raises(Damaged, match="__main__.Mine"):
        Fit.load(path)
    assert alike(q, Fit.load(path, classes=[Mine]).q)  # saved by a script, loaded by a module
    with pytest.raises(Damaged, match="__main__.Mine"):
        Fit.load(path, classes=[History])


def test_only_classes_can_be_named(path):
    gaussian().save(path)
    for bad in ([print], [lambda: 0], ["Mine"], Mine, [type], None):
        with pytest.raises(TypeError, match="classes"):
            Fit.load(path, classes=bad)


def test_a_flow_that_holds_a_function_is_refused_at_once(path):
    for held in (lambda z: z, print, torch.tanh, os.system):
        q = Flow(Affine(dim=2))
        q.transform.held = held
        with pytest.raises(TypeError, match="q holds"):
            of_samples(q=q).save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    "kind, times",
    [
        ("bit", 60),
        ("truncated", 30),
        ("zeroed", 30),
        *[
            pytest.param(kind, times, marks=pytest.mark.full)
            for kind, times in [("bit", 400), ("truncated", 200), ("zeroed", 200)]
        ],
    ],
)
def test_damage_is_noticed_every_time(path, kind, times):
    rng = np.random.default_rng(times)
    data = gaussian(draws=500).save(path).read_bytes()
    for _ in range(times):
        path.write_bytes(damage(kind, data, rng))
        with pytest.raises(Damaged, match=f"{path.name} cannot be loaded as a fit"):
            Fit.load(path)


def test_foreign_files_are_refused(path):
    for data in (
        b"",
        b"hello",
        bytes(5000),
        pickle.dumps(1),
        MAGIC,
        pack(3, {"weights": torch.zeros(3)}),
        pack(3, {"format": FORMAT}),
        pack(3, {"format": FORMAT, "q": torch.zeros(3)}),
        packed(nn.Linear(2, 2)),
        packed({"a": 1}),
        packed(Flow(Affine(dim=2)), bounds=3),
        packed(Flow(Affine(dim=2)), history={}),
        packed(Flow(Affine(dim=2)), more=1),
    ):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=path.name):
            Fit.load(path)
    with pytest.raises(FileNotFoundError):
        Fit.load(path.with_name("none.fit"))


@pytest.mark.parametrize("number", [0, FORMAT + 1, 7])
def test_other_formats_are_refused_with_both_numbers(path, number):
    path.write_bytes(packed(Flow(Affine(dim=2)), format=number))
    with pytest.raises(ValueError, match=f"{path.name}.*format {number};.*formats 1 to {FORMAT}"):
        Fit.load(path)
    payload = b"the future"
    path.write_bytes(b"%s 9 %s\n" % (MAGIC, sha256(b"9" + payload).encode()) + payload)
    with pytest.raises(ValueError, match=f"{path.name}.*format 9"):
        Fit.load(path)


# Strangers


def packed(item, raw=None, zipped=True, **fields):
    "A file with a good hash and `item`, or the bytes `raw`, in the place of the flow."
    if raw is None:
        buffer = io.BytesIO()
        torch.save(item, buffer, _use_new_zipfile_serialization=zipped)
        raw = buffer.getvalue()
    one = {"value": torch.tensor(1.0), "std_error": torch.tensor(0.1), "terms": {}}
    past = {
        "steps": torch.arange(2),
        "values": {"log_likelihood": torch.zeros(2, 1)},
        "steps_valid": torch.arange(0),
        "valid": {},
        "seconds": 1.0,
        "best_step": None,
        "best_value": None,
    }
    state = {
        "format": FORMAT,
        "steps": 1,
        "converged": None,
        "z": None,
        "log_w": None,
        "log_z": None,
        "bounds": [one],
        "log_likelihood": one,
        "history": past,
    }
    return pack(1, {**state, "q": torch.frombuffer(bytearray(raw), dtype=torch.uint8), **fields})


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    "Unpickled by the state setter of its sixth item."

    def __init__(self, setter):
        self.setter = setter

    def __reduce_ex__(self, protocol):
        return nn.Identity, (), {"a": 1}, None, None, self.setter


def with_attribute(name, value):
    q = Flow(Affine(dim=2))
    object.__setattr__(q.transform, name, value)
    return q


def hostile(target):
    "Objects that would make the file `target` when they are unpickled, or used."
    touch = f"touch {target}"
    code = f"open({str(target)!r}, 'w')"
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(os.system, touch)
    yield from (
        Payload(os.system, touch),
        Payload(builtins.eval, code),
        Payload(exec, code),
        Payload(subprocess.call, ["touch", str(target)]),
        Payload(open, str(target), "w"),
        Payload(normflow_vi.utils.files.atomic_write, str(target), b"x"),
        Payload(functools.partial(os.system, touch)),
        Payload(functools.partial, os.system, touch),
        objects,
        Payload(getattr, os, "system"),
        Payload(torch.load, str(target)),
        Payload(torch.save, 1, str(target)),
        Payload(np.save, str(target), 1),
        Payload(types.SimpleNamespace),
        Payload(map, os.system, [touch]),
        [{"deep": Payload(os.system, touch)}],
        with_attribute("held", Payload(os.system, touch)),
        with_attribute("_forward_hooks", {0: os.system}),
        with_attribute("push", os.system),
        Payload(subprocess.Popen, ["touch", str(target)]),
        Payload(__import__, "antigravity"),
        Payload(pickle.loads, pickle.dumps(Payload(os.system, touch), 2)),
        Payload(nn.utils.parametrize.register_parametrization),
    )


def opcodes(target):
    "The same by hand, in opcodes that `torch.save` does not write."
    touch = f"touch {target}".encode()
    quoted = b"S'" + touch + b"'\n"
    yield b"cos\nsystem\n(" + quoted + b"tR."
    yield b"(" + quoted + b"ios\nsystem\n."  # INST
    yield b"(cos\nsystem\n" + quoted + b"o."  # OBJ
    yield (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c" + bytes([len(touch)]) + touch + b"\x85R."
    )  # STACK_GLOBAL
    yield b"\x80\x02ctorch.nn.modules.linear\nIdentity\nq\x00)\x81}(X\x08\x00\x00\x00__call__cos\nsystem\nub."
    yield (b"\x80\x02cnormflow_vi.files\natomic_write\n(" + b"S'" + str(target).encode() + b"'\nS'x'\ntR.")
    yield b"\x80\x02cnormflow_vi.flows\nmath.factorial\n(K\x03tR."  # an attribute of an allowed module
    yield b"\x80\x02ctorch.distributions.constraints\ntorch.hub\n."


def as_module(pkl):
    "Bytes of a pickle in the frame that `torch.save` writes."
    import zipfile

    buffer = io.BytesIO()
    torch.save(1, buffer)
    parts = zipfile.ZipFile(buffer)
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as archive:
        for name in parts.namelist():
            archive.writestr(name, pkl if name.endswith("data.pkl") else parts.read(name))
    return new.getvalue()


def saved(item, **options):
    "The bytes of a hostile file; None for what cannot even be written."
    try:
        return packed(item, **options)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("classes", [(), (Mine,)])
def test_a_payload_is_never_executed(path, tmp_path, zipped, classes):
    target = tmp_path / "executed"
    refused = 0
    for item in hostile(target):
        if (data := saved(item, zipped=zipped)) is None:
            continue
        path.write_bytes(data)
        with pytest.raises(Damaged, match=path.name):
            Fit.load(path, classes=classes)
        assert not target.exists()
        assert "antigravity" not in sys.modules
        refused += 1
    assert refused >= 20


def test_payloads_in_other_opcodes_are_not_executed(path, tmp_path):
    target = tmp_path / "executed"
    for pkl, frame in itertools.product(opcodes(target), (as_module, bytes)):
        path.write_bytes(packed(None, raw=frame(pkl)))
        with pytest.raises(Damaged, match=path.name):
            Fit.load(path)
        assert not target.exists()


def test_the_payloads_bite(tmp_path):
    "The control: read without restriction, they do run."
    target = tmp_path / "executed"
    for item in list(hostile(target))[:5]:
        buffer = io.BytesIO()
        torch.save(item, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=False)
        assert target.exists()
        target.unlink()
    for pkl in list(opcodes(target))[:4]:
        pickle.loads(pkl)
        assert target.exists()
        target.unlink()


def test_only_harmless_classes_are_trusted():
    found = trusted_classes()
    assert all(isinstance(cls, type) and not issubclass(cls, type) for cls in found)
    assert Flow in found
    assert Fit not in found
    assert Mine not in found
    assert all(
        cls.__module__.startswith(
            (
                "torch.nn.modules.",
                "torch.distributions.",
                "normflow_vi.transforms.",
                "normflow_vi.flows",
                "normflow_vi.models.mixture",
            )
        )
        for cls in found
    )
    kinds = (
        nn.Module,
        Law,
        torch.distributions.Distribution,
        torch.distributions.Transform,
        constraints.Constraint,
    )
    assert all(issubclass(cls, kinds) for cls in found)
    assert not {cls.__name__ for cls in found} & {
        "DataParallel",
        "ScriptModule",
        "GraphModule",
        "lazy_property",
    }


def test_a_setter_of_state_is_not_called(path, tmp_path):
    path.write_bytes(packed(Stateful(os.system)))
    with pytest.raises(Damaged):
        Fit.load(path)


FULL_DISK = """
import resource, sys, torch
sys.path.insert(0, sys.argv[2])
from test_fitted import gaussian, Fit
path = sys.argv[1]
gaussian(draws=100).save(path)
for limit in (0, 10_000, 50_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try: gaussian(draws=20_000).save(path); raise SystemExit("saved")
    except OSError as error: print(error)
    assert len(Fit.load(path).z) == 100
"""


def test_a_full_disk_leaves_the_previous_file(path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("one.fit") == 3
    assert "a fit of" in done.stdout
    assert os.listdir(path.parent) == ["one.fit"]


# ArviZ


def test_arviz_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"normflow_vi\[arviz\]"):
        gaussian().to_arviz()


@pytest.fixture(params=["0.23.4", "1.2.0"])
def recorder(request, monkeypatch):
    "A stand-in for ArviZ of either generation, that returns the groups it is given."

    def from_dict(posterior=None, **groups):
        return {"posterior": posterior, **groups} if request.param.startswith("0.") else posterior

    monkeypatch.setitem(
        sys.modules,
        "arviz",
        types.SimpleNamespace(__version__=request.param, from_dict=from_dict),
    )


def test_what_arviz_is_given(recorder):
    fit = gaussian(HALF)
    groups = fit.to_arviz()
    rows = diagnosis.resample(fit.log_w)
    assert groups["posterior"]["z"].shape == (1, 4000, 2)
    assert np.array_equal(groups["posterior"]["z"][0], fit.z[rows].numpy())
    assert np.array_equal(groups["sample_stats"]["log_weight"][0], fit.log_w[rows].numpy())
    named = fit.to_arviz(names={"tau": 0, "theta": slice(1, None)})["posterior"]
    assert named["tau"].shape == (1, 4000)
    assert named["theta"].shape == (1, 4000, 1)
    assert set(fit.to_arviz(names=["a", "b"])["posterior"]) == {"a", "b"}
    for bad in (["a"], ["a", "a"], 3, {}):
        with pytest.raises(ValueError, match="names"):
            fit.to_arviz(names=bad)
    assert of_samples().to_arviz().keys() == {"posterior"}
    assert of_samples().to_arviz()["posterior"]["z"].shape == (1, 10_000, 2)
    with pytest.warns(UserWarning, match="k-hat"):
        gaussian(scale=0.4).to_arviz()


def test_arviz_agrees_about_means_and_errors():
    arviz = pytest.importorskip("arviz")
    fit = gaussian(HALF, draws=20_000)
    found = fit.to_arviz(names=["a", "b"])
    for d, name in enumerate("ab"):
        assert abs(float(arviz.mcse(found)[name]) / fit.moments.mean_error[d] - 1) < 0.15
        assert (
            abs(float(found["posterior"][name].mean()) - fit.moments.mean[d]) < 2 * fit.moments.mean_error[d]
        )


def test_what_functions_of_the_draws_give_arviz(recorder):
    fit = gaussian(HALF)
    groups = fit.to_arviz(log_likelihood=lambda z: z, predictive=lambda z: {"a": z[:, 0], "b": z})
    z = torch.from_numpy(groups["posterior"]["z"][0])
    known = groups["sample_stats"]
    assert np.allclose(known["lp"][0], -0.5 * z.square().sum(-1), atol=1e-4)
    assert np.allclose(known["log_q"], known["lp"] - known["log_weight"], atol=1e-4)
    assert np.array_equal(groups["log_likelihood"]["x"][0], z)
    assert np.array_equal(groups["posterior_predictive"]["a"][0], z[:, 0])
    assert groups["posterior_predictive"]["b"].shape == (1, 4000, 2)
    for wrong in (lambda z: z[0], lambda z: 0.0, lambda z: z.sum()):
        for name in ("log_likelihood", "predictive"):
            with pytest.raises(ValueError, match=name):
                fit.to_arviz(**{name: wrong})
    assert of_samples().to_arviz(predictive=lambda z: z).keys() == {"posterior", "posterior_predictive"}


def test_leaving_one_observation_out_is_exact_for_a_gaussian_mean():
    "Six observations of variance 6 and mean 0 under a flat prior: the posterior of their mean is N(0, 1)."
    arviz = pytest.importorskip("arviz")
    x = torch.tensor([-3.0, -2.0, -0.5, 0.5, 2.0, 3.0])
    found = gaussian(HALF[:1], dim=1, draws=20_000).to_arviz(
        log_likelihood=lambda z: torch.distributions.Normal(z, 6**0.5).log_prob(x)
    )
    others = torch.distributions.Normal(-x / 5, (6 + 6 / 5) ** 0.5)  # given the other five
    loo = arviz.loo(found, pointwise=True)
    assert np.abs(loo.loo_i.values - others.log_prob(x).numpy()).max() < 0.02
    assert loo.pareto_k.max() < 0.5


# Pictures


@pytest.fixture
def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.mark.parametrize(
    "make, panels",
    [
        (lambda: gaussian(HALF, log_z=LOG_Z), 5),
        (lambda: gaussian(dim=1), 3),
        (lambda: gaussian(dim=4), 6),
        (of_samples, 4),
        (lambda: gaussian(scale=0.4), 5),
        (
            lambda: gaussian(target=lambda z: torch.where(z[:, 0] > 0, z[:, 0] * 1e5, -math.inf)),
            5,
        ),
        (lambda: gaussian(draws=30), 5),
    ],
)
def test_pictures(pyplot, make, panels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = make().plot()
        figure.canvas.draw()
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert len(visible) == panels
    assert all(axes.get_title() and axes.get_xlabel() for axes in visible)
    assert all(axes.get_legend() for axes in visible)


def test_marginals_can_be_counted(pyplot):
    assert len([axes for axes in gaussian(dim=4).plot(coordinates=0).axes if axes.get_visible()]) == 3
    with pytest.raises(ValueError, match="coordinates"):
        gaussian().plot(coordinates=1.5)


@pytest.mark.parametrize(
    "make, coordinates, panels",
    [
        (lambda: gaussian(HALF), 4, 3),
        (lambda: gaussian(dim=6), 3, 6),
        (lambda: gaussian(dim=6), (5, 0), 3),
        (lambda: gaussian(dim=1), 4, 1),
        (of_samples, 4, 3),
    ],
)
def test_every_two_coordinates(pyplot, make, coordinates, panels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = make().plot_pairs(coordinates)
        figure.canvas.draw()
    assert len([axes for axes in figure.axes if axes.get_visible()]) == panels


def test_pairs_show_what_a_witness_saw(pyplot):
    fit = gaussian()
    far = fit.z[:600].reshape(2, 300, 2) + torch.tensor([20.0, 0.0])
    witness = Witness(far, torch.full((2, 300), 50.0), torch.zeros(2, 300))
    marginal, _, pair, _ = replace(fit, witness=witness).plot_pairs().axes
    assert marginal.get_xlim()[1] > 20
    assert pair.get_xlim()[1] > 20
    assert max(len(points.get_offsets()) for points in pair.collections) >= 300


def test_pairs_name_a_coordinate_that_there_is_not(pyplot):
    for wrong in (0, -1, 1.5, (), (0, 2), (0, -1), (0, 1.5), "ab"):
        with pytest.raises(ValueError, match="coordinates"):
            gaussian().plot_pairs(wrong)
