"""Annealed importance sampling: weights are unbiased however short the path, there and back.

The bounds hold and meet; passes are counted.
"""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from normflow_vi.evaluate.annealed import (
    ACCEPTANCE,
    FIRST,
    Annealed,
    _Hamiltonian,
    _Path,
    ais,
    bidirectional,
    temperatures,
)

SIGMA = 0.5


def model(D, pixels, N, seed=0):
    "A linear-Gaussian model: `(log_joint, x, z, log p(x), the exact posterior's mean and covariance)`."
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    W = noise(pixels, D)
    z = noise(N, D)
    x = z @ W.t() + SIGMA * noise(N, pixels)

    def log_joint(x, z):
        return {
            "log_prior": Normal(0.0, 1.0).log_prob(z).sum(-1),
            "log_likelihood": Normal(z @ W.t(), SIGMA).log_prob(x).sum(-1),
        }

    truth = MultivariateNormal(
        torch.zeros(pixels).double(), W @ W.t() + SIGMA**2 * torch.eye(pixels)
    ).log_prob(x)
    covariance = torch.linalg.inv(torch.eye(D) + W.t() @ W / SIGMA**2)
    return log_joint, x, z, truth, x @ W @ covariance / SIGMA**2, covariance


def test_temperatures():
    for steps in (1, 2, 7, 1000):
        beta = temperatures(steps)
        assert len(beta) == steps + 1
        assert beta[0] == 0
        assert beta[-1] == 1
        assert (beta.diff() > 0).all()
        assert torch.allclose(beta + beta.flip(0), torch.ones(steps + 1).double())


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 12])
def test_weights_are_unbiased_on_short_paths(steps, initial):
    """The mean of w is p(x), and from exact posterior draws that of 1/w is 1/p(x), within 4.5 standard
    errors.

    1/w has a finite variance only where the path starts from less than twice the posterior's variance, so
    the way back is tested from there.
    """
    log_joint, x, z, truth, mean, covariance = model(2, 3, 6)
    precisions = torch.linalg.inv(covariance).diagonal()
    scale = torch.linalg.inv(precisions.diag()).diagonal().sqrt().expand(6, 2)
    count = 3000  # of each coordinate given the other
    place = (mean + 0.4 * scale, 1.2 * scale) if initial else None
    there = ais(
        log_joint,
        x,
        2,
        steps=steps,
        chains=count,
        leapfrog=3,
        initial=place,
        block=10**6,
    )
    w = (there.log_weights - truth).exp()
    assert ((w.mean(0) - 1).abs() < 4.5 * w.std(0) / math.sqrt(count)).all()
    if not initial:
        return
    exact = MultivariateNormal(mean, covariance).sample((count,))
    rows = slice(0, 3)  # each draw an image of its own: chains of one image share theirs
    many = x[rows].repeat(count, 1)
    lower, upper = bidirectional(
        log_joint,
        many,
        exact[:, rows].reshape(-1, 2),
        steps=steps,
        chains=1,
        leapfrog=3,
        block=10**6,
        initial=tuple(p[rows].repeat(count, 1) for p in place),
    )
    inverse = (truth[rows] - upper.log_weights.view(count, 3)).exp()
    assert ((inverse.mean(0) - 1).abs() < 4.5 * inverse.std(0) / math.sqrt(count)).all()


def test_the_sandwich_closes_on_the_truth():
    log_joint, x, z, truth, *_ = model(4, 6, 60)
    gaps = []
    for steps in (10, 300):
        lower, upper = bidirectional(log_joint, x, z, steps=steps, chains=10, leapfrog=4, seed=1)
        below = lower.log_p - truth
        assert below.mean() < 0 + 3 * below.std() / math.sqrt(60)
        above = upper.log_p - truth
        assert above.mean() > -3 * above.std() / math.sqrt(60)
        gaps.append((upper.log_p - lower.log_p).mean())
    assert gaps[0] > 3
    assert -0.1 < gaps[1] < 0.5
    assert ((lower.log_p - truth).abs() < 5 * lower.error + 0.3).all()
    assert abs((lower.log_p - truth).mean()) < 0.25
    assert abs((upper.log_p - truth).mean()) < 0.25


def test_from_the_posterior_itself_each_weight_is_the_evidence():
    x = torch.randn(7, 3, dtype=torch.float64)

    def log_joint(x, z):
        log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return log_prior + Normal(z, 1.0).log_prob(x).sum(-1)

    truth = Normal(0 * x, math.sqrt(2)).log_prob(x).sum(-1)
    lower, upper = bidirectional(
        log_joint,
        x,
        x / 2,
        steps=4,
        chains=3,
        leapfrog=3,
        initial=(x / 2, torch.full((7, 3), math.sqrt(0.5), dtype=torch.float64)),
    )
    for bound in (lower, upper):
        assert torch.allclose(bound.log_weights, truth.expand(3, 7), rtol=0, atol=1e-10)
        assert (bound.error < 1e-10).all()
        assert torch.allclose(bound.log_p, truth)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_transition_keeps_its_density(beta):
    "Exact draws of f_beta stay that: their mean and covariance after many transitions, within 4.5 errors."
    log_joint, x, _, _, _, _ = model(2, 3, 1, seed=3)
    path = _Path(log_joint, x, torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    origin = path.at(torch.zeros(1, 1, 2, dtype=torch.float64))
    steps = []
    for direction in torch.eye(2).double():
        point = path.at(direction.expand(1, 1, 2))
        steps.append(point.slope - origin.slope)
    hessian = torch.stack(steps)[:, 0, 0]
    precision = (1 - beta) * torch.eye(2) - beta * hessian
    precision = (precision + precision.t()) / 2
    exact = MultivariateNormal(
        torch.linalg.solve(precision, beta * origin.slope[0, 0]),
        precision_matrix=precision,
    )
    n = 4000
    sampler = _Hamiltonian(path, 3, torch.Generator().manual_seed(0))
    size = torch.full((1,), 0.8 / precision.diagonal().max().sqrt(), dtype=torch.float64)
    point = path.at(exact.sample((n, 1)))
    for _ in range(15):
        point, chance = sampler.transition(point, size, beta)
    centred = point.e[:, 0] - exact.mean
    assert 0.5 < chance.mean() < 0.999  # refusals matter
    assert (centred.mean(0).abs() < 4.5 * exact.variance.sqrt() / math.sqrt(n)).all()
    products = centred[:, :, None] * centred[:, None]
    assert ((products.mean(0) - exact.covariance_matrix).abs() < 4.5 * products.std(0) / math.sqrt(n)).all()


def test_passes_lengths_and_acceptance():
    """One gradient a leapfrog step.

    Lengths come from the pilot run and are not touched by the measured one; they find the acceptance asked
    for.
    """
    log_joint, x, z, *_ = model(3, 4, 10)
    calls = []

    def counted(x, z):
        calls.append(z.shape[:2])
        return log_joint(x, z)

    lower, upper = bidirectional(counted, x, z, steps=40, chains=6, leapfrog=5, block=24)
    blocks = 3
    pilot = sum(c[0] == 4 for c in calls)
    chains = sum(c[0] == 6 for c in calls)
    assert pilot == blocks * (1 + FIRST * 5 + 40 * 5)
    assert chains == 2 * blocks * (1 + 40 * 5)
    assert torch.equal(lower.step_sizes, upper.step_sizes)
    assert lower.step_sizes.shape == (40, 10)
    assert lower.acceptance.shape == (40,)
    assert abs(lower.acceptance[10:].mean() - ACCEPTANCE) < 0.1
    assert (lower.step_sizes[-1] < lower.step_sizes[0]).all()
    again = bidirectional(log_joint, x, z, steps=40, chains=6, leapfrog=5, block=24)[0]
    assert torch.equal(again.log_weights, lower.log_weights)
    assert not torch.equal(ais(log_joint, x, 3, steps=40, chains=6, seed=1).log_p, again.log_p)


def test_infinite_regions_are_refused_not_entered():
    """A density that is zero (or NaN) beyond a wall: chains stay inside, and the evidence is right."""

    def walled(x, z):
        inside = (z.abs() < 1.5).all(-1)
        return torch.where(
            inside,
            Normal(0.0, 1.0).log_prob(z).sum(-1),
            torch.full_like(z[..., 0], -math.inf),
        ) + 0 * x.sum(-1)

    found = ais(
        walled,
        torch.zeros(3, 1).double(),
        1,
        steps=30,
        chains=400,
        leapfrog=2,
        initial=(torch.zeros(3, 1).double(), torch.full((3, 1), 0.4).double()),
    )
    truth = math.log(math.erf(1.5 / math.sqrt(2)))
    assert ((found.log_p - truth).abs() < 5 * found.error + 0.02).all()


def test_bounds_of_few_chains():
    one = Annealed(torch.tensor([[1.0, 2.0]]), torch.ones(1), torch.ones(1, 2))
    assert torch.equal(one.log_p, torch.tensor([1.0, 2.0]))
    assert one.error.isnan().all()


BAD = [
    ({"steps": 0}, "steps"),
    ({"chains": 0}, "chains"),
    ({"leapfrog": 0}, "leapfrog"),
    ({"latent_dim": 0}, "latent_dim"),
    ({"block": 0}, "block"),
    ({"x": torch.zeros(0, 4)}, "x: .*one row"),
    ({"x": torch.full((2, 4), math.nan)}, "x: 2 of 2 rows"),
    ({"initial": (torch.zeros(2, 3), torch.ones(2, 3))}, "initial mean"),
    ({"initial": (torch.zeros(10, 3), torch.zeros(10, 3))}, "initial scale"),
    ({"initial": (torch.zeros(10, 2), torch.ones(10, 3))}, "initial mean"),
]


@pytest.mark.parametrize("wrong, words", BAD)
def test_bad_input_is_named(wrong, words):
    log_joint, x, *_ = model(3, 4, 10)
    with pytest.raises((ValueError, TypeError), match=words):
        ais(log_joint, **({"x": x, "latent_dim": 3} | wrong))


def test_other_bad_input():
    log_joint, x, z, *_ = model(3, 4, 10)
    with pytest.raises(ValueError, match="z has shape"):
        bidirectional(log_joint, x, z[:3])
    with pytest.raises(ValueError, match="z: 1 of 10|row 4"):
        bidirectional(log_joint, x, z.index_fill(0, torch.tensor([4]), math.nan))
    with pytest.raises(FloatingPointError, match="row 1"):
        ais(
            lambda x, z: -z.square().sum(-1) + torch.tensor([0.0, math.nan]),
            x[:2],
            3,
            steps=2,
            chains=2,
        )


def test_with_gradients_switched_off():
    log_joint, x, z, truth, *_ = model(2, 3, 5)
    with torch.no_grad():
        off = ais(log_joint, x, 2, steps=10, chains=4)
    assert torch.equal(off.log_weights, ais(log_joint, x, 2, steps=10, chains=4).log_weights)
    assert not off.log_p.requires_grad
