"""Continuously-indexed posteriors of images: their runs, models and rows, and a prior in disguise."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from normflow_vi.experiments import cif_images, images
from normflow_vi.experiments.cif_images import NAMES, NETWORKS, TABLE
from normflow_vi.flows import Flow
from normflow_vi.models.vae import VAE
from normflow_vi.objectives import free_energy
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
from normflow_vi.results.store import Store
from normflow_vi.transforms import Inverse

SMOKE = {run.flow: run for run in cif_images.plan("smoke", "digits")}


@pytest.fixture(scope="module")
def digits():
    return images.dataset(SMOKE["nsf"])


@pytest.fixture(scope="module")
def x(digits):
    return cif_images.draw_once(SMOKE["nsf"], digits).test.pixels(indices=slice(4))


def move(model, by=0.3):
    "Parameters away from where they start."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def test_the_plan_has_the_table_its_opponents_and_all_networks():
    runs = cif_images.plan("paper", "mnist")
    assert {run.model for run in runs} == {f"VAE {name}" for name in NETWORKS}
    assert {run.data for run in runs} == {"mnist-dynamic", "fashion-mnist-dynamic"}
    assert {run.flow for run in runs if run.model == "VAE small"} == set(NAMES) == set(SMOKE)
    assert {run.flow for run in cif_images.plan("quick", "mnist")} == set(TABLE)
    published = cif_images.plan("paper", "mnist", "published")
    assert {run.get("updates") for run in published} == {500_000}
    assert {run.get("patience") for run in published} == {25_000}
    with pytest.raises(ValueError, match="setting"):
        cif_images.plan("paper", "mnist", "slow")


@pytest.mark.parametrize("flow", NAMES)
def test_every_model_learns_all_it_has(flow, digits, x):
    """Every parameter gets a finite gradient."""
    model = cif_images.build(SMOKE[flow], digits)
    free_energy(lambda z: model.log_joint(x, z), model.q(x)).value.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []


@pytest.mark.parametrize("networks", NETWORKS)
def test_all_networks_fit_images_of_mnist(networks, digits):
    run = replace(SMOKE["diagonal"], model=f"VAE {networks}")
    model = cif_images.build(run, replace(digits, train=replace(digits.train, images=torch.zeros(2, 784))))
    model.check(torch.zeros(3, 784))
    latents = NETWORKS[networks].latents
    assert model.posterior.dim == latents and model.posterior.context_dim == 2 * latents


def test_the_flows_of_the_table_have_about_as_many_parameters():
    for sizes in NETWORKS.values():
        nsf, cif = (
            sum(p.numel() for p in cif_images.make_posterior(flow, sizes).parameters())
            for flow in ("nsf", "cif")
        )
        assert 0.6 < cif / nsf < 1.1


def test_what_sees_the_image(digits, x):
    """The NSF of the table moves a point alike for all images, the CIF too but for its auxiliary density."""
    w = torch.randn(1, 20, dtype=torch.float64).expand(2, -1)
    context = torch.randn(2, 40, dtype=torch.float64)
    for flow, moves, weighs in (
        ("nsf", False, False),
        ("cif", False, True),
        ("cif-blind", False, False),
        ("nsf-seeing", True, True),
    ):
        model = move(cif_images.make_posterior(flow, NETWORKS["small"]).double())
        layers = model.transform.transforms[1]

        def push(row, layers=layers):
            return layers.forward(w[row], context[row], torch.Generator().manual_seed(0))

        (one, one_weight), (two, two_weight) = push(slice(0, 1)), push(slice(1, 2))
        assert torch.equal(one, two) != moves
        assert torch.equal(one_weight, two_weight) != weighs


def test_a_flow_that_does_not_see_the_image_is_a_learned_prior_too(digits, x):
    """The same bound to rounding, draw by draw, with the flow in the posterior, or in prior and decoder."""
    posterior_flow = move(cif_images.build(SMOKE["nsf"], digits), 0.1).double()
    gaussian, flow = posterior_flow.posterior.transform.transforms

    class Moved(nn.Module):
        "A decoder behind the flow."

        def forward(self, w):
            return posterior_flow.decoder(flow.forward(w)[0])

    learned_prior = VAE(posterior_flow.encoder, Moved(), Flow(gaussian), Flow(Inverse(flow))).double()
    values = [
        free_energy(
            lambda z, model=model: model.log_joint(x.double(), z),
            model.q(x.double()),
            samples=5,
            generator=torch.Generator().manual_seed(1),
        ).value.item()
        for model in (posterior_flow, learned_prior)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert values[0] > 10


def test_a_run_has_its_record_and_says_when_it_ended(digits):
    run = replace(SMOKE["cif"], budget=dict(SMOKE["cif"].budget) | {"updates": 6, "looks": 6, "patience": 1})
    (found,) = cif_images.train([run], None, "cpu")
    assert 2 <= found.value("ended") <= 6
    assert found.value("log_p") == -found.value("nll")
    assert {"log_p_short", "log_p_long", "F", "kl", "F_valid"} <= found.values.keys()
    assert len(found.arrays["test_log_p"]) == 20 and len(found.arrays["long_log_p"]) == 4


def test_rows_stand_beside_the_published_table_and_count_as_shortened_unless_they_ended(tmp_path):
    for flow, ended in (("diagonal", 15_000), ("cif", 9_000)):
        run = Run(
            experiment="cif_images",
            recipe=cif_images.RECIPE,
            model=f"VAE {cif_images.ADOPTED}",
            data="mnist-dynamic",
            data_sha256="",
            flow=flow,
            length=0,
            seed=0,
            profile="paper",
            budget={"updates": 15_000},
        )
        Record(run, {"log_p": -90.0, "ended": ended}).save(tmp_path)
    found = {row.row: row for row in cif_images.rows(Store([tmp_path]))}
    assert found.keys() == {"VAE", "CIF-NSF"}
    assert found["VAE"].shortened and not found["CIF-NSF"].shortened
    assert found["VAE"].data == "MNIST dynamic"
