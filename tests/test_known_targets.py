"""Targets known exactly: densities, normalisers, draws, modes and shares, each against something else."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from normflow_vi import Flow, fit
from normflow_vi.targets import KNOWN, KnownTarget
from normflow_vi.targets.known import (
    banana,
    correlated_normal,
    energy,
    funnel,
    gmm40,
    many_well,
    ring,
    rosenbrock_gaussian,
    schools_posterior,
    separable_logistic,
    skewed,
    student_t,
    tabulate,
    two_modes,
)
from normflow_vi.transforms import Affine

N = 20_000


def draws(target, n=N, seed=0):
    return target.sample(n, torch.Generator().manual_seed(seed)).double()


def off(values, expected):
    "How many standard errors the mean of values is away from what is expected."
    return float((values.mean() - expected).abs() / (values.std() / len(values) ** 0.5))


FORMULAS = {
    "normal": (
        correlated_normal(3, 0.5),
        stats.multivariate_normal(np.zeros(3), 0.5 * np.eye(3) + 0.5).logpdf,
    ),
    "t": (student_t(4, 3), stats.multivariate_t(np.zeros(4), np.eye(4), df=3).logpdf),
    "skewed": (skewed(2, 3), lambda z: stats.loggamma(3).logpdf(z).sum(1)),
    "banana": (
        banana(3, 0.5),
        lambda z: (
            stats.norm.logpdf(z[:, 0])
            + stats.norm.logpdf(z[:, 1], 0.5 * (z[:, 0] ** 2 - 1))
            + stats.norm.logpdf(z[:, 2])
        ),
    ),
    "funnel": (
        funnel(4, 3.0, 0.5),
        lambda z: (
            stats.norm.logpdf(z[:, 0], scale=3)
            + stats.norm.logpdf(z[:, 1:], scale=np.exp(z[:, :1] / 2)).sum(1)
        ),
    ),
    "two modes": (
        two_modes(2, 4.0, 0.25),
        lambda z: np.log(
            0.25 * stats.multivariate_normal([2, 0]).pdf(z) + 0.75 * stats.multivariate_normal([-2, 0]).pdf(z)
        ),
    ),
    "Rosenbrock": (
        rosenbrock_gaussian(),
        lambda z: (
            -((z[:, 0] ** 2 - z[:, 1]) ** 2)
            - (z[:, 0] - 1) ** 2 / 100
            - (z[:, 2] ** 2 - z[:, 3]) ** 2
            - (z[:, 2] - 1) ** 2 / 100
            - (z[:, 4] ** 2 + z[:, 5] ** 2) / 2
            + stats.norm.logpdf(z, scale=3).sum(1)
        ),
    ),
    "wells": (
        many_well(4),
        lambda z: sum(0.5 * x + 6 * x**2 - x**4 - 0.5 * y**2 for x, y in (z.T[:2], z.T[2:])),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_densities_are_their_formulas(name):
    target, formula = FORMULAS[name]
    z = 2 * np.random.default_rng(0).standard_normal((200, target.dim))
    assert np.allclose(target(torch.from_numpy(z)).numpy(), formula(z), rtol=1e-9, atol=1e-9)


def test_normalisers():
    "Of those that are not normalised, against adaptive quadrature; the evidence of the plane in polar form."
    pair = integrate.quad(lambda x: math.exp(0.5 * x + 6 * x * x - x**4), -6, 6)[0]
    assert many_well(6).log_z == pytest.approx(3 * math.log(pair * math.sqrt(2 * math.pi)), abs=1e-9)
    assert many_well(32).log_z == pytest.approx(164.69568, abs=1e-5)
    logistic = separable_logistic()

    def along(t):
        r = np.linspace(0, 60, 6001)
        z = torch.from_numpy(np.stack([r * math.cos(t), r * math.sin(t)], 1))
        return np.trapezoid(r * np.exp(logistic(z).numpy()), r)

    angles = np.linspace(0, 2 * math.pi, 721)[:-1]
    assert math.log(np.mean([along(t) for t in angles]) * 2 * math.pi) == pytest.approx(
        logistic.log_z, abs=1e-5
    )


MOMENTS = {
    "product of correlated coordinates": (correlated_normal(5, 0.9), lambda z: z[:, 0] * z[:, 4], 0.9),
    "second moment of t": (student_t(3, 12), lambda z: z[:, 0] ** 2, 12 / 10),
    "mean of a log-gamma": (skewed(2, 1), lambda z: z.mean(1), -np.euler_gamma),
    "banana": (banana(2, 1.0), lambda z: z[:, 1] ** 2, 3.0),
    "neck of a funnel": (funnel(10), lambda z: z[:, 0] ** 2, 9.0),
    "scale in a funnel": (funnel(3, 1.0), lambda z: (z[:, 2] * (-0.5 * z[:, 0]).exp()) ** 2, 1.0),
    "Gaussian of six": (rosenbrock_gaussian(), lambda z: z[:, 5] ** 2, 0.9),
    "share of a mode": (two_modes(20), lambda z: (z[:, 0] > 0).double(), 0.3),
    "mixture": (gmm40(), lambda z: z[:, 0], gmm40().modes[:, 0].double().mean()),
    "common scale of the schools": (schools_posterior(), lambda z: z[:, 1], 0.8021),
    "one effect of the schools": (schools_posterior(), lambda z: z[:, 2] - z[:, 0], 1.8151),
    "ring": (ring(3.0, 0.25), lambda z: z.square().sum(1), 9 + 2 * 0.0625),
    "log-density of wells": (many_well(32), lambda z: many_well(32)(z) - 164.6956753, -27.4972171),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_draws_have_the_moments(name):
    target, g, expected = MOMENTS[name]
    assert off(g(draws(target)), expected) < 4


@pytest.mark.parametrize("name", ["U1", "U2", "U3", "U4", "Rosenbrock-Gaussian", "logistic"])
def test_draws_in_the_plane_are_those_of_a_grid(name):
    "A mean over exact draws against a sum over a grid of the first two coordinates, the others at zero."
    target = KNOWN[name]()
    axis = torch.linspace(-30, 40, 1401, dtype=torch.float64) if target.name == "logistic" else None
    axis = torch.linspace(-9, 20, 1161, dtype=torch.float64) if axis is None else axis
    plane = torch.cartesian_prod(axis, axis)
    z = torch.cat([plane, plane.new_zeros(len(plane), target.dim - 2)], 1)
    weight = target(z).softmax(0)
    for g in (lambda z: z[:, 0], lambda z: z[:, 1], lambda z: (z[:, 0] * z[:, 1]).tanh()):
        assert off(g(draws(target)), weight @ g(plane)) < 4


@pytest.mark.parametrize("name", [name for name, make in KNOWN.items() if make().modes is not None])
def test_shares_of_modes(name):
    target = KNOWN[name]()
    if len(target.modes) > 100:
        assert abs(target.mode_shares.sum() - 1) < 1e-4
        return
    n = 100_000
    shares = target.shares(draws(target, n))
    assert shares.shape == target.mode_shares.shape == (len(target.modes),)
    assert ((shares - target.mode_shares).abs() < 4.5 * (target.mode_shares / n).sqrt()).all()
    assert ((shares.roll(1) - target.mode_shares).abs() > 1e-3).any() or target.mode_shares.std() < 1e-6


def test_modes_and_shares_of_mixtures():
    "The means of the forty are torch's first numbers; of two that overlap, each takes from the other."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        means = (torch.rand(40, 2) - 0.5) * 80
    assert torch.allclose(gmm40().modes, means, atol=1e-5)
    beyond = stats.norm.sf(1.5)
    exact = 0.3 * (1 - beyond) + 0.7 * beyond
    assert two_modes(2, 3.0, 0.3).mode_shares[0].item() == pytest.approx(exact, abs=1e-6)


def test_a_table_of_wells_is_the_product():
    one, three = many_well(2), many_well(6)
    assert three.modes.shape == (8, 6)
    left = integrate.quad(lambda x: math.exp(0.5 * x + 6 * x * x - x**4), -6, 0.02)[0]
    both = integrate.quad(lambda x: math.exp(0.5 * x + 6 * x * x - x**4), -6, 6)[0]
    assert one.mode_shares[0].item() == pytest.approx(left / both, abs=2e-6)
    assert three.mode_shares[0].item() == pytest.approx((left / both) ** 3, abs=2e-6)
    assert (three.modes[0, ::2] < 0).all() and (three.modes[-1, ::2] > 0).all()


def test_draws_come_from_the_generator_and_in_the_default_precision():
    for name, make in KNOWN.items():
        target = make()
        if target.sampler is None:
            continue
        state = torch.get_rng_state()
        some, same = target.sample(5, torch.Generator().manual_seed(3)), draws(target, 5, 3)
        assert some.dtype == torch.float32, name
        assert torch.equal(some, same.float()), name
        assert torch.equal(torch.get_rng_state(), state), name
        assert not torch.equal(some, draws(target, 5, 4).float()), name


def test_a_fit_uses_the_normaliser_unless_it_is_hidden():
    target = correlated_normal(2, 0.0)
    options = {"steps": 20, "evaluation_draws": 100}
    assert fit(Flow(Affine(2)), target, **options).kl is not None
    assert fit(Flow(Affine(2)), target.hidden, **options).kl is None
    schools = KNOWN["eight schools"]()
    assert not hasattr(schools.hidden, "log_z")
    assert schools.log_z == pytest.approx(-31.3113474)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: correlated_normal(3, 1.0), "rho=1.0"),
        (lambda: correlated_normal(0, 0.5), "dim=0"),
        (lambda: student_t(3, 0), "df=0"),
        (lambda: skewed(3, 1.5), "shape=1.5"),
        (lambda: banana(1), "dim=1"),
        (lambda: funnel(1), "dim=1"),
        (lambda: funnel(3, 0.0), "sd=0.0"),
        (lambda: two_modes(2, -1.0), "distance=-1.0"),
        (lambda: two_modes(2, 3.0, 1.0), "share=1.0"),
        (lambda: many_well(5), "dim=5"),
        (lambda: many_well(34), "dim=34"),
        (lambda: energy("U5"), "name='U5'"),
        (lambda: separable_logistic(0.0), "prior_sd=0.0"),
        (lambda: gmm40().sample(0), "n=0"),
        (lambda: KnownTarget("bare", 2, abs).sample(3), "bare has no exact draws"),
        (lambda: ring().shares(torch.zeros(2, 2)), "ring has no list of modes"),
        (lambda: gmm40()(torch.zeros(3, 3)), "dim=2"),
    ],
)
def test_what_does_not_fit_is_named(make, said):
    with pytest.raises(ValueError, match=said.replace("'", ".")):
        make()


def test_draws_from_a_table_follow_the_distribution_function():
    _, draw = tabulate(lambda x: -x.abs(), -40.0, 40.0)
    x = draw(N, torch.Generator().manual_seed(0)).flatten().numpy()
    assert stats.kstest(x, stats.laplace.cdf).pvalue > 1e-3
    assert isinstance(KNOWN["ring"](), KnownTarget)
