"""The verdicts: the plan of three hundred fits, what is done to them, how verdict and truth are counted."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from normflow_vi.experiments import fit_targets
from normflow_vi.experiments import fit_verdicts as judged
from normflow_vi.reproduce.probe import in_small
from normflow_vi.results.record import Record
from normflow_vi.targets import KNOWN

PAPER = judged.plan("paper")


def run_of(model, seed=0, runs=PAPER):
    return next(run for run in runs if run.model == model and run.seed == seed)


def made_up(said="good", run=PAPER[0], **values):
    "A record of a fit that is right in every respect but for the `values` given."
    right = {"gap": 0.01, "forward_kl": 0.02, "forward_kl_99": 0.01, "k_hat": 0.1, "dim": 2}
    right |= {"evidence": {"value": 0.0, "std_error": 0.001}, "low": -0.1, "high": 0.1}
    return Record(run, {"verdict": judged.VERDICTS.index(said)} | right | values)


def test_three_hundred_fits_half_of_them_spoiled():
    done = Counter(judged.situation(run)[1] for run in PAPER)
    assert sum(done.values()) == 300 == len({run.key for run in PAPER})
    assert done == {judged.PLAIN: 150} | dict.fromkeys(set(judged.TREATMENTS) - {judged.PLAIN}, 30)
    names = {judged.situation(run)[0] for run in PAPER}
    assert {KNOWN[name]().dim for name in names} >= {2, 3, 4, 5, 6, 10, 20, 50}
    assert len(judged.plan("quick")) == 20
    assert len(judged.plan("smoke")) == 4


def test_a_probe_is_small_whatever_is_done():
    for model in ("ring, by defaults", "ring, early stop"):
        run = type(PAPER[0]).from_dict(in_small(run_of(model, 4).to_dict()))
        assert judged.prepare(run)[2]["steps"] == 40


def test_what_is_done_to_a_fit():
    for seed in (0, 1, 2):
        q, target, options = judged.prepare(run_of("two modes 20, lost mode", seed))
        assert torch.equal(q.place.loc, target.modes[seed % 2])
        assert options["place"] is options["anneal"] is False
        q, _, options = judged.prepare(run_of("logistic, wrong units", seed))
        assert (q.place.scale == (0.2 if seed % 2 else 5.0)).all()
        assert options["place"] is False
        assert judged.prepare(run_of("U3, early stop", seed))[2]["steps"] == 60 * (seed + 1)
    q, _, options = judged.prepare(run_of("t3 3, light tails"))
    assert set(options) == {"seed", "evaluation_draws", "steps"}
    assert (q.place.scale == 1).all()
    with pytest.raises(ValueError, match="ring has no list of modes"):
        judged.TREATMENTS["lost mode"](q, KNOWN["ring"](), 0)


def test_seeds_give_other_flows():
    first, second = (judged.prepare(run_of("ring, by defaults", seed))[0] for seed in (0, 1))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert any(not torch.equal(p, other) for p, other in pairs)


@pytest.mark.parametrize(
    "values, bad",
    [
        ({}, False),
        ({"gap": 0.11}, True),
        ({"forward_kl": 0.11}, True),
        ({"gap": 0.09, "forward_kl": 0.09}, False),
        ({"evidence": {"value": 0.03, "std_error": 0.001}}, True),
        ({"evidence": {"value": -0.03, "std_error": 0.001}}, True),
        ({"evidence": {"value": -0.03, "std_error": 0.01}}, False),
        ({"evidence": {"value": -0.019, "std_error": 0.001}}, False),
        ({"forward_kl": fit_targets.FAR}, True),
    ],
)
def test_what_is_bad(values, bad):
    assert judged.is_bad(made_up(**values)) is bad


def test_verdict_and_truth_are_counted():
    lost = made_up(gap=0.36, forward_kl=140.0, forward_kl_99=130.0)
    tail = made_up("usable", forward_kl=5.0)
    heavy = made_up("not to be trusted", k_hat=0.8)
    stopped = replace(made_up("stopped"), values={"verdict": 3})
    some = [made_up(), lost, tail, heavy, stopped]
    assert judged.confusion(some) == {
        "good": (1, 1),
        "usable": (0, 1),
        "not to be trusted": (1, 0),
        "stopped": (0, 1),
    }
    assert judged.confusion(some, judged.word_of_k_hat) == {
        "good": (1, 2),
        "usable": (0, 0),
        "not to be trusted": (1, 0),
        "stopped": (0, 1),
    }
    assert judged.confusion(some, forward="forward_kl_99")["usable"] == (1, 0)


def test_intervals_are_counted_by_dimension():
    narrow = made_up(low=-0.02, high=0.02, dim=2)
    wide = made_up(low=-0.5, high=0.5, dim=10)
    misses = made_up(low=-0.2, high=-0.1, dim=3)
    without = replace(narrow, values={"verdict": 0, "dim": 2})
    some = [narrow, wide, misses, without]
    held, total, width = judged.coverage(some)
    assert (held, total) == (2, 3)
    assert width == pytest.approx(0.1)
    assert judged.coverage(some, (3, 5))[:2] == (0, 1)
    assert judged.coverage([made_up(low=0.1, high=0.2)])[:2] == (0, 1)
    assert judged.coverage(some, (11, 50)) == (0, 0, 0.0)
    assert [band[0] for band in judged.BANDS[1:]] == [band[1] + 1 for band in judged.BANDS[:-1]]


def test_an_interval_for_a_share():
    "Wilson's: for 8 of 10, from a table."
    assert judged.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert judged.wilson(0, 10)[0] == 0
    assert judged.wilson(10, 10)[1] == 1
