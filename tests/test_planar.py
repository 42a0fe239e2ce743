"""Planar layers beyond their contract: extended precision, many draws, second derivatives."""

from functools import partial

import mpmath
import pytest
import torch
from torch.func import grad, jacrev

from helpers import dtypes, emitting, exact, many_draws, moved, near, scales
from normflow_vi.transforms import Planar
from normflow_vi.transforms.planar import CONSTRAINTS, constrain, solve_slope


def test_inverse_has_second_derivatives():
    planar = moved(Planar(3, 2))

    def log_det(y):
        return planar.inverse(y)[1]

    y = torch.randn(3, dtype=torch.float64)
    step = 1e-4
    hessian = jacrev(grad(log_det))(y)
    numeric = torch.stack(
        [
            (grad(log_det)(y + step * e) - grad(log_det)(y - step * e)) / (2 * step)
            for e in torch.eye(3, dtype=torch.float64)
        ]
    )
    assert torch.allclose(hessian, numeric, atol=1e-6)


def in_extended_precision(z, u, w, b, offset):
    "log|det| of one planar layer from the formulas of the paper, with 60 digits."
    with mpmath.workdps(60):
        z, u, w, b = map(exact, (z, u, w, b))

        def dot(a, c):
            return sum(x * y for x, y in zip(a, c, strict=True))

        alpha = dot(w, u)
        norm2 = dot(w, w)
        m = mpmath.log1p(mpmath.exp(alpha + offset)) - 1
        u_hat = [ui + (m - alpha) * wi / norm2 for ui, wi in zip(u, w, strict=True)]
        h = mpmath.tanh(dot(w, z) + b)
        return mpmath.log(1 + (1 - h * h) * dot(w, u_hat))


@scales
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_against_extended_precision(scale, constraint):
    for _ in range(40):
        transform = moved(Planar(3, constraint=constraint), scale)
        z = torch.randn(3, dtype=torch.float64) / scale
        u, w, b = (transform.source()[n][0].detach() for n in ("u", "w", "b"))
        assert near(
            transform.forward(z)[1],
            in_extended_precision(z, u, w, b, CONSTRAINTS[constraint]),
        )


@many_draws
@dtypes
@scales
def test_determinant_never_changes_sign(draws, dtype, scale):
    """Many parameter draws as one amortised batch: every slope along w is positive and finite, so is the
    log-determinant.
    """
    for constraint in CONSTRAINTS:
        make = partial(Planar, 5, 1, constraint=constraint)
        transform, context = emitting(make, draws, scale, dtype)
        tensors = transform.source(context, dtype)
        u_hat, slope = constrain(tensors["u"], tensors["w"], CONSTRAINTS[constraint])
        assert u_hat.isfinite().all()
        assert (slope >= 0).all()
        assert slope.isfinite().all()
        y, log_det = transform.forward(torch.randn(draws, 5, dtype=dtype), context)
        assert y.isfinite().all()
        assert log_det.isfinite().all()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_vanishing_w_is_a_shift(constraint):
    "And `u = 0` is the identity under the constraint of that name alone."
    planar = Planar(3, 4, constraint=constraint).double()
    z = torch.randn(10, 3, dtype=torch.float64)
    with torch.no_grad():
        planar.source.w.zero_()
    y, log_det = planar.forward(z)
    assert torch.allclose(y, z + (planar.source.u * planar.source.b.tanh()[:, None]).sum(0))
    assert not log_det.any()
    (y.sum() + log_det.sum()).backward()
    assert all(p.grad.isfinite().all() for p in planar.parameters())
    planar = moved(Planar(3, constraint=constraint))
    with torch.no_grad():
        planar.source.u.zero_()
    assert torch.allclose(planar.forward(z)[0], z, atol=1e-12) == (constraint == "identity")


def test_a_slope_that_underflowed_has_a_root():
    assert solve_slope(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_heads_of_long_stacks_are_slow():
    assert [round(Planar(2, length).head_scale, 6) for length in (1, 10, 1000)] == [0.316228, 0.1, 0.01]


def test_slopes_have_all_their_digits():
    "Also where a softplus goes over to its asymptote."
    u = torch.linspace(-60, 60, 1000, dtype=torch.float64)[:, None]
    found = constrain(u, torch.ones(1, 1, dtype=torch.float64), 0.0)[1]
    expected = torch.logaddexp(u[:, 0], torch.zeros(1000, dtype=torch.float64))
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)
