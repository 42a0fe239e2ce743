"""Inverse autoregressive posteriors on MNIST: their runs, models, images and rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from normflow_vi.experiments import images, vae_iaf
from normflow_vi.experiments.vae_iaf import CHOICES, POSTERIORS
from normflow_vi.objectives import free_energy
from normflow_vi.reproduce.probe import in_small, judge_again
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
from normflow_vi.results.store import Store


def runs_of(experiment, **budget):
    plan = vae_iaf.plan if experiment == "vae_iaf" else vae_iaf.choices_plan
    profile = "paper" if experiment == "vae_iaf" else "smoke"
    some = [run for run in plan(profile, "digits") if run.seed == 0]
    return [replace(run, budget=dict(run.budget) | {"hidden": 12} | budget) for run in some]


@pytest.fixture(scope="module")
def digits():
    return images.dataset(runs_of("vae_iaf")[0])


ALL = runs_of("vae_iaf", networks="mlp") + runs_of("iaf_choices")


@pytest.mark.parametrize("run", ALL, ids=lambda run: f"{run.experiment}: {vae_iaf.call_posterior(run)}")
def test_every_posterior_is_one_and_learns_all_it_has(run, digits):
    """Its draws have the log-density that it states, and every parameter gets a gradient."""
    model = vae_iaf.build(run, digits)
    x = vae_iaf.draw_once(run, digits).test.pixels(indices=slice(4))
    bound = free_energy(lambda z: model.log_joint(x, z), model.q(x))
    bound.value.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []
    with torch.no_grad():
        z, log_q = model.q(x).rsample_and_log_prob((3,))
        torch.testing.assert_close(model.q(x).log_prob(z), log_q, atol=2e-3, rtol=1e-4)


def test_what_the_context_reaches(digits):
    """Without a context the steps are the same for all images; only the Gaussian before them is not."""
    for choice, differs in (("IAF 2/320", True), ("without context", False)):
        run = next(run for run in runs_of("iaf_choices") if vae_iaf.call_posterior(run) == choice)
        steps = vae_iaf.build(run, digits).posterior.transform.transforms[1]
        with torch.no_grad():
            for p in steps.parameters():
                p.add_(0.3 * torch.randn_like(p))
        z = torch.randn(1, vae_iaf.DIM).expand(2, -1)
        moved, _ = steps.forward(z, torch.randn(2, 12) if differs else None)
        assert (moved[0] != moved[1]).any() == differs


def test_images_are_drawn_once_for_judging_and_anew_for_training(digits):
    run = runs_of("vae_iaf")[0]
    judged = vae_iaf.draw_once(run, digits)
    assert torch.equal(judged.test.pixels(), judged.test.pixels())
    first, again = (digits.train.pixels(torch.Generator().manual_seed(s), slice(50)) for s in (0, 1))
    assert not torch.equal(first, again)


def test_the_data_start_the_residual_networks(digits):
    run = next(run for run in runs_of("vae_iaf") if run.get("networks") == "resnet")
    model = vae_iaf.build(run, digits)
    x = digits.train.pixels(torch.Generator().manual_seed(run.seed), slice(100))
    with torch.no_grad():
        logits = model.decoder(model.q(x).sample())
    assert 0.5 < logits.std() < 3 and logits.mean().abs() < 1


def test_widths_are_never_averaged_and_long_trainings_count_as_shortened(tmp_path):
    for flow, updates in (("iaf-320", 50_000), ("iaf-1920", 15_000)):
        run = Run(
            experiment="vae_iaf",
            recipe=vae_iaf.RECIPE,
            model="VAE resnet",
            data="mnist-dynamic",
            data_sha256="",
            flow=flow,
            length=2,
            seed=0,
            profile="paper",
            budget={"updates": updates},
        )
        Record(run, {"vlb": -82.0 - updates / 1e6, "log_p": -80.0}).save(tmp_path)
    found = {(row.row, row.metric.split()[0]): row for row in vae_iaf.rows(Store([tmp_path]))}
    assert len(found) == 4 and all(row.shortened for row in found.values())
    assert found["IAF depth 2 width 320", "VLB"].value == -82.05
    assert found["IAF depth 2 width 1920", "VLB"].value == -82.015


def test_names_of_posteriors_are_told_apart():
    places = {**POSTERIORS, **CHOICES}
    assert len(set(places.values())) == len(places)


def test_weights_of_a_model_of_images_drawn_anew_can_be_judged_again(monkeypatch, digits):
    """The check of kept weights takes fixed images, whichever way the training drew its own."""
    run = vae_iaf.plan("smoke", "digits")[0]
    assert run.data == "digits-dynamic"
    weights = vae_iaf.build(Run.from_dict(in_small(run.to_dict())), digits).state_dict()
    kept = SimpleNamespace(load_weights=lambda: weights)
    monkeypatch.setattr(Store, "find", lambda store, run: kept)
    found = judge_again(run.to_dict(), images=20, samples=2)
    assert found.keys() == {"log_p", "elbo"} and found == judge_again(run.to_dict(), images=20, samples=2)
