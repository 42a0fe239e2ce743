"""The scoreboard: its plan, what is counted and measured of a fit, and the published numbers."""

import math
from types import SimpleNamespace

import pytest
import torch

from normflow_vi.engine.errors import NonFinite
from normflow_vi.evaluate.diagnosis import effective_sample_size, log_mean_weight
from normflow_vi.experiments import fit_targets as board
from normflow_vi.flows import Flow
from normflow_vi.objectives import Estimate, estimate
from normflow_vi.reproduce.probe import in_small
from normflow_vi.reproduce.status import read_csv
from normflow_vi.targets import KNOWN
from normflow_vi.targets.known import correlated_normal, two_modes
from normflow_vi.transforms import Affine

QUICK, PAPER = board.plan("quick"), board.plan("paper")


def placed(dim, shift, scale=1.0):
    "A Gaussian flow whose first coordinate is centred at `shift`."
    q = Flow(Affine(dim))
    q.place.loc[0] = shift
    q.place.scale.fill_(scale)
    return q.eval()


def judged(q, target, n=2000, **more):
    "What `fit` would return of `q`, from fresh draws."
    z, log_q = q.rsample_and_log_prob((n,), torch.Generator().manual_seed(0))
    log_w = (target(z) - log_q).detach().double()
    fields = {
        "q": q,
        "z": z.detach(),
        "log_w": log_w,
        "elbo": estimate(log_w),
        "evidence": log_mean_weight(log_w),
        "ess": effective_sample_size(log_w).item(),
        "k_hat": -math.inf,
        "steps": 7,
        "verdict": "good",
        "missing": None,
        "log_z_interval": (target.log_z - 0.1, target.log_z + 0.3),
    }
    return SimpleNamespace(**fields | more)


def test_a_long_plan_has_all_targets_and_the_modes_of_all():
    repeated = {run.model for run in PAPER if run.seed}
    assert repeated == {"eight schools", "U1", "U2", "U3", "U4"}
    assert {run.seed for run in PAPER if run.model in repeated} == {0, 1, 2}
    assert {run.model for run in PAPER} == set(board.FITS) > {run.model for run in QUICK}
    assert {board.options_of(run)["steps"] for run in PAPER} == {2000}
    mixed = {run.model for run in PAPER if run.flow.endswith(board.ALL)}
    assert mixed == {name for name in board.FITS if KNOWN[name]().modes is not None}
    assert all(("modes" in board.options_of(run)) == run.flow.endswith(board.ALL) for run in PAPER)


def test_a_probe_of_a_run_is_small():
    assert in_small(PAPER[0].to_dict())["budget"]["updates"] == 40


def test_published_numbers_belong_to_targets_and_are_means_of_their_seeds():
    rows = read_csv("targets.csv")
    assert {row["target"] for row in rows} <= set(board.FITS)
    assert all(row["source"] and row["method"] for row in rows)
    by_name = {(row["target"], row["method"], row["measure"]): float(row["value"] or "nan") for row in rows}
    seeds = {
        ("GMM40", "FAB with buffer", "ess"): (0.596, 0.686, 0.637),
        ("GMM40", "FAB with buffer", "log_q"): (-7.22, -7.12, -7.18),
        ("GMM40", "maximum likelihood on exact draws", "log_q"): (-7.17, -7.16, -7.26),
        ("GMM40", "stochastic flow", "ess"): (0.116, 0.599, 0.369),
        ("Many-Well 32", "FAB with buffer", "ess"): (0.825, 0.759, 0.800),
    }
    for key, values in seeds.items():
        assert by_name[key] == pytest.approx(sum(values) / 3, abs=0.006), key
    at_modes = sum((-21.28, -21.38, -21.23)) / 3
    assert by_name["Many-Well 32", "FAB with buffer", "loss_modes"] == pytest.approx(
        -20.889 - at_modes, abs=0.01
    )


def test_points_are_counted_below_every_transform():
    counted = board.Counted(lambda z: -z.square().sum(-1))
    counted(torch.zeros(5, 2))
    assert (counted.rows, counted.with_gradient) == (5, 0)
    counted(torch.zeros(5, 2, requires_grad=True))
    assert (counted.rows, counted.with_gradient) == (10, 5)
    torch.func.grad(lambda z: counted(z).sum())(torch.zeros(4, 2))
    torch.func.vmap(torch.func.grad(lambda z: counted(z).sum()))(torch.zeros(3, 4, 2))
    assert (counted.rows, counted.with_gradient) == (26, 21)
    with torch.no_grad():
        counted(torch.zeros(5, 2, requires_grad=True))
    assert counted.with_gradient == 21
    means = torch.zeros(3, 2, requires_grad=True)  # as when several runs train as one program
    torch.func.vmap(lambda mean: counted(mean + torch.zeros(4, 2)))(means).sum().backward()
    assert counted.with_gradient == 33


def test_a_forward_divergence_in_closed_form():
    target = correlated_normal(3, 0.0)
    found = board.measure_forward(placed(3, 2.0), target, 20_000, 0)
    assert abs(found["forward_kl"]["value"] - 2.0) < 4 * found["forward_kl"]["std_error"]
    entropy = 1.5 * math.log(2 * math.pi * math.e)
    assert abs(found["log_q"]["value"] + entropy + 2) < 4 * found["log_q"]["std_error"]
    assert found["forward_kl_99"] < found["forward_kl"]["value"]
    assert found["unreached"] == 0


def test_draws_that_q_cannot_reach_make_it_infinite():
    cut = SimpleNamespace(
        place=placed(2, 0.0).place, log_prob=lambda z: torch.where(z[:, 0] > -2.0, -1.0, math.nan)
    )
    found = board.measure_forward(cut, correlated_normal(2, 0.0), 5000, 0)
    assert found["forward_kl"]["value"] == board.FAR
    assert 0 < found["unreached"] < 1
    cut.log_prob = lambda z: torch.where(z[:, 0] > -3.5, -1.0, math.nan)
    found = board.measure_forward(cut, correlated_normal(2, 0.0), 50_000, 0)
    assert found["forward_kl"]["value"] == board.FAR > found["forward_kl_99"]


def test_one_mode_of_two():
    target = two_modes(2, 20.0, 0.3)
    q = placed(2, 10.0)
    found = board.measure(judged(q, target), target, 2000, 0)
    assert (found["modes"], found["modes_found"]) == (2, 1)
    assert found["share_error"] == pytest.approx(0.7, abs=1e-6)
    assert found["gap"]["value"] == pytest.approx(-math.log(0.3), abs=1e-4)
    at_p = -math.log(2 * math.pi) + (math.log(0.3) + math.log(0.7)) / 2
    assert found["log_p_modes"] == pytest.approx(at_p, abs=1e-4)
    assert found["log_q_modes"] == pytest.approx(-math.log(2 * math.pi) - 100, abs=1e-2)


def test_what_the_fit_says_is_relative_to_log_z_and_finite():
    target = KNOWN["Many-Well 6"]()
    fields = {"k_hat": math.inf, "missing": Estimate(torch.tensor(0.25), torch.tensor(0.1))}
    found = board.measure_itself(judged(placed(6, 0.0), target, **fields), target)
    assert found["low"] == pytest.approx(-0.1)
    assert found["high"] == pytest.approx(0.3)
    assert found["k_hat"] == board.FAR
    assert found["missing"]["value"] == pytest.approx(0.25)
    outside = judged(placed(6, 0.0), target, elbo=Estimate(torch.tensor(-math.inf), torch.tensor(math.nan)))
    assert board.measure_itself(outside, target)["gap"]["value"] == board.FAR


def test_many_modes_are_not_counted_by_draws():
    target = KNOWN["Many-Well 32"]()
    q = placed(32, 0.0)
    found = board.measure_modes(q, torch.zeros(3, 32), target)
    assert found["modes"] == 65_536
    assert "modes_found" not in found
    assert found["log_p_modes"] == pytest.approx(-20.612, abs=0.3)


def test_a_fit_that_stops_is_a_record(monkeypatch):
    asked = {}

    def stopping(q, log_density, **options):
        asked.update(options)
        log_density(torch.zeros(7, q.dim))
        raise NonFinite(3, "the loss", 0, "loss")

    monkeypatch.setattr(board, "fit", stopping)
    run = next(run for run in board.plan("smoke") if run.flow.endswith(board.ALL))
    (record,) = board.train([run], None, "cpu")
    assert board.VERDICTS[int(record.value("verdict"))] == "stopped"
    assert record.value("evaluations") == 7
    assert "gap" not in record.values
    assert asked["modes"] == "all"
    assert asked["steps"] == run.get("updates")
