"""The tighter bound from several indices: known answers, the right direction, and what takes it."""

import math

import pytest
import torch
from torch.distributions import Normal

from normflow_vi import Chain, Flow
from normflow_vi.evaluate import log_marginal
from normflow_vi.flows import ManyIndices
from normflow_vi.flows.many_indices import draw_index_weights, log_mean_exp
from normflow_vi.objectives import elbo, free_energy, importance_weighted
from normflow_vi.transforms import Affine, ContinuouslyIndexed, Planar

A, SIGMA, S, B = -0.6, 0.7, 0.2, 0.9
V = (math.exp(S) + A * B) ** 2 + (B * SIGMA) ** 2
SLOPE = (A * math.exp(S) + B * (A**2 + SIGMA**2)) / V
REST = A**2 + SIGMA**2 - SLOPE**2 * V
EXACT = (SLOPE, math.sqrt(REST))
POOR = ((0.0, 1.0), (1.2 * SLOPE, 1.5 * EXACT[1]), (SLOPE + 0.3, EXACT[1]))


def linear_gaussian(slope, std):
    "`z = e^S w + B u`, `u | w ~ N(A w, SIGMA^2)`, and an `r(u|z) = N(slope z, std^2)`."
    layer = ContinuouslyIndexed(Affine(1), hidden=()).double()
    values = {"q_": (A, math.log(SIGMA)), "ts_": (B, S), "r_": (slope, math.log(std))}
    with torch.no_grad():
        for prefix, (weight, log_scale) in values.items():
            getattr(layer.source, f"{prefix}weight_0").copy_(torch.tensor([[[weight, 0.0]]]))
            getattr(layer.source, f"{prefix}bias_0").copy_(torch.tensor([[0.0, log_scale]]))
    return Flow(layer).double()


def gap(slope, std):
    "`E KL(q(u|z) || r(u|z))`."
    return 0.5 * (math.log(std**2 / REST) + (REST + (SLOPE - slope) ** 2 * V) / std**2 - 1)


def log_q(z):
    return Normal(0.0, math.sqrt(V)).log_prob(z).sum(-1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Known answers.


@pytest.mark.parametrize("r", POOR)
def test_the_auxiliary_bound_is_the_closed_form(r):
    bound = elbo(log_q, linear_gaussian(*r), samples=20_000, generator=seeded())  # log Z = 0, KL(q || p) = 0
    assert abs(bound.value + gap(*r)) < 4 * bound.std_error


def test_the_bound_against_another_target():
    "log Z = 1.7, a divergence in closed form, and the gap."
    target = Normal(0.4, 1.1)
    kl = torch.distributions.kl_divergence(Normal(0.0, math.sqrt(V)), target).item()
    bound = elbo(
        lambda z: target.log_prob(z).sum(-1) + 1.7, linear_gaussian(*POOR[1]), 40_000, generator=seeded()
    )
    assert abs(bound.value - (1.7 - kl - gap(*POOR[1]))) < 4 * bound.std_error


@pytest.mark.parametrize("extra", [0, 1, 7])
def test_with_the_exact_r_every_draw_is_the_density(extra):
    z, term = ManyIndices(linear_gaussian(*EXACT), extra).rsample_and_log_prob((500,), seeded())
    assert torch.allclose(term, log_q(z), atol=1e-9)
    assert gap(*EXACT) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("r", POOR)
def test_it_falls_with_each_index_and_stays_above(r):
    counts = (0, 1, 2, 4, 8, 16, 64)
    z, log_w = draw_index_weights(linear_gaussian(*r)(), (6000,), counts[-1], seeded())
    above = torch.stack([log_mean_exp(log_w[: M + 1]) - log_q(z) for M in counts])
    steps = above.diff(dim=0)
    errors = steps.std(1) / len(z) ** 0.5
    assert (steps.mean(1) < 2 * errors).all()
    assert steps.mean(1)[0] < -2 * errors[0]
    assert (above.mean(1) > -4 * above.std(1) / len(z) ** 0.5).all()
    assert above[-1].mean() < 0.2 * gap(*r)


def test_one_further_index_by_quadrature():
    "The mean of the bound with M = 1 is a double integral over both indices, given z."
    slope, std = 0.0, 1.0
    q = linear_gaussian(slope, std)
    z, log_w = draw_index_weights(q(), (40_000,), 1, seeded())
    found = log_mean_exp(log_w) - log_q(z)
    u = torch.linspace(-7, 7, 561, dtype=torch.float64)
    total = 0.0
    nodes = torch.linspace(-6, 6, 241, dtype=torch.float64) * math.sqrt(V)
    share = log_q(nodes[:, None]).exp()
    share = share / share.sum()
    for at, weight in zip(nodes, share, strict=True):
        log_r = Normal(slope * at, std).log_prob(u)
        log_post = Normal(SLOPE * at, math.sqrt(REST)).log_prob(u)
        ratio = log_post - log_r
        pair = torch.logaddexp(ratio[:, None], ratio) - math.log(2)
        total += weight * ((log_post.exp()[:, None] * log_r.exp()) * pair).sum() * (u[1] - u[0]) ** 2
    assert abs(found.mean() - total) < 4 * found.std() / len(z) ** 0.5


def test_the_swapped_average_exceeds_log_z():
    "All indices from r, inside an evidence bound: above log Z = 0, and by the reverse divergence at M = 1."
    slope, std = POOR[1]
    z, log_w = draw_index_weights(linear_gaussian(slope, std)(), (20_000,), 8, seeded())
    for M in (1, 2, 8):
        swapped = log_q(z) - log_mean_exp(log_w[1 : M + 1])
        assert swapped.mean() > 4 * swapped.std() / len(z) ** 0.5, M
    reverse = 0.5 * (math.log(REST / std**2) + (std**2 + (SLOPE - slope) ** 2 * V) / REST - 1)
    one = log_q(z) - log_w[1]
    assert abs(one.mean() - reverse) < 4 * one.std() / len(z) ** 0.5


def test_the_average_is_unbiased_for_the_density():
    "`E 1/M sum w_m = q(z)` for indices from r: at a fixed point, against the closed form."
    q = linear_gaussian(*POOR[1])
    z = torch.tensor([[0.8]], dtype=torch.float64).expand(200_000, 1)
    with torch.no_grad():
        weights = q.log_prob(z, seeded()).exp()
    error = weights.std() / len(weights) ** 0.5
    assert abs(weights.mean() - log_q(z[:1]).exp()) < 4 * error


# What takes it.


def two_layers(context_dim=None):
    torch.manual_seed(0)
    return Flow(
        Chain(*(ContinuouslyIndexed(Planar(2, 2, context_dim), context_dim=context_dim) for _ in range(2)))
    )


def test_without_further_indices_it_is_the_flow():
    q = two_layers()
    for found, expected in zip(
        ManyIndices(q, 0).rsample_and_log_prob((20,), seeded()),
        q.rsample_and_log_prob((20,), seeded()),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_a_density_stays_what_it_is():
    q = Flow(Planar(2, 3)).double()
    z, term = ManyIndices(q, 5).rsample_and_log_prob((20,), seeded())
    assert torch.allclose(term, q.log_prob(z), atol=1e-6)


def test_objectives_take_it_and_gradients_reach_every_parameter():
    q = two_layers()
    tighter = ManyIndices(q, 3)

    def target(z):
        return -0.5 * (z * z).sum(-1)

    assert {id(p) for p in tighter.parameters()} == {id(p) for p in q.parameters()}
    free_energy(target, tighter, samples=10).value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())
    assert importance_weighted(target, tighter, samples=5, outer=4).value.isfinite()
    with pytest.raises(TypeError, match="sticking-the-landing"):
        elbo(target, tighter, samples=2, gradient="sticking-the-landing")


def test_the_evaluator_takes_it():
    "z ~ N(0, I), x | z ~ N(z, I): the ELBO rises with the further indices and stays below the evidence."

    def log_joint(x, z):
        return Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(z, 1.0).log_prob(x).sum(-1)

    torch.manual_seed(0)
    q = Flow(Chain(Affine(2, context_dim=2), ContinuouslyIndexed(Affine(2), context_dim=2)))
    x = torch.randn(10, 2)
    exact = Normal(0.0, math.sqrt(2)).log_prob(x).sum(-1).mean()
    bounds = [log_marginal(log_joint, ManyIndices(q, M), x, samples=2000).elbo.mean() for M in (0, 8)]
    assert bounds[0] < bounds[1] < exact
    z, term = ManyIndices(q, 4)(x).rsample_and_log_prob((3,))
    assert z.shape == (3, 10, 2)
    assert term.shape == (3, 10)


def test_a_generator_repeats_it():
    tighter = ManyIndices(two_layers(), 3)
    one, again, other = (tighter.rsample_and_log_prob((9,), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    "error, word, call",
    [
        (ValueError, "extra=-1", lambda q: ManyIndices(q, -1)),
        (ValueError, "extra=1.5", lambda q: ManyIndices(q, 1.5)),
        (ValueError, "extra=True", lambda q: ManyIndices(q, True)),
        (TypeError, "flow", lambda q: ManyIndices(q(), 1)),
        (ValueError, "context", lambda q: ManyIndices(q, 1)(torch.zeros(3, 2))),
    ],
)
def test_wrong_arguments_are_named(error, word, call):
    with pytest.raises(error, match=word):
        call(two_layers())


def test_it_shows_what_it_is():
    assert "extra=7" in repr(ManyIndices(two_layers(), 7))
