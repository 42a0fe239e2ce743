"""The plan behind the four points: sums over the lattice, decoders that stand still, what is concluded."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from normflow_vi.experiments import iaf_toy as toy
from normflow_vi.experiments import programs
from normflow_vi.experiments.findings import write_findings
from normflow_vi.results.record import Record


def sums(posteriors, truths, evidence):
    "What the lattice says about Gaussian posteriors of data points with Gaussian true posteriors."
    z, log_cell = toy._lattice(321)
    log_joint = torch.stack([p.log_prob(z) + e for p, e in zip(truths, evidence, strict=True)], -1)
    log_q = torch.stack([q.log_prob(z) for q in posteriors], -1)
    return toy._sums(log_joint, log_q, toy._log_normal(z), log_cell)


def gaussian(mean, covariance):
    return MultivariateNormal(torch.tensor(mean).double(), torch.tensor(covariance).double())


def test_the_sums_know_gaussians():
    truths = [
        gaussian([0.5, 0.0], [[0.3, 0.1], [0.1, 0.4]]),
        gaussian([0.0, -1.0], [[1.0, 0.0], [0.0, 0.2]]),
    ] * 2
    guesses = [gaussian([0.0, 0.3], [[0.5, 0.0], [0.0, 0.4]])] * 4
    found = sums(guesses, truths, [-1.0, -2.0, -3.0, -4.0])
    exact = torch.stack([kl_divergence(q, p) for q, p in zip(guesses, truths, strict=True)])
    assert torch.allclose(found["log_p"], torch.tensor([-1.0, -2.0, -3.0, -4.0]).double(), atol=1e-8)
    assert torch.allclose(found["kl"], exact, atol=1e-8)
    assert torch.allclose(found["elbo"], found["log_p"] - exact, atol=1e-8)
    prior = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    assert abs(found["aggregate"] - kl_divergence(guesses[0], prior)) < 1e-8
    assert (found["mass"] - 1).abs().max() < 1e-8


def test_posteriors_that_tile_the_prior_have_it_as_their_mixture():
    "Four quarters of the standard normal: their mixture is the prior, and each is ln 4 away from it."
    z, log_cell = toy._lattice(640)
    quarter = (z[:, 0] > 0).long() + 2 * (z[:, 1] > 0).long()
    own = torch.nn.functional.one_hot(quarter, 4).double().log()
    log_joint = toy._log_normal(z)[:, None] + own.clamp(min=-700)
    log_q = toy._log_normal(z)[:, None] + own + math.log(4)
    found = toy._sums(log_joint, log_q, toy._log_normal(z), log_cell)
    assert torch.allclose(found["log_p"], torch.full((4,), toy.BEST).double(), atol=1e-6)
    assert found["aggregate"].abs() < 1e-6
    assert found["kl"].abs().max() < 1e-6
    all_alike = toy._log_normal(z)[:, None].expand(-1, 4)
    assert (
        abs(toy._sums(all_alike - math.log(4), log_q, toy._log_normal(z), log_cell)["kl"][0] - math.log(4))
        < 1e-6
    )


def test_no_model_of_the_points_is_better_than_the_best():
    "The four are four of sixteen images whose probabilities sum to one."
    runs = toy.plan("smoke")
    model = toy.build(runs[0]).double()
    with torch.no_grad():
        for layer in model.decoder:
            layer.weight.mul_(5)
        assert toy._measure(model, 321)["log_p"].mean() < toy.BEST
        images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
        z, log_cell = toy._lattice(321)
        log_p = model.likelihood.log_prob(images, model.decoder(z)[:, None]) + toy._log_normal(z)[:, None]
        assert abs((log_p.logsumexp(0) + log_cell).exp().sum() - 1) < 1e-6


def test_a_frozen_decoder_does_not_move():
    run = next(run for run in toy.plan("smoke") if (run.model, run.flow) == (toy.COMMON, "full"))
    model = toy.build(run)
    model.decoder = toy._freeze(model.decoder)
    before = copy.deepcopy(model)
    here = {"folder": None, "device": "cpu", "progress": None}
    (trained,), _ = toy._train_family([run], [model], **here)
    assert all(
        torch.equal(a, b) for a, b in zip(before.decoder.buffers(), trained.decoder.buffers(), strict=True)
    )
    assert not list(trained.decoder.parameters())
    moved = zip(before.encoder.parameters(), trained.encoder.parameters(), strict=True)
    assert any((a != b).any() for a, b in moved)


def test_a_half_is_a_program():
    units = programs(toy.experiment, toy.plan("quick"))
    assert [{run.model for run in unit} for unit in units] == [{toy.OWN}, {toy.COMMON}]
    assert [len(unit) for unit in units] == [9, 9]
    assert {run.flow for run in units[0]} == set(toy.FAMILIES)


def made_up(family, seed, **values):
    run = next(run for run in toy.plan("quick") if run.flow == family and run.seed == seed)
    return Record(run, {name: {"value": value, "std_error": None} for name, value in values.items()}, {})


def half(gains):
    "Records of three families whose bound rises by `gains` from one to the next, as the divergence falls."
    records, level = {}, -1.8
    for family, gain in zip(toy.FAMILIES, (0.0, *gains), strict=True):
        level += gain
        records[family] = [
            made_up(family, seed, elbo=level + 0.01 * seed, kl=-1.5 - level, aggregate=0.1)
            for seed in range(3)
        ]
    return records


def test_conclusions_are_paired_by_seed():
    text = write_findings(toy.conclude(half([0.1, 0.05]), half([0.1, 0.05])), "\n")
    assert "closer than the diagonal by 0.1000 ± 0.0000" in text
    assert "the flow above the full covariance by 0.0500 ± 0.0000" in text
    assert f"{-math.log(4):.4f}" in text
    mean, error = toy.difference(half([0.1, 0.05]), "iaf", "diagonal", "elbo")
    assert abs(mean - 0.15) < 1e-12 and error < 1e-12
    assert toy.is_clear((0.3, 0.1)) and not toy.is_clear((0.2, 0.1)) and not toy.is_clear((-0.3, 0.1))


@pytest.mark.parametrize("name, value", [("length", 0), ("grid", 3), ("updates", 0)])
def test_settings_are_checked(name, value, monkeypatch):
    from normflow_vi.utils import settings

    read = settings.read_section
    monkeypatch.setattr(settings, "read_section", lambda section: read(section) | {name: value})
    with pytest.raises(ValueError, match=name):
        toy.plan("quick")
