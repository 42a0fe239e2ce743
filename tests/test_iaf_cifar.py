"""Residual models of CIFAR-10: their runs, trainings that resume, what is kept, and rows."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from normflow_vi import experiments
from normflow_vi.data import Data, Split
from normflow_vi.experiments import iaf_cifar
from normflow_vi.experiments.common import KINGMA
from normflow_vi.experiments.iaf_cifar import POSTERIORS, call_posterior, list_runs
from normflow_vi.reproduce import notebooks
from normflow_vi.reproduce.notebooks import execution_folder
from normflow_vi.reproduce.planning import make_plan
from normflow_vi.reproduce.probe import WALL_CLOCK, digest, probe
from normflow_vi.reproduce.status import join, published
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
from normflow_vi.results.store import Store

ROOT = Path(__file__).parent.parent
SHAPE = (8, 8, 3)


def noise(n=60):
    def part(seed):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (n, math.prod(SHAPE)), dtype=torch.uint8, generator=generator)
        return Split(pixels, None)

    return Data("noise", "noise", "none", SHAPE, "", *map(part, range(3)))


def small(name="IAF", **budget):
    flow, length = POSTERIORS[name]
    run = list_runs("smoke")[0]
    return replace(run, flow=flow, length=length, budget=dict(run.budget) | {"maps": 4} | budget)


# Plan


def test_every_profile_names_each_run_once_and_the_sizes_in_the_model():
    for profile in ("smoke", "quick", "paper"):
        runs = list_runs(profile)
        assert len({run.key for run in runs}) == len(runs)
        for run in runs:
            sizes = (run.get("maps"), run.get("latents"))
            assert f"1x{run.get('depth')} of {sizes[0]} maps and {sizes[1]} latents" in run.model
    assert {call_posterior(run) for run in list_runs("quick")} == {"diagonal", "linear IAF", "IAF"}
    assert max(run.get("depth") for run in list_runs("paper")) == 20


def test_without_the_images_only_what_has_a_record_is_planned(tmp_path, monkeypatch):
    asked = []

    def absent(source, download):
        asked.append(download)
        raise iaf_cifar.DataNotFound("nowhere")

    monkeypatch.setattr(iaf_cifar, "find", absent)
    monkeypatch.setattr(iaf_cifar, "records_root", lambda profile: tmp_path)
    runs = list_runs("quick")
    assert iaf_cifar.plan("quick") == iaf_cifar.plan("quick", "mnist") == iaf_cifar.plan("smoke") == []
    assert asked == [True, False, False]
    Record(runs[1], {"F": 1.0}).save(tmp_path)
    assert iaf_cifar.plan("quick") == runs[1:2]
    for run in runs:
        Record(run, {"F": 1.0}).save(tmp_path)
    asked.clear()
    assert iaf_cifar.plan("quick") == runs and asked == [False]


# Training


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_record_holds_what_the_page_shows(name):
    run, data = small(name), noise()
    (found,) = iaf_cifar.train([run], None, "cpu", data=data)
    assert found.value("bits") == pytest.approx(found.value("F") / 192 / math.log(2))
    assert found.value("bits_nll") <= found.value("bits")
    assert found.std_error("bits") == pytest.approx(found.std_error("F") / 192 / math.log(2))
    assert found.arrays["test_elbo"].shape == (20,)
    assert found.arrays["map_kl"].shape == (2, run.get("latents"))
    assert {"kl_1", "kl_2", "F_valid", "step_valid"} <= set(found.arrays)
    assert found.arrays["samples"].shape == (24, 192) and found.arrays["samples"].dtype == np.uint8
    assert found.arrays["flow_ms"].shape == (2, 2) and (found.arrays["flow_ms"] > 0).all()


def test_a_training_that_is_interrupted_ends_with_the_same_bits(tmp_path):
    data, run = noise(), small(updates=10)
    whole = iaf_cifar.trainer([run], data=data)
    whole.run()
    half = iaf_cifar.trainer([run], data=data, folder=tmp_path)
    half.good = half.state()
    for _ in range(4):
        half.advance()
    half.clock = 0.0
    half._settle(stop=True)
    resumed = iaf_cifar.trainer([run], data=data, folder=tmp_path)
    resumed.run()
    pairs = zip(whole.models[0].parameters(), resumed.models[0].parameters(), strict=True)
    assert resumed.step == whole.step and all(torch.equal(a, b) for a, b in pairs)


def test_free_bits_count_a_map_as_no_less():
    "The objective with much freedom is the likelihood and a constant; without it, the bound."
    data = noise()
    model = iaf_cifar.build(small(), data)
    x = data.train.pixels(indices=slice(10))

    def value(least):
        return iaf_cifar.bound_loss(least)(model, x, 0, torch.Generator().manual_seed(0))

    log_likelihood, kl = model.draw_terms(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(value(0.0).terms["free_energy"], (kl.sum((0, 2)) - log_likelihood).mean())
    torch.testing.assert_close(value(1e4).value, kl[:, 0].numel() * 1e4 - log_likelihood.mean())
    means = kl.mean(1)
    least = means.median().item()
    expected = means.clamp(min=least).sum() - log_likelihood.mean()
    torch.testing.assert_close(value(least).value, expected)


def test_negative_free_bits_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="free_bits=-0.25: allowed is"):
        iaf_cifar.bound_loss(-0.25)
    text = (ROOT / "settings.ini").read_text()
    (tmp_path / "settings.ini").write_text(text.replace("free_bits = 0.25", "free_bits = -0.25"))
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="free_bits"):
        list_runs("smoke")


def test_the_start_is_that_of_the_seed():
    data = noise()
    one, again, other = (iaf_cifar.build(replace(small(), seed=seed), data) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.first.weight, other.first.weight)


# Rows


def test_rows_are_those_of_models_of_the_papers_size(tmp_path):
    assert iaf_cifar.experiment.rows(Store([tmp_path])) == []
    for run in list_runs("quick") + list_runs("paper"):
        Record(run, {"bits": 3.5, "bits_nll": 3.4}).save(tmp_path)
    found = {(row.item, row.row): row for row in iaf_cifar.rows(Store([tmp_path]))}
    assert ("Table 2", "ResNet VAE with IAF") in found
    assert found["Table 2", "ResNet VAE with IAF"].value == 3.4
    assert found["Table 4", "bidirectional linear IAF, ResNet depth 8"].value == 3.5
    assert len(found) == 4 * 3 + 1
    known = {(row["item"], row["row"]) for row in join(published(), []) if row["source"] == KINGMA}
    assert set(found) <= known
    assert all(row.profile == "paper" and not row.shortened for row in found.values())


def test_a_shorter_training_is_shortened(tmp_path):
    run = next(run for run in list_runs("paper") if run.flow == "diagonal")
    Record(replace(run, budget=dict(run.budget) | {"updates": 1000}), {"bits": 4.0}).save(tmp_path)
    (row,) = iaf_cifar.rows(Store([tmp_path]))
    assert row.shortened and row.updates == 1000


def test_the_page_says_that_it_was_not_run(tmp_path, monkeypatch):
    for folder in ("nbs/03_iaf", "data"):
        (tmp_path / folder).mkdir(parents=True)
    experiment = experiments.get("iaf_cifar")
    shutil.copy(ROOT / experiment.notebook, tmp_path / "nbs" / "03_iaf")
    for path in ("settings.ini", "data/published.csv", "data/figures.csv"):
        shutil.copy(ROOT / path, tmp_path / path)
    for name, value in (("ROOT", str(tmp_path)), ("EXPERIMENTS", "normflow_vi.experiments.iaf_cifar")):
        monkeypatch.setenv(f"NORMFLOW_VI_{name}", value)
    monkeypatch.delenv("NORMFLOW_VI_DATA", raising=False)
    manifest = notebooks.draw(make_plan(experiment, "smoke"))
    assert manifest.good and set(manifest.products) == set(experiment.products), manifest.cause
    text = (execution_folder(experiment.notebook, "smoke") / "notebook.ipynb").read_text()
    assert "not run: CIFAR-10 was not found" in text


def test_a_certificate_does_not_hang_on_the_clock(monkeypatch):
    assert "flow_ms" in WALL_CLOCK
    monkeypatch.setattr(iaf_cifar, "load_photographs", lambda device="cpu": noise())
    run = Run.to_dict(small(updates=3))
    one, other = probe([run]), probe([run])
    assert digest(one, 0) == digest(other, 0)
