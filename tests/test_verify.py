"""A share of the report is made again: what agrees is told from what does not."""

import copy

import pytest
import torch

from normflow_vi.experiments import images, vae_iaf
from normflow_vi.reproduce import verify as verifying
from normflow_vi.reproduce.certify import Task
from normflow_vi.reproduce.probe import digest, probe
from normflow_vi.reproduce.verify import Check, verify
from normflow_vi.results.record import Record
from normflow_vi.utils.modules import evaluating


@pytest.fixture(scope="module")
def short_training():
    """The task of one run, with what it notes."""
    run = vae_iaf.plan("smoke", "digits")[0]
    noted = digest(probe([run.to_dict()]), 0)
    return Task("vae_iaf", [run], "", "", None, noted=[(0, noted)])


def test_a_short_training_agrees_bit_by_bit_and_a_changed_number_does_not(short_training):
    (check,) = verifying._train_again("vae_iaf", short_training)
    assert check.good and check.apart == 0 and "the same bits" in str(check)
    rounded, wrong = copy.deepcopy(short_training), copy.deepcopy(short_training)
    for task, by in ((rounded, 1e-5), (wrong, 0.01)):
        values = task.noted[0][1]["values"]
        name = next(iter(values))
        values[name][0] = (float.fromhex(values[name][0]) * (1 + by)).hex()
    (check,) = verifying._train_again("vae_iaf", rounded)
    assert check.good and 0 < check.apart < 1e-4
    (check,) = verifying._train_again("vae_iaf", wrong)
    assert not check.good and str(check).startswith("DIFFERS")


@pytest.fixture
def kept(tmp_path):
    """A record that keeps the weights of a model of digits, and a way to spoil them."""
    run = vae_iaf.plan("smoke", "digits")[0]
    data = images.dataset(run)
    model = vae_iaf.build(run, data)
    test = vae_iaf.draw_once(run, data).test.pixels()
    with evaluating(model):
        found = images.judge(run, model, test)

    def save(spoiled=0.0):
        weights = {name: value * (1 + spoiled) for name, value in model.state_dict().items()}
        record = Record(run, {"F": 0.0}, images.marginal_arrays(found), {}, weights)
        record.save(tmp_path / str(spoiled))
        return Record.load(next((tmp_path / str(spoiled)).rglob("record.json")).parent)

    return save


def test_weights_agree_with_their_record_and_others_do_not(kept):
    assert all(check.good for check in verifying._judge_again(kept()))
    elbo, log_p = verifying._judge_again(kept(spoiled=0.5))
    assert not elbo.good and not log_p.good and "standard errors" in str(elbo)


def test_a_share_is_drawn_at_random_and_time_is_kept(monkeypatch):
    def check(name):
        return lambda: [Check(name, "", 0.0, 1.0)]

    monkeypatch.setattr(verifying, "_find_trainings", lambda: [check(f"training {i}") for i in range(40)])
    monkeypatch.setattr(verifying, "_find_weights", lambda: [check("weights")])
    threads = torch.get_num_threads()
    drawn = [[c.name for c in verify(0.1, seed=seed)] for seed in (0, 0, 1)]
    torch.set_num_threads(threads)
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(names) == len(set(names)) == 5 and "weights" in names for names in drawn)
    assert list(verify(1.0, minutes=-1.0)) == []
    with pytest.raises(ValueError, match="share=1.5"):
        next(verify(1.5))
