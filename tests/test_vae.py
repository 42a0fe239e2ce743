"""Likelihoods, networks and the variational autoencoder against closed forms and quadrature.

What must be refused before training; collapse.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from helpers import normals
from normflow_vi import Chain, Flow
from normflow_vi.data import load_data
from normflow_vi.flows import RealNVP
from normflow_vi.models.likelihoods import Bernoulli, DiscretisedLogistic, Gaussian, LogitNormal
from normflow_vi.models.networks import MLP, GatedConvDecoder, GatedConvEncoder, ResNetDecoder, ResNetEncoder
from normflow_vi.models.posteriors import posterior
from normflow_vi.models.vae import VAE, check_uses_latents, dlgm, independent_pixels_nll
from normflow_vi.objectives import annealing, free_energy, importance_weighted
from normflow_vi.transforms import PLU, Affine

LIKELIHOODS = {
    "bernoulli": lambda dim: Bernoulli(),
    "logit-normal": lambda dim: LogitNormal(),
    "learned": lambda dim: LogitNormal("learned", dim=dim),
    "fixed": lambda dim: LogitNormal(0.5),
    "logistic": lambda dim: DiscretisedLogistic(),
    "two levels": lambda dim: DiscretisedLogistic(2),
    "gaussian": lambda dim: Gaussian(0.3),
}
each = pytest.mark.parametrize("likelihood", [make(5) for make in LIKELIHOODS.values()], ids=LIKELIHOODS)


# Likelihoods.


@each
def test_draws_have_the_mean_that_is_claimed(likelihood):
    output = normals(1, likelihood.outputs(5))
    draws = likelihood.double().sample(output.expand(20_000, -1))
    likelihood.check(draws)
    z = (draws.mean(0) - likelihood.mean(output)[0]) / (draws.std(0) / 20_000**0.5)
    assert (z.abs() < 4.5).all(), z


@pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_a_likelihood_is_normalised(make):
    """For one pixel: a sum over its levels, or an integral over a grid that is fine where the
    density is steep.
    """
    likelihood = make(1).double()
    discrete = isinstance(likelihood, (Bernoulli, DiscretisedLogistic))
    if discrete:
        x = torch.linspace(0, 1, getattr(likelihood, "top", 1) + 1, dtype=torch.float64)
    elif isinstance(likelihood, Gaussian):
        x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    else:
        x = likelihood.unsqueeze(torch.linspace(-9.2, 9.2, 20_001, dtype=torch.float64))
    for _ in range(3):
        output = 0.5 * normals(1, likelihood.outputs(1))
        mass = likelihood.log_prob(x[:, None], output).exp()
        total = mass.sum() if discrete else torch.trapezoid(mass, x)
        assert abs(total - 1) < 1e-4


@pytest.mark.parametrize(
    "name", sorted(LIKELIHOODS.keys() - {"learned"})
)  # whose variances belong to five pixels
def test_pixels_are_independent(name):
    "The log-probability of an image is the sum over its pixels, each with its own outputs."
    likelihood = LIKELIHOODS[name](5)
    output = normals(1, likelihood.outputs(5))
    x = likelihood.sample(output)
    alone = [likelihood.log_prob(x[:, i : i + 1], output[:, i::5]) for i in range(5)]
    assert torch.allclose(likelihood.log_prob(x, output), sum(alone))


@each
def test_shapes_broadcast_over_draws(likelihood):
    likelihood.double()
    output = normals(3, 7, likelihood.outputs(5))
    x = likelihood.sample(output[0])
    value = likelihood.log_prob(x, output)
    assert value.shape == (3, 7)
    assert torch.allclose(value[2, 4], likelihood.log_prob(x[4], output[2, 4]))
    assert likelihood.mean(output).shape == (3, 7, 5)
    with pytest.raises(ValueError, match="outputs"):
        likelihood.log_prob(x, output[..., :-1])


@each
@pytest.mark.parametrize("size", [-1e7, -100.0, 100.0, 1e7])
def test_extremes_in_single_precision(likelihood, size):
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])
    output = torch.full((1, likelihood.float().outputs(5)), size, requires_grad=True)
    value = likelihood.log_prob(x, output).sum()
    (gradient,) = torch.autograd.grad(value, output)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient.isfinite().all()


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.2, 1.01, 255.0])
def test_values_outside_the_support_are_named(likelihood, bad):
    x = torch.zeros(4, 5).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(bad))
    if isinstance(likelihood, Gaussian) and math.isfinite(bad):
        likelihood.check(x)
    else:
        with pytest.raises(ValueError, match="row 2, pixel 3"):
            likelihood.check(x)


def test_logistic_mass_in_the_tails():
    """Two hundred scales from the location, where a difference of sigmoids is zero, against the
    closed form of the tail, log sigma(a) + log(1 - e^-w).
    """
    likelihood = DiscretisedLogistic().double()
    output = torch.tensor([0.3, -1e9], dtype=torch.float64)  # scale e^-7
    x = torch.tensor([25 / 255], dtype=torch.float64)
    s = math.exp(-7)
    a = (x + 1 / 510 - 0.8) / s
    w = 1 / 255 / s
    expected = (a + math.log1p(-math.exp(-w))).sum()
    assert abs(likelihood.log_prob(x, output) - expected) < 1e-9
    assert a < -700


# Networks.


@pytest.mark.parametrize("hidden, functions", [((400,), 1600), ((100,), 400)])
def test_maxout_in_both_readings(hidden, functions):
    network = MLP(20, hidden, 3, activation="maxout", window=4)
    assert network[0].weight.shape == (functions, 20)
    assert network[1].weight.shape == (3, hidden[0])
    x = torch.randn(6, 20)
    first, last = network
    windows = (x @ first.weight.T + first.bias).view(6, 4, hidden[0])
    expected = windows.amax(1) @ last.weight.T + last.bias
    assert torch.allclose(network(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "encoder, decoder",
    [(GatedConvEncoder, GatedConvDecoder), (ResNetEncoder, ResNetDecoder)],
    ids=["gated", "residual"],
)
def test_a_model_of_convolutions(encoder, decoder):
    """Shapes fit, draws of several posteriors at once decode as one by one, every parameter gets
    a gradient; two numbers a pixel come out as two images.
    """
    x = torch.rand(3, 144)
    model = VAE(
        encoder(144, 16, 4),
        decoder(5, 288, 4, per_pixel=2),
        posterior("planar", 5, 2, 16),
        likelihood=LogitNormal(),
    )
    model.check(x)
    z = torch.randn(2, 3, 5)
    together = model.decoder(z)
    alone = model.decoder(z[1:, 2:])
    assert torch.allclose(together[1, 2], alone[0, 0], atol=1e-5)
    free_energy(lambda z: model.log_joint(x, z), model.q(x)).value.backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.abs().max() > 0
    q = posterior("planar", 5, 2, 16)
    wrong = VAE(encoder(144, 16, 4), decoder(5, 144, 4), q, likelihood=LogitNormal())
    with pytest.raises(ValueError, match="decoder"):
        wrong.check(x)


# Known answers.


def principal_components(W, b, sigma, transform, encoder):
    model = VAE(encoder, nn.Linear(*reversed(W.shape)), Flow(transform), likelihood=Gaussian(sigma)).double()
    with torch.no_grad():
        model.decoder.weight.copy_(W)
        model.decoder.bias.copy_(b)
    return model


@pytest.fixture
def components():
    W = torch.randn(7, 3).double()
    b = torch.randn(7).double()
    sigma = 0.6
    marginal = MultivariateNormal(b, W @ W.T + sigma**2 * torch.eye(7).double())
    M = W.T @ W + sigma**2 * torch.eye(3).double()
    return W, b, sigma, M, torch.linalg.solve(M, W.T), marginal, marginal.sample((20,))


def set_shift(head, to_mean, b, log_scale):
    "An amortised `Affine` of the context `x`: mean `to_mean (x - b)`, constant scale."
    with torch.no_grad():
        head.weight.copy_(torch.cat([to_mean, 0 * to_mean]))
        head.bias.copy_(torch.cat([-to_mean @ b, log_scale]))


def test_with_the_exact_posterior_every_weight_is_the_evidence(components):
    "A full covariance: a fixed triangular map of the noise, then an amortised shift."
    W, b, sigma, M, to_mean, marginal, x = components
    L = torch.linalg.cholesky(sigma**2 * M.inverse())
    mix = PLU(3)
    shift = Affine(3, context_dim=7)
    model = principal_components(W, b, sigma, Chain(mix, shift), nn.Identity())
    set_shift(shift.source.linear, to_mean, b, torch.zeros(3).double())
    diagonal = L.diagonal()
    with torch.no_grad():
        mix.order.copy_(torch.arange(3)[None])
        mix.source.bias.zero_()
        mix.source.lu.copy_((L / diagonal).tril(-1) + diagonal.log().diag())
    z, log_q = model.q(x).rsample_and_log_prob((200,))
    log_w = sum(model.log_joint(x, z).values()) - log_q
    assert (log_w - marginal.log_prob(x)).abs().max() < 1e-10


def test_gap_of_the_best_diagonal_posterior(components):
    """log p - ELBO is 1/2 (sum log Lambda_ii - log det Lambda), Lambda the precision of the
    posterior, for every image.
    """
    W, b, sigma, M, to_mean, marginal, x = components
    affine = Affine(3, context_dim=7)
    precision = M / sigma**2
    model = principal_components(W, b, sigma, affine, nn.Identity())
    set_shift(affine.source.linear, to_mean, b, -0.5 * precision.diagonal().log())
    z, log_q = model.q(x).rsample_and_log_prob((5000,))
    log_w = sum(model.log_joint(x, z).values()) - log_q
    gaps = marginal.log_prob(x) - log_w
    exact = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert exact > 0.02
    assert ((gaps.mean(0) - exact).abs() < 4.5 * gaps.std(0) / 5000**0.5).all()


@pytest.mark.parametrize("family, length", [("diagonal", 0), ("planar", 3)])
def test_importance_weights_against_quadrature(family, length):
    encoder = MLP(8, (16,))
    decoder = MLP(2, (16,), 8)
    q = posterior(family, 2, length, 16)
    prior = Flow(RealNVP(2, 2))
    model = VAE(encoder, decoder, q, prior=prior).double()
    transform = model.posterior.transform
    gaussian = transform.transforms[0] if length else transform
    head = gaussian.source.linear
    with torch.no_grad():
        model.decoder[-1].weight.mul_(2)
        head.weight.mul_(0.3)
        head.bias[2:] = 0.3  # images that tell something about z, a posterior with room
        for p in model.prior.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = (torch.rand(4, 8) < 0.5).double()
    line = torch.linspace(-8, 8, 161).double()
    grid = torch.cartesian_prod(line, line)[:, None].expand(-1, 4, -1)
    log_cell = 2 * (line[1] - line[0]).log()
    with torch.no_grad():
        exact = sum(model.log_joint(x, grid).values()).logsumexp(0) + log_cell
        z, log_q = model.q(x).rsample_and_log_prob((20_000,))
        log_w = sum(model.log_joint(x, z).values()) - log_q
    w = (log_w - exact).exp()
    error = w.std(0) / 20_000**0.5
    assert ((w.mean(0) - 1).abs() < 3.5 * error).all()
    assert error.max() < 0.03
    bound = importance_weighted(lambda z: model.log_joint(x, z), model.q(x), samples=50, outer=200)
    assert bound.value < exact.mean() + 3.5 * error.max()
    assert bound.value > bound.terms["elbo"]


@pytest.mark.parametrize("free, counts", [(0.5, False), (50.0, True)])
def test_free_bits(free, counts):
    """Above the free nats nothing changes.

    Below, the gradient is the likelihood's and the true F is still reported.
    """
    model = dlgm(torch.full((9,), 0.3), dim=2, hidden=(6,))
    x = (torch.rand(30, 9) < 0.3).float()
    with torch.no_grad():
        model.posterior.transform.source.linear.bias[:2] = 1.5

    def gradients(**options):
        model.zero_grad()
        F = free_energy(
            lambda z: model.log_joint(x, z),
            model.q(x),
            samples=4,
            anneal="kl",
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        F.value.backward()
        return F, [p.grad.clone() for p in model.parameters()]

    plain, without = gradients()
    F, found = gradients(free_bits=free)
    _, likelihood_only = gradients(beta=0.0)
    kl = F.terms["log_q"] - F.terms["log_prior"]
    assert (kl < free) == counts
    assert torch.allclose(F.terms["free_energy"], plain.value)
    assert torch.allclose(F.value, plain.value + (free - kl) * counts, atol=1e-4)
    for a, b in zip(found, likelihood_only if counts else without, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# Refused before training.


def small(encoder=None, decoder=None, **parts):
    return VAE(encoder or MLP(12, (6,)), decoder or MLP(2, (6,), 12), posterior("planar", 2, 2, 6), **parts)


X = torch.zeros(5, 12)
BAD = {
    "an encoder that does not match the posterior": (
        lambda: small(encoder=MLP(12, (7,))).check(X),
        r"encoder.*\(1, 7\).*expected \(1, 6\)",
    ),
    "an encoder of other images": (lambda: small(encoder=MLP(9, (6,))).check(X), r"encoder.*\(1, 12\)"),
    "a decoder with too few outputs": (
        lambda: small(likelihood=LogitNormal()).check(X),
        "decoder.*expected .*24",
    ),
    "a decoder of other latents": (lambda: small(decoder=MLP(3, (6,), 12)).check(X), r"decoder.*\(2, 1, 2\)"),
    "a network in double precision": (lambda: small().double().check(X), "encoder.*float32"),
    "pixels above 1": (lambda: small().check(X + 2), r"row 0, pixel 0 is 2 .*\[0, 1\]"),
    "pixels below 0": (lambda: small().check(X - 0.5), r"\[0, 1\]"),
    "a data set with nan": (
        lambda: small().check(X.index_fill(0, torch.tensor(4), math.nan)),
        "row 4, pixel 0 is nan",
    ),
    "no images": (lambda: small().check(X[:0]), "shape"),
    "weights that are nan": (
        lambda: small(
            decoder=nn.Linear(2, 12).requires_grad_(False).apply(lambda m: m.weight.fill_(math.nan))
        ).check(X),
        "log_likelihood is .*nan",
    ),
    "a posterior without a context": (
        lambda: VAE(MLP(12, (6,)), MLP(2, (6,), 12), Flow(Affine(2))),
        "posterior.*context",
    ),
    "a prior with a context": (lambda: small(prior=posterior("planar", 2, 2, 6)), "prior.*context"),
    "no draws": (
        lambda: free_energy(lambda z: small().log_joint(X, z), small().q(X), samples=0),
        "samples=0",
    ),
    "no such family": (lambda: dlgm(X[0], "plane", 3), "family='plane'.*planar"),
}


@pytest.mark.parametrize("call, words", BAD.values(), ids=BAD)
def test_refused_before_training(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_check_changes_nothing():
    model = small()
    x = (torch.rand(5, 12) < 0.5).float()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.check(x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for p in model.parameters():
        assert p.grad is None


# Collapse.


def trained(x, anneal, updates=500, rate=1e-3):
    "F on the images `x` of a small model after training under Adam."
    model = dlgm(x.mean(0), "diagonal", dim=10, hidden=(64, 64))
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), rate)
    for t in range(updates):
        batch = x[torch.randint(len(x), (100,), generator=generator)]
        beta = annealing(t, int(0.8 * updates), 0.01 if anneal == "joint" else 0.0)
        adam.zero_grad()
        log_joint = partial(model.log_joint, batch)
        F = free_energy(log_joint, model.q(batch), beta=beta, anneal=anneal, generator=generator)
        F.value.backward()
        adam.step()
    with torch.no_grad():
        return free_energy(lambda z: model.log_joint(x, z), model.q(x), generator=generator).value.item()


def test_joint_annealing_collapses_and_is_caught():
    """Under Adam at 1e-3: with prior and likelihood annealed together the model ends as one that
    ignores its latents, and the check says so; with the divergence alone it does not.
    """
    images = load_data("digits", "static").train.pixels().view(-1, 28, 28)
    x = images[:, 3:27:3, 3:27:3].reshape(-1, 64)  # the digits in their own resolution
    least = independent_pixels_nll(x)
    assert check_uses_latents(trained(x, "kl"), x) < 0.92 * least
    collapsed = trained(x, "joint")
    assert abs(collapsed - least) < 0.01 * least
    with pytest.raises(RuntimeError, match="ignores its latents"):
        check_uses_latents(collapsed, x)
