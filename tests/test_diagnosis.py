"What importance weights say, against exact answers, scipy and recorded values of another implementation."

import math

import numpy as np
import pytest
import torch
from scipy.stats import genpareto, norm

from normflow_vi.evaluate.diagnosis import (
    effective_sample_size,
    generalised_pareto,
    k_hat,
    k_threshold,
    log_mean_weight,
    moment_shifts,
    moments,
    pareto_smoothed,
    resample,
    tail_of,
)


def excesses(k, n, seed, sigma=1.0):
    return torch.from_numpy(genpareto.rvs(k, scale=sigma, size=n, random_state=seed)).sort().values


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("n", [200, 2000])
def test_the_shape_of_a_generalised_pareto_distribution_is_found(k, n):
    runs = 40
    found = torch.tensor(
        [generalised_pareto(excesses(k, n, seed, 3.0)) for seed in range(runs)],
        dtype=torch.float64,
    )
    expected = (n * k + 5) / (n + 10)
    error = n / (n + 10) * (1 + k) / math.sqrt(n)
    assert (
        abs(found[:, 0].mean() - expected) < 4 * error / math.sqrt(runs) + 1 / n
    )  # the estimate's own bias is of order 1/n
    assert 0.7 < found[:, 0].std() / error < 1.5
    assert abs(found[:, 1].mean() / 3 - 1) < 0.06


@pytest.mark.parametrize("k", [-0.2, 0.2, 0.6, 1.2])
def test_it_is_as_likely_as_scipys_maximum(k):
    x = excesses(k, 3000, 1)
    found, sigma = generalised_pareto(x)
    shape, _, scale = genpareto.fit(x.numpy(), floc=0)
    best, ours = (
        genpareto.logpdf(x.numpy(), *parameters).sum()
        for parameters in ((shape, 0, scale), (found, 0, sigma))
    )
    assert best - ours < 0.5
    assert abs(found - shape) < 0.02


RECORDED = {
    (25, 0.1): 0.32210502585,
    (25, 1.0): 0.45015482118,
    (25, 3.0): 0.73381278759,
    (100, 0.1): 0.10251615106,
    (100, 1.0): 0.36814005580,
    (100, 3.0): 0.96518859085,
    (1000, 0.1): -0.03557347267,
    (1000, 1.0): 0.29075302448,
    (1000, 3.0): 1.05241997366,
    (10_000, 0.1): -0.05261880330,
    (10_000, 1.0): 0.25017223837,
    (10_000, 3.0): 0.95199804949,
}
LARGEST = {
    (25, 1.0): -1.6127863253,
    (1000, 1.0): -4.1179595582,
    (1000, 3.0): -1.1882810330,
    (10_000, 3.0): -1.9391838714,
}


@pytest.mark.parametrize("S, sd", RECORDED)
def test_recorded_values(S, sd):
    """Lognormal weights at the quantiles of a normal: k-hat and the largest normalised log-weight, as ArviZ
    0.23.4 gives them.
    """
    smoothed, k = pareto_smoothed(torch.from_numpy(sd * norm.ppf((np.arange(S) + 0.5) / S)))
    assert abs(k - RECORDED[S, sd]) < 1e-9
    if (S, sd) in LARGEST:
        assert abs(smoothed.log_softmax(0).max() - LARGEST[S, sd]) < 1e-9


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8, 0.95])
def test_a_gaussian_proposal_too_narrow_for_its_target(ratio):
    "`k = 1 - (s_q / s_p)^2`."
    found = torch.tensor([k_hat(0.5 * row**2 * (1 - ratio**2)) for row in normal(10, 50_000)])
    assert abs(found.mean() - (1 - ratio**2)) < 0.07 + 4 * found.std() / math.sqrt(10)
    wide = k_hat(-0.5 * normal(50_000) ** 2)  # too wide: bounded weights
    assert wide < 0


def test_the_smoothed_tail_is_the_fitted_distribution():
    log_w = 0.8 * normal(3000, seed=1)
    cutoff, tail = tail_of(log_w)
    smoothed, k = pareto_smoothed(log_w)
    n = len(tail)
    assert n == math.ceil(3 * math.sqrt(3000))
    assert set(tail.tolist()) == set(log_w.topk(n).indices.tolist())
    _, sigma = generalised_pareto(log_w[tail].exp() - cutoff.exp())
    expected = cutoff.exp().item() + genpareto.ppf((np.arange(n) + 0.5) / n, k, scale=sigma)
    assert torch.allclose(
        smoothed[tail],
        torch.from_numpy(expected).log().clamp(max=log_w.max()),
        atol=1e-9,
    )
    rest = torch.ones(3000, dtype=bool).index_fill(0, tail, False)
    assert torch.equal(smoothed[rest], log_w[rest])
    assert torch.equal(smoothed.argsort(), log_w.argsort())
    assert smoothed.max() <= log_w.max()


def test_scale_order_and_precision_of_the_weights_do_not_matter():
    log_w = 1.5 * normal(2000)
    order = torch.randperm(2000)
    smoothed, k = pareto_smoothed(log_w)
    moved, same = pareto_smoothed(log_w[order] + 5000.0)
    assert abs(same - k) < 1e-6
    assert torch.allclose(moved, smoothed[order] + 5000.0, atol=1e-6)
    single, near = pareto_smoothed(log_w.float())
    assert single.dtype == torch.float64
    assert abs(near - k) < 1e-3
    assert not pareto_smoothed(log_w.requires_grad_())[0].requires_grad


@pytest.mark.parametrize(
    "log_w, expected",
    [
        (torch.zeros(1000), -math.inf),
        (torch.full((1000,), -1e30), -math.inf),
        (torch.randn(1000).sign(), -math.inf),  # no weight above the rest
        (torch.zeros(1), math.inf),
        (torch.zeros(20), math.inf),
        (torch.randn(20), math.inf),  # too few draws
        (torch.cat([torch.zeros(1), torch.full((999,), -math.inf)]), math.inf),
        (torch.cat([torch.zeros(4), torch.full((996,), -1000.0)]), math.inf),
        (torch.cat([torch.full((4,), 1e-5), torch.zeros(996)]), -math.inf),
    ],
)
def test_what_cannot_be_fitted_has_a_defined_answer(log_w, expected):
    smoothed, k = pareto_smoothed(log_w)
    assert k == expected
    assert torch.equal(smoothed, log_w.double())


@pytest.mark.parametrize(
    "log_w",
    [
        torch.randn(1000) * 1e-7,
        torch.randn(1000) * 1e5,
        torch.randn(21),
        torch.randn(1000).round(),
        torch.randn(1000) * 1000 + 1e8,
        torch.where(torch.rand(1000) < 0.5, torch.randn(1000), -math.inf),
        torch.where(torch.rand(1000) < 0.95, -math.inf, torch.randn(1000)),
    ],
)
def test_odd_weights_give_finite_answers(log_w):
    smoothed, k = pareto_smoothed(log_w)
    assert not math.isnan(k)
    assert not smoothed.isnan().any()
    assert torch.equal(smoothed == -math.inf, log_w == -math.inf)
    assert smoothed.max() <= log_w.double().max() + 1e-9
    assert 1 <= effective_sample_size(log_w) + 1e-9
    assert effective_sample_size(log_w) <= len(log_w) + 1e-6


@pytest.mark.parametrize(
    "log_w, error, word",
    [
        (torch.tensor([0.0, math.nan]), ValueError, "1 of 2"),
        (torch.tensor([math.inf, 0.0, math.nan]), ValueError, "2 of 3"),
        (torch.full((3,), -math.inf), ValueError, "all 3"),
        (torch.zeros(0), ValueError, r"\(0,\)"),
        (torch.zeros(2, 2), ValueError, r"\(2, 2\)"),
        (torch.zeros(()), ValueError, "shape"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "int64"),
        ([0.0], TypeError, "list"),
    ],
)
@pytest.mark.parametrize("function", [k_hat, effective_sample_size, log_mean_weight, resample])
def test_bad_weights_are_named(log_w, error, word, function):
    with pytest.raises(error, match=f"log_w.*{word}"):
        function(log_w)


def test_threshold():
    assert [round(k_threshold(S), 4) for S in (10, 100, 1000, 2000, 2200, 10**6)] == [
        0.0,
        0.5,
        0.6667,
        0.6971,
        0.7,
        0.7,
    ]
    assert k_threshold(1) == -math.inf


def test_lognormal_weights():
    "For `log w ~ N(-s^2/2, s^2)`: mean 1, and `ESS / S` tends to `exp(-s^2)`."
    s = 0.7
    S = 400_000
    log_w = s * normal(S) - s * s / 2
    evidence = log_mean_weight(log_w)
    assert abs(evidence.value) < 4 * evidence.std_error
    assert abs(evidence.std_error / (math.sqrt(math.expm1(s * s)) / math.sqrt(S)) - 1) < 0.05
    assert abs(effective_sample_size(log_w) / S / math.exp(-s * s) - 1) < 0.02
    assert abs(log_mean_weight(log_w - 1e4).value + 1e4 - evidence.value) < 1e-6
    assert log_mean_weight(log_w[:1]).std_error.isnan()


def scores(runs=300, S=1000):
    "(estimate - truth) / error of moments and of their shifts, for q = N(0, 1), p = N(.4, .9^2)."
    found = []
    for z in normal(runs, S, 1):
        log_w = (0.5 * z**2 - 0.5 * ((z - 0.4) / 0.9) ** 2)[:, 0]
        m = moments(z, log_w)
        d = moment_shifts(z, log_w)
        found.append(
            [
                (m.mean - 0.4) / m.mean_error,
                (m.sd - 0.9) / m.sd_error,
                (d.mean - 0.4) / d.mean_error,
                (d.sd + 0.1) / d.sd_error,
            ]
        )
    return torch.tensor(found)


def test_moments_and_their_errors():
    found = scores()
    assert (found.mean(0).abs() < 0.35).all()
    assert ((found.std(0) - 1).abs() < 0.2).all()


def test_moments_of_q_alone():
    z = normal(5000, 2)
    m = moments(z)
    assert torch.allclose(m.mean, z.mean(0))
    assert torch.allclose(m.sd, z.std(0, unbiased=False))
    assert torch.allclose(m.mean_error, z.std(0) / math.sqrt(5000), rtol=1e-3)
    assert ((m.sd_error * math.sqrt(2 * 5000) / m.sd - 1).abs() < 0.1).all()  # sd / sqrt(2 S) for a normal
    same = moment_shifts(z, torch.zeros(5000))
    assert same.mean.abs().max() < 1e-12
    assert same.mean_error.max() < 1e-12


def test_zero_weights_cut_the_support():
    z = normal(20_000, 1)
    m = moments(z, torch.where(z[:, 0] > 0, 0.0, -math.inf))  # the half normal
    assert abs(m.mean - math.sqrt(2 / math.pi)) < 4 * m.mean_error
    assert abs(m.sd - math.sqrt(1 - 2 / math.pi)) < 4 * m.sd_error


def test_a_constant_coordinate():
    m = moments(torch.ones(100, 2), 0.1 * torch.randn(100))
    assert torch.allclose(m.mean, torch.ones(2).double())
    assert m.mean_error.max() < 1e-9
    assert m.sd.max() < 1e-9
    assert m.sd_error.isfinite().all()


def test_moments_of_what_does_not_fit_are_refused():
    for z, log_w, word in (
        (torch.zeros(4, 2), torch.zeros(3), "log_w has shape"),
        (torch.zeros(4), torch.zeros(4), "z:"),
        (torch.full((4, 1), math.inf), torch.zeros(4), "finite"),
    ):
        with pytest.raises(ValueError, match=word):
            moments(z, log_w)


def test_a_missed_mode_leaves_no_trace_in_the_weights():
    "What the diagnosis cannot see: half the mass is missing; only the evidence is off, by log 2."
    z = 10 + 1.05 * normal(10_000)
    log_w = (
        torch.logaddexp(-0.5 * (z - 10) ** 2, -0.5 * (z + 10) ** 2)
        - math.log(2)
        + 0.5 * ((z - 10) / 1.05) ** 2
        + math.log(1.05)
    )
    assert k_hat(log_w) < 0.5
    assert effective_sample_size(log_w) > 9800
    assert abs(log_mean_weight(log_w).value + math.log(2)) < 0.01


def test_resampling():
    z = normal(20_000, 1)
    log_w = None
    log_w = (0.5 * z**2 - 0.5 * ((z - 1) / 0.8) ** 2)[:, 0]
    rows = resample(log_w)
    w = pareto_smoothed(log_w)[0].softmax(0)
    copies = rows.bincount(minlength=20_000)
    assert (copies - 20_000 * w).abs().max() <= 1 + 1e-9
    assert (rows.diff() >= 0).all()
    assert abs(z[rows].mean() - moments(z, log_w).mean) < 0.01
