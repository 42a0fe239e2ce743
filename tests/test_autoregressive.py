"""Autoregressive layers: exact zeros, stages against the loop of D passes, the kernel against both."""

import itertools
import sys
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev, vmap

from helpers import (
    dtypes,
    exact,
    many_draws,
    moved,
    near,
    over_draws,
    scales,
    tensors_of,
)
from normflow_vi.numerics import compiling as kernels
from normflow_vi.numerics import stagewise as loops
from normflow_vi.testing.contract import Direction
from normflow_vi.testing.contract import draw_context as context_of
from normflow_vi.transforms import made, stagewise
from normflow_vi.transforms.autoregressive import (
    Autoregressive,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from normflow_vi.transforms.conditioner import run_network
from normflow_vi.transforms.laws import ScaleShift, Shift

# Hidden widths below, equal to and above D = 5, none, several layers, residual blocks.
NETWORKS = [
    ((), False),
    ((3,), False),
    ((5,), False),
    ((16,), False),
    ((3, 7, 4), False),
    ((8, 8, 8), True),
    ((4, 4, 4, 4, 4), True),
]
networks = pytest.mark.parametrize("hidden, residual", NETWORKS, ids=lambda value: str(value))
dims = pytest.mark.parametrize("dim", [1, 2, 5])
contexts = pytest.mark.parametrize("context_dim", [None, 3], ids=["owned", "context"])
kinds = pytest.mark.parametrize("kind", [InverseAutoregressive, MaskedAutoregressive])
needs_numba = pytest.mark.skipif(stagewise.stage_kernel() is None, reason="numba is optional")


def layers_of(transform, kind, context=None):
    return transform.unstacked(transform.masked(kind, transform.fetch_tensors(context, torch.float64)))


def by_passes(transform, value, context=None):
    """The sequential direction by D passes of the whole network, the oracle of this file."""
    forward = transform.forward_kind == "sequential"
    step = transform.law.push if forward else transform.law.pull
    layers = layers_of(transform, "closed form", context)
    total = 0.0
    for layer in layers if forward else reversed(layers):
        found = torch.zeros_like(value)
        for i in layer["sequence"].tolist():
            theta = run_network(found, layer, context, transform.activation, transform.residual).unflatten(
                -1, (transform.dim, transform.law.size)
            )
            changed, log_slope = step(value, theta)
            found = torch.where(torch.arange(transform.dim) == i, changed, found)
        value = found
        total = total + log_slope.sum(-1)
    return value, total


def slow(transform):
    return transform.forward if transform.forward_kind == "sequential" else transform.inverse


def gap(found, expected):
    return max(((a - b).abs() / (1 + b.abs())).max().item() for a, b in zip(found, expected, strict=True))


# Structure


def check_structure(make, dim, context_dim=None):
    """One layer in either order, both directions: exact zeros where an earlier variable would see a later
    one, and slopes that are not zero.
    """
    transform = moved(make(dim, context_dim))
    point = torch.randn(dim, dtype=torch.float64)
    context = context_of(1, context_dim)
    if context is not None:
        context = context[0]
    for direction, kind in (
        (transform.push, transform.forward_kind),
        (transform.pull, transform.inverse_kind),
    ):
        for k, layer in enumerate(layers_of(transform, kind, context)):
            map_point = partial(direction, **layer)
            jacobian = jacrev(lambda value, f=map_point: f(value)[0])(point)
            backwards = k % 2 and transform.order == "alternate"
            allowed = jacobian.triu() if backwards else jacobian.tril()
            assert torch.equal(jacobian, allowed), "a variable sees one that it must not see"
            assert jacobian.diag().all()
            assert jacobian.isfinite().all()


@networks
@dims
@kinds
@pytest.mark.parametrize("order", ["alternate", "natural"])
def test_exact_zeros_in_the_jacobian(kind, dim, hidden, residual, order):
    for context_dim in (None, 3):
        check_structure(
            lambda d, c: kind(d, 2, c, hidden, "tanh", order, residual),
            dim,
            context_dim,
        )


@kinds
def test_nothing_is_cut_that_may_stay(kind):
    """A network wide enough lets every variable see all before it, and the context reaches all of them, the
    first too.
    """
    transform = moved(kind(5, 1, 3, (20,), "tanh")).double()
    z = torch.randn(5, dtype=torch.float64)
    context = torch.randn(3, dtype=torch.float64)
    assert jacrev(lambda z: transform.forward(z, context)[0])(z).tril(-1).bool().sum() == 10
    assert jacrev(lambda c: transform.forward(z, c)[0])(context).all()


@pytest.mark.parametrize("dim", [1, 2, 5, 40])
@pytest.mark.parametrize("hidden", [(), (1,), (3,), (5,), (16,), (3, 7, 4)], ids=str)
def test_each_live_weight_is_used_once(dim, hidden):
    """The kernel's loop bounds count exactly the weights that the masks leave, in at most min(D, units) + 1
    stages.
    """
    for least in (0, 1):
        live = (
            sum(mask.sum().item() for mask in made.build_masks(torch.arange(dim), hidden, least)[:-1])
            + 2 * made.build_masks(torch.arange(dim), hidden, least)[-1].sum().item()
        )
        for flipped in (False, True):
            ends, starts, spans, order = stagewise.stage_tables(
                stagewise.stage_edges(dim, hidden, least), flipped
            )
            assert (np.diff(ends) * (spans[..., 1] - spans[..., 0])).sum() == live
            assert ends.shape[1] - 1 <= (min(dim, sum(hidden)) + 1 if hidden else dim)


def test_degrees_are_spread_evenly():
    assert [
        made.hidden_degrees(*sizes).tolist() for sizes in ((5, 4), (10, 3), (4, 6), (4, 4, 0), (1, 3))
    ] == [[1, 2, 3, 4], [2, 5, 8], [1, 1, 2, 2, 3, 3], [0, 1, 2, 3], [0, 0, 0]]


def test_a_unit_with_few_inputs_starts_as_loud_as_one_with_many():
    """What a unit hears of unit-variance inputs has one variance a layer, however many of them its mask
    leaves.
    """
    masks = made.build_masks(torch.arange(6).expand(4000, -1), (10,))
    for i, mask in enumerate(masks):
        heard = made.start_made(4000, masks)[f"weight_{i}"].square().sum(-2).mean(0)[mask[0].any(0)]
        assert (heard / heard.mean() - 1).abs().max() < 0.1


# The sequential direction


@networks
@dims
@kinds
@contexts
def test_stages_are_the_loop_of_passes(kind, dim, hidden, residual, context_dim):
    for form in ("gated", "plain"):
        transform = moved(kind(dim, 2, context_dim, hidden, "tanh", residual=residual, form=form))
        value = torch.randn(4, 6, dim, dtype=torch.float64)
        context = context_of(6, context_dim)
        assert gap(slow(transform)(value, context), by_passes(transform, value, context)) <= 1e-12


def test_stages_with_a_law_of_another_size():
    transform = moved(Autoregressive(6, Shift(), 3, None, (4, 9)))
    value = torch.randn(10, 6, dtype=torch.float64)
    assert gap(transform.inverse(value), by_passes(transform, value)) <= 1e-12


@needs_numba
@kinds
@contexts
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_kernel_is_the_loop_of_passes(kind, context_dim, dtype, tolerance, kernel_calls):
    plain = [hidden for hidden, residual in NETWORKS if not residual]
    for hidden, dim in itertools.product(plain, (1, 2, 5, 23)):
        for activation, how in [
            ("relu", {"form": "gated"}),
            ("tanh", {"form": "plain"}),
            ("elu", {"form": "plain", "max_log_scale": 2.0}),
        ]:
            transform = moved(kind(dim, 2, context_dim, hidden, activation, **how))
            value = torch.randn(2, 17, dim, dtype=torch.float64)
            context = context_of(17, context_dim)
            with torch.no_grad():
                expected = by_passes(transform, value, context)
                found = slow(transform.to(dtype))(
                    value.to(dtype), None if context is None else context.to(dtype)
                )
            assert found[0].dtype == found[1].dtype == dtype
            assert gap(found, expected) <= tolerance
    assert kernel_calls


def test_the_kernel_without_a_compiler(monkeypatch):
    "Its loops are plain Python: uncompiled they give the same."
    monkeypatch.setattr(stagewise, "stage_kernel", lambda: loops._sweep)
    for kind in (InverseAutoregressive, MaskedAutoregressive):
        transform = moved(kind(4, 2, None, (3, 6)))
        value = torch.randn(18, 4, dtype=torch.float64)
        with torch.no_grad():
            assert gap(slow(transform)(value), by_passes(transform, value)) <= 1e-12


@kinds
def test_gradients_of_the_stages_are_implicit_ones(kind):
    """`x = f(z; p)` solves `g(x; p) = z` with the parallel direction g, so `dx/dz = G^-1` and `dx/dp =
    -G^-1 dg/dp` with `G = dg/dx`.
    """
    transform = moved(kind(4, 2, None, (6, 6), "tanh"))
    fast = transform.forward if transform.inverse_kind == "sequential" else transform.inverse
    z = torch.randn(4, dtype=torch.float64)
    parameters = dict(transform.named_parameters())
    x = slow(transform)(z)[0].detach()
    G = jacrev(lambda x: fast(x)[0])(x)
    assert torch.allclose(jacrev(lambda z: slow(transform)(z)[0])(z), G.inverse(), atol=1e-10)
    names = {transform.forward: "forward", transform.inverse: "inverse"}

    def at(call, p, value):
        return functional_call(
            Direction(transform, names[call]),
            {f"transform.{name}": t for name, t in p.items()},
            (value,),
        )[0]

    of_slow = jacrev(lambda p: at(slow(transform), p, z))(parameters)
    of_fast = jacrev(lambda p: at(fast, p, x))(parameters)
    for name in parameters:
        expected = -torch.einsum("ij,j...->i...", G.inverse(), of_fast[name])
        assert torch.allclose(of_slow[name], expected, atol=1e-10), name


def test_a_value_is_broadcast_against_a_larger_context():
    for kind in (InverseAutoregressive, MaskedAutoregressive):
        transform = moved(kind(3, 2, 2, (8,)))
        z = torch.randn(1, 3, dtype=torch.float64)
        context = torch.randn(7, 2, dtype=torch.float64)
        for call in (transform.forward, transform.inverse):
            assert gap(call(z, context), call(z.expand(7, 3), context)) <= 1e-12
            with torch.no_grad():
                assert gap(call(z, context), call(z.expand(7, 3), context)) <= 1e-12


# Kernel or reference


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []
    run = stagewise.stagewise_numba
    monkeypatch.setattr(stagewise, "stagewise_numba", lambda *args: (calls.append(1), run(*args))[1])
    return calls


def maf(**how):
    return MaskedAutoregressive(4, 2, hidden=(6,) if not how.get("residual") else (6, 6, 6), **how)


@needs_numba
def test_the_kernel_runs_where_nobody_records(kernel_calls):
    with torch.no_grad():
        maf().forward(torch.randn(3, 4))
    with torch.inference_mode():
        maf().forward(torch.randn(3, 4))
    maf().requires_grad_(False).forward(torch.randn(3, 4))
    assert len(kernel_calls) == 6  # two layers each


@needs_numba
def test_the_kernel_keeps_the_digits_of_gates_that_are_all_but_shut(kernel_calls):
    model = maf(form="gated").double()
    with torch.no_grad():
        model.source.weight_1.zero_()
        model.source.bias_1[..., 1::2] = -800.0
        found = model.forward(torch.randn(3, 4))[1]
        expected = torch.full((3,), -8 * 800.0, dtype=torch.float64)
        assert torch.allclose(found, expected)
        assert kernel_calls


def in_dual_level(model, z):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(
            model.forward(torch.autograd.forward_ad.make_dual(z, torch.ones_like(z)))[0]
        ).tangent


def in_a_mode(model, z):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return model.forward(z)[0]


RECORDED = {
    "parameters want a gradient": lambda model, z: model.requires_grad_().forward(z)[0],
    "the value wants a gradient": lambda model, z: model.forward(z.clone().requires_grad_())[0],
    "grad": lambda model, z: torch.func.grad(lambda z: model.forward(z)[1].sum())(z),
    "vmap": lambda model, z: vmap(lambda z: model.forward(z)[0])(z),
    "jacrev": lambda model, z: jacrev(lambda z: model.forward(z)[0])(z),
    "jvp": lambda model, z: torch.func.jvp(lambda z: model.forward(z)[0], (z,), (z,))[1],
    "dual numbers": in_dual_level,
    "compile": lambda model, z: torch.compile(lambda z: model.forward(z)[0], fullgraph=True, backend="eager")(
        z
    ),
    "jit trace": lambda model, z: torch.jit.trace(lambda z: model.forward(z)[0], z, check_trace=False)(z),
    "make_fx": lambda model, z: torch.fx.experimental.proxy_tensor.make_fx(lambda z: model.forward(z)[0])(z)(
        z
    ),
    "a dispatch mode": in_a_mode,
    "another device": lambda model, z: model.to("meta").forward(z.to("meta"))[0],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", RECORDED)
def test_the_reference_runs_where_somebody_records(name, kernel_calls):
    model = maf().requires_grad_(False)
    z = torch.randn(3, 4)
    expected = model.forward(z)[0]
    kernel_calls.clear()
    found = RECORDED[name](model, z)
    assert not kernel_calls
    assert found is not None
    if name in (
        "parameters want a gradient",
        "the value wants a gradient",
        "vmap",
        "compile",
        "jit trace",
        "make_fx",
        "a dispatch mode",
    ):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_context_that_wants_a_gradient_gets_one(kernel_calls):
    "An encoder may be trained through a flow that is fixed."
    for model in (
        MaskedAutoregressive(3, 2, 4, hidden=(8,)),
        InverseAutoregressive(3, 2, 4, hidden=(8,)),
    ):
        context = torch.randn(5, 4, requires_grad=True)
        value, log_det = slow(model.requires_grad_(False))(torch.randn(5, 3), context)
        assert not kernel_calls
        assert torch.autograd.grad(value.sum() + log_det.sum(), context)[0].any()


def test_sixteen_bits_are_computed_in_single_precision():
    for model in (maf(), MaskedAutoregressive(4, 2, hidden=(8,)).bfloat16()):
        assert model.forward(torch.randn(3, 4).bfloat16())[0].dtype == torch.float32


def test_the_reference_runs_what_the_kernel_does_not_know(kernel_calls):
    class Doubled(ScaleShift):
        pass

    with torch.no_grad():
        for model in (
            maf(residual=True),
            Autoregressive(4, Shift(), hidden=(6,)),
            Autoregressive(4, Doubled(), hidden=(6,)),
        ):
            slow(model)(torch.randn(3, 4))
    assert not kernel_calls


@pytest.fixture
def fresh_compiler():
    def clear():
        stagewise.stage_kernel.cache_clear()
        kernels.has_numba.cache_clear()

    clear()
    yield
    clear()


def test_without_numba(monkeypatch, kernel_calls, fresh_compiler):
    monkeypatch.setitem(sys.modules, "numba", None)
    model = maf()
    z = torch.randn(3, 4)
    with torch.no_grad():
        assert stagewise.stage_kernel() is None
        assert gap(model.forward(z), by_passes(model.double(), z.double())) <= 1e-5
    assert not kernel_calls


@needs_numba
def test_without_a_folder_for_compiled_code(monkeypatch, fresh_compiler):
    "Numba refuses to keep code where it finds no place to write; then it compiles for this process alone."
    import numba

    kept = []
    njit = numba.njit

    def without_folder(*args, cache=False, **how):
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **how)

    monkeypatch.setattr(numba, "njit", without_folder)
    assert stagewise.stage_kernel() is not None
    assert kept == [True, False] * 4


# Numbers


def in_extended_precision(transform, z, scale_of):
    """`log|det|` of one layer, read from `z`, by 50-digit arithmetic: the network's weights, degree by
    degree, and the law.
    """
    layer = layers_of(transform, "closed form")[0]
    with mpmath.workdps(50):
        h = exact(z)
        count = len(transform.hidden) + 1
        for i in range(count):
            weight = exact(layer[f"weight_{i}"])
            bias = exact(layer[f"bias_{i}"])
            h = [b + sum(x * row[j] for x, row in zip(h, weight, strict=True)) for j, b in enumerate(bias)]
            if i < count - 1:
                h = [max(x, mpmath.mpf(0)) if transform.activation == "relu" else mpmath.tanh(x) for x in h]
        return sum(scale_of(s) for s in h[1::2])


LOG_SCALES = {
    "gated": lambda s: -mpmath.log1p(mpmath.exp(-s)),
    "plain": lambda s: s,
    "bounded": lambda s: 5 * mpmath.tanh(s / 5),
}


@scales
@pytest.mark.parametrize("form", LOG_SCALES)
@kinds
def test_log_det_against_extended_precision(kind, form, scale):
    how = {"form": "plain", "max_log_scale": 5.0} if form == "bounded" else {"form": form}
    for activation in ("relu", "tanh"):
        for _ in range(5):
            transform = moved(kind(3, 1, None, (5, 4), activation, **how), scale)
            z = torch.randn(3, dtype=torch.float64) / scale
            parallel, sign = (
                (transform.forward, 1) if kind is InverseAutoregressive else (transform.inverse, -1)
            )
            assert near(
                parallel(z)[1],
                sign * in_extended_precision(transform, z, LOG_SCALES[form]),
            )


@many_draws
@dtypes
@scales
@kinds
def test_many_draws_stay_finite(kind, scale, dtype, draws):
    """Weights belong to the layers, so the draws are stacked and mapped: finite values and log-dets, and no
    determinant changes sign. Gates in the direction in which they contract, the plain form in the
    parallel one.
    """
    for how in (
        {"form": "gated"},
        {"form": "plain", "max_log_scale": 5.0},
        {"form": "plain"},
    ):
        transform = kind(3, 2, None, (4,), "tanh", **how).to(dtype)
        free = tensors_of(transform, draws, scale, dtype)
        if how == {"form": "plain"}:  # log-scales within +-5
            free["source.weight_1"][..., 1::2] = 0.0
            free["source.bias_1"][..., 1::2] = (
                5 * torch.rand(draws, 2, 3, dtype=dtype) * torch.randn(draws, 2, 3, dtype=dtype).sign()
            )
        name = "forward" if kind is InverseAutoregressive or how["form"] == "gated" else "inverse"
        z = torch.randn(draws, 3, dtype=dtype)
        y, log_det = over_draws(transform, free, z, name)
        assert y.isfinite().all()
        assert log_det.isfinite().all()
        if dtype == torch.float64 and scale == 1.0:
            step = Direction(transform, name)

            def at(z, p, step=step):
                return functional_call(step, {f"transform.{key}": t for key, t in p.items()}, (z,))[0]

            assert (torch.linalg.slogdet(vmap(jacrev(at))(z, free)).sign > 0).all()


def test_gates_that_are_all_but_shut():
    """ReLU networks shut gates to e^-50 far out, where a Jacobian's determinant is beyond double precision;
    its diagonal, of one triangular layer, is not.
    """
    iaf = moved(InverseAutoregressive(5, 1, None, (16, 16)))
    with torch.no_grad():
        iaf.source.weight_2.mul_(30)
    z = 100 * torch.randn(200, 5, dtype=torch.float64)
    log_det = iaf.forward(z)[1]
    diagonal = vmap(jacrev(lambda z: iaf.forward(z)[0]))(z).diagonal(dim1=-2, dim2=-1)
    assert log_det.min() < -20
    assert torch.allclose(log_det, diagonal.log().sum(-1), rtol=1e-10, atol=1e-10)


# What is stored and said


def test_the_order_and_its_masks_are_saved_together():
    "A state loaded into a layer of another order brings both, so that the two directions still fit."
    natural, other = (
        moved(MaskedAutoregressive(4, 2, hidden=(8,), order=order)) for order in ("natural", "alternate")
    )
    other.load_state_dict(natural.state_dict())
    z = torch.randn(5, 4, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(other.forward(z), natural.forward(z), strict=True))
    assert torch.allclose(other.inverse(other.forward(z)[0])[0], z)


@kinds
def test_gated_layers_start_near_the_identity(kind):
    transform = kind(6, 1, form="gated")
    z = torch.randn(100, 6)
    assert (transform.forward(z)[1] / 6 - torch.sigmoid(torch.tensor(1.5)).log()).abs().mean() < 0.1


@needs_numba
@pytest.mark.parametrize("bug", ["spans", "order"])
def test_planted_bugs_of_the_kernel_are_caught(bug, monkeypatch, kernel_calls):
    tables = stagewise.stage_tables

    def wrong(edges, flipped):
        ends, starts, spans, order = tables(edges, flipped)
        if bug == "order":
            return ends, starts, spans, order[::-1].copy()
        later = spans.copy()
        later[-1, 0, 0] += 2
        return ends, starts, later, order

    monkeypatch.setattr(stagewise, "stage_tables", wrong)
    with pytest.raises(AssertionError):
        test_the_kernel_is_the_loop_of_passes(MaskedAutoregressive, None, torch.float64, 1e-12, kernel_calls)
