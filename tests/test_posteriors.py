"""Posterior families against closed forms, in a fit, in long stacks, and in what they refuse."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from helpers import normals
from normflow_vi.models.posteriors import FAMILIES, options_of, posterior
from normflow_vi.transforms.convolution import convolve

C = 6
families = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "diagonal"])


def emitted(part, context):
    return {name: t[:, 0] for name, t in part.source(context, torch.float64).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_layers_every_family_is_the_diagonal_gaussian(family):
    q = posterior(family, 5, 0, C).double()
    context = normals(9, C)
    z = normals(3, 9, 5)
    first = emitted(q.transform, context)
    exact = Normal(first["shift"], first["log_scale"].exp())
    assert torch.allclose(q(context).log_prob(z), exact.log_prob(z).sum(-1))


@pytest.mark.parametrize("family", ["full", "circulant"])
def test_linear_families_are_gaussians(family):
    "With the mean `L mu + t` and the covariance `L diag(sigma^2) L'`, `L` triangular or circulant."
    q = posterior(family, 5, 1, C).double()
    context = normals(9, C)
    first, second = (emitted(part, context) for part in q.transform.transforms)
    eye = torch.eye(5, dtype=torch.float64)
    if family == "full":
        L = eye.repeat(9, 1, 1)
        rows, columns = torch.tril_indices(5, 5, -1)
        L[:, rows, columns] = second["below"]
        shift = second["shift"]
    else:
        columns = [convolve(unit.expand(9, 5), **second) for unit in eye]
        L = torch.stack(columns, -1)
        shift = 0.0
    mean = (L @ first["shift"][..., None])[..., 0] + shift
    scaled = L * first["log_scale"].exp()[:, None]
    exact = MultivariateNormal(mean, scaled @ scaled.mT)
    z, log_q = q(context).rsample_and_log_prob((4,))
    assert torch.allclose(log_q, exact.log_prob(z))
    assert (L - torch.eye(5)).abs().max() > 0.05


@families
def test_draws_and_densities_agree(family):
    q = posterior(family, 6, 3, C).double()
    context = normals(9, C)
    z, log_q = q(context).rsample_and_log_prob((20,))
    assert torch.allclose(q(context).log_prob(z), log_q, atol=1e-7)


def divergence(family, length, exact, steps=300):
    "KL(q || exact) in nats of a posterior fitted for one context."
    q = posterior(family, 2, length, C)
    context = torch.ones(1, C)
    optimizer = torch.optim.Adam(q.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        z, log_q = q(context).rsample_and_log_prob((128,))
        optimizer.zero_grad()
        (log_q - exact.log_prob(z)).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z, log_q = q(context).rsample_and_log_prob((20_000,))
    return (log_q - exact.log_prob(z)).mean()


def test_a_full_covariance_reaches_a_correlated_posterior():
    """A diagonal Gaussian stops at a known gap, half the log of the product of the precision's
    diagonal over its determinant; a full one closes it.
    """
    precision = torch.tensor([[3.5, 2.4], [2.4, 3.5]])
    exact = MultivariateNormal(torch.tensor([1.0, -2.0]), precision_matrix=precision)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert gap > 0.3
    assert abs(divergence("diagonal", 0, exact) - gap) < 0.03
    assert abs(divergence("full", 1, exact)) < 0.01


@pytest.mark.parametrize("family", ["planar", "nice-perm", "nice-ortho"])
def test_eighty_layers_in_single_precision(family):
    q = posterior(family, 40, 80, 50)
    context = torch.randn(30, 50).relu().mul_(3).requires_grad_()
    z, log_q = q(context).rsample_and_log_prob((2,))
    (log_q + z.square().sum(-1)).mean().backward()
    assert z.isfinite().all()
    assert log_q.isfinite().all()
    for p in [*q.parameters(), context]:
        assert p.grad.isfinite().all()
        assert p.grad.any()


@families
def test_the_context_reaches_the_layers(family):
    "Not only the Gaussian in front of them."
    q = posterior(family, 6, 2, C)
    context = torch.randn(9, C, requires_grad=True)
    y, log_det = q.transform.transforms[1].forward(torch.randn(9, 6), context)
    (slope,) = torch.autograd.grad(y.sin().sum() + log_det.sum(), context)
    assert slope.abs().min() > 0


def test_options():
    def layers(family, **options):
        return posterior(family, 6, 2, C, **options).transform.transforms[1]

    assert layers("iaf", hidden=(7,)).hidden == (7,)
    assert layers("conf", activation="relu").activation == "relu"
    assert layers("nice-ortho").mix == "ortho"
    for family in FAMILIES:
        assert "context_dim" not in options_of(family)
    for words, arguments, options in [
        (("family", "diagonal, full"), ("planars", 6, 2, C), {}),
        (("hidden", "constraint"), ("planar", 6, 2, C), {"hidden": (8,)}),
        (("mix", "none"), ("nice-perm", 6, 2, C), {"mix": "ortho"}),
        (("length", "at least 0"), ("planar", 6, -1, C), {}),
        (("length", "at least 0"), ("diagonal", 6, None, C), {}),
        (("length", "expected 0"), ("diagonal", 6, 1, C), {}),
        (("dim", "at least 1"), ("planar", 0, 2, C), {}),
        (("context_dim", "at least 1"), ("planar", 6, 2, None), {}),
    ]:
        with pytest.raises(ValueError) as raised:
            posterior(*arguments, **options)
        for word in words:
            assert word in str(raised.value), raised.value
