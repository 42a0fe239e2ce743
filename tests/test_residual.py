"""Radial and Sylvester layers: closed forms in extended precision, many parameter draws, the centre of a radial layer, planted bugs."""
import math

import mpmath
import pytest
import torch
from torch.func import grad, jacrev, vmap

from normflow_vi import contract
from normflow_vi.contract import C, Case
from normflow_vi.transforms import radial as radial_module, sylvester as sylvester_module
from normflow_vi.transforms.planar import planar_stack
from normflow_vi.transforms.radial import FLOOR, Radial, distance
from normflow_vi.transforms.sylvester import Sylvester, orthonormal

FAMILIES = {
    "radial": lambda dim, length=1, context_dim=None: Radial(dim, length, context_dim),
    "radial-paper": lambda dim, length=1, context_dim=None: Radial(dim, length, context_dim, constraint="paper"),
    "sylvester": lambda dim, length=1, context_dim=None: Sylvester(dim, length, context_dim, bottleneck=min(dim, 3)),
    "sylvester-paper": lambda dim, length=1, context_dim=None: Sylvester(dim, length, context_dim, bottleneck=min(dim, 3), constraint="paper"),
    "householder": lambda dim, length=1, context_dim=None: Sylvester(dim, length, context_dim, kind="householder", reflections=2),
}
every = pytest.mark.parametrize("name", FAMILIES)


def many(name, dim, draws, scale, dtype):
    "An amortised layer and a context that hands it one draw a row: free numbers `scale` times a standard normal."
    count = sum(p.numel() for p in FAMILIES[name](dim).parameters())
    transform = FAMILIES[name](dim, 1, count).to(dtype)
    with torch.no_grad():
        transform.source.linear.weight.copy_(torch.eye(count) / transform.head_scale); transform.source.linear.bias.zero_()
    return transform, scale * torch.randn(draws, count, dtype=dtype)


# Closed forms, with 60 digits

def exact(tensor): return mpmath.matrix(tensor.detach().double().tolist())
def softplus(x): return mpmath.log1p(mpmath.exp(x))


def radial_in_extended_precision(z, z0, a, b, constraint):
    "log|det| from the formulas of the paper, its brackets as they are printed, with the shortest length that the package documents."
    with mpmath.workdps(60):
        a, b = mpmath.mpf(a.item()), mpmath.mpf(b.item())
        alpha = softplus(a) + FLOOR
        beta = -alpha + softplus(a + b if constraint == "identity" else b) + FLOOR
        r = mpmath.norm(exact(z) - exact(z0))
        h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
        return float((len(z) - 1) * mpmath.log(1 + beta * h) + mpmath.log(1 + beta * h + beta * slope * r))


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("scale", [1., 10., 100.])
@pytest.mark.parametrize("constraint", ["identity", "paper"])
def test_radial_against_extended_precision(constraint, scale, dim):
    for near in (1e-3, 1., 30.):
        for _ in range(15):
            transform = Radial(dim, constraint=constraint).double()
            z0, a, b = (p.detach().copy_(scale * (p + torch.randn_like(p)))[0] for p in transform.parameters())
            z = z0 + near * torch.randn(dim, dtype=torch.float64)
            expected = radial_in_extended_precision(z, z0, a, b, constraint)
            assert abs(transform.forward(z)[1].item() - expected) <= 1e-10 * (1 + abs(expected))


def sylvester_in_extended_precision(z, v, square, diagonal, b, constraint):
    "log|det(I + Q R diag(h') R_tilde Q^T)|, the whole D x D determinant."
    with mpmath.workdps(60):
        dim, units = len(z), len(b)
        q = mpmath.eye(dim)
        for x in v: x = exact(x); q = (mpmath.eye(dim) - 2 * x * x.T / (x.T * x)[0]) * q
        q, square, diagonal = q[:, :units], exact(square), exact(diagonal)
        r, r_tilde = mpmath.zeros(units), mpmath.zeros(units)
        for i in range(units):
            for j in range(i + 1, units): r[i, j], r_tilde[i, j] = square[i, j], square[j, i]
            free, other = square[i, i], diagonal[i]
            r[i, i] = mpmath.tanh(free) if constraint == "paper" else free / (1 + mpmath.exp(-mpmath.asinh(free * other / 2)))
            r_tilde[i, i] = mpmath.tanh(other) if constraint == "paper" else other
        slopes = mpmath.diag([mpmath.sech(x) ** 2 for x in r_tilde * q.T * exact(z) + exact(b)])
        return float(mpmath.log(mpmath.det(mpmath.eye(dim) + q * r * slopes * r_tilde * q.T)))


@pytest.mark.parametrize("scale", [1., 10., 100.])
@pytest.mark.parametrize("options", [{"bottleneck": 3}, {"bottleneck": 3, "constraint": "paper"}, {"kind": "householder", "reflections": 2}], ids=str)
def test_sylvester_against_extended_precision(options, scale):
    for _ in range(15):
        transform = Sylvester(4, **options).double()
        v, square, diagonal, b = (p.detach().copy_(scale * (p + .3 * torch.randn_like(p)))[0] for p in transform.parameters())
        b /= scale                                           # inputs of hidden units of size 1, where determinants are furthest from 1
        z = torch.randn(4, dtype=torch.float64) / scale
        expected = sylvester_in_extended_precision(z, v, square, diagonal, b, transform.constraint)
        assert abs(transform.forward(z)[1].item() - expected) <= 1e-10 * (1 + abs(expected))


# Many draws

@every
@pytest.mark.parametrize("draws", [2000, pytest.param(100_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1., 10., 100.])
def test_determinant_never_changes_sign(name, draws, dtype, scale):
    "Every factor of every determinant is positive, and values and log-dets are finite, also at the centre and far away."
    transform, context = many(name, 5, draws, scale, dtype)
    tensors = transform.prepare(**transform.source(context, dtype))
    for factor in ("alpha", "m") if "radial" in name else ("slope",):
        assert tensors[factor].isfinite().all() and (tensors[factor] >= 0).all()
        assert (tensors[factor] > 0).all() or name == "sylvester-paper" and scale == 100     # there 1 + tanh(300) tanh(-300) underflows
    points = [torch.randn(draws, 5, dtype=dtype), 1e4 * torch.randn(draws, 5, dtype=dtype)] + ([tensors["z0"][:, 0]] if "radial" in name else [])
    for z in points:
        y, log_det = transform.forward(z, context)
        assert y.isfinite().all() and log_det.isfinite().all()


@every
@pytest.mark.parametrize("scale", [1., 10.])
def test_the_jacobian_has_a_positive_determinant(name, scale):
    transform, context = many(name, 5, 2000, scale, torch.float64)
    jacobian = vmap(jacrev(lambda z, c: transform.forward(z, c)[0]))(torch.randn(2000, 5, dtype=torch.float64), context)
    assert (torch.linalg.slogdet(jacobian).sign == 1).all()


@every
@pytest.mark.parametrize("scale", [1., 10., 100.])
def test_inverse_is_as_good_as_the_digits_of_z(name, scale):
    "`z` is what is left of `y` after a move, so its last digit is that of the larger of them; and where a layer is steep, that is many units of `y`. The residual is allowed as much."
    transform, context = many(name, 5, 500, scale, torch.float64)
    y = 3 * torch.randn(500, 5, dtype=torch.float64)
    z, minus = transform.inverse(y, context)
    again = transform.forward(z, context)[0]
    tensors = {key: tensor[:, 0] for key, tensor in transform.prepare(**transform.source(context, torch.float64)).items()}
    def size(key): return tensors[key].flatten(1).norm(dim=-1)
    if "radial" in name: last_digit, steep = z.norm(dim=-1) + size("z0"), 1 + tensors["m"] / tensors["alpha"]
    else: last_digit, steep = z.norm(dim=-1) + size("r") + size("b"), 1 + size("r") * size("r_tilde")
    allowed = 1e-10 * (1 + y.norm(dim=-1)) + 1e-15 * last_digit * steep
    assert z.isfinite().all() and minus.isfinite().all() and ((again - y).norm(dim=-1) <= allowed).all()


# The centre of a radial layer

@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radial_at_its_centre(dim, dtype):
    "The Jacobian is m / alpha times the identity; first and second derivatives are finite in both directions, in values and parameters."
    transform, context = many("radial", dim, 50, 2., dtype)
    tensors = transform.prepare(**transform.source(context, dtype))
    centre, ratio = tensors["z0"][:, 0].detach(), (tensors["m"] / tensors["alpha"])[:, 0].detach()
    jacobian = vmap(jacrev(lambda z, c: transform.forward(z, c)[0]))(centre, context)
    torch.testing.assert_close(jacobian, ratio[:, None, None] * torch.eye(dim, dtype=dtype))
    torch.testing.assert_close(transform.forward(centre, context)[1], dim * ratio.log())
    for direction in (transform.forward, transform.inverse):
        def total(z, c): y, log_det = direction(z, c); return log_det + y.sin().sum()
        assert torch.equal(direction(centre, context)[0], centre)
        for slopes in (vmap(grad(total))(centre, context), vmap(grad(total, argnums=1))(centre, context), vmap(jacrev(grad(total)))(centre, context)):
            assert slopes.isfinite().all()


def test_radial_gradients_are_finite_close_to_the_centre():
    for size in (1e-300, 1e-160, 1e-30, 1e-8):
        z = torch.full((3,), size, dtype=torch.float64)
        assert grad(distance)(z).isfinite().all() and grad(distance)(z).norm() <= 1.001
        assert distance(z) == pytest.approx(size * math.sqrt(3), rel=1e-6, abs=1e-150)


def test_radial_far_away_moves_by_beta():
    transform = Radial(3, constraint="paper").double()
    with torch.no_grad(): transform.source.b.fill_(2.)
    beta = math.log1p(math.exp(2)) - 1
    z = transform.source.z0.detach() + 1e9 * torch.eye(3, dtype=torch.float64)
    y, log_det = transform.forward(z)
    assert torch.allclose((y - z).norm(dim=-1), torch.full((3,), beta, dtype=torch.float64), atol=1e-6) and log_det.abs().max() < 1e-7


# Sylvester

@pytest.mark.parametrize("scale", [1e-4, 1., 100.])
@pytest.mark.parametrize("shape", [(500, 1, 1, 1), (500, 8, 8, 8), (500, 3, 5, 5), (500, 8, 40, 8)], ids=str)
def test_columns_are_orthonormal(shape, scale):
    "Draws of every shape, and close to dependent ones."
    draws, n, dim, columns = shape
    for noise in (1., 1e-3, 1e-9):
        v = scale * (1 + noise * torch.randn(draws, n, dim, dtype=torch.float64))
        for dtype, error in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
            q = orthonormal(v.to(dtype), columns)
            assert (q.mT @ q - torch.eye(columns, dtype=dtype)).abs().max() < error


def test_one_unit_is_a_planar_layer():
    transform = Sylvester(3, 2, bottleneck=1).double()
    z, tensors = torch.randn(20, 3, dtype=torch.float64), transform.prepare(**transform.source())
    layers = [{"u_hat": A[:, 0], "w": B[0], "b": b[0]} for A, B, b in zip(tensors["A"], tensors["B"], tensors["b"])]
    for found, expected in zip(transform.forward(z), planar_stack(z, layers, tensors["slope"][:, 0])): torch.testing.assert_close(found, expected)


# Planted bugs: the checks of the kit must notice each of them.

def ring_without_r(r, alpha, m):
    along = (r + m) / (r + alpha)
    return along, along - (m - alpha) / (r + alpha) ** 2

def first_unit_first(v, r, r_tilde, b, slope):
    flipped = [t.flip(-1) for t in (v, b, slope)]
    matrices = [t.flip(-1, -2) for t in (r, r_tilde)]
    return _solve_units(flipped[0], *matrices, *flipped[1:]).flip(-1)

def full_power(z, layers, alpha, m):
    d = [z - layer["z0"] for layer in layers][0]
    z, log_det = _radial_stack(z, layers, alpha, m)
    return z, log_det + radial_module.stretches(distance(d), alpha[..., 0], m[..., 0])[0].log()

_solve_units, _radial_stack, _solve_radius, _matrices = sylvester_module.solve_units, radial_module.radial_stack, radial_module.solve_radius, sylvester_module.matrices

def detached(stack): return lambda *arguments: (lambda y, log_det: (y, log_det.detach()))(*stack(*arguments))

BUGS = {
    "the factor r is dropped": ("radial", "stretches", ring_without_r),
    "the first bracket to the power D": ("radial", "radial_stack", full_power),
    "beta is not constrained": ("radial", "lengths", lambda a, b, constraint: (torch.nn.functional.softplus(a), torch.nn.functional.softplus(a) + 3 * b)),
    "radial log-det without gradient": ("radial", "radial_stack", detached(_radial_stack)),
    "the other root": ("radial", "solve_radius", lambda t, alpha, m: ((t - m) - ((t - m) ** 2 + 4 * alpha * t).sqrt()) / 2),
    "a root without the factor 4": ("radial", "solve_radius", lambda t, alpha, m: _solve_radius(t, alpha / 4, m)),
    "r r_tilde is not constrained": ("sylvester", "CONSTRAINTS", {"identity": lambda r, r_tilde: (r, r_tilde, 1 + r * r_tilde)}),
    "log-det with R only": ("sylvester", "CONSTRAINTS", {"identity": lambda r, r_tilde: (*sylvester_module.admissible(r, r_tilde)[:2], 1 + sylvester_module.admissible(r, r_tilde)[0])}),
    "the inverse starts at the first unit": ("sylvester", "solve_units", first_unit_first),
    "columns not normalised": ("sylvester", "orthonormal", lambda v, columns: v[..., :columns, :].mT),
    "R_tilde is lower triangular": ("sylvester", "matrices", lambda **free: _matrices(**free) | {"B": _matrices(**free)["r_tilde"].mT @ _matrices(**free)["q"].mT}),
    "Sylvester log-det without gradient": ("sylvester", "sylvester_stack", detached(sylvester_module.sylvester_stack)),
}


def caught_by(case):
    "The checks that object, of four."
    found = []
    for check in (lambda: contract.log_det(case, None, draws=4), lambda: contract.log_det(case, C, draws=4), lambda: contract.inverse(case, None), lambda: contract.slopes(case, C)):
        try: check()
        except (AssertionError, RuntimeError) as error: found.append(str(error))
    return found


@pytest.mark.parametrize("name", ["radial", "sylvester"])
def test_without_a_bug_the_checks_pass(name):
    assert caught_by(Case(name, FAMILIES[name], dims=(2, 3), jitter=1.)) == []


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, attribute, wrong = BUGS[bug]
    monkeypatch.setattr(f"normflow_vi.transforms.{name}.{attribute}", wrong)
    assert caught_by(Case(name, FAMILIES[name], dims=(2, 3), jitter=1.)), f"nothing noticed: {bug}"


def test_a_plain_norm_is_caught_at_the_centre(monkeypatch):
    monkeypatch.setattr(radial_module, "distance", lambda d: (d * d).sum(-1).sqrt())
    with pytest.raises(AssertionError): test_radial_at_its_centre(2, torch.float64)
