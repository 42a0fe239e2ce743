"""Convolutional posteriors: sizes, correlation and non-Gaussianity told apart, and what a record keeps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from normflow_vi.experiments import vae_convolution as page
from normflow_vi.models.posteriors import posterior
from normflow_vi.reproduce.status import join, published
from normflow_vi.results.record import Record
from normflow_vi.results.store import Store


def draws(mean, factor, S, images=60):
    "Draws `(S, images, D)` of a Gaussian and their log-density."
    D = len(mean)
    eps = torch.randn(S, images, D, dtype=torch.float64)
    return mean + eps @ factor.T, -0.5 * (eps**2).sum(-1) - D / 2 * math.log(
        2 * math.pi
    ) - torch.linalg.slogdet(factor).logabsdet


def near(found, exact, errors=4):
    return abs(found.mean() - exact) < errors * found.std() / len(found) ** 0.5


# Correlation and negentropy


@pytest.mark.parametrize("S", [60, 1000])
def test_a_gaussian_has_its_total_correlation_and_no_negentropy(S):
    "With 60 draws in 20 dimensions the covariance is far too small: without its known bias both are off."
    D = 20
    factor = torch.eye(D).double() + 0.2 * torch.randn(D, D, dtype=torch.float64).tril(-1)
    correlation, negentropy, _ = page._measure_structure(*draws(torch.randn(D).double(), factor, S))
    assert near(correlation, 0.5 * (factor @ factor.T).diagonal().log().sum()) and near(negentropy, 0)


def test_a_mixture_has_the_negentropy_found_by_quadrature():
    "Two modes in one entry of three; a rotation makes correlation but leaves the negentropy as it is."
    S, images, m, s = 4000, 60, 2.0, 0.5
    side, eps = (
        torch.randint(0, 2, (S, images)).double() * 2 - 1,
        torch.randn(S, images, 3, dtype=torch.float64),
    )
    z = torch.cat([(m * side + s * eps[..., 0])[..., None], eps[..., 1:]], -1)

    def log_mixture(x):
        return torch.logaddexp(-((x - m) ** 2) / (2 * s * s), -((x + m) ** 2) / (2 * s * s)) - math.log(
            2 * s * math.sqrt(2 * math.pi)
        )

    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    exact = (log_mixture(x).exp() * log_mixture(x)).sum() * (x[1] - x[0]) + 0.5 * math.log(
        2 * math.pi * math.e * (m * m + s * s)
    )
    log_q = log_mixture(z[..., 0]) - 0.5 * (z[..., 1:] ** 2).sum(-1) - math.log(2 * math.pi)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    (correlation, negentropy, _), (turned, same, _) = (
        page._measure_structure(z, log_q),
        page._measure_structure(z @ turn.T, log_q),
    )
    assert (
        exact > 0.3
        and abs(negentropy.mean() - exact) < 4 * negentropy.std() / images**0.5 + 1e-3
        and abs(correlation.mean()) < 1e-3
    )  # 1e-3: the bias taken out is that of a Gaussian
    assert torch.allclose(negentropy, same) and turned.mean() > 0.1


def test_no_linear_posterior_has_negentropy_and_others_do():
    context = torch.randn(12, 16)
    for family, K in page.LENGTHS.items():
        q = posterior(family, 12, K, 16).double()
        with torch.no_grad():
            for p in q.transform.parameters():
                p.mul_(3.0)
            correlation, negentropy, _ = page._measure_structure(
                *q(context.double()).rsample_and_log_prob((1500,))
            )
        assert near(negentropy, 0) == (family in ("diagonal", "circulant", "circulant-diagonal", "full")), (
            family
        )
        assert near(correlation, 0) == (family == "diagonal"), family


def test_a_ring_profile_sees_the_ring_and_not_where_it_begins():
    D, rows = 10, torch.arange(10)
    distance = (rows[:, None] - rows).abs()
    ring = 0.5 ** torch.minimum(distance, D - distance).double()
    assert torch.allclose(page._ring_profile(ring[None]), 0.5 ** torch.arange(1, 6).double())
    assert torch.allclose(page._ring_profile(ring.roll((3, 3), (0, 1))[None]), page._ring_profile(ring[None]))
    order = torch.randperm(D)
    assert not torch.allclose(page._ring_profile(ring[order][:, order][None]), page._ring_profile(ring[None]))


# The plan, and what is kept


def test_families_are_of_equal_size_but_for_the_two_that_cannot_be():
    sizes = {
        family: page._count_parameters(posterior(family, 40, K, 400)) for family, K in page.LENGTHS.items()
    }
    others = [n for family, n in sizes.items() if family not in ("diagonal", "circulant")]
    assert (
        all(0.9 < n / sizes["full"] < 1.1 for n in others)
        and sizes["diagonal"] < sizes["circulant"] < min(others) / 5
    )


def test_only_the_posterior_differs():
    for profile in ("smoke", "quick", "paper"):
        runs = page.plan(profile, "digits")
        assert len({run.budget for run in runs}) == 1 and {"diagonal", "circulant", "full"} <= {
            run.flow for run in runs
        } <= set(page.LENGTHS)
        assert len({run.key for run in runs}) == len(runs) and all(
            run.length == page.LENGTHS[run.flow] for run in runs
        )


def test_timing_disturbs_no_random_stream():
    before = torch.get_rng_state()
    assert all(page._flow_seconds(family, K, 16) > 0 for family, K in page.LENGTHS.items()) and torch.equal(
        before, torch.get_rng_state()
    )


def test_a_record_and_its_rows(tmp_path):
    run = next(run for run in page.plan("smoke", "digits") if run.flow == "circulant-slog")
    (found,) = page.train([run], None, "cpu")
    assert {"F", "nll", "kl", "tightened", "correlation", "negentropy", "parameters", "step_ms"} <= set(
        found.values
    ) and found.value("parameters") == page._count_parameters(posterior(run.flow, 40, run.length, 64))
    assert (
        len(found.arrays["flow_ms"]) == len(run.get("dims"))
        and len(found.arrays["ring"]) == 20
        and not {"images", "samples"} & set(found.arrays)
    )
    assert len(found.arrays["correlations"]) == run.get("structure_images") and np.isclose(
        found.arrays["correlations"].mean(), found.value("correlation"), atol=1e-6
    )
    for family in page.LENGTHS:
        for data in ("digits-static", "mnist-static"):
            if (family, data) != ("full", "mnist-static"):
                Record(
                    replace(run, flow=family, length=page.LENGTHS[family], data=data, profile="quick"),
                    {"F": 90.0, "nll": 85.0},
                ).save(tmp_path)
    assert page.rows(Store([tmp_path])) == [], "no table with a family missing, and none of the digits"
    Record(
        replace(run, flow="full", length=page.LENGTHS["full"], data="mnist-static", profile="quick"),
        {"F": 88.0, "nll": 84.0},
    ).save(tmp_path)
    rows = page.rows(Store([tmp_path]))
    joined = join(published(), rows)
    assert [row.value for row in rows if row.row == "full"] == [84, 88] and len(rows) == 2 * len(page.LENGTHS)
    assert {row["verdict"] for row in joined if row["item"] == page._ITEM} == {"no published number"}
