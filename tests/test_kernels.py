"""Compiled kernels: when they run, that they are their references, and that a wrong one is seen."""

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacfwd, jacrev, vmap

from helpers import caught
from normflow_vi.engine.runs import StackedRuns
from normflow_vi.numerics import compiling as kernels
from normflow_vi.numerics import planar as loops
from normflow_vi.numerics.compiling import exp, log, tanh
from normflow_vi.transforms import Planar, planar
from normflow_vi.transforms.planar import planar_layers, planar_torch

KERNELS = ("_wide_forward", "_wide_backward", "_narrow_forward", "_narrow_backward")
C = planar.CONSTRAINTS["identity"]
needs_numba = pytest.mark.skipif(not kernels.has_numba(), reason="numba is optional")


@pytest.fixture
def seen(monkeypatch):
    "The names of the planar kernels that ran."
    names = []
    compiled = loops.planar_kernels()

    def noted(name):
        return lambda *arguments: (
            names.append(name),
            getattr(compiled, name)(*arguments),
        )[1]

    if compiled is not None:
        monkeypatch.setattr(
            loops,
            "planar_kernels",
            lambda: SimpleNamespace(**{name: noted(name) for name in KERNELS}),
        )
    return names


def layers(*batch, K=4, D=3, dtype=torch.float64, scale=0.5):
    return [
        (s * torch.randn(*batch, *shape, dtype=dtype)).requires_grad_()
        for s, shape in ((scale, (K, D)), (scale, (K, D)), (1.0, (K,)))
    ]


def points(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def everything(form, inputs):
    y, log_det = form(*inputs)
    weights = torch.arange(log_det.numel(), dtype=y.dtype).cos().view(log_det.shape)
    return [
        y,
        log_det,
        *torch.autograd.grad(y.sin().sum() + (log_det * weights).sum(), inputs),
    ]


def gap(found, expected):
    assert all(f.shape == e.shape and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))
    return max(
        [
            ((f.double() - e.double()).abs().max() / (1 + e.double().abs().max())).item()
            for f, e in zip(found, expected, strict=True)
            if e.numel()
        ],
        default=0,
    )


def kernel(*inputs):
    return planar_layers(*inputs, C)


def reference(*inputs):
    return planar_torch(*inputs, C)


# The guard


def dual_numbers(t):
    with torch.autograd.forward_ad.dual_level():
        return kernels.fits(t)


def dispatch_mode(t):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return kernels.fits(t)


def asked_within(transform):
    def ask(t):
        answers = []
        transform(lambda x: (answers.append(kernels.fits(x)), x.sum())[1])(t)
        return answers[0]

    return ask


def traced(t):
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(
            lambda x: (answers.append(kernels.fits(x)), x.sum())[1],
            t,
            check_trace=False,
        )
    return answers[0]


class Tagged(torch.Tensor):
    pass


REFUSED = {
    "another device": lambda t: kernels.fits(t.to("meta")),
    "half precision": lambda t: kernels.fits(t.half()),
    "whole numbers": lambda t: kernels.fits(t.long()),
    "two precisions": lambda t: kernels.fits(t, t.double()),
    "a sparse tensor": lambda t: kernels.fits(t.to_sparse()),
    "a negative view": lambda t: kernels.fits(torch._neg_view(t)),
    "a subclass": lambda t: kernels.fits(t.as_subclass(Tagged)),
    "grad": asked_within(torch.func.grad),
    "jacfwd": asked_within(jacfwd),
    "jacrev": asked_within(jacrev),
    "functionalize": asked_within(torch.func.functionalize),
    "vmap of grad": asked_within(lambda f: vmap(torch.func.grad(f))),
    "grad of vmap": asked_within(lambda f: torch.func.grad(lambda t: vmap(f)(t).sum())),
    "dual numbers": dual_numbers,
    "a dispatch mode": dispatch_mode,
    "jit trace": traced,
    "compile": lambda t: torch.compile(lambda x: x + float(kernels.fits(x)), fullgraph=True, backend="eager")(
        t
    ).equal(t + 1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_nothing_runs_where_somebody_records(name):
    assert not REFUSED[name](torch.randn(3, 4))


@needs_numba
def test_what_a_kernel_without_rules_refuses_besides():
    z = torch.randn(3, 4)
    for t, plain in ((z, True), (torch.nn.Parameter(z), False)):
        assert kernels.fits(t)
        assert kernels.fits(t, rules=False) == plain
        with torch.no_grad():
            assert kernels.fits(t, rules=False)
    answers = []
    vmap(lambda x: (answers.extend((kernels.fits(x), kernels.fits(x, rules=False))), x)[1])(z)
    assert answers == [True, False]


# Functions of single precision, over all scales


@needs_numba
def test_functions_at_every_exponent():
    def apply(x, y, which):
        for i in range(len(x)):
            y[i] = exp(x[i]) if which == 0 else tanh(x[i]) if which == 1 else log(x[i])

    run = kernels.machine_code(apply)
    bits = np.arange(2**16, dtype=np.uint32) * 65521 + 7
    every = bits.view(np.float32)  # all exponents and signs, infinities and NaN
    for which, function in enumerate((np.exp, np.tanh, np.log)):
        found = np.empty_like(every)
        run(every, found, which)
        with np.errstate(all="ignore"):
            exact = function(every.astype(np.float64))
        with np.errstate(all="ignore"):
            single = exact.astype(np.float32)
        usual = np.isfinite(single)
        assert np.array_equal(found[~usual], single[~usual], equal_nan=True)
        assert (
            np.abs(found[usual] - exact[usual]) <= 3 * np.spacing(np.abs(single[usual])).astype(np.float64)
        ).all()


# The planar kernels are their reference

SHAPES = {
    "owned": ((40,), ()),
    "owned, one point": ((), ()),
    "owned, sample axes": ((2, 3, 8), ()),
    "amortised": ((20,), (20,)),
    "few samples": ((3, 20), (20,)),
    "many samples": ((9, 9, 5), (5,)),
    "two batch axes": ((4, 5, 2), (5, 2)),
    "batch of one": ((20,), (1,)),
    "a batch that is spread": ((3, 5, 4), (5, 1)),
    "more than a block": ((700,), ()),
    "no points": ((0,), ()),
    "no samples": ((0, 5), (5,)),
}


@needs_numba
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("K, D", [(1, 1), (32, 2), (3, 40), (80, 5)])
def test_agreement(name, K, D, seen):
    samples, batch = SHAPES[name]
    inputs = [points(*samples, D), *layers(*batch, K=K, D=D, scale=1 / D**0.5)]
    exact = everything(reference, inputs)
    single = [t.detach().float().requires_grad_() for t in inputs]
    assert gap(everything(kernel, inputs), exact) <= 1e-10
    assert [t.dtype for t in everything(kernel, single)] == [torch.float32] * 6
    assert gap(everything(kernel, single), [e.float() for e in exact]) <= 1e-5 + 10 * gap(
        everything(reference, single), [e.float() for e in exact]
    )
    assert len(seen) == (6 if 0 not in samples else 0)


@needs_numba
def test_slices_and_repeated_tensors():
    head = points(6, 4 * 7)
    u, w, b = (
        part.unflatten(-1, shape)
        for part, shape in zip(head.split([12, 12, 4], -1), ((4, 3), (4, 3), (4,)), strict=True)
    )
    for z in (
        points(6, 3),
        points(3, 6).T,
        points(12, 3)[::2],
        points(3).expand(6, 3),
        points(5, 6, 3),
    ):
        for given in (
            (u, w, b),
            (u[:1].expand(6, 4, 3), w, b),
            (u.transpose(0, 1).contiguous().transpose(0, 1), w.flip(1), b),
        ):
            assert gap(everything(kernel, (z, *given)), everything(reference, (z, *given))) <= 1e-12


@needs_numba
@pytest.mark.parametrize("constraint", planar.CONSTRAINTS)
def test_harsh_layers(constraint):
    "Layers 100 times as large, a vanishing w, a slope that underflows: finite, and as the reference."
    c = planar.CONSTRAINTS[constraint]
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        for scale in (0.0, 1e-8, 1.0, 10.0, 100.0):
            z = points(50, 3, dtype=dtype)
            u, w, b = layers(50, K=1, dtype=dtype, scale=scale)
            with torch.no_grad():
                u.copy_(-u.abs() * w.sign())  # w.u < 0: slopes down to e^-10000
            found = everything(lambda *inputs: planar_layers(*inputs, c), (z, u, w, b))
            expected = everything(lambda *inputs: planar_torch(*inputs, c), (z, u, w, b))
            assert all(t.isfinite().all() for t in found[:2])
            assert gap(found[:2], expected[:2]) <= tolerance
            assert all(torch.equal(f.isfinite(), e.isfinite()) for f, e in zip(found, expected, strict=True))


# Programs


@needs_numba
@pytest.mark.parametrize(
    "axes",
    [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, 0), (1, 0, 1, None), (-2, None, 0, 0)],
)
@pytest.mark.parametrize("batch", [(), (6,)], ids=["owned", "amortised"])
@pytest.mark.parametrize("samples", [(), (4,), (30,)])
def test_under_vmap(axes, batch, samples, seen):
    def spread(t, axis):
        return (
            t
            if axis is None
            else torch.stack([t + 0.1 * r for r in range(3)], axis).detach().requires_grad_()
        )

    inputs = [
        spread(t, axis) for t, axis in zip([points(*samples, *batch, 3), *layers(*batch)], axes, strict=True)
    ]
    if len(samples + batch) == 0:
        axes = tuple(0 if axis in (1, -2) and i == 0 else axis for i, axis in enumerate(axes))
        inputs[0] = spread(points(3), axes[0])
    found, expected = (everything(vmap(form, in_dims=axes), inputs) for form in (kernel, reference))
    assert gap(found, expected) <= 1e-12
    assert len(seen) == 2


@needs_numba
def test_under_two_vmaps():
    inputs = [points(2, 3, 9, 3), *layers(2, 3)]
    assert (
        gap(
            everything(vmap(vmap(kernel)), inputs),
            everything(vmap(vmap(reference)), inputs),
        )
        <= 1e-12
    )


@needs_numba
@pytest.mark.parametrize("context_dim", [None, 5])
def test_several_runs_are_the_runs(context_dim, seen):
    "As training stacks them, with noise drawn inside."

    def loss(model, batch, step, generator):
        y, log_det = model(
            torch.randn(40, 2, generator=generator, dtype=torch.float64),
            None if context_dim is None else torch.ones(40, 5, dtype=torch.float64),
        )
        return SimpleNamespace(value=(y.square().sum(-1) - log_det).mean(), terms={})

    runs = StackedRuns([Planar(2, 3, context_dim).double() for _ in range(3)], loss)
    value, _ = runs(None, 0, torch.Generator().manual_seed(0))
    found = torch.autograd.grad(value.sum(), list(runs.parameters().values()))
    noise = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert seen == [
        "_wide_forward" if context_dim is None else "_narrow_forward",
        "_wide_backward" if context_dim is None else "_narrow_backward",
    ]
    for r in range(3):
        own = {name: t[r].detach().requires_grad_() for name, t in runs.parameters().items()}
        y, log_det = functional_call(
            Planar(2, 3, context_dim).double(),
            own,
            (
                noise[r],
                None if context_dim is None else torch.ones(40, 5, dtype=torch.float64),
            ),
        )
        alone = (y.square().sum(-1) - log_det).mean()
        torch.testing.assert_close(value[r], alone)
        for f, e in zip(found, torch.autograd.grad(alone, list(own.values())), strict=True):
            torch.testing.assert_close(f[r], e)


@needs_numba
@pytest.mark.parametrize("shape, batch", [((12,), ()), ((3,), (3,)), ((2, 3), (3,))])
def test_first_and_second_derivatives(shape, batch):
    inputs = [points(*shape, 2), *layers(*batch, K=2, D=2)]
    assert torch.autograd.gradcheck(kernel, inputs)
    assert torch.autograd.gradgradcheck(kernel, inputs)


@needs_numba
def test_second_derivatives_where_inputs_depend_on_each_other():
    x = points(4, 3)
    net = torch.nn.Linear(3, 12).double()
    _, w, b = layers(4)

    def second(form):
        y, log_det = form(x, net(x).view(4, 4, 3), w, b)
        (slope,) = torch.autograd.grad(y.sin().sum() + log_det.sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *net.parameters()])

    assert gap(second(kernel), second(reference)) <= 1e-12


@needs_numba
def test_gradients_that_are_mapped():
    inputs = [points(4, 3), *layers(4)]
    every = torch.eye(12, dtype=torch.float64).view(12, 4, 3)
    found, expected = (
        torch.autograd.grad(form(*inputs)[0], inputs, every, is_grads_batched=True)
        for form in (kernel, reference)
    )
    assert gap(found, expected) <= 1e-12


@needs_numba
def test_gradients_that_nobody_wants():
    "Some inputs want no gradient, some outputs are not used, the graph is used twice."
    for wanted in range(4):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate([points(20, 3), *layers()])]
        for part in (0, 1):
            found, expected = (form(*inputs)[part].sum() for form in (kernel, reference))
            for _ in range(2):
                slope = torch.autograd.grad(found, inputs[wanted], retain_graph=True)
                expected_slope = torch.autograd.grad(expected, inputs[wanted], retain_graph=True)
                assert gap(slope, expected_slope) <= 1e-12
    with torch.inference_mode():
        assert not kernel(*inputs)[0].requires_grad


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_at_every_call(dtype):
    for shape, batch in (((300,), ()), ((50,), (50,)), ((4, 50), (50,))):
        inputs = [
            points(*shape, 5, dtype=dtype),
            *layers(*batch, K=7, D=5, dtype=dtype),
        ]
        first = everything(kernel, inputs)
        for _ in range(5):
            junk = [torch.full((n,), float("nan"), dtype=dtype) for n in (35, 300, 1500, 35 * 50)]
            del junk  # memory that comes back is not empty
            assert all(torch.equal(a, b) for a, b in zip(first, everything(kernel, inputs), strict=True))


@needs_numba
def test_inputs_are_left_alone():
    for shape, batch in (((300,), ()), ((2, 50), (50,))):
        inputs = [points(*shape, 5), *layers(*batch, D=5)]
        before = [t.detach().clone() for t in inputs]
        everything(kernel, inputs)
        assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


# Without a compiler, and with a wrong kernel


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    kernels.has_numba.cache_clear()
    loops.planar_kernels.cache_clear()
    try:
        inputs = [points(20, 3), *layers()]
        assert not kernels.fits(*inputs)
        assert loops.planar_kernels() is None
        assert kernels.machine_code(loops._add) is None
        assert all(
            torch.equal(a, b)
            for a, b in zip(everything(kernel, inputs), everything(reference, inputs), strict=True)
        )
    finally:
        kernels.has_numba.cache_clear()
        loops.planar_kernels.cache_clear()


@needs_numba
def test_the_name_of_kept_code_changes_with_what_it_calls():
    def one(x):
        return x + 1

    def other(x):
        return x + 2

    assert (
        kernels.fingerprint(loops._activate, one)
        != kernels.fingerprint(loops._activate, other)
        == kernels.fingerprint(loops._activate, other)
    )


BUGS = {
    "a sign in the gradient of z": (
        "numerics.planar._backward_layer",
        "w[w_k + d], (a, _ZERO), n)",
        "-w[w_k + d], (a, _ZERO), n)",
        "wide",
    ),
    "points that are not taken back": (
        "numerics.planar._backward_layer",
        "_add((rows, d * _BLOCK), -u_hat, units, n)",
        "pass",
        "wide",
    ),
    "a slope that is one less": ("numerics.planar._activate_back", "(one - p)", "p", "both"),
    "the constraint without gradient": (
        "numerics.planar._constrain_back",
        "in_rho * (sigmoid - one)",
        "in_rho * 0",
        "both",
    ),
    "the norm without gradient": (
        "numerics.planar._constrain_back",
        "-in_rho * excess",
        "in_rho * excess",
        "both",
    ),
    "log-det without the clamp's factor": ("numerics.planar._activate", "(one - h * h)", "one", "both"),
    "a sign in the gradient of u": (
        "numerics.planar._backward_point",
        "_combine(gu_k, (h,",
        "_combine(gu_k, (-h,",
        "narrow",
    ),
    "the gradient of the first point of a group alone": (
        "numerics.planar._backward_lanes",
        "first + s > group[s] * S",
        "False",
        "narrow",
    ),
    "a group's layers from its neighbour": (
        "numerics.planar._forward_lanes",
        "b[group[s] * in_b + k]",
        "b[k]",
        "narrow",
    ),
}


@pytest.fixture
def uncompiled(monkeypatch):
    "The loops as Python runs them, so that a bug can be put into them."
    monkeypatch.setattr(loops, "planar_kernels", lambda: loops)


@needs_numba
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_of_the_kernels_are_caught(name, monkeypatch, uncompiled):
    place, found, wrong, kind = BUGS[name]
    inputs = {
        "wide": [points(11, 2), *layers(K=2, D=2)],
        "narrow": [points(3, 2, 2), *layers(2, K=2, D=2)],
    }

    def check():
        for name, given in inputs.items():
            if kind in (name, "both"):
                assert gap(everything(kernel, given), everything(reference, given)) <= 1e-12

    caught(monkeypatch, check, place, found, wrong)
