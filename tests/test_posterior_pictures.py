"The plan behind the posterior pictures: quadrature, exact posteriors, and what is known about Gaussians."

import math

import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, kl_divergence

from normflow_vi.experiments import programs
from normflow_vi.experiments import vae_posteriors as posteriors
from normflow_vi.flows import Flow
from normflow_vi.models.networks import MLP
from normflow_vi.models.vae import VAE
from normflow_vi.objectives import elbo
from normflow_vi.transforms import Affine


def normal(mean, covariance):
    return MultivariateNormal(torch.tensor(mean).double(), torch.tensor(covariance).double())


def constant_model(pixels=6):
    "A decoder that does not look at z: the posterior is the prior, the evidence that of independent pixels."
    model = VAE(MLP(pixels, (4,)), MLP(2, (4,), pixels), Flow(Affine(2, context_dim=4)))
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        model.decoder[-1].bias.copy_(torch.linspace(-1, 2, pixels))
    return model


def test_quadrature_knows_gaussians():
    z, log_cell = posteriors._lattice(241, 6.0, dtype=torch.float64)
    some = [normal([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), normal([1.0, -0.5], [[0.3, 0.2], [0.2, 0.25]])]
    truth = posteriors._integrate(
        torch.stack([d.log_prob(z) + shift for d, shift in zip(some, (3.0, -200.0), strict=False)], -1),
        z,
        log_cell,
    )
    assert torch.allclose(truth.log_p, torch.tensor([3.0, -200.0]).double(), atol=1e-6)
    assert torch.allclose(truth.mean, torch.stack([d.mean for d in some]), atol=1e-6) and torch.allclose(
        truth.scale, torch.stack([d.variance.sqrt() for d in some]), atol=1e-6
    )
    assert truth.negentropy.abs().max() < 1e-5 and truth.error.max() < 1e-6
    found, mass = posteriors._divergence(some[1].log_prob(z), some[0].log_prob(z), log_cell)
    assert abs(found - kl_divergence(some[1], some[0])) < 1e-6 and abs(mass - 1) < 1e-6
    assert posteriors._divergence(some[0].log_prob(z), some[0].log_prob(z), log_cell)[0] == 0


def test_a_coarse_lattice_says_so():
    z, log_cell = posteriors._lattice(61, 5.0, dtype=torch.float64)
    truth = posteriors._integrate(
        normal([0.04, 0.07], [[0.0025, 0.0], [0.0, 0.0025]]).log_prob(z)[:, None], z, log_cell
    )
    assert truth.error > 0.1  # a posterior narrower than the spacing


def test_box_holds_the_mass_and_is_centred_on_it():
    z, log_cell = posteriors._lattice(301, 5.0, dtype=torch.float64)
    log_p = normal([1.0, -2.0], [[0.09, 0.0], [0.0, 0.01]]).log_prob(z)
    centre1, centre2, half = posteriors._integrate(log_p[:, None], z, log_cell).box[0].tolist()
    assert abs(centre1 - 1) < 0.03 and abs(centre2 + 2) < 0.03 and 0.8 < half < 1.5
    inside = ((z[:, 0] - centre1).abs() < half) & ((z[:, 1] - centre2).abs() < half)
    assert log_p.exp()[inside].sum() / log_p.exp().sum() > 0.995


def test_exact_posterior_has_no_divergence():
    model, x = constant_model(), torch.tensor([[0.0, 1, 1, 0, 1, 0], [1.0, 1, 1, 1, 1, 1]])
    truth = posteriors._find_truth(model, x, 201)
    evidence = Bernoulli(logits=model.decoder[-1].bias).log_prob(x).sum(-1).double()
    assert torch.allclose(truth.log_p, evidence, atol=1e-5)
    assert torch.allclose(truth.mean, torch.zeros(2, 2).double(), atol=1e-5) and torch.allclose(
        truth.scale, torch.ones(2, 2).double(), atol=1e-4
    )
    for image, mean, scale, log_p in zip(x, truth.mean, truth.scale, truth.log_p, strict=False):
        q = posteriors._ImageFlow(Affine(2), image, mean, scale)
        bound = elbo(lambda y, q=q: posteriors._joint_in_units(model, q, y), q(), samples=100)
        assert abs(log_p - bound.value) < 1e-3 and bound.std_error < 1e-3
        small, (kl, mass) = posteriors._picture(model, q, image, torch.tensor([0.0, 0.0, 5.0]), log_p)
        assert abs(kl) < 1e-4 and abs(mass - 1) < 1e-4 and torch.allclose(*small, atol=1e-4)


def test_units_of_a_posterior_do_not_change_the_divergence():
    model, x = constant_model(), torch.ones(1, 6)
    log_p = posteriors._find_truth(model, x, 201).log_p[0]
    q = posteriors._ImageFlow(Affine(2), x[0], torch.tensor([0.5, 0.0]), torch.tensor([0.5, 1.5]))
    exact = kl_divergence(
        normal([0.5, 0.0], [[0.25, 0.0], [0.0, 2.25]]), normal([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    )
    bound = elbo(
        lambda y: posteriors._joint_in_units(model, q, y),
        q(),
        samples=40_000,
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(log_p - bound.value - exact) < 4 * bound.std_error
    kl, mass = posteriors._picture(model, q, x[0], torch.tensor([0.0, 0.0, 11.0]), log_p)[1]
    assert abs(kl - exact) < 0.01 and abs(mass - 1) < 1e-3


@pytest.mark.parametrize("name", posteriors.GAUSSIANS)
def test_full_covariance_is_exact_and_the_references_are_ordered(name):
    P = posteriors._precision(name, 6, 0.9)
    q = posteriors._CorrelatedFlow(posteriors._posterior_of("full", 6, 1), P).double()
    q.root.copy_(torch.linalg.cholesky(P).T)
    factor = torch.linalg.cholesky(P.inverse())
    affine, triangular = q.transform.transforms
    with torch.no_grad():
        affine.source.log_scale.copy_(factor.diagonal().log())
        unit = factor / factor.diagonal()
        triangular.source.below.copy_(unit[tuple(torch.tril_indices(6, 6, -1))])
        bound = elbo(q.target, q(), samples=50)
    assert abs(bound.value) < 1e-5 and bound.std_error < 1e-6
    diagonal = MultivariateNormal(torch.zeros(6).double(), torch.diag(1 / P.diagonal()))
    assert (
        abs(
            posteriors._mean_field(P)
            - kl_divergence(diagonal, MultivariateNormal(torch.zeros(6).double(), P.inverse()))
        )
        < 1e-9
    )
    values = [
        posteriors._mean_field(P),
        *(posteriors._best_of_rank(name, 6, 0.9, rank) for rank in (1, 2, 3)),
    ]
    assert (
        all(more <= less + 1e-3 for less, more in zip(values, values[1:], strict=False)) and values[-1] == 0
    )
    assert (values[1] < 1e-3) == (name == "equicorrelated")  # one direction is enough for the one only


def test_half_the_rank_is_enough():
    "L-BFGS finds the zero that the argument about D / 2 promises; rank one is not enough."
    P = posteriors._precision("AR(1)", 6, 0.9)

    def least(rank):
        tensors = [
            -0.5 * P.diagonal().log(),
            *(
                0.1 * torch.randn(6, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                for seed in (0, 1)
            ),
        ]
        solver = torch.optim.LBFGS(
            [t.requires_grad_() for t in tensors], max_iter=300, line_search_fn="strong_wolfe"
        )

        def closure():
            solver.zero_grad()
            value = posteriors._divergence_of_rank(P, *tensors)
            value.backward()
            return value

        solver.step(closure)
        return closure().item()

    assert least(3) < 1e-5 and least(1) > 0.01


def test_needed_interpolates():
    assert posteriors.length_needed({1: 4.0, 2: 2.0, 4: 1.0}, 2.0) == 2 and posteriors.length_needed(
        {4: 1.0, 1: 4.0}, 2.0
    ) == pytest.approx(2)
    assert (
        posteriors.length_needed({1: 4.0, 2: 2.0}, 5.0) == 1
        and posteriors.length_needed({1: 4.0, 2: 2.0}, 1.0) == math.inf
    )


def test_a_dimension_is_a_unit_and_the_pictures_are_one():
    runs = posteriors.plan("quick", "digits")
    units = programs(posteriors.experiment, runs)
    assert [len({run.model for run in unit}) for unit in units] == [1] + [2] * (len(units) - 1)
    assert len(units) == 1 + len({run.get("dim") for run in runs if run.model in posteriors.GAUSSIANS})
    assert {run.flow for run in units[0]} == {"diagonal", "full", "planar"} and {
        run.flow for run in units[-1]
    } == {"planar", "iaf", "full"}
