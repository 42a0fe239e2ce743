"""Objectives and evaluation against closed forms; Monte Carlo thresholds are in standard errors."""
import math

import pytest
import torch
from torch.distributions import Independent, Normal

from normflow_vi import Chain, Flow
from normflow_vi.evaluate import log_marginal
from normflow_vi.objectives import draw_terms, elbo, estimate, free_energy, joint
from normflow_vi.transforms import Affine, Planar


def test_a_flow_equal_to_its_target_has_no_gap():
    q = Flow(Chain(Affine(2), Planar(2, 5))).double()
    target = Flow(Chain(Affine(2), Planar(2, 5))).double()
    target.load_state_dict(q.state_dict())
    bound = elbo(lambda z: target.log_prob(z) + 3., q(), samples=500)
    assert abs(bound.value - 3.) < 1e-6 and bound.std_error < 1e-7


def test_bound_gap_is_the_divergence():
    "Between Gaussians KL(q || p) has a closed form."
    q = Flow(Affine(1)).double()
    with torch.no_grad(): q.transform.source.shift.fill_(.5); q.transform.source.log_scale.fill_(math.log(.7))
    bound = elbo(lambda z: Normal(0., 1.).log_prob(z).sum(-1), q(), samples=40_000)
    kl = .5 * (.7 ** 2 + .5 ** 2 - 1) - math.log(.7)
    assert abs(-bound.value - kl) < 4 * bound.std_error and bound.std_error < .01


def test_standard_errors_are_honest():
    "Over many repetitions the error divided by its estimate has variance one."
    scores = []
    for _ in range(400):
        e = estimate(1. + 2. * torch.randn(100))
        scores.append(((e.value - 1.) / e.std_error).item())
    scores = torch.tensor(scores)
    assert abs(scores.mean()) < 4 / 20 and abs(scores.square().mean() - 1) < 4 * math.sqrt(2 / 400) + .05


def test_reparameterised_gradient_of_a_gaussian():
    "d/dmu and d/dlog_sigma of F against N(0, 1): mu and sigma^2 - 1."
    q = Flow(Affine(1)).double()
    with torch.no_grad(): q.transform.source.shift.fill_(.5); q.transform.source.log_scale.fill_(math.log(.7))
    gradients = []
    for _ in range(400):
        q.zero_grad()
        free_energy(lambda z: -.5 * z.square().sum(-1), q(), samples=20).value.backward()
        gradients.append([q.transform.source.shift.grad.item(), q.transform.source.log_scale.grad.item()])
    gradients = torch.tensor(gradients)
    error = gradients.std(0) / 20
    assert ((gradients.mean(0) - torch.tensor([.5, .7 ** 2 - 1])).abs() < 4 * error).all()


@pytest.mark.parametrize("anneal", ["joint", "kl"])
def test_annealing_weights_what_it_says(anneal):
    q = Flow(Affine(2)).double()
    parts = lambda z: {"log_likelihood": -(z - 1).square().sum(-1), "log_prior": -.5 * z.square().sum(-1)}
    generator = lambda: torch.Generator().manual_seed(5)
    terms = draw_terms(parts, q(), 7, generator())
    value = free_energy(parts, q(), samples=7, beta=.3, anneal=anneal, generator=generator()).value
    likelihood, prior, log_q = terms["log_likelihood"], terms["log_prior"], terms["log_q"]
    expected = log_q - .3 * (likelihood + prior) if anneal == "joint" else .3 * (log_q - prior) - likelihood
    assert torch.allclose(value, expected.mean())


class Exact:
    "The posterior of z ~ N(0, I), x | z ~ N(z, I), widened by `factor`; with `noise`, it hands that out in order instead of drawing."
    def __init__(self, x, factor=1., noise=None): self.q, self.noise = Independent(Normal(x / 2, factor * math.sqrt(.5)), 1), noise
    def rsample_and_log_prob(self, shape, generator=None):
        if self.noise is None: eps = torch.randn(*shape, *self.q.base_dist.loc.shape, generator=generator, dtype=torch.float64)
        else: eps, self.noise = self.noise.split([shape[0], len(self.noise) - shape[0]])
        z = self.q.base_dist.loc + self.q.base_dist.scale * eps
        return z, self.q.log_prob(z)


UNIT = Normal(torch.zeros((), dtype=torch.float64), 1.)
def log_joint(x, z): return UNIT.log_prob(z).sum(-1) + Normal(z, 1.).log_prob(x).sum(-1)
def truth(x): return Normal(torch.zeros_like(x), math.sqrt(2)).log_prob(x).sum(-1)


@pytest.mark.parametrize("samples, block", [(1, 10), (7, 10), (200, 64), (200, 100_000)])
def test_exact_posterior_gives_log_p_for_every_draw(samples, block):
    x = torch.randn(23, 3, dtype=torch.float64)
    found = log_marginal(log_joint, Exact, x, samples=samples, block=block)
    assert torch.allclose(found.log_p, truth(x), rtol=0, atol=1e-10) and torch.allclose(found.elbo, truth(x), rtol=0, atol=1e-10)
    assert abs(found.kl.value) < 1e-10 and abs(found.nll.value + truth(x).mean()) < 1e-10


def test_streaming_equals_one_block():
    "The running log-sum-exp is the log-sum-exp of everything, whatever the chunks."
    x = torch.randn(1, 3, dtype=torch.float64)
    noise = torch.randn(120, 1, 3, dtype=torch.float64)
    z, log_q = Exact(x, 1.5, noise).rsample_and_log_prob((120,))
    log_w = log_joint(x, z) - log_q
    for block in (120, 17, 1):
        found = log_marginal(log_joint, lambda x: Exact(x, 1.5, noise), x, samples=120, block=block)
        assert torch.allclose(found.log_p, log_w.logsumexp(0) - math.log(120)) and torch.allclose(found.elbo, log_w.mean(0))


def test_importance_weighting_closes_most_of_the_gap():
    x = torch.randn(300, 3, dtype=torch.float64)
    found = log_marginal(log_joint, lambda x: Exact(x, 1.5), x, samples=500)
    gap = truth(x) - found.log_p
    assert abs(gap.mean()) < .02 and found.kl.value > .2
    kl = 3 * (.5 * (1.5 ** 2 - 1) - math.log(1.5))
    assert abs(found.kl.value - kl) < 4 * found.kl.std_error + .02
    assert (found.log_p >= found.elbo - 1e-12).all()


def test_parts_and_sum_of_a_joint_agree():
    x = torch.randn(9, 3, dtype=torch.float64)
    parts = lambda x, z: {"log_prior": UNIT.log_prob(z).sum(-1), "log_likelihood": Normal(z, 1.).log_prob(x).sum(-1)}
    one, other = (log_marginal(j, lambda x: Exact(x, 1.5), x, samples=20) for j in (log_joint, parts))
    assert torch.allclose(one.log_p, other.log_p, atol=1e-12)
    assert joint({"log_q": torch.ones(2), "a": torch.ones(2), "b": torch.ones(2)}).tolist() == [2, 2]


def test_a_whole_loss_traces_to_one_graph():
    "Model, posterior and annealed free energy of a batch: nothing in it breaks the graph."
    from normflow_vi.vae import dlgm
    model, x = dlgm(torch.full((20,), .2), 3, dim=4, hidden=(8, 8)), (torch.rand(5, 20) < .2).float()
    def loss(x): return free_energy(lambda z: model.log_joint(x, z), model.q(x), beta=.5, anneal="kl").value
    torch._dynamo.reset()
    assert torch.compile(loss, fullgraph=True, backend="eager")(x).isfinite()
