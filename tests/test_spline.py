"""Rational-quadratic splines and the layers made of them: exact, finite everywhere, and checked by checks
that notice.
"""

import mpmath
import pytest
import torch
from torch.func import jacrev

from helpers import caught, dtypes, exact, many_draws, near, scales
from normflow_vi.transforms import Inverse
from normflow_vi.transforms import spline as module
from normflow_vi.transforms.spline import Spline, knots
from normflow_vi.transforms.spline_layers import SplineAutoregressive, SplineCoupling


class Reference(Spline):
    "A spline that never runs its kernel."

    def push(self, z, theta):
        return module.rq_spline(z, theta, self.bins, self.bound)

    def pull(self, y, theta):
        return module.rq_spline_inverse(y, theta, self.bins, self.bound)


REFERENCE = Reference()
laws = pytest.mark.parametrize("law", [Spline(), Reference()], ids=["kernel", "reference"])


def directions(law):
    return {"push": law.push, "pull": law.pull}


def thetas(n, scale, dtype=torch.float64, bins=8):
    return scale * torch.randn(n, 1, 3 * bins - 1, dtype=dtype)


def edges(dtype, bound=3.0):
    """What breaks splines: the bound, one unit in the last place to either side, zero, the smallest
    numbers, far outside.
    """
    b = torch.tensor(bound, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    right = torch.stack(
        [
            b,
            b.nextafter(zero),
            b.nextafter(2 * b),
            zero,
            zero.nextafter(b),
            2 * b,
            torch.tensor(1e6, dtype=dtype),
        ]
    )
    return torch.cat([right, -right])


def and_knots(theta, row, bins=8, bound=3.0):
    "The edges, every knot of each spline and both its neighbours, and points in between: `(n, m)`."
    at = knots(theta, bins, bound)[:, 0, row].detach()
    far = torch.full_like(at, 2 * bound)
    inside = bound * (2 * torch.rand(len(theta), 8, dtype=theta.dtype) - 1)
    return torch.cat(
        [
            edges(theta.dtype, bound).expand(len(theta), -1),
            at,
            at.nextafter(far),
            at.nextafter(-far),
            inside,
        ],
        -1,
    )


# Against the formulas of the paper, with 50 digits


def in_extended_precision(z, theta, bins=8, bound=3.0):
    "`(y, log dy/dz)` by eqs. 4 and 5 of Durkan et al. 2019 as printed, with the floors of their code."
    z = exact(z)
    theta = exact(theta)
    floor = mpmath.mpf(module.FLOOR)

    def places(raw):
        e = [mpmath.exp(r) for r in raw]
        shares = [floor + (1 - floor * bins) * x / mpmath.fsum(e) for x in e]
        return [bound * (2 * mpmath.fsum(shares[:k]) - 1) for k in range(bins)] + [mpmath.mpf(bound)]

    x = places(theta[:bins])
    y = places(theta[bins : 2 * bins])
    offset = mpmath.log(mpmath.expm1(1 - floor))
    d = [
        mpmath.mpf(1),
        *(mpmath.log1p(mpmath.exp(t + offset)) + floor for t in theta[2 * bins :]),
        mpmath.mpf(1),
    ]
    k = sum(z >= knot for knot in x[1:-1])
    w = x[k + 1] - x[k]
    h = y[k + 1] - y[k]
    xi = (z - x[k]) / w
    s = h / w
    below = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    slope = s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / below**2
    return y[k] + h * (s * xi**2 + d[k] * xi * (1 - xi)) / below, mpmath.log(slope)


@laws
@scales
def test_against_extended_precision(scale, law):
    theta = thetas(40, scale)
    z = 6 * torch.rand(40, 1, dtype=torch.float64) - 3
    y, log_slope = law.push(z, theta)
    back, minus = law.pull(y, theta)
    with mpmath.workdps(50):
        for i in range(40):
            expected, expected_slope = in_extended_precision(z[i, 0], theta[i, 0])
            assert near(y[i, 0], expected)
            assert near(log_slope[i, 0], expected_slope)
            again, slope_there = in_extended_precision(
                back[i, 0], theta[i, 0]
            )  # the inverse by its residual, and by its slope where it landed
            assert near(y[i, 0], again)
            assert near(-minus[i, 0], slope_there)


# Many draws


def check_draws(n, scale, dtype, law=REFERENCE):
    "Finite, monotone, slopes above 0, and an inverse that comes back."
    theta = thetas(n, scale, dtype)
    z = and_knots(theta, 0).sort(-1).values
    tolerance = 8 * 3 * torch.finfo(dtype).eps  # a few units in the last place at the bound
    for name, direction in directions(law).items():
        out, log_slope = direction(z, theta)
        assert out.isfinite().all(), f"{name} is not finite"
        assert log_slope.isfinite().all(), f"{name} is not finite"
        assert (out.diff(dim=-1) >= -tolerance).all(), f"{name} falls"
        assert torch.equal(out[~(z.abs() < 3)], z[~(z.abs() < 3)]), "not the identity outside"
        assert (log_slope[~(z.abs() < 3)] == 0).all(), "not the identity outside"
        assert (log_slope.exp() > 0).all()
    y = and_knots(theta, 1)
    again, log_slope = law.push(
        law.pull(y, theta)[0], theta
    )  # a unit in the last place of z moves y by the slope
    assert ((again - y).abs() <= tolerance * log_slope.exp().clamp(min=1)).all(), (
        "the inverse does not come back"
    )


@many_draws
@dtypes
@scales
@laws
def test_finite_monotone_and_invertible(draws, dtype, scale, law):
    for _ in range(draws // 2000):
        check_draws(2000, scale, dtype, law)


@many_draws
@dtypes
@scales
def test_amortised_layer_on_many_draws(draws, dtype, scale):
    "One call of a layer whose context is theta itself."
    layer = SplineCoupling(1, context_dim=23, hidden=()).to(dtype)
    with torch.no_grad():
        layer.source.context_0.copy_(torch.eye(23)[None])
        layer.source.bias_0.zero_()
    theta = thetas(draws, scale, dtype)
    z = 2 * torch.randn(draws, 1, dtype=dtype)
    y, log_det = layer.forward(z, theta[:, 0])
    expected, expected_slope = Spline().push(z, theta)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert torch.equal(y, expected)
    assert torch.equal(log_det, expected_slope[:, 0])


# Gradients


def check_gradients(n, scale, dtype, law=REFERENCE):
    theta = thetas(n, scale, dtype)
    for row, (name, direction) in enumerate(directions(law).items()):
        value = and_knots(theta, row).requires_grad_()
        parameters = theta.clone().requires_grad_()
        out, log_slope = direction(value, parameters)
        for output in (out, log_slope):
            for g in torch.autograd.grad(output.sum(), (value, parameters), retain_graph=True):
                assert g.isfinite().all(), f"gradient of {name}"


@dtypes
@scales
@laws
def test_gradients_are_finite_at_every_edge(dtype, scale, law):
    check_gradients(500, scale, dtype, law)


@dtypes
@laws
def test_gradients_at_the_identity(dtype, law):
    "Zero parameters: the middle of a bin is where the quadratic of the inverse has b = 0."
    value = torch.cat([torch.linspace(-3, 3, 17, dtype=dtype), edges(dtype)])[:, None]
    for direction in directions(law).values():
        found = value.clone().requires_grad_()
        out, log_slope = direction(found, torch.zeros(1, 23, dtype=dtype))
        assert torch.allclose(out, value, rtol=1e-6, atol=1e-6)
        assert torch.allclose(log_slope, 0 * value, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(out.sum(), found)[0], torch.ones_like(value), atol=1e-5)


@pytest.mark.parametrize("law", [Spline(bins=3), Reference(bins=3)], ids=["kernel", "reference"])
def test_first_and_second_derivatives(law):
    theta = thetas(3, 0.5, bins=3).requires_grad_()
    z = torch.tensor([[-2.2, 0.1], [-0.6, 1.7], [2.9, 3.5]], dtype=torch.float64, requires_grad=True)
    for direction in (law.push, law.pull):
        assert torch.autograd.gradcheck(direction, (z, theta))
        assert torch.autograd.gradgradcheck(direction, (z, theta))


# Single precision at the places that break


@pytest.mark.parametrize("inputs", [20_000, pytest.param(1_000_000, marks=pytest.mark.full)])
@laws
def test_knots_and_edges_in_single_precision(inputs, law):
    "Nothing non-finite on knots, bounds and their neighbours; the residual of the inverse is below 1e-5."
    for _ in range(inputs // 20_000):
        theta = thetas(408, 1.0, torch.float32)
        y = and_knots(theta, 1)  # 49 a spline
        assert y.numel() == 19_992
        z, minus = law.pull(y, theta)
        again, log_slope = law.push(z, theta)
        assert all(t.isfinite().all() for t in (z, minus, again, log_slope))
        assert ((again - y).abs() <= 1e-5 * log_slope.exp().clamp(min=1) * y.abs().clamp(min=1)).all()


# Facts about splines


def check_meets_the_identity(dtype=torch.float32, law=REFERENCE):
    """The last knots are the bound itself.

    One unit in the last place inside, value and slope are those outside but for rounding.
    """
    b = torch.tensor(3.0, dtype=dtype)
    eps = torch.finfo(dtype).eps
    theta = thetas(1000, 0.5, dtype)
    assert (module.knots(theta, 8, 3.0)[..., :2, 0] == -3).all()
    assert (module.knots(theta, 8, 3.0)[..., :2, -1] == 3).all()
    for sign in (1, -1):
        inside = sign * b.nextafter(0 * b)
        for direction in directions(law).values():
            out, log_slope = direction(inside.expand(1000, 1), theta)
            assert (out - inside).abs().max() <= 16 * eps
            assert log_slope.abs().max() < 1e5 * eps


@dtypes
@laws
def test_meets_the_identity_at_the_bound(dtype, law):
    check_meets_the_identity(dtype, law)


@pytest.mark.parametrize("bins, bound", [(2, 1.0), (5, 0.1), (40, 3.0), (999, 1e3)])
@dtypes
@pytest.mark.parametrize("kind", [Spline, Reference], ids=["kernel", "reference"])
def test_any_number_of_bins_and_any_bound(bins, bound, dtype, kind):
    """With 999 bins the floors take nearly all: the spline is close to the identity, and still exact at its
    ends.
    """
    law = kind(bins, bound)
    theta = thetas(2, 10.0, dtype, bins)
    z = and_knots(theta, 0, bins, bound)
    y, log_slope = law.push(z, theta)
    z, minus = law.pull(y, theta)
    assert all(t.isfinite().all() for t in (y, log_slope, z, minus))
    assert torch.equal(y[:, [0, 7]], torch.tensor([bound, -bound], dtype=dtype).expand(2, 2))


@laws
def test_densities_integrate_to_one(law):
    "`int N(g^{-1}(y)) |dg^{-1}/dy| dy = 1`."
    y = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * 16 - 8
    for theta in thetas(4, 0.5)[:, 0]:
        z, log_slope = law.pull(y, theta)
        assert (
            abs((torch.distributions.Normal(0.0, 1.0).log_prob(z) + log_slope).exp().sum() * 16 / 200_000 - 1)
            < 1e-3
        )


def test_parameters_have_the_order_widths_heights_slopes():
    theta = torch.zeros(3, 1, 11, dtype=torch.float64)
    theta[0, 0, 0] = 2.0
    theta[1, 0, 4] = 2.0
    theta[2, 0, 8] = 2.0
    x, y, slope = knots(theta[:, 0], 4, 3.0).unbind(-2)
    equal = torch.linspace(-3, 3, 5, dtype=torch.float64)
    one = torch.ones(5, dtype=torch.float64)
    for i, (tensor, rest) in enumerate(((x, equal), (y, equal), (slope, one))):
        assert (tensor[i] - rest).abs().max() > 0.1
        assert all(torch.allclose(tensor[j], rest) for j in range(3) if j != i)


def test_slopes_at_knots_have_all_their_digits():
    "Also where a softplus goes over to its asymptote."
    theta = torch.zeros(1000, 5, dtype=torch.float64)
    theta[:, 4] = torch.linspace(-60, 60, 1000)
    expected = (
        torch.logaddexp(theta[:, 4] + module.OFFSET, torch.zeros(1000, dtype=torch.float64)) + module.FLOOR
    )
    assert torch.allclose(knots(theta, 2, 3.0)[:, 2, 1], expected, rtol=1e-14, atol=0)


def test_options_are_checked():
    for make in (
        lambda **options: Spline(**options),
        lambda **options: SplineCoupling(2, **options),
        lambda **options: SplineAutoregressive(2, **options),
    ):
        for word, wrong in [
            ("bins", 1),
            ("bins", 2.5),
            ("bins", 1000),
            ("bound", 0),
            ("bound", -1.0),
            ("bound", float("inf")),
            ("bound", "3"),
        ]:
            with pytest.raises(ValueError, match=word):
                make(**{word: wrong})


@laws
def test_inputs_that_are_not_finite_do_not_spread(law):
    z = torch.tensor([[float("nan"), 1.0, float("inf")]])
    y, log_slope = law.push(z, torch.zeros(1, 3, 23))
    assert y[0, 0].isnan()
    assert y[0, 2].isposinf()
    assert y[0, 1].isfinite()
    assert log_slope[0, 1].isfinite()


# Layers


@pytest.mark.parametrize(
    "dim, hidden",
    [(1, (4,)), (2, (4,)), (5, (3,)), (5, (5,)), (5, (16,)), (5, (8, 8, 8))],
)
def test_autoregressive_jacobian_has_exact_zeros(dim, hidden):
    layer = SplineAutoregressive(dim, hidden=hidden, activation="tanh", residual=len(hidden) == 3).double()
    for z in 2 * torch.randn(5, dim, dtype=torch.float64):
        jacobian = jacrev(lambda z: layer.forward(z)[0])(z)
        assert not jacobian.triu(1).any()
        assert (jacobian.diagonal() > 0).all()
        assert dim == 1 or jacobian.tril(-1).any()


def test_directions_are_what_they_say():
    layer = SplineAutoregressive(3, length=2)
    assert (layer.forward_kind, layer.inverse_kind) == ("closed form", "sequential")
    assert (Inverse(layer).forward_kind, Inverse(layer).inverse_kind) == ("sequential", "closed form")
    assert SplineCoupling(3).forward_kind == SplineCoupling(3).inverse_kind == "closed form"


# Planted bugs, in the reference, that the kit has no eye for; those which it catches are in
# tests/test_planted_bugs.py, and those of the kernel in tests/test_spline_kernel.py.

BUGS = {
    "slopes not matched at the bound": (
        "knots",
        "(1, 1), value=1.0)",
        "(1, 1), value=0.7)",
        check_meets_the_identity,
    ),
    "last knot a sum of shares": (
        "knots",
        "pad(pad(inner, (1, 0), value=-bound), (0, 1), value=bound)",
        "pad(bound * (2 * shares.cumsum(-1) - 1), (1, 0), value=-bound)",
        check_meets_the_identity,
    ),
    "floors dropped": (
        "knots",
        "shares = FLOOR + (1 - FLOOR * bins) *",
        "shares =",
        lambda: check_draws(500, 100.0, torch.float32),
    ),
    "position not clipped": (
        "_clipped_bin",
        "value = value.clamp(-bound, bound)",
        "pass",
        lambda: check_gradients(500, 10.0, torch.float32),
    ),
    "root that cancels": (
        "uncurve",
        "return up / (up + down), down / (up + down)",
        "odds = ((b * b + 4 * s * s * tau * rest).sqrt() - b) / (2 * s * rest); "
        "return odds / (1 + odds), 1 / (1 + odds)",
        lambda: check_gradients(500, 10.0, torch.float32),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, found, wrong, check = BUGS[bug]
    caught(monkeypatch, check, f"spline.{name}", found, wrong)
