"""Approximation and amortisation gaps against their closed forms in a linear-Gaussian model, for every kind
of family.
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from normflow_vi.evaluate import log_marginal
from normflow_vi.evaluate.gaps import Gaps, _free_parameters, gaps
from normflow_vi.models.posteriors import FAMILIES, posterior

SIGMA = 0.7


def model(N=30):
    "`(log_joint, x, log p(x), posterior mean, precision)`: three latent dimensions, five observed."
    draw = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    W = noise(5, 3)
    x = noise(N, 3) @ W.t() + SIGMA * noise(N, 5)

    def log_joint(x, z):
        return {
            "log_prior": Normal(0.0, 1.0).log_prob(z).sum(-1),
            "log_likelihood": Normal(z @ W.t(), SIGMA).log_prob(x).sum(-1),
        }

    precision = torch.eye(3) + W.t() @ W / SIGMA**2
    truth = MultivariateNormal(torch.zeros(5).double(), W @ W.t() + SIGMA**2 * torch.eye(5)).log_prob(x)
    return log_joint, x, truth, x @ W @ precision.inverse() / SIGMA**2, precision


def test_both_gaps_are_their_closed_forms():
    log_joint, x, truth, mean, precision = model()
    encoder = nn.Linear(5, 5).double()
    flow = posterior("diagonal", 3, 0, 5).double()
    before = {name: p.clone() for module in (encoder, flow) for name, p in module.named_parameters()}
    found = gaps(
        log_joint,
        lambda x: flow(encoder(x)),
        x,
        steps=400,
        learning_rate=0.1,
        samples=2000,
    )
    approximation = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    emitted = flow.transform.source(encoder(x), x.dtype)
    q = MultivariateNormal(
        emitted["shift"][:, 0],
        scale_tril=torch.diag_embed(emitted["log_scale"][:, 0].exp()),
    )
    total = kl_divergence(q, MultivariateNormal(mean, precision_matrix=precision)).detach()
    assert approximation > 0.2
    assert (total - approximation).mean() > 1  # both are there to be found
    best = truth - found.best
    assert abs(best.mean() - approximation) < 0.03
    assert ((best - approximation).abs() < 0.15).all()
    error = (truth - found.elbo) - total
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(30)
    assert abs(found.log_p - truth).max() < 6 * found.error.max()
    assert abs(found.approximation.value - approximation) < 0.03
    assert abs(
        found.amortisation.value - (total - approximation).mean()
    ) < 0.03 + 4 * error.std() / math.sqrt(30)
    assert all(
        torch.equal(p, before[name]) and p.grad is None
        for module in (encoder, flow)
        for name, p in module.named_parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_optimised(family):
    """What an encoder determines becomes free: the bound rises, and beyond the diagonal Gaussian's best
    where the family is richer.
    """
    torch.manual_seed(1)
    log_joint, x, truth, mean, precision = model(8)
    flow = posterior(family, 3, 0 if family == "diagonal" else 2, 5).double()

    def near(x):
        return flow(0.2 * x)  # an encoder that is wrong, but not absurd

    q = near(x)
    loose, leaves = _free_parameters(q)
    assert len(leaves) > 1
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    for a, b in zip(
        *(d.rsample_and_log_prob((5,), torch.Generator().manual_seed(0)) for d in (q, loose)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-9)
    with torch.no_grad():
        found = gaps(log_joint, near, x, steps=200, draws=8, learning_rate=0.05, samples=500)
    diagonal = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert found.amortisation.value > 0.5
    assert (truth - found.best).mean() < diagonal + 0.35
    assert ((found.best - truth) < 0.1).all()
    if family in ("full", "planar", "sylvester"):
        assert (
            truth - found.best
        ).mean() < 0.75 * diagonal  # networks of other families stay as they were drawn


def test_images_do_not_share_anything():
    """An image's optimum does not depend on which others are optimised beside it (up to its own draws).

    More images than one block.
    """
    log_joint, x, truth, *_ = model(130)
    amortised = posterior("diagonal", 3, 0, 5).double()

    def flow(x):
        return amortised(0.2 * x)

    found = gaps(log_joint, flow, x, steps=150, draws=4, learning_rate=0.05, samples=100)
    few = gaps(log_joint, flow, x[-20:], steps=150, draws=4, learning_rate=0.05, samples=100)
    assert found.best.shape == (130,)
    assert abs((found.best[-20:] - few.best).mean()) < 0.15
    first = gaps(log_joint, flow, x[:20], steps=1, samples=50).elbo
    assert torch.allclose(first, log_marginal(log_joint, flow, x[:20], 50).elbo)


def test_parts_add_up():
    parts = Gaps(*(torch.tensor(values) for values in ([0.0, 1.0], [-1.0, -1.0], [-3.0, -2.0], [0.0, 0.0])))
    assert parts.approximation.value == 1.5
    assert parts.amortisation.value == 1.5
    assert parts.total.value == 3


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"steps": 0}, "steps"),
        ({"draws": 0}, "draws"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"samples": 0}, "samples"),
        ({"x": torch.zeros(0, 5)}, "x: "),
        ({"x": torch.full((2, 5), math.nan)}, "row 0"),
        ({"posterior": lambda x: Normal(0.0, 1.0)}, "posterior"),
    ],
)
def test_bad_input_is_named(wrong, words):
    log_joint, x, *_ = model(4)
    with pytest.raises((ValueError, TypeError), match=words):
        gaps(
            **(
                {
                    "log_joint": log_joint,
                    "posterior": posterior("diagonal", 3, 0, 5).double(),
                    "x": x,
                }
                | wrong
            )
        )
