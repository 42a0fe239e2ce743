"""Simulation-based calibration: it passes what is right, refuses what is wrong, and its false alarms are as
rare as it says.
"""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import (
    Dirichlet,
    Gamma,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
    constraints,
)

from normflow_vi import Flow
from normflow_vi.evaluate import calibration
from normflow_vi.evaluate.calibration import (
    Calibration,
    chance_inside,
    fit_each,
    log_joint,
    pointwise,
    rank,
    sbc,
)
from normflow_vi.transforms import PLU, Affine, Chain

# Conjugate models with exact posteriors, which can be made too narrow or shifted by so many of their
# standard deviations.


class Mean:
    "A Gaussian mean with known variance: prior N(0, 1), ten observations of standard deviation 2."

    prior = Independent(Normal(torch.zeros(1), 1.0), 1)
    sd = (1 + 10 / 4) ** -0.5

    @staticmethod
    def simulate(theta):
        return theta + 2 * torch.randn(len(theta), 10)

    @staticmethod
    def log_likelihood(theta, x):
        return Normal(theta, 2.0).log_prob(x).sum(-1)

    @classmethod
    def posterior(cls, width=1.0, shift=0.0):
        return lambda x: Independent(
            Normal(cls.sd**2 * x.sum(-1, keepdim=True) / 4 + shift * cls.sd, width * cls.sd),
            1,
        )


class Linear:
    "Three unknowns with a correlated prior, seen through four noisy linear measurements."

    A = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    prior = MultivariateNormal(
        torch.tensor([1.0, 0.0, -1.0]),
        torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.3], [0.0, 0.3, 0.5]]),
    )
    precision = torch.linalg.inv(prior.covariance_matrix)
    covariance = torch.linalg.inv(precision + A.T @ A / 0.25)

    @classmethod
    def simulate(cls, theta):
        return theta @ cls.A.T + 0.5 * torch.randn(len(theta), 4)

    @classmethod
    def log_likelihood(cls, theta, x):
        return Normal(theta @ cls.A.T, 0.5).log_prob(x).sum(-1)

    @classmethod
    def posterior(cls, width=1.0, shift=0.0):
        sd = cls.covariance.diag().sqrt()
        return lambda x: MultivariateNormal(
            (cls.precision @ cls.prior.mean + x @ cls.A / 0.25) @ cls.covariance + shift * sd,
            width**2 * cls.covariance,
        )


both = pytest.mark.parametrize("model", [Mean, Linear])
sizes = pytest.mark.parametrize("simulations", [200, pytest.param(1000, marks=pytest.mark.full)])


def refused(model, seeds, simulations=200, **fault):
    return sum(
        not sbc(
            model.prior,
            model.simulate,
            model.posterior(**fault),
            simulations=simulations,
            seed=seed,
        ).passed
        for seed in seeds
    )


@both
@sizes
def test_an_exact_posterior_passes(model, simulations):
    found = sbc(
        model.prior,
        model.simulate,
        model.posterior(),
        simulations=simulations,
        quantities={"log-likelihood": model.log_likelihood},
    )
    assert found.passed
    assert found.ranks.shape == (simulations, len(found.names))
    assert "passed" in found.summary()
    tests = len(found.names)
    assert tests * found.p_values["chi-square"].min() > 1e-3
    assert tests * found.p_values["ECDF"].min() > 1e-3
    for counts in found.counts.T:  # the picture agrees with the p-value
        below = counts.cumsum(0)[:-1]
        low, high = calibration.band(simulations, 99, 1 - 1e-3 / tests)
        assert (low <= below).all()
        assert (below <= high).all()


@pytest.mark.parametrize(
    "model, simulations",
    [
        (Linear, 200),
        *[pytest.param(model, 1000, marks=pytest.mark.full) for model in (Linear, Mean)],
    ],
)
def test_a_posterior_that_is_too_narrow_fails(model, simulations):
    found = sbc(model.prior, model.simulate, model.posterior(width=0.8), simulations=simulations)
    assert not found.passed
    assert "FAILED" in found.summary()
    assert "over-confident" in found.words["distance"]
    assert found.p_value <= 2 * found.width[1] < 1e-3


@both
@sizes
def test_a_shifted_posterior_fails(model, simulations):
    for shift, word in ((0.5, "too high"), (-0.5, "too low")):
        found = sbc(
            model.prior,
            model.simulate,
            model.posterior(shift=shift),
            simulations=simulations,
        )
        assert not found.passed
        assert any(word in text for text in found.words.values())
        assert word in found.summary()


def test_a_posterior_that_is_too_wide_fails():
    found = sbc(Linear.prior, Linear.simulate, Linear.posterior(width=1.4))
    assert not found.passed
    assert "under-confident" in found.words["distance"]
    assert "hump" in found.summary()


def test_the_measured_fault_is_the_fault():
    """Over 1,000 simulations the words' numbers are near the truth: distances 1 / 0.8 times as far out, a
    shift of half a standard deviation.
    """
    narrow = sbc(Mean.prior, Mean.simulate, Mean.posterior(width=0.8), simulations=1000)
    ratio = float(narrow.words["distance"].split("about ")[1].split()[0])
    assert abs(ratio - 1.25) < 0.1
    shifted = sbc(Mean.prior, Mean.simulate, Mean.posterior(shift=0.5), simulations=1000)
    assert abs(float(shifted.words["theta[0]"].split("about ")[1].split()[0]) - 0.5) < 0.1


@pytest.mark.parametrize("seeds", [40, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "model, simulations, least",
    [(Linear, 200, 0.95), (Mean, 300, 0.9), (Mean, 200, 0.75)],
    ids=["D=3", "D=1, N=300", "D=1"],
)
def test_power(model, simulations, least, seeds):
    """Of posteriors too narrow by a fifth at least so many are refused.

    For D = 1 and N = 200 no test can reach more than 0.93.
    """
    found = refused(model, range(seeds), simulations, width=0.8)
    assert found >= seeds * least - 2 * math.sqrt(seeds * least * (1 - least))


@pytest.mark.parametrize("seeds", [60, pytest.param(2000, marks=pytest.mark.full)])
@both
def test_false_alarms(model, seeds):
    "At most `alpha` = 0.001 of correct posteriors are refused; 0.1 of them where 0.1 is asked for."
    found = [sbc(model.prior, model.simulate, model.posterior(), seed=seed).p_value for seed in range(seeds)]
    for alpha in (1e-3, 0.1):
        assert sum(p <= alpha for p in found) <= alpha * seeds + 4 * math.sqrt(alpha * (1 - alpha) * seeds), (
            alpha
        )


@pytest.mark.full
@pytest.mark.parametrize("simulations, draws", [(50, 9), (200, 99), (1000, 199)])
def test_the_p_values_are_those_of_uniform_ranks(simulations, draws):
    """Over 4,000 sets of uniform ranks no test rejects more often than it says, but for the approximation
    of chi-square in its tail.
    """
    ranks = torch.randint(draws + 1, (simulations, 4000))
    found = Calibration(ranks, ranks[:, 0], draws, tuple(range(4000)), 1)
    for name, p in found.p_values.items():
        for level in (0.1, 0.01):
            assert (p < level).double().mean() < 1.2 * level + 4 * math.sqrt(level / 4000), name


def test_a_wrong_correlation_is_seen_by_the_log_likelihood_only():
    """Right margins, no correlation: the ranks of the coordinates are uniform, those of a function of data
    and coordinates are not.
    """

    def margins(x):
        return Independent(Normal(Linear.posterior()(x).mean, Linear.covariance.diag().sqrt()), 1)

    found = sbc(
        Linear.prior,
        Linear.simulate,
        margins,
        quantities={"log-likelihood": Linear.log_likelihood},
        simulations=400,
    )
    assert not found.passed
    assert found.words["log-likelihood"]
    assert not any(found.words[f"theta[{i}]"] for i in range(3))


def test_the_ecdf_test_is_exact():
    "The chance to stay in a corridor against the sum over all ways in which 4 ranks can fall on 0..9."
    ranks = torch.cartesian_prod(*[torch.arange(10)] * 4)
    below = torch.stack([(ranks < i).sum(1) for i in range(1, 10)], 1)
    least = pointwise(4, 9)[torch.arange(9), below].min(1).values
    for gamma in (0.01, 0.1, 0.3, *least.unique()[:5].tolist()):
        assert abs(chance_inside(4, 9, gamma) - (least > gamma).double().mean()) < 1e-12


def test_the_band_agrees_with_simulation():
    low, high = calibration.band(200, 99, 0.95)
    ranks = torch.randint(100, (4000, 200))
    counts = (
        torch.zeros(4000, 100, dtype=torch.long)
        .scatter_add_(1, ranks, torch.ones_like(ranks))
        .cumsum(1)[:, :-1]
    )
    inside = ((low <= counts) & (counts <= high)).all(1).double().mean()
    assert 0.95 - 4 * math.sqrt(0.05 * 0.95 / 4000) < inside < 0.96 + 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_chi_square_against_scipy():
    counts = torch.randint(1, 20, (20, 5))
    expected = torch.tensor([stats.chisquare(c).pvalue for c in counts.T.numpy()])
    assert torch.allclose(calibration.chi_square(counts), expected)


def test_ties_are_broken_at_random():
    "A test quantity of two values has uniform ranks all the same."
    found = sbc(
        Mean.prior,
        Mean.simulate,
        Mean.posterior(),
        quantities={"sign": lambda theta, x: (theta[:, 0] > 0).float()},
        simulations=1000,
    )
    assert found.passed
    assert (
        calibration.chi_square(rank(torch.zeros(4000), torch.zeros(9, 4000)).bincount(minlength=10)) > 1e-4
    )  # nothing but ties


def test_a_quantity_is_given_its_own_data():
    "Where data equal the truth, the truth is nearer to them than any draw."
    found = sbc(
        Mean.prior,
        lambda theta: theta.clone(),
        lambda x: Independent(Normal(x, 1.0), 1),
        quantities={"near": lambda theta, x: -(theta - x).abs().sum(-1)},
    )
    assert (found.ranks[:, 1] == 99).all()


def test_the_seed_decides_and_the_global_stream_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (sbc(Mean.prior, Mean.simulate, Mean.posterior(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.ranks, again.ranks)
    assert torch.equal(first.distance, again.distance)
    assert not torch.equal(first.ranks, other.ranks)
    assert torch.equal(before, torch.get_rng_state())


def test_an_amortised_flow_is_a_posterior():
    "An affine flow of a context, with the weights of the exact posterior."
    flow = Flow(Affine(1, context_dim=10))
    with torch.no_grad():
        head = flow.transform.source.linear
        shift, log_scale = head.weight
        shift.fill_(Mean.sd**2 / 4)
        log_scale.zero_()
        head.bias.copy_(torch.tensor([0.0, math.log(Mean.sd)]))
        found = flow(torch.ones(3, 10)).sample((4000,)).std(0)
        expected = torch.full((3, 1), Mean.sd)
        assert torch.allclose(found, expected, rtol=0.06)
        assert sbc(Mean.prior, Mean.simulate, flow).passed
        head.bias[1] += math.log(0.7)
        assert not sbc(Mean.prior, Mean.simulate, flow).passed


# Fitted flows


@sizes
def test_flows_fitted_to_each_data_set_pass(simulations):
    found = sbc(
        Linear.prior,
        Linear.simulate,
        fit_each(
            Linear.prior,
            Linear.log_likelihood,
            lambda: Flow(Chain(PLU(3), Affine(3))),
            steps=300,
        ),
        quantities={"log-likelihood": Linear.log_likelihood},
        simulations=simulations,
    )
    assert found.passed, found.summary()


def test_mean_field_fits_fail():
    found = sbc(
        Linear.prior,
        Linear.simulate,
        fit_each(Linear.prior, Linear.log_likelihood, lambda: Flow(Affine(3)), steps=200),
    )
    assert not found.passed
    assert "over-confident" in found.words["distance"]


def test_a_fit_that_ends_too_early_fails():
    assert not sbc(
        Linear.prior,
        Linear.simulate,
        fit_each(
            Linear.prior,
            Linear.log_likelihood,
            lambda: Flow(Chain(PLU(3), Affine(3))),
            steps=5,
        ),
    ).passed


def test_each_fit_is_that_of_its_own_data():
    "Means of the fitted flows are those of the exact posteriors, data set by data set, in units far from 1."
    prior = Independent(Normal(torch.tensor([1000.0, 0.0]), torch.tensor([50.0, 1e-3])), 1)
    scale = torch.tensor([50.0, 1e-3])

    def likelihood(theta, x):
        return Normal(theta, scale).log_prob(x).sum(-1)

    x = prior.sample((60,))
    fitted = fit_each(prior, likelihood, lambda: Flow(Affine(2)), steps=200)(x)
    z = fitted.sample((4000,))
    exact = (prior.mean + x) / 2
    assert z.shape == (4000, 60, 2)
    assert ((z.mean(0) - exact).abs() / scale).max() < 0.1
    assert (z.std(0) / scale / 0.5**0.5 - 1).abs().max() < 0.1


def test_a_support_is_kept():
    """Poisson counts with a Gamma rate: flows on the positive numbers, integer data, a prior that checks
    its arguments before and after.
    """
    prior = Independent(
        Gamma(torch.tensor([3.0]), torch.tensor([1.0]), validate_args=True),
        1,
        validate_args=True,
    )

    def simulate(theta):
        return torch.poisson(theta.expand(-1, 4)).long()

    def likelihood(theta, x):
        return Poisson(theta).log_prob(x).sum(-1)

    def make_flow():
        return Flow(Affine(1), support=constraints.positive)

    assert sbc(
        prior,
        simulate,
        lambda x: Independent(Gamma(3.0 + x.sum(-1, keepdim=True), torch.tensor([5.0])), 1),
    ).passed
    found = sbc(prior, simulate, fit_each(prior, likelihood, make_flow, steps=300))
    assert found.p_values["slope"].min() > 1e-6  # a log-normal is near this posterior, not equal to it
    with pytest.raises(ValueError):
        prior.log_prob(torch.tensor([-1.0]))
    assert (
        fit_each(prior, likelihood, make_flow, steps=20)(simulate(prior.sample((5,)))).sample((9,)) > 0
    ).all()


def test_log_joint_is_the_posterior_but_for_a_constant():
    theta = Linear.prior.sample((50,))
    x = Linear.simulate(theta)
    difference = log_joint(Linear.prior, Linear.log_likelihood, x[0])(theta) - Linear.posterior()(
        x[0]
    ).log_prob(theta)
    assert difference.std() < 1e-4


# Errors


GOOD = dict(prior=Mean.prior, simulate=Mean.simulate, posterior=Mean.posterior())
BAD = {
    "no distribution": (TypeError, "prior", dict(prior=torch.randn)),
    "no event": (ValueError, "event shape", dict(prior=Normal(torch.zeros(1), 1.0))),
    "batch of priors": (
        ValueError,
        "event shape",
        dict(prior=Dirichlet(torch.ones(3, 2))),
    ),
    "wrong batch": (
        ValueError,
        "simulate: x has shape (7, 10)",
        dict(simulate=lambda theta: Mean.simulate(theta)[:7]),
    ),
    "no tensor": (TypeError, "simulate", dict(simulate=lambda theta: theta.tolist())),
    "nan data": (
        ValueError,
        "simulate: x: not finite in 200 of 200",
        dict(simulate=lambda theta: Mean.simulate(theta) * math.nan),
    ),
    "wrong event": (
        ValueError,
        "(99, 200, 1)",
        dict(posterior=lambda x: Independent(Normal(torch.zeros(200, 2), 1.0), 1)),
    ),
    "no batch": (ValueError, "(99, 200, 1)", dict(posterior=lambda x: Mean.prior)),
    "draws": (TypeError, "posterior", dict(posterior=lambda x: x)),
    "infinite draws": (
        ValueError,
        "posterior: draws: not finite",
        dict(
            posterior=lambda x: Independent(
                Normal(torch.zeros(200, 1) + math.inf, 1.0, validate_args=False), 1
            )
        ),
    ),
    "few simulations": (ValueError, "simulations=49", dict(simulations=49)),
    "few draws": (ValueError, "draws=5", dict(draws=5)),
    "indivisible": (
        ValueError,
        "draws=100: draws + 1 must be a multiple of 10, so that bins hold equally many ranks; 99 will do",
        dict(draws=100),
    ),
    "alpha": (ValueError, "alpha", dict(alpha=0.0)),
    "quantity": (
        ValueError,
        "quantities: f",
        dict(quantities={"f": lambda theta, x: theta}),
    ),
    "nan quantity": (
        ValueError,
        "quantities: f",
        dict(quantities={"f": lambda theta, x: theta[:, 0] * math.nan}),
    ),
    "context": (
        ValueError,
        "make_flow",
        dict(posterior=fit_each(Mean.prior, Mean.log_likelihood, lambda: Flow(Affine(1, context_dim=2)))),
    ),
    "flow of another size": (
        ValueError,
        "make_flow",
        dict(posterior=fit_each(Mean.prior, Mean.log_likelihood, lambda: Flow(Affine(2)))),
    ),
    "no flow": (
        TypeError,
        "make_flow",
        dict(posterior=fit_each(Mean.prior, Mean.log_likelihood, lambda: Affine(1))),
    ),
    "likelihood": (
        ValueError,
        "log_likelihood",
        dict(posterior=fit_each(Mean.prior, lambda theta, x: theta, lambda: Flow(Affine(1)))),
    ),
    "nan likelihood": (
        FloatingPointError,
        "step 0",
        dict(
            posterior=fit_each(
                Mean.prior,
                lambda theta, x: Mean.log_likelihood(theta, x) * math.nan,
                lambda: Flow(Affine(1)),
            )
        ),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_error(case):
    error, words, change = BAD[case]
    with pytest.raises(error) as caught:
        sbc(**GOOD | change)
    assert words in str(caught.value)
