"""Radial and Sylvester layers: closed forms in extended precision, many parameter draws, the centre
of a radial layer.
"""

import math
from functools import partial

import mpmath
import pytest
import torch
from torch.func import grad, jacrev, vmap

from helpers import caught, dtypes, emitting, exact, many_draws, moved, near, normals, scales
from normflow_vi.transforms.planar import Planar, planar_stack
from normflow_vi.transforms.radial import Radial, _norm, _positive_lengths, _solve_radius
from normflow_vi.transforms.sylvester import Sylvester, _orthonormal_columns

FAMILIES = {
    "radial": Radial,
    "radial-paper": partial(Radial, constraint="paper"),
    "sylvester": partial(Sylvester, bottleneck=3),
    "sylvester-paper": partial(Sylvester, bottleneck=3, constraint="paper"),
    "householder": partial(Sylvester, kind="householder", reflections=2),
}
every = pytest.mark.parametrize("name", FAMILIES)


def many(name, dim, draws, scale, dtype):
    """An amortised layer and a context that hands it one draw a row: free numbers `scale` times a
    standard normal.
    """
    return emitting(partial(FAMILIES[name], dim, 1), draws, scale, dtype)


# Closed forms, with 60 digits

FLOOR = 1e-12  # the shortest length that the package documents


def softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def radial_in_extended_precision(z, z0, a, b, constraint):
    "log|det| from the formulas of the paper, its brackets as they are printed."
    with mpmath.workdps(60):
        a = exact(a)
        b = exact(b)
        alpha = softplus(a) + FLOOR
        beta = -alpha + softplus(a + b if constraint == "identity" else b) + FLOOR
        r = mpmath.norm(mpmath.matrix(exact(z)) - mpmath.matrix(exact(z0)))
        h = 1 / (alpha + r)
        slope = -1 / (alpha + r) ** 2
        across = mpmath.log(1 + beta * h)
        along = mpmath.log(1 + beta * h + beta * slope * r)
        return (len(z) - 1) * across + along


@pytest.mark.parametrize("dim", [1, 4])
@scales
@pytest.mark.parametrize("constraint", ["identity", "paper"])
def test_radial_against_extended_precision(constraint, scale, dim):
    for radius in (1e-3, 1.0, 30.0):
        for _ in range(15):
            transform = moved(Radial(dim, constraint=constraint), scale, jitter=1.0)
            z0, a, b = (p.detach()[0] for p in transform.parameters())
            z = z0 + radius * normals(dim)
            expected = radial_in_extended_precision(z, z0, a, b, constraint)
            assert near(transform.forward(z)[1], expected)


def sylvester_in_extended_precision(z, v, square, diagonal, b, constraint):
    "log|det(I + Q R diag(h') R_tilde Q^T)|, the whole D x D determinant."
    with mpmath.workdps(60):
        dim = len(z)
        units = len(b)
        q = mpmath.eye(dim)
        for row in exact(v):
            x = mpmath.matrix(row)
            reflection = mpmath.eye(dim) - 2 * x * x.T / mpmath.fdot(x, x)
            q = reflection * q
        q = q[:, :units]
        square = mpmath.matrix(exact(square))
        diagonal = exact(diagonal)
        r = mpmath.zeros(units)
        r_tilde = mpmath.zeros(units)
        for i in range(units):
            for j in range(i + 1, units):
                r[i, j] = square[i, j]
                r_tilde[i, j] = square[j, i]
            free = square[i, i]
            other = diagonal[i]
            if constraint == "paper":
                r[i, i] = mpmath.tanh(free)
                r_tilde[i, i] = mpmath.tanh(other)
            else:
                r[i, i] = free / (1 + mpmath.exp(-mpmath.asinh(free * other / 2)))
                r_tilde[i, i] = other
        inputs = r_tilde * q.T * mpmath.matrix(exact(z)) + mpmath.matrix(exact(b))
        slopes = mpmath.diag([mpmath.sech(x) ** 2 for x in inputs])
        jacobian = mpmath.eye(dim) + q * r * slopes * r_tilde * q.T
        return mpmath.log(mpmath.det(jacobian))


@scales
@pytest.mark.parametrize(
    "options",
    [{"bottleneck": 3}, {"bottleneck": 3, "constraint": "paper"}, {"kind": "householder", "reflections": 2}],
    ids=str,
)
def test_sylvester_against_extended_precision(options, scale):
    for _ in range(15):
        transform = moved(Sylvester(4, **options), scale)
        v, square, diagonal, b = (p.detach()[0] for p in transform.parameters())
        b /= scale  # inputs of hidden units of size 1, where determinants are furthest from 1
        z = normals(4) / scale
        expected = sylvester_in_extended_precision(z, v, square, diagonal, b, transform.constraint)
        assert near(transform.forward(z)[1], expected)


# Many draws


@every
@many_draws
@dtypes
@scales
def test_determinant_never_changes_sign(name, draws, dtype, scale):
    """Every factor of every determinant is positive, and values and log-dets are finite, also at
    the centre and far away.
    """
    transform, context = many(name, 5, draws, scale, dtype)
    tensors = transform.prepare(**transform.source(context, dtype))
    underflows = name == "sylvester-paper" and scale == 100  # in 1 + tanh(300) tanh(-300)
    for key in ("alpha", "m") if "radial" in name else ("slope",):
        factor = tensors[key]
        assert factor.isfinite().all()
        assert (factor >= 0).all()
        assert (factor > 0).all() or underflows
    points = [torch.randn(draws, 5, dtype=dtype), 1e4 * torch.randn(draws, 5, dtype=dtype)]
    if "radial" in name:
        points.append(tensors["z0"][:, 0])
    for z in points:
        y, log_det = transform.forward(z, context)
        assert y.isfinite().all()
        assert log_det.isfinite().all()


@every
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_jacobian_has_a_positive_determinant(name, scale):
    transform, context = many(name, 5, 2000, scale, torch.float64)
    jacobian = vmap(jacrev(lambda z, c: transform.forward(z, c)[0]))
    matrices = jacobian(normals(2000, 5), context)
    assert (torch.linalg.slogdet(matrices).sign == 1).all()


@every
@scales
def test_inverse_is_as_good_as_the_digits_of_z(name, scale):
    """`z` is what is left of `y` after a move, so its last digit is that of the larger of them; and
    where a layer is steep, that is many units of `y`.

    The residual is allowed as much.
    """
    transform, context = many(name, 5, 500, scale, torch.float64)
    y = 3 * normals(500, 5)
    z, minus = transform.inverse(y, context)
    again = transform.forward(z, context)[0]
    tensors = transform.prepare(**transform.source(context, torch.float64))

    def size(key):
        return tensors[key][:, 0].flatten(1).norm(dim=-1)

    if "radial" in name:
        last_digit = z.norm(dim=-1) + size("z0")
        steep = 1 + (tensors["m"] / tensors["alpha"])[:, 0]
    else:
        last_digit = z.norm(dim=-1) + size("r") + size("b")
        steep = 1 + size("r") * size("r_tilde")
    allowed = 1e-10 * (1 + y.norm(dim=-1)) + 1e-15 * last_digit * steep
    assert z.isfinite().all()
    assert minus.isfinite().all()
    assert ((again - y).norm(dim=-1) <= allowed).all()


# The centre of a radial layer


@pytest.mark.parametrize("dim", [1, 2, 5])
@dtypes
def test_radial_at_its_centre(dim, dtype):
    """The Jacobian is m / alpha times the identity; first and second derivatives are finite in both
    directions, in values and parameters.
    """
    transform, context = many("radial", dim, 50, 2.0, dtype)
    tensors = transform.prepare(**transform.source(context, dtype))
    centre = tensors["z0"][:, 0].detach()
    ratio = (tensors["m"] / tensors["alpha"])[:, 0].detach()
    jacobian = vmap(jacrev(lambda z, c: transform.forward(z, c)[0]))(centre, context)
    torch.testing.assert_close(jacobian, ratio[:, None, None] * torch.eye(dim, dtype=dtype))
    torch.testing.assert_close(transform.forward(centre, context)[1], dim * ratio.log())
    for direction in (transform.forward, transform.inverse):

        def total(z, c, direction=direction):
            y, log_det = direction(z, c)
            return log_det + y.sin().sum()

        assert torch.equal(direction(centre, context)[0], centre)
        for slopes in (
            vmap(grad(total))(centre, context),
            vmap(grad(total, argnums=1))(centre, context),
            vmap(jacrev(grad(total)))(centre, context),
        ):
            assert slopes.isfinite().all()


def test_radial_gradients_are_finite_close_to_the_centre():
    for size in (1e-300, 1e-160, 1e-30, 1e-8):
        z = torch.full((3,), size, dtype=torch.float64)
        assert grad(_norm)(z).isfinite().all()
        assert grad(_norm)(z).norm() <= 1.001
        assert _norm(z) == pytest.approx(size * math.sqrt(3), rel=1e-6, abs=1e-150)


def test_lengths_have_all_their_digits():
    "Also where a softplus goes over to its asymptote."
    a = torch.linspace(-60, 60, 1000, dtype=torch.float64)
    _, length = _positive_lengths(a, a, "paper")
    expected = torch.logaddexp(a, torch.zeros_like(a)) + FLOOR
    assert torch.allclose(length, expected, rtol=1e-14, atol=0)


def test_the_radius_has_all_its_digits_and_slopes():
    "Where `m` is far larger than `t`, and at `t = m`, where the two forms of the root meet."
    alpha, m, t = (torch.tensor(v, dtype=torch.float64) for v in (1.0, [1e4, 1e8, 1e12], [1e-3, 1.0, 10.0]))
    r = _solve_radius(t, alpha, m)
    assert torch.allclose(r * (r + m) / (r + alpha), t, rtol=1e-14)
    at = torch.ones((), dtype=torch.float64)

    def radius(t):
        return _solve_radius(t, 2 * alpha, alpha)

    numeric = (radius(at + 1e-6) - radius(at - 1e-6)) / 2e-6
    assert abs(grad(radius)(at) - numeric) < 1e-8


def test_layers_start_at_the_size_that_they_document():
    assert abs(Radial(400, 50).source.z0.std() * 20 - 1) < 0.05
    tensors = Radial(2).source()
    alpha, _ = _positive_lengths(tensors["a"], tensors["b"], "identity")
    assert (alpha - 1).abs() < 1e-6
    for tensor, size in (
        (Planar(8, 50).source.u, 0.5),
        (Planar(8, 50).source.w, 0.5),
        (Sylvester(8, 50).source.square, 0.5),
        (Sylvester(20, 50, bottleneck=2).source.b, 1.0),
    ):
        assert 0.9 * size < tensor.abs().max() <= size


def test_radial_far_away_moves_by_beta():
    transform = Radial(3, constraint="paper").double()
    with torch.no_grad():
        transform.source.b.fill_(2.0)
    beta = math.log1p(math.exp(2)) - 1
    z = transform.source.z0.detach() + 1e9 * torch.eye(3, dtype=torch.float64)
    y, log_det = transform.forward(z)
    assert torch.allclose((y - z).norm(dim=-1), torch.full((3,), beta, dtype=torch.float64), atol=1e-6)
    assert log_det.abs().max() < 1e-7


# Sylvester


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(500, 1, 1, 1), (500, 8, 8, 8), (500, 3, 5, 5), (500, 8, 40, 8)], ids=str)
def test_columns_are_orthonormal(shape, scale):
    "Draws of every shape, and close to dependent ones."
    draws, n, dim, columns = shape
    for noise in (1.0, 1e-3, 1e-9):
        v = scale * (1 + noise * normals(draws, n, dim))
        for dtype, error in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
            q = _orthonormal_columns(v.to(dtype), columns)
            product = q.mT @ q
            assert (product - torch.eye(columns, dtype=dtype)).abs().max() < error


def test_how_many_units_there_are_unless_told():
    assert [Sylvester(dim).bottleneck for dim in (3, 20)] == [3, 8]
    assert [Sylvester(dim, kind="householder").reflections for dim in (3, 20)] == [3, 8]


def test_one_unit_is_a_planar_layer():
    transform = Sylvester(3, 2, bottleneck=1).double()
    z = normals(20, 3)
    tensors = transform.prepare(**transform.source())
    layers = []
    for A, B, b in zip(tensors["A"], tensors["B"], tensors["b"], strict=True):
        layers.append({"u_hat": A[:, 0], "w": B[0], "b": b[0]})
    y, log_det = transform.forward(z)
    expected, total = planar_stack(z, layers, tensors["slope"][:, 0])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, total)


def test_a_plain_norm_is_caught_at_the_centre(monkeypatch):
    caught(
        monkeypatch,
        lambda: test_radial_at_its_centre(2, torch.float64),
        "radial._norm",
        "torch.where(zero, 0.0, safe.sqrt())",
        "square.sqrt()",
    )
