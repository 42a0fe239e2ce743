"""The opening of chapter 3: its diagram has a row, and times are times of the same thing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from normflow_vi import experiments
from normflow_vi.experiments import iaf_times
from normflow_vi.experiments.iaf_times import WAYS, invert_by_passes, invert_in_torch
from normflow_vi.reproduce.probe import WALL_CLOCK, digest, in_small, probe
from normflow_vi.reproduce.status import read_csv
from normflow_vi.results.store import Store
from normflow_vi.testing import slogdet_of_jacobian
from normflow_vi.transforms import InverseAutoregressive

SMOKE = iaf_times.plan("smoke")[0]


def strong_layer(dim, hidden, form="gated"):
    "A layer whose networks do much, in double precision."
    layer = InverseAutoregressive(dim, hidden=hidden, form=form).double()
    with torch.no_grad():
        getattr(layer.source, f"weight_{len(hidden)}").mul_(8.0)
    return layer


def test_figure_1_of_the_report_is_drawn_by_the_page_of_the_idea():
    (row,) = [row for row in read_csv("figures.csv") if row["item"] == "Fig 1 (report)"]
    page = experiments.get("iaf_idea")
    assert row["notebook"] == page.notebook
    assert row["product"] in page.products
    assert page.plan("paper") == []


# The inverses


@pytest.mark.parametrize("hidden", [(5,), (32, 32), ()])
@pytest.mark.parametrize("form", ["gated", "plain"])
@pytest.mark.parametrize("dim", [1, 2, 9])
def test_three_inverses_are_one_map(dim, hidden, form):
    layer, z = strong_layer(dim, hidden, form), torch.randn(20, dim).double()
    with torch.no_grad():
        y, log_det = layer.forward(z)
        for invert in (invert_by_passes, invert_in_torch, InverseAutoregressive.inverse):
            back, minus = invert(layer, y)
            assert torch.allclose(back, z, atol=1e-9)
            assert torch.allclose(minus, -log_det, atol=1e-9)
    assert torch.allclose(log_det, slogdet_of_jacobian(layer, z), atol=1e-9)


def test_the_usual_inverse_is_one_pass_a_variable(monkeypatch):
    passes = []
    original = iaf_times.run_network

    def counted(*args, **options):
        passes.append(1)
        return original(*args, **options)

    monkeypatch.setattr(iaf_times, "run_network", counted)
    layer, y = strong_layer(9, (16,)), torch.randn(4, 9).double()
    with torch.no_grad():
        invert_by_passes(layer, y)
        assert len(passes) == 9
        invert_in_torch(layer, y)
    assert len(passes) == 9


# What is timed


@pytest.mark.parametrize("dim", SMOKE.get("dims"))
def test_all_ways_of_one_direction_give_one_density(dim):
    torch.manual_seed(0)
    with torch.no_grad():
        actions = iaf_times.build_actions(SMOKE, dim)
        assert list(actions) == list(WAYS)
        by_passes, in_torch, by_package = (actions[f"iaf-{how}"]() for how in ("passes", "torch", "stages"))
        draws, log_q = actions["iaf-draw"]()
        samples, log_p = actions["maf-stages"]()
    points = SMOKE.get("points")
    assert by_passes.shape == log_q.shape == log_p.shape == (points,)
    assert draws.shape == samples.shape == (points, dim)
    assert torch.allclose(by_passes, by_package, atol=1e-4)
    assert torch.allclose(in_torch, by_package, atol=1e-4)


def test_the_ways_take_turns():
    order = []

    def pause(name):
        order.append(name)
        sum(range(300_000))

    seconds = iaf_times.time_in_turns([lambda: pause("a"), lambda: pause("b")], 3)
    assert seconds.shape == (2, 3)
    assert (seconds > 0).all()
    rounds = "".join(order[-len(order) // 2 :])
    assert rounds.count("ab") + rounds.count("ba") >= 3


def test_exponents_of_powers():
    dims = np.array([2, 8, 32])
    assert np.allclose(iaf_times.exponents(dims, 3.0 * dims**1.5), 1.5)


# The record


@pytest.fixture(scope="module")
def record():
    return iaf_times.train([SMOKE], None, "cpu")[0]


def test_a_record_has_all_times_and_shows_that_they_are_times_of_one_thing(record, tmp_path):
    dims = SMOKE.get("dims")
    assert record.arrays["flow_ms"].shape == (len(WAYS), len(dims), SMOKE.get("timed_steps"))
    assert (record.arrays["flow_ms"] > 0).all()
    log_q = record.arrays["log_q"]
    assert log_q.shape[:2] == (len(dims), 3)
    assert abs(log_q - log_q[:, :1]).max() < 1e-9
    assert (record.arrays["stages"] <= dims).all()
    record.save(tmp_path)
    (found,) = Store([tmp_path]).best("iaf_times", recipe=iaf_times.RECIPE)
    assert np.array_equal(found.arrays["flow_ms"], record.arrays["flow_ms"])
    assert iaf_times.experiment.rows(Store([tmp_path])) == []


def test_the_least_round_counts(record):
    times = np.ones((len(WAYS), 2, 3), dtype=np.float32)
    times[0, 1] = 5.0, 4.0, 6.0
    slowed = replace(record, arrays=record.arrays | {"flow_ms": times})
    assert iaf_times.least(slowed)["iaf-draw"].tolist() == [1, 4]


def test_longer_profiles_do_not_change_what_is_timed():
    quick, paper = (iaf_times.plan(profile)[0] for profile in ("quick", "paper"))
    assert max(quick.get("dims")) == 1024
    assert min(quick.get("dims")) == 2
    assert dict(quick.budget) | {"timed_steps": 0} == dict(paper.budget) | {"timed_steps": 0}
    assert len({run.key for run in (SMOKE, quick, paper)}) == 3


def test_a_certificate_does_not_hang_on_the_clock():
    "Two runs differ in their times, and in nothing that a certificate compares."
    assert "flow_ms" in WALL_CLOCK
    run = iaf_times.plan("quick")[0].to_dict()
    assert in_small(run)["budget"]["dims"] == (16,)
    small = run | {"budget": run["budget"] | {"hidden": (16, 16)}}
    state = torch.get_rng_state()
    one, other = probe([small]), probe([small])
    assert torch.equal(state, torch.get_rng_state())
    assert digest(one, 0) == digest(other, 0)
    assert set(one["records"][0]["arrays"]) == {"log_q", "stages"}
