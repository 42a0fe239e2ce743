"""The kernel of the spline: the reference's values and gradients everywhere, and the reference itself
wherever somebody watches.
"""

from types import SimpleNamespace

import pytest
import torch
from test_spline import and_knots, thetas

from helpers import caught, dtypes, scales
from normflow_vi.numerics import compiling as kernels
from normflow_vi.numerics import spline as loops
from normflow_vi.transforms import spline as module

REFERENCES = {"push": module.rq_spline, "pull": module.rq_spline_inverse}
both_ways = pytest.mark.parametrize("name", REFERENCES)
needs_numba = pytest.mark.skipif(not kernels.has_numba(), reason="numba is not installed")


def results(call, value, theta, weights):
    "Values, log-slopes, and the gradients of their weighted sum."
    value, theta = (t.detach().clone().requires_grad_() for t in (value, theta))
    found = call(value, theta)
    return [
        *(t.detach() for t in found),
        *torch.autograd.grad(
            sum((w * t).sum() for w, t in zip(weights, found, strict=True)),
            (value, theta),
        ),
    ]


def kernel_and_reference(name, value, theta, bins=8, bound=3.0):
    weights = torch.randn(2, *torch.broadcast_shapes(value.shape, theta.shape[:-1]), dtype=value.dtype)
    return (
        results(call, value, theta, weights)
        for call in (
            lambda *t: module.spline(*t, REFERENCES[name], bins, bound),
            lambda *t: REFERENCES[name](*t, bins, bound),
        )
    )


def agree(found, expected, tolerances, where=""):
    for what, f, e, tolerance in zip(
        ("value", "log-slope", "gradient in the value", "gradient in theta"),
        found,
        expected,
        tolerances,
        strict=False,  # the values and log-slopes alone may be asked about
    ):
        assert f.shape == e.shape, what
        assert f.dtype == e.dtype, what
        assert ((f - e).abs() <= tolerance * (1 + e.abs())).all(), (
            f"{what} {where} is off by {((f - e).abs() / (1 + e.abs())).max():.1e}"
        )


def check_agreement(bins=3, n=30, scale=1.0, dtype=torch.float64, bound=3.0):
    "Values inside and outside, all parts of every gradient."
    for name in REFERENCES:
        theta = scale * torch.randn(n, 3 * bins - 1, dtype=dtype)
        value = 1.2 * bound * (2 * torch.rand(n, dtype=dtype) - 1)
        value[:2] = torch.tensor([1e30, -1e30], dtype=dtype)  # what is not clipped is far from any bin
        agree(
            *kernel_and_reference(name, value, theta, bins, bound),
            (1e-12, 1e-12, 1e-10, 1e-10),
            name,
        )


# Agreement


@pytest.mark.parametrize("bins, bound", [(2, 1.0), (3, 3.0), (8, 3.0), (40, 0.1), (999, 1e3)])
def test_agrees_for_any_number_of_bins(bins, bound):
    check_agreement(bins, 200, bound=bound)


@pytest.mark.parametrize("n", [2, 3, 127, 128, 129, 256, 1000])
def test_agrees_for_any_number_of_values(n):
    check_agreement(8, n)


def quantiles(found, exact):
    return ((found.double() - exact).abs() / (1 + exact.abs())).flatten().sort().values


@scales
@both_ways
def test_single_precision_is_as_good_as_that_of_the_reference(name, scale):
    "Judged by the reference in double precision; medians and 99.9 % quantiles of the errors."
    theta = scale * torch.randn(20_000, 23)
    value = 6 * torch.rand(20_000) - 3
    weights = torch.randn(2, 20_000)

    def reference(*t):
        return REFERENCES[name](*t, 8, 3.0)

    exact = results(reference, *(t.double() for t in (value, theta, weights)))
    kernel = results(lambda *t: module.spline(*t, REFERENCES[name], 8, 3.0), value, theta, weights)
    single = results(reference, value, theta, weights)
    for k, s, e in zip(kernel, single, exact, strict=True):
        ours = quantiles(k, e)
        theirs = quantiles(s, e)
        for part in (0.5, 0.999):
            assert ours[int(part * len(ours))] <= 2 * theirs[int(part * len(theirs))] + 1e-6
        if scale == 1:
            assert ours[len(ours) // 2] < 1e-6
            assert ours[int(0.99 * len(ours))] < 1e-4


@dtypes
@scales
@both_ways
def test_agrees_at_every_edge(name, dtype, scale):
    "On knots either bin will do: values and log-slopes are continuous there, and gradients are finite."
    theta = thetas(300, scale, dtype)
    value = and_knots(theta, list(REFERENCES).index(name))
    found, expected = kernel_and_reference(name, value, theta)
    assert all(t.isfinite().all() for t in found)
    if dtype == torch.float64 and scale == 1:
        agree(found[:2], expected[:2], (1e-12, 1e-9))
    outside = value.abs() >= 3
    for f, e in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(f[outside], e[outside])


@both_ways
def test_agrees_for_any_layout(name):
    """Values and parameters that are broadcast, transposed, strided or absent.

    Results and gradients have the shapes of the reference.
    """

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    for value, theta in [
        (draw(4, 1), draw(5, 8)),
        (draw(2, 3, 5), draw(5, 8)),
        (draw(5), draw(2, 5, 8)),
        (draw(5, 6).T, draw(6, 5, 8)),
        (draw(6, 5), draw(8, 5, 6).permute(2, 1, 0)),
        (draw(10)[::2], draw(5, 16)[:, ::2]),
        (draw(), draw(8)),
        (draw(0, 3), draw(0, 3, 8)),
        (draw(3, 0), draw(0, 8)),
        (draw(), draw(4, 8)),
    ]:
        agree(
            *kernel_and_reference(name, value, theta, 3),
            (1e-12, 1e-12, 1e-10, 1e-10),
            f"{tuple(value.shape)}, {tuple(theta.shape)}",
        )


@both_ways
def test_a_value_does_not_depend_on_its_lane(name):
    theta = torch.randn(300, 23)
    value = torch.randn(300)
    whole = module.spline(value, theta, REFERENCES[name], 8, 3.0)
    for start in (1, 77, 250):
        for w, part in zip(
            whole,
            module.spline(value[start:], theta[start:], REFERENCES[name], 8, 3.0),
            strict=True,
        ):
            assert torch.equal(w[start:], part)


# Derivatives


@both_ways
def test_only_what_is_asked_for(name):
    "A gradient in the value alone or in theta alone, of one result alone; nothing for those who want none."
    theta = torch.randn(50, 23, dtype=torch.float64)
    value = torch.randn(50, dtype=torch.float64)

    def call(*t):
        return module.spline(*t, REFERENCES[name], 8, 3.0)

    assert not any(t.requires_grad for t in call(value, theta))
    for i, result in [(i, result) for i in range(2) for result in range(2)]:
        inputs = [t.clone().requires_grad_(i == j) for j, t in enumerate((value, theta))]
        expected = torch.autograd.grad(REFERENCES[name](*inputs, 8, 3.0)[result].sum(), inputs[i])[0]
        found = torch.autograd.grad(call(*inputs)[result].sum(), inputs[i])[0]
        assert torch.allclose(found, expected, rtol=1e-10)


def in_both_ways(reference):
    "The kernel and `reference`, both with three bins between -3 and 3."
    return lambda *t: module.spline(*t, reference, 3, 3.0), lambda *t: reference(*t, 3, 3.0)


def check_higher_derivatives():
    "Where theta depends on the value, as in an autoregressive layer; also many gradients at once."
    head = torch.randn(1, 8, dtype=torch.float64)

    def total(call, value):
        return sum(t.sum() for t in call(value, (value[:, None] * head).sin()))

    for reference in REFERENCES.values():
        found = []
        value = torch.tensor([-2.2, -0.3, 0.4, 1.9], dtype=torch.float64, requires_grad=True)
        for call in in_both_ways(reference):
            first = torch.autograd.grad(total(call, value), value, create_graph=True)[0]
            second = torch.autograd.grad(first.square().sum(), value)[0]
            result = call(value, (value[:, None] * head).sin())[1]
            many = torch.autograd.grad(
                result, value, torch.eye(4, dtype=torch.float64), is_grads_batched=True
            )[0]
            found.append((first.detach(), second, many))
        for f, e in zip(*found, strict=True):
            assert torch.allclose(f, e, rtol=1e-9, atol=1e-9)


def test_higher_derivatives():
    check_higher_derivatives()


# Who runs


@pytest.fixture
def calls(monkeypatch):
    "How often the kernels have run, forward and backward."
    counts = [0, 0]
    real = loops.spline_kernels()

    def counting(i, name):
        def call(*arguments):
            counts[i] += 1
            return getattr(real, name)(*arguments)

        return call

    counted = SimpleNamespace(**{name: counting(i, name) for i, name in enumerate(("_forward", "_backward"))})
    monkeypatch.setattr(loops, "spline_kernels", lambda: counted)
    return counts


def inputs(dtype=torch.float32):
    return torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, 23, dtype=dtype)


@needs_numba
@dtypes
def test_the_kernel_runs_in_training(dtype, calls):
    law = module.Spline()
    value, theta = inputs(dtype)
    law.push(*(t.requires_grad_() for t in (value, theta)))[0].sum().backward()
    assert calls == [1, 1]
    with torch.no_grad():
        law.pull(value, theta)
    with torch.inference_mode():
        law.pull(value, theta)
    assert calls == [3, 1]


def check_vmap(run=module.spline):
    "Any axis of either may be mapped, twice too; gradients pass."
    value = torch.randn(3, 4, 5, dtype=torch.float64)
    theta = torch.randn(3, 4, 5, 8, dtype=torch.float64)
    for reference in REFERENCES.values():

        def call(*t, reference=reference):
            return run(*t, reference, 3, 3.0)

        cases = [
            (value, theta, (0, 0)),
            (value, theta.movedim(0, 2), (0, 2)),
            (value[0], theta, (None, 0)),
            (value.movedim(0, 1), theta[0], (1, None)),
        ]
        for v, t, axes in cases:
            pairs = zip((v, t), axes, strict=True)
            aligned = [x if axis is None else x.movedim(axis, 0) for x, axis in pairs]
            expected = reference(*aligned, 3, 3.0)
            for f, e in zip(torch.vmap(call, axes)(v, t), expected, strict=True):
                assert torch.allclose(f, e, rtol=1e-12)
        twice = torch.vmap(torch.vmap(call))(value, theta)
        for f, e in zip(twice, reference(value, theta, 3, 3.0), strict=True):
            assert torch.allclose(f, e, rtol=1e-12)
        weights = torch.randn(2, *value.shape, dtype=torch.float64)
        agree(
            results(torch.vmap(call), value, theta, weights),
            results(in_both_ways(reference)[1], value, theta, weights),
            (1e-12, 1e-12, 1e-10, 1e-10),
        )


@needs_numba
def test_vmap(calls):
    check_vmap()
    assert calls == [12, 2]  # the kernel for all of them, one call for all rows


WATCHED = {
    "grad": lambda v, t: torch.func.grad(lambda v: module.Spline().push(v, t)[0].sum())(v),
    "vmap of grad": lambda v, t: torch.vmap(
        torch.func.grad(lambda v, t: module.Spline().push(v, t)[0].sum())
    )(v, t),
    "jvp": lambda v, t: torch.func.jvp(lambda v: module.Spline().pull(v, t), (v,), (v,)),
    "jacfwd": lambda v, t: torch.func.jacfwd(lambda v: module.Spline().pull(v, t)[0])(v),
    "compile": lambda v, t: torch.compile(
        lambda v, t: module.Spline().push(v, t), fullgraph=True, backend="eager"
    )(v, t),
    "two precisions": lambda v, t: module.Spline().push(v, t.double()),
    "bfloat16": lambda v, t: module.Spline().push(v.bfloat16(), t.bfloat16()),
    "meta": lambda v, t: module.Spline().push(v.to("meta"), t.to("meta")),
}


@pytest.mark.parametrize("name", WATCHED)
def test_the_reference_runs_where_somebody_watches(name, calls):
    assert WATCHED[name](*inputs()) is not None
    assert calls == [0, 0]


def test_without_numba(monkeypatch):
    monkeypatch.setattr(kernels, "has_numba", lambda: False)
    monkeypatch.setattr(loops, "spline_kernels", None)
    value, theta = inputs()
    assert all(
        torch.equal(f, e)
        for f, e in zip(
            module.Spline().push(value, theta),
            module.rq_spline(value, theta, 8, 3.0),
            strict=True,
        )
    )


def test_parameters_of_another_size_are_left_to_the_reference(calls):
    with pytest.raises(RuntimeError):
        module.Spline(bins=8).push(torch.randn(5), torch.randn(5, 20))
    assert calls == [0, 0]


# Planted bugs, in the uncompiled kernels

BUGS = {
    "value not clipped": (
        "_load",
        "s[_VALUE + i] = v if v > -bound else -bound",
        "s[_VALUE + i] = value[first + i]",
    ),
    "softmax without the floor": ("_exponentiate", "1 - FLOOR * bins", "1"),
    "floor not added": ("_pass_bin", "(floor + t[k, i] *", "(t[k, i] *"),
    "last knot a sum of shares": (
        "_pass_bin",
        "bound if last else bound * (y + y - _ONE)",
        "bound * (y + y - _ONE) * np.float32(1.001)",
    ),
    "first slope taken from a height": ("_pass_bin", "_ONE if k > 0 else _ZERO", "_ONE"),
    "bin found in the wrong direction": ("_pass_bin", "y0 if inverse else x0", "x0 if inverse else y0"),
    "softplus without its correction": (
        "numerics.compiling.softplus_slope",
        "(e - (u - one)) / u",
        "zero * e + np.float32(1e-9)",
    ),
    "the other root": ("_solve_position", "u if b >= _ZERO else fall", "fall if b >= _ZERO else u"),
    "half the logarithm": ("_evaluate_lanes", "half + half + log", "half + log"),
    "sign of the inverse log-slope": ("_forward", "-s[_SLOPE + i] if inverse", "s[_SLOPE + i] if inverse"),
    "slopes at the ends swapped": ("_evaluate_lanes", "d1 * xi * xi + (m + m)", "d0 * xi * xi + (m + m)"),
    "gradient of s without its second part": ("_bin_gradient", "+ (xe + xe) * per_bracket)", ")"),
    "gradient of the left slope": ("_bin_gradient", "b * xe * (_ONE - part) +", "b * xe * part +"),
    "gradient of the log-slope in xi": (
        "_bin_gradient",
        "- (xi - eta) * (m + m - d0 - d1) * two",
        "- (xi - eta) * (m + m - d0 - d1) * per_beta",
    ),
    "inverse: the log-slope's part in the value dropped": (
        "_bin_gradient",
        "-(a + ell * bend / width)",
        "-a",
    ),
    "inverse: sign of the log-slope": ("_bin_gradient", "ell = -ell if inverse else ell", "pass"),
    "ends of the bin move together": ("_bin_gradient", "stretch - g_xi * eta / width", "-g_xi * eta / width"),
    "softmax: mean not taken off": ("_share_gradient", "(g - s[total + i])", "g"),
    "softmax: mean with the wrong factor": ("_share_gradient", "1 / (1 - FLOOR * bins)", "1"),
    "softmax: the bin counts as before": (
        "_share_gradient",
        "g = before if this < at else here\n            s[total",
        "g = before if this <= at else here\n            s[total",
    ),
    "the share of the bin moves its left end": (
        "_lane_gradients",
        "s[_X1 + i] = (bound + bound) * x1",
        "s[_X1 + i] = (bound + bound) * (x0 + x1)",
    ),
    "softplus without its derivative": ("_lane_gradients", "g_d1 * turn1", "g_d1"),
    "gradients of the slopes swapped": (
        "_slope_gradient",
        "here = right_end if at == this else _ZERO\n            t[2 * bins + k, i] = left_end if",
        "here = left_end if at == this else _ZERO\n            t[2 * bins + k, i] = right_end if",
    ),
    "outside the bound not the identity": ("_backward", "else g_out[first + i]", "else _ZERO"),
    "gradient of one result only": ("_backward", "b if inside else _ZERO", "_ZERO"),
}


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(loops, "spline_kernels", lambda: loops)
    monkeypatch.setattr(kernels, "has_numba", lambda: True)


def failing(check):
    "`check`, where an error counts as a failure: uncompiled, the logarithm of a negative number is one."

    def call():
        try:
            check()
        except (ValueError, RuntimeError) as error:
            raise AssertionError("an error") from error

    return call


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch, uncompiled):
    name, found, wrong = BUGS[bug]
    caught(
        monkeypatch,
        failing(check_agreement),
        name if "." in name else f"numerics.spline.{name}",
        found,
        wrong,
    )


@needs_numba
def test_bugs_planted_around_the_kernel_are_caught(monkeypatch):
    with monkeypatch.context() as patch:
        caught(
            patch,
            failing(check_higher_derivatives),
            "numerics.compiling.by_reference",
            "t.view_as(t) for t in",
            "t for t in",
        )
    with monkeypatch.context() as patch:
        caught(patch, failing(check_vmap), "spline._axis_first", "t.movedim(axis, 0)", "t")
