"""The plan of the flows on modes and rings: sizes, shares, steepness, indices, bounds that enclose."""

import math

import numpy as np
import pytest
import torch

from normflow_vi.experiments import cif_plane as plane
from normflow_vi.experiments import programs
from normflow_vi.flows import Flow
from normflow_vi.flows.many_indices import draw_index_weights
from normflow_vi.reproduce.status import read_csv
from normflow_vi.transforms import Affine, Chain, ContinuouslyIndexed, Permutation

SMOKE, QUICK = plane.plan("smoke"), plane.plan("quick")
NARROW = "9 modes, sigma 0.1"


def run_of(flow, model=NARROW, runs=SMOKE, longest=True):
    some = [run for run in runs if (run.flow, run.model) == (flow, model)]
    return max(some, key=lambda run: run.length) if longest else min(some, key=lambda run: run.length)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The plan


def test_the_figure_of_the_slides_is_drawn_by_this_page():
    (row,) = [row for row in read_csv("figures.csv") if row["item"] == "Fig 1 (slides)"]
    assert row["notebook"] == plane.experiment.notebook
    assert row["product"] in plane.experiment.products


def test_quick_has_what_the_conclusions_need():
    seeds = {}
    for run in QUICK:
        seeds.setdefault((run.flow, run.length, run.model), []).append(run.seed)
    for flow in ("nsf", "cif"):
        for where in (NARROW, NARROW + ", annealed"):
            assert seeds[flow, 5, where] == [0, 1, 2]
        for where in ("9 modes, sigma 1", "9 modes, sigma 10", "rings, sigma 0.1"):
            assert seeds[flow, 5, where] == [0]
    assert {run.flow for run in QUICK} >= {"nsf-trained", "nsf-mixture", "planar", "realnvp", "cif-quiet"}
    assert {run.get("updates") for run in QUICK} == {4000}
    for where in (NARROW + ", annealed", "9 modes, sigma 1, annealed"):
        for flow in ("planar", "planar-shifted", *plane.OTHERS_INDEXED, "iaf"):
            lengths = [K for name, K, model in seeds if (name, model) == (flow, where)]
            assert len(lengths) == (2 if flow in ("planar", "iaf") else 1)
            assert all(seeds[flow, K, where] == [0, 1, 2] for K in lengths)
    for flow in ("nsf-trained", "nsf-shifted"):
        assert seeds[flow, 5, NARROW + ", annealed"] == [0, 1, 2]


def test_keys_of_the_records_stay():
    "What was trained before there was an index around other layers is planned as it was."
    planned = {run.key for run in QUICK}
    for key in ("06d328e83377", "42feb67d496c", "801079324029", "8871e660588c", "ec656f9f2da0"):
        assert key in planned


def test_paper_is_the_protocol_of_the_source():
    runs = plane.plan("paper")
    assert {run.get("updates") for run in runs} == {20_000}
    assert {run.get("samples") for run in runs} == {1000}
    assert {run.get("schedule") for run in runs} == {"constant"}
    assert {plane.situation(run).target for run in runs} == {"9 modes", "16 modes", "rings"}


def test_a_flow_is_a_program():
    units = programs(plane.experiment, QUICK)
    assert len(units) == len({(run.flow, run.length) for run in QUICK})


def test_sizes_are_equal():
    one_each = {(run.flow, run.length): run for run in QUICK}
    sizes = {key: plane._count(plane.build(run)) for key, run in one_each.items()}
    for flow in ("nsf", "nsf-trained", "nsf-mixture"):
        assert abs(sizes[flow, 5] / sizes["cif", 5] - 1) < 0.03
    others = [("realnvp", 8), ("iaf", 8), ("iaf", 20), ("iaf-indexed", 4), ("nsf-shifted", 5)]
    for key in others:
        assert abs(sizes[key] / sizes["cif", 5] - 1) < 0.03, key
    assert sizes["planar", 32] == sizes["planar-linear", 4] == 161
    assert sizes["planar-shifted", 4] == 157
    assert (sizes["planar-indexed", 4], sizes["planar", 414]) == (2073, 2071)


def test_starts():
    "The quiet start is near the identity; the released code's has weights within 1 / sqrt(inputs)."
    widths = {}
    for flow in ("nsf", "cif", "cif-quiet"):
        q = plane.build(run_of(flow, runs=QUICK))
        widths[flow] = q.sample((4000,)).var(0).sum().sqrt().item() / 2**0.5
        assert q.base.log_sigma.exp().item() == pytest.approx(0.1)
        assert not list(q.base.parameters())
    assert abs(widths["nsf"] - 0.1) < 0.02
    assert widths["cif-quiet"] < widths["cif"]
    layer = plane.build(run_of("cif", runs=QUICK)).transform.transforms[0]
    last = layer.source.ts_weight_2
    assert last.abs().max() <= 10**-0.5
    assert last.abs().max() > 0.8 * 10**-0.5
    assert torch.equal(
        last, plane.build(run_of("cif", runs=QUICK)).transform.transforms[0].source.ts_weight_2
    )


ANNEALED_FROM_ONE = "9 modes, sigma 1, annealed"


@pytest.mark.parametrize("flow", ["planar-shifted", *plane.OTHERS_INDEXED, "iaf"])
def test_bases_of_the_further_flows_are_trained(flow):
    for where in (ANNEALED_FROM_ONE, NARROW + ", annealed"):
        q = plane.build(run_of(flow, where))
        assert q.annealed
        assert q.base.log_sigma.exp().item() == pytest.approx(plane.situation(run_of(flow, where)).sigma)
        assert isinstance(q.base.log_sigma, torch.nn.Parameter)


def test_the_base_of_the_shifted_nsf_is_fixed():
    q = plane.build(run_of("nsf-shifted", NARROW + ", annealed"))
    assert not list(q.base.parameters())
    assert sum(isinstance(layer, Affine) for layer in q.transform.transforms) == 2


@pytest.mark.parametrize("flow", [*plane.OTHERS_INDEXED, "iaf", "planar-shifted"])
@pytest.mark.parametrize("where", [ANNEALED_FROM_ONE, NARROW + ", annealed"])
def test_gradients_reach_all_parameters(flow, where):
    run = run_of(flow, where, QUICK)
    q = plane.build(run)
    made = plane._make_loss([run])(q, None, 2000, seeded())
    slopes = torch.autograd.grad(made.value, list(q.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)
    for (name, _), slope in zip(q.named_parameters(), slopes, strict=True):
        assert slope.abs().max() > 0, name


@pytest.mark.parametrize("flow", plane.OTHERS_INDEXED)
def test_a_block_has_an_index_and_its_small_networks(flow):
    q = plane.build(run_of(flow, ANNEALED_FROM_ONE, QUICK))
    blocks = q.transform.transforms
    assert len(blocks) == 4
    assert all(isinstance(block, ContinuouslyIndexed) and block.form == "before" for block in blocks)
    networks = 20 if flow == "planar-linear" else 498
    for block in blocks:
        assert plane._count(block) - plane._count(block.transform) == networks
        assert block.transform.length == (2 if flow == "iaf-indexed" else 4)


@pytest.mark.parametrize("flow", plane.OTHERS_INDEXED)
def test_weights_of_draws_and_of_points_are_of_one_density(flow):
    """The mean of `q(z, u) / r(u|z)` over indices is a density: of mass one, and it says what draws say.

    The networks are made small, so that `r` finds the index often enough.
    """
    q = plane.build(run_of(flow, ANNEALED_FROM_ONE)).double()
    with torch.no_grad():
        for layer in q.transform.transforms:
            for p in layer.source.parameters():
                p.mul_(0.3)
        axis = torch.linspace(-8, 8, 65, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        log_w = q.log_prob(grid.expand(60, *grid.shape), seeded())
        density = plane.log_mean_exp(log_w).exp() * (axis[1] - axis[0]) ** 2
        z = q.sample((40_000,), seeded(1))
    assert density.sum() == pytest.approx(1, abs=0.03)
    for moment in (lambda z: z[:, 0], lambda z: z[:, 1], lambda z: z.square().sum(-1).clamp(max=9.0)):
        assert (density * moment(grid)).sum() == pytest.approx(moment(z).mean().item(), abs=0.08)


# Targets


@pytest.mark.parametrize("name", plane.TARGETS)
def test_shares_of_exact_draws(name):
    shares, between = plane.shares_of(name, plane.TARGETS[name].sample(50_000, seeded()))
    assert plane.count_covered(shares) == len(shares)
    exact = math.exp(-8) if name != "rings" else 2 * (1 - 0.99865)
    assert between < 2 * exact + 1e-3
    assert shares.sum() + between == pytest.approx(1, abs=1e-6)


def test_one_mode_of_nine():
    z = 0.25 * torch.randn(1000, 2, generator=seeded())
    shares, between = plane.shares_of("9 modes", z)
    assert shares[4] == pytest.approx(1 - between)
    assert plane.count_covered(shares) == 0
    assert plane.shares_of("9 modes", torch.ones(5, 2))[1] == 1  # half-way between four modes


def test_the_loss_is_of_the_models_own_target():
    runs = [run for run in SMOKE if run.flow == "nsf"]
    loss = plane._make_loss(runs)
    for run in runs:
        q = plane.build(run)
        made = loss(q, None, 10**6, seeded())
        z, log_q = q().rsample_and_log_prob((run.get("samples"),), seeded())
        target = plane.TARGETS[plane.situation(run).target]
        assert made.value.item() == pytest.approx((log_q - target(z)).mean().item(), rel=1e-4, abs=1e-3)


# What is measured


def test_steepness_of_indexed_layers_is_that_of_the_bijection_of_each_draw():
    torch.manual_seed(0)
    affine = Affine(2)
    with torch.no_grad():
        affine.source.log_scale.copy_(torch.tensor([5.0, 0.5]).log())
    layer = ContinuouslyIndexed(affine, hidden=())
    with torch.no_grad():
        for p in layer.source.parameters():
            p.zero_()
        layer.source.q_weight_0[0, 0, 0] = 50.0  # a steep choice of the index is not a steep bijection
        layer.source.ts_weight_0[0, 0, 0] = 3.0
    found = plane.steepness(Flow(Chain(layer, Permutation(2))), 50, seeded())
    assert found == pytest.approx((5.0, 2.0), rel=1e-4)


def test_information_of_an_index_that_nothing_depends_on():
    torch.manual_seed(0)
    layer = ContinuouslyIndexed(Affine(2), hidden=())
    with torch.no_grad():
        for p in layer.source.parameters():
            p.zero_()
        found = plane.index_information(Flow(Chain(layer, layer)), 500, seeded())
    assert found.shape == (2, 3)
    assert np.allclose(found, 0, atol=1e-4)


def test_the_bounds_enclose_the_sum_over_the_index():
    run = run_of("cif", longest=False)
    assert run.length == 1
    q = plane.build(run)
    with torch.no_grad():
        q.base.log_sigma.zero_()
        q = q.double()
        z, log_w = draw_index_weights(q(), (150,), 200, seeded())
        exact = plane.log_q_by_quadrature(q, z, nodes=1500)
    values = plane._enclose(exact, log_w)  # with log q in the place of log p: the divergence is 0
    assert values["elbo_tight"]["value"] < 4 * values["elbo_tight"]["std_error"]
    assert values["elbo_above"]["value"] > -4 * values["elbo_above"]["std_error"]
    gap = (log_w[0] - exact).mean()
    assert values["gap_least"]["value"] < gap + 0.05
    assert values["gap_most"]["value"] > gap - 0.05


def test_a_density_by_quadrature_has_mass_one():
    q = plane.build(run_of("cif", longest=False)).double()
    with torch.no_grad():
        q.base.log_sigma.zero_()
        axis = torch.linspace(-7, 7, 29, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        mass = plane.log_q_by_quadrature(q, grid, nodes=200).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass - 1) < 0.01


@pytest.mark.parametrize("flow", ["cif", *plane.OTHERS_INDEXED])
def test_records_of_a_program(flow):
    runs = [run for run in SMOKE if run.flow == flow and run.length > 1]
    records = plane.train(runs, None, "cpu")
    assert [record.run for record in records] == runs
    for record in records:
        assert record.arrays["information"].shape == (record.run.length, 3)
        assert record.arrays["indices"].shape == (2000, record.run.length)
        assert record.value("elbo_few") < record.value("elbo_above")
        assert record.arrays["gaps"][0, 1] == 0
        assert record.value("sigma") == pytest.approx(plane.situation(record.run).sigma, rel=0.02)
        for name in ("steep", "inverse_steep", "gradient"):
            assert (record.arrays[name] > 0).all()


@pytest.mark.parametrize(
    "name, value", [("updates", 0), ("modes", (10,)), ("schedule", "linear"), ("indices", 1)]
)
def test_settings_are_checked(name, value, monkeypatch):
    from normflow_vi.utils import settings

    read = settings.read_section
    monkeypatch.setattr(settings, "read_section", lambda section: read(section) | {name: value})
    with pytest.raises(ValueError, match=name):
        plane.plan("quick")
