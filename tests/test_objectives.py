"""Objectives and evaluation against closed forms; Monte Carlo thresholds are in standard errors."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, constraints

from normflow_vi import Chain, Flow
from normflow_vi.evaluate import log_marginal
from normflow_vi.objectives import (
    draw_terms,
    elbo,
    estimate,
    forward_kl,
    free_energy,
    importance_weighted,
    joint,
    log_power_mean,
    renyi,
)
from normflow_vi.transforms import Affine, Planar


def test_a_flow_equal_to_its_target_has_no_gap():
    q = Flow(Chain(Affine(2), Planar(2, 5))).double()
    target = Flow(Chain(Affine(2), Planar(2, 5))).double()
    target.load_state_dict(q.state_dict())
    bound = elbo(lambda z: target.log_prob(z) + 3.0, q(), samples=500)
    assert abs(bound.value - 3.0) < 1e-6
    assert bound.std_error < 1e-7


def test_bound_gap_is_the_divergence():
    "Between Gaussians KL(q || p) has a closed form."
    q = Flow(Affine(1)).double()
    with torch.no_grad():
        q.transform.source.shift.fill_(0.5)
        q.transform.source.log_scale.fill_(math.log(0.7))
    bound = elbo(lambda z: Normal(0.0, 1.0).log_prob(z).sum(-1), q(), samples=40_000)
    kl = 0.5 * (0.7**2 + 0.5**2 - 1) - math.log(0.7)
    assert abs(-bound.value - kl) < 4 * bound.std_error
    assert bound.std_error < 0.01


def test_standard_errors_are_honest():
    "Over many repetitions the error divided by its estimate has variance one."
    scores = []
    for _ in range(400):
        e = estimate(1.0 + 2.0 * torch.randn(100))
        scores.append(((e.value - 1.0) / e.std_error).item())
    scores = torch.tensor(scores)
    assert abs(scores.mean()) < 4 / 20
    assert abs(scores.square().mean() - 1) < 4 * math.sqrt(2 / 400) + 0.05


def test_reparameterised_gradient_of_a_gaussian():
    "d/dmu and d/dlog_sigma of F against N(0, 1): mu and sigma^2 - 1."
    q = Flow(Affine(1)).double()
    with torch.no_grad():
        q.transform.source.shift.fill_(0.5)
        q.transform.source.log_scale.fill_(math.log(0.7))
    gradients = []
    for _ in range(400):
        q.zero_grad()
        free_energy(lambda z: -0.5 * z.square().sum(-1), q(), samples=20).value.backward()
        gradients.append(
            [
                q.transform.source.shift.grad.item(),
                q.transform.source.log_scale.grad.item(),
            ]
        )
    gradients = torch.tensor(gradients)
    error = gradients.std(0) / 20
    exact = torch.tensor([0.5, 0.7**2 - 1])
    assert ((gradients.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("anneal", ["joint", "kl"])
def test_annealing_weights_what_it_says(anneal):
    q = Flow(Affine(2)).double()

    def parts(z):
        return {
            "log_likelihood": -(z - 1).square().sum(-1),
            "log_prior": -0.5 * z.square().sum(-1),
        }

    def generator():
        return torch.Generator().manual_seed(5)

    terms = draw_terms(parts, q(), 7, generator())
    value = free_energy(parts, q(), samples=7, beta=0.3, anneal=anneal, generator=generator()).value
    likelihood = terms["log_likelihood"]
    prior = terms["log_prior"]
    log_q = terms["log_q"]
    if anneal == "joint":
        expected = log_q - 0.3 * (likelihood + prior)
    else:
        expected = 0.3 * (log_q - prior) - likelihood
    assert torch.allclose(value, expected.mean())


class Exact:
    """The posterior of z ~ N(0, I), x | z ~ N(z, I), widened by `factor`.

    With `noise`, it hands that out in order instead of drawing.
    """

    def __init__(self, x, factor=1.0, noise=None):
        self.q = Independent(Normal(x / 2, factor * math.sqrt(0.5)), 1)
        self.noise = noise

    def rsample_and_log_prob(self, shape, generator=None):
        if self.noise is None:
            eps = torch.randn(
                *shape,
                *self.q.base_dist.loc.shape,
                generator=generator,
                dtype=torch.float64,
            )
        else:
            eps, self.noise = self.noise.split([shape[0], len(self.noise) - shape[0]])
        z = self.q.base_dist.loc + self.q.base_dist.scale * eps
        return z, self.q.log_prob(z)


UNIT = Normal(torch.zeros((), dtype=torch.float64), 1.0)


def log_joint(x, z):
    log_prior = UNIT.log_prob(z).sum(-1)
    return log_prior + Normal(z, 1.0).log_prob(x).sum(-1)


def truth(x):
    return Normal(torch.zeros_like(x), math.sqrt(2)).log_prob(x).sum(-1)


@pytest.mark.parametrize("samples, block", [(1, 10), (7, 10), (200, 64), (200, 100_000)])
def test_exact_posterior_gives_log_p_for_every_draw(samples, block):
    x = torch.randn(23, 3, dtype=torch.float64)
    found = log_marginal(log_joint, Exact, x, samples=samples, block=block)
    assert torch.allclose(found.log_p, truth(x), rtol=0, atol=1e-10)
    assert torch.allclose(found.elbo, truth(x), rtol=0, atol=1e-10)
    assert abs(found.kl.value) < 1e-10
    assert abs(found.nll.value + truth(x).mean()) < 1e-10


def test_streaming_equals_one_block():
    "The running log-sum-exp is the log-sum-exp of everything, whatever the chunks."
    x = torch.randn(1, 3, dtype=torch.float64)
    noise = torch.randn(120, 1, 3, dtype=torch.float64)
    z, log_q = Exact(x, 1.5, noise).rsample_and_log_prob((120,))
    log_w = log_joint(x, z) - log_q
    for block in (120, 17, 1):
        found = log_marginal(log_joint, lambda x: Exact(x, 1.5, noise), x, samples=120, block=block)
        assert torch.allclose(found.log_p, log_w.logsumexp(0) - math.log(120))
        assert torch.allclose(found.elbo, log_w.mean(0))


def test_importance_weighting_closes_most_of_the_gap():
    x = torch.randn(300, 3, dtype=torch.float64)
    found = log_marginal(log_joint, lambda x: Exact(x, 1.5), x, samples=500)
    gap = truth(x) - found.log_p
    assert abs(gap.mean()) < 0.02
    assert found.kl.value > 0.2
    kl = 3 * (0.5 * (1.5**2 - 1) - math.log(1.5))
    assert abs(found.kl.value - kl) < 4 * found.kl.std_error + 0.02
    assert (found.log_p >= found.elbo - 1e-12).all()


def test_parts_and_sum_of_a_joint_agree():
    x = torch.randn(9, 3, dtype=torch.float64)

    def parts(x, z):
        return {
            "log_prior": UNIT.log_prob(z).sum(-1),
            "log_likelihood": Normal(z, 1.0).log_prob(x).sum(-1),
        }

    one = log_marginal(log_joint, lambda x: Exact(x, 1.5), x, samples=20)
    other = log_marginal(parts, lambda x: Exact(x, 1.5), x, samples=20)
    assert torch.allclose(one.log_p, other.log_p, atol=1e-12)
    assert joint({"log_q": torch.ones(2), "a": torch.ones(2), "b": torch.ones(2)}).tolist() == [2, 2]


def test_a_whole_loss_traces_to_one_graph():
    "Model, posterior and annealed free energy of a batch: nothing in it breaks the graph."
    from normflow_vi.models.vae import dlgm

    model = dlgm(torch.full((20,), 0.2), length=3, dim=4, hidden=(8, 8))
    x = (torch.rand(5, 20) < 0.2).float()

    def loss(x):
        return free_energy(lambda z: model.log_joint(x, z), model.q(x), beta=0.5, anneal="kl").value

    torch._dynamo.reset()
    assert torch.compile(loss, fullgraph=True, backend="eager")(x).isfinite()


# Bounds with several draws, and the other divergence.


def gaussian(mean, scale, dim=1):
    q = Flow(Affine(dim)).double()
    with torch.no_grad():
        q.transform.source.shift.fill_(mean)
        q.transform.source.log_scale.fill_(math.log(scale))
    return q


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.998, 1, 1.002, 1.5])
def test_renyi_bound_is_the_divergence_between_gaussians(alpha):
    """D_alpha(N(m, s^2) || N(0, 1)) = -log s - log v / (2 (alpha - 1)) + alpha m^2 / (2 v), v = alpha + (1
    - alpha) s^2 (Gil et al. 2013), which many draws a group reach.
    """
    m = 0.4
    s = 0.8
    v = alpha + (1 - alpha) * 0.8**2
    if alpha == 1:
        exact = 0.5 * (s * s + m * m - 1) - math.log(s)
    else:
        spread = -math.log(s) - math.log(v) / (2 * (alpha - 1))
        exact = spread + alpha * m * m / (2 * v)
    bound = renyi(
        lambda z: UNIT.log_prob(z).sum(-1) + 2.0,
        gaussian(m, s),
        alpha,
        samples=4000,
        outer=50,
    )
    assert abs(2.0 - bound.value - exact) < 4 * bound.std_error + 1e-3
    assert bound.std_error < 0.01


def test_bounds_are_ordered_in_alpha_and_in_draws():
    q = gaussian(0.5, 1.5, 2)

    def target(z):
        return UNIT.log_prob(z).sum(-1)

    def seeded():
        return torch.Generator().manual_seed(0)

    alphas = [-5.0, -1.0, 0.0, 0.5, 0.99, 1 - 1e-6, 1.0, 1 + 1e-6, 1.01, 2.0, 10.0]
    values = [renyi(target, q, alpha, 8, 100, seeded()).value for alpha in alphas]
    assert all(a >= b - 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert values[0] > values[-1] + 0.1
    assert torch.equal(values[6], elbo(target, q, 800, seeded()).value)
    for alpha, sign in ((0.0, 1), (0.5, 1), (2.0, -1)):
        few = renyi(target, q, alpha, 2, 10_000)
        many = renyi(target, q, alpha, 20, 1000)
        error = (many.std_error**2 + few.std_error**2).sqrt()
        assert sign * (many.value - few.value) > 4 * error
    for alpha in alphas:
        found = renyi(target, q, alpha, 1, 50, seeded()).value
        expected = elbo(target, q, 50, seeded()).value
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("support", [None, constraints.positive, constraints.simplex], ids=str)
def test_a_flow_equal_to_its_target_meets_every_bound(support):
    q = Flow(Chain(Affine(2), Planar(2, 5)), support=support).double()

    def target(z):
        return q.log_prob(z) + 3.0

    for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0):
        assert abs(renyi(target, q, alpha, 5, 20).value - 3.0) < 1e-6
    assert abs(forward_kl(q, q.sample((50,)), q.log_prob).value) < 1e-12


def test_forward_kl_between_gaussians():
    """With the target's density the divergence, without it the cross-entropy.

    Its minimum has the samples' moments.
    """
    x = 1.5 + 2.0 * torch.randn(50_000, 1, dtype=torch.float64)
    q = gaussian(0.5, 1.6)
    p = Normal(torch.tensor(1.5, dtype=torch.float64), 2.0)
    kl = forward_kl(q, x, lambda x: p.log_prob(x).sum(-1))
    cross = forward_kl(q, x)
    exact = math.log(1.6 / 2) + (4 + 1) / (2 * 1.6**2) - 0.5
    assert abs(kl.value - exact) < 4 * kl.std_error
    assert kl.std_error < 0.02
    assert abs(cross.value - exact - p.entropy()) < 4 * cross.std_error
    fitted = gaussian(x.mean().item(), x.std(correction=0).item())
    slopes = torch.autograd.grad(forward_kl(fitted, x).value, list(fitted.parameters()))
    assert all(abs(slope) < 1e-9 for slope in slopes)


def test_with_a_batch_each_image_has_its_bound():
    """The importance weighted bound agrees with the evaluator's, and its error is that of the mean over
    images.
    """
    x = torch.randn(40, 3, dtype=torch.float64)
    noise = torch.randn(60, 40, 3, dtype=torch.float64)
    found = log_marginal(log_joint, lambda x: Exact(x, 1.5, noise), x, samples=60, block=10_000)
    bound = importance_weighted(lambda z: log_joint(x, z), Exact(x, 1.5, noise), samples=60)
    assert torch.allclose(bound.value, found.log_p.mean())
    assert torch.allclose(bound.std_error, found.log_p.std() / math.sqrt(40))
    assert torch.allclose(bound.terms["elbo"], found.elbo.mean())
    grouped = importance_weighted(lambda z: log_joint(x, z), Exact(x, 1.5, noise), samples=20, outer=3)
    z, log_q = Exact(x, 1.5, noise).rsample_and_log_prob((60,))
    log_w = (log_joint(x, z) - log_q).view(20, 3, 40)
    assert torch.allclose(grouped.value, (log_w.logsumexp(0) - math.log(20)).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_mean_keeps_its_digits_and_its_range(dtype):
    log_w = 5 * torch.randn(30, 4, dtype=dtype)
    wide = log_w.double()
    for a in (2.0, 1.0, 0.05, 0.0101, 0.0099, 1e-3, 1e-5, 1e-9, -1e-9, -1e-3, -0.05, -3.0):
        if abs(a) < 1e-4:
            exact = wide.mean(0) + a * wide.var(0, correction=0) / 2
        else:
            exact = (a * wide).exp().mean(0).log() / a
        found = log_power_mean(log_w, a).double()
        assert torch.allclose(
            found,
            exact,
            rtol=2e-5 if dtype == torch.float32 else 1e-9,
            atol=1e-4 if dtype == torch.float32 else 2e-6 if abs(a) < 1e-4 else 1e-9,
        ), a
        assert log_power_mean(1e5 * log_w, a).isfinite().all()
    log_w = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for a in (1.0, 1e-3, -1e-3, 0.0):
        assert torch.autograd.gradcheck(log_power_mean, (log_w, a))
