"""Planar layers beyond their contract: extended precision, many draws, second derivatives, planted bugs."""
import mpmath
import pytest
import torch
from torch.func import grad, jacrev

from normflow_vi.contract import CHECKS, Case, drawn
from normflow_vi.transforms import Planar
from normflow_vi.transforms.planar import CONSTRAINTS, constrain, solve_slope

PLANAR = {constraint: Case(constraint, lambda dim, length, context_dim, constraint=constraint: Planar(dim, length, context_dim, constraint=constraint))
          for constraint in CONSTRAINTS}


def test_inverse_has_second_derivatives():
    planar = drawn(PLANAR["identity"], 3, length=2)
    def log_det(y): return planar.inverse(y)[1]
    y, step = torch.randn(3, dtype=torch.float64), 1e-4
    hessian = jacrev(grad(log_det))(y)
    numeric = torch.stack([(grad(log_det)(y + step * e) - grad(log_det)(y - step * e)) / (2 * step) for e in torch.eye(3, dtype=torch.float64)])
    assert torch.allclose(hessian, numeric, atol=1e-6)


def in_extended_precision(z, u, w, b, offset):
    "log|det| of one planar layer from the formulas of the paper, with 60 digits."
    with mpmath.workdps(60):
        z, u, w = ([mpmath.mpf(float(x)) for x in v] for v in (z, u, w))
        dot = lambda a, c: sum(x * y for x, y in zip(a, c))
        alpha, norm2 = dot(w, u), dot(w, w)
        m = mpmath.log1p(mpmath.exp(alpha + offset)) - 1
        u_hat = [ui + (m - alpha) * wi / norm2 for ui, wi in zip(u, w)]
        h = mpmath.tanh(dot(w, z) + mpmath.mpf(float(b)))
        return float(mpmath.log(1 + (1 - h * h) * dot(w, u_hat)))


@pytest.mark.parametrize("scale", [1., 10., 100.])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_against_extended_precision(scale, constraint):
    for _ in range(40):
        transform = drawn(PLANAR[constraint], 3, length=1, scale=scale)
        z = torch.randn(3, dtype=torch.float64) / scale
        u, w, b = (transform.source()[n][0].detach() for n in ("u", "w", "b"))
        expected = in_extended_precision(z, u, w, b, CONSTRAINTS[constraint])
        assert abs(transform.forward(z)[1].item() - expected) <= 1e-10 * (1 + abs(expected))


@pytest.mark.parametrize("draws", [2000, pytest.param(100_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1., 10., 100.])
def test_determinant_never_changes_sign(draws, dtype, scale):
    "Many parameter draws as one amortised batch: every slope along w is positive and finite, so is the log-determinant."
    u, w = scale * torch.randn(2, draws, 5, dtype=dtype)
    for offset in CONSTRAINTS.values():
        u_hat, slope = constrain(u, w, offset)
        assert u_hat.isfinite().all() and (slope >= 0).all() and slope.isfinite().all()
    transform = Planar(5, context_dim=11).to(dtype)
    with torch.no_grad():
        transform.source.linear.weight.copy_(torch.eye(11) / transform.head_scale); transform.source.linear.bias.zero_()
    y, log_det = transform.forward(torch.randn(draws, 5, dtype=dtype), torch.cat([u, w, scale * torch.randn(draws, 1, dtype=dtype)], -1))
    assert y.isfinite().all() and log_det.isfinite().all()
