"""Patches of CIFAR-10: true crops a stream that resumes, and a page that works without data."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from normflow_vi import experiments
from normflow_vi.data import Data, Split
from normflow_vi.experiments import vae_cifar
from normflow_vi.experiments.vae_cifar import (
    DEQUANTISED,
    PLAIN,
    _all_runs,
    _cut,
    _cut_at_random,
    _fixed_patches,
    _is_saturated,
    _log_p_by_pixel,
    _Patches,
    _split_free_energy,
    _to_grey,
    plan,
    rows,
    train,
)
from normflow_vi.reproduce import notebooks
from normflow_vi.reproduce.notebooks import execution_folder
from normflow_vi.reproduce.planning import make_plan
from normflow_vi.reproduce.status import join, published
from normflow_vi.results.record import Record
from normflow_vi.results.run import Run
from normflow_vi.results.store import Store, records_root

ROOT = Path(__file__).parent.parent
SHAPE = (32, 32, 3)


def images(n, seed=0):
    return torch.randint(0, 256, (n, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def noise(n=120):
    return Data("noise", "noise", "none", SHAPE, "", *(Split(images(n, seed), None) for seed in range(3)))


def small(length=0, name=PLAIN, **budget):
    run = next(run for run in _all_runs("smoke") if run.data == name)
    return Run(**(run.to_dict() | {"length": length, "budget": dict(run.budget) | budget}))


# Patches


def windows(image):
    "All patches of one flat image, by a loop over the places."
    square = image.view(*SHAPE)
    return {
        square[r : r + 8, c : c + 8].flatten().numpy().tobytes(): (r, c) for r in range(25) for c in range(25)
    }


def test_patches_are_true_crops_of_their_own_image():
    "Each patch of a batch lies somewhere in the image that the order names, and the places differ."
    data, stream = images(40), _Patches(Split(images(40), None), SHAPE, 40, seed=3)
    for _ in range(3):
        batch = (stream.next() * 255).round().byte()
        places = [
            windows(data[row])[patch.numpy().tobytes()]
            for row, patch in zip(stream.order, batch, strict=False)
        ]
        assert len(set(places)) > 30


def test_other_shapes_too():
    flat = images(2)[:, : 9 * 12]
    patch = _cut(flat, torch.tensor([[1, 3], [0, 0]]), (9, 12, 1))
    assert torch.equal(
        patch.view(2, 8, 8), torch.stack([flat[0].view(9, 12)[1:9, 3:11], flat[1].view(9, 12)[:8, :8]])
    )


def test_an_epoch_cuts_one_patch_of_each_image():
    own = torch.arange(60, dtype=torch.uint8)[:, None].expand(60, 3072).contiguous()
    stream = _Patches(Split(own, None), SHAPE, 20, seed=0)
    for _ in range(2):
        seen = (torch.cat([stream.next() for _ in range(3)])[:, 0] * 255).round().int()
        assert sorted(seen.tolist()) == list(range(60))


@pytest.mark.parametrize("dequantize", [False, True])
def test_the_stream_resumes_bitwise(dequantize):
    split = Split(images(70), None)
    stream, again = _Patches(split, SHAPE, 32, 0, dequantize), _Patches(split, SHAPE, 32, 9, dequantize)
    for _ in range(5):
        stream.next()
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in stream.state_dict().items()
    }
    later = [stream.next() for _ in range(7)]
    again.load_state_dict(state)
    assert all(torch.equal(batch, again.next()) for batch in later)
    with pytest.raises(ValueError, match="batch_size"):
        _Patches(split, SHAPE, 16, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="images"):
        _Patches(Split(images(71), None), SHAPE, 32, 0).load_state_dict(state)


def test_a_training_that_is_interrupted_ends_with_the_same_bits(tmp_path):
    data, run = noise(), small(2, name=DEQUANTISED, updates=12)
    whole = vae_cifar.trainer([run], data=data)
    whole.run()
    half = vae_cifar.trainer([run], data=data, folder=tmp_path)
    half.good = half.state()
    for _ in range(5):
        half.advance()
    half.clock = 0.0
    half._settle(stop=True)
    resumed = vae_cifar.trainer([run], data=data, folder=tmp_path)
    resumed.run()
    assert resumed.step == whole.step and all(
        torch.equal(a, b)
        for a, b in zip(whole.models[0].parameters(), resumed.models[0].parameters(), strict=False)
    )


def test_validation_patches_are_fixed_and_the_first_ones_stay_the_first():
    split = Split(images(50), None)
    some, again = _fixed_patches(split, SHAPE, 20), _fixed_patches(split, SHAPE, 20)
    torch.manual_seed(5)
    assert (
        torch.equal(some, again)
        and torch.equal(some, _fixed_patches(split, SHAPE, 20))
        and some.shape == (20, 192)
    )
    assert not torch.equal(some, _cut_at_random(split.images[:20], SHAPE, torch.Generator().manual_seed(1)))


# Levels


def test_levels_stay_in_range_and_noise_stays_within_its_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(_to_grey(levels) * 255, levels.float())
    many = _to_grey(levels.expand(20_000, 256), True, torch.Generator().manual_seed(0))
    assert (
        torch.equal((many * 256).floor(), levels.float().expand_as(many))
        and many.min() >= 0
        and many.max() < 1
    )
    u = many[:, 200].double() * 256 - 200
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5 and abs(u.var() - 1 / 12) < 0.003


def test_the_squeezed_range_is_that_of_the_paper():
    model = vae_cifar.build(small(), noise())
    squeezed = model.likelihood.squeeze(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert squeezed.tolist() == pytest.approx([1e-4, 1 - 1e-4], abs=1e-12)
    assert model.encoder[0](torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64))[
        0
    ].tolist() == pytest.approx([-math.log(9999) / 2, math.log(9999) / 2, 0], abs=1e-9)


@pytest.mark.parametrize("dequantize", [False, True])
def test_saturated_pixels_are_those_of_the_two_outermost_levels(dequantize):
    levels = torch.arange(256, dtype=torch.uint8).expand(500, 256)
    x = _to_grey(levels, dequantize, torch.Generator().manual_seed(0))
    assert torch.equal(_is_saturated(x), (levels == 0) | (levels == 255))


# Where the bound comes from


def test_the_pixels_add_up_to_the_likelihood():
    model, data = vae_cifar.build(small(2), noise()).double(), noise()
    x, z = (
        _fixed_patches(data.test, SHAPE, 20).double(),
        torch.randn(3, 20, vae_cifar._DIM, dtype=torch.float64),
    )
    each = _log_p_by_pixel(model, x, z)
    assert each.shape == (3, 20, 192) and torch.allclose(
        each.sum(-1), model.log_joint(x, z)["log_likelihood"]
    )
    mean, raw = model.decoder(z).chunk(2, -1)  # one pixel by hand, with the published formula
    from normflow_vi.models.likelihoods import _limit

    y, v = 1e-4 + (1 - 2e-4) * x[4, 100], _limit(raw[1, 4, 100])
    by_hand = (
        -0.5 * ((y.logit() - mean[1, 4, 100]) ** 2 / v.exp() + v + math.log(2 * math.pi))
        - (y * (1 - y)).log()
        + math.log(1 - 2e-4)
    )
    assert torch.allclose(each[1, 4, 100], by_hand)


def test_the_parts_of_the_bound_add_up():
    model, data = vae_cifar.build(small(2), noise()), noise()
    x = _fixed_patches(data.test, SHAPE, 60)
    with torch.no_grad():
        parts = _split_free_energy(model, x, seed=0, draws=50)
        z, log_q = model.q(x).rsample_and_log_prob((50,), torch.Generator().manual_seed(0))
        elbo = (sum(model.log_joint(x, z).values()) - log_q).mean(0)
    assert torch.allclose(
        parts["log_p_saturated"] + parts["log_p_others"] - parts["kl_prior"], elbo, rtol=1e-4, atol=1e-2
    )
    assert (
        torch.equal(parts["saturated"], ((x == 0) | (x == 1)).double().sum(-1))
        and parts["saturated"].sum() > 0
    )


# Plans, rows, pages


def test_seeds_train_together_as_they_would_alone():
    data, first = noise(), small(2, updates=8)
    both = [first, Run(**(first.to_dict() | {"seed": 1}))]
    together, alone = (
        train(both, None, "cpu", data=data),
        [train([run], None, "cpu", data=data)[0] for run in both],
    )
    for one, other in zip(together, alone, strict=False):
        assert (
            one.values.keys() == other.values.keys()
            and {"F", "nll", "kl", "F_train", "log_p_saturated", "log_p_others", "kl_prior"}
            <= one.values.keys()
        )
    assert (
        together[0].value("F") != together[1].value("F")
        and together[0].arrays["patches"].tolist() == alone[0].arrays["patches"].tolist()
    )


def test_it_learns():
    "On images that are one grey each, a few updates go a long way below the start."
    flat = torch.randint(30, 220, (300, 1), dtype=torch.uint8).expand(300, 3072).contiguous()
    data = Data("grey", "grey", "none", SHAPE, "", *(Split(flat[i::3].contiguous(), None) for i in range(3)))
    (found,) = train([small(2, updates=150, hidden=64)], None, "cpu", data=data)
    start = found.arrays["F_valid"][0]
    assert (
        found.value("F") < start - 50
        and found.value("nll") < found.value("F")
        and (found.arrays["test_log_p"] >= found.arrays["test_elbo"] - 1e-2).all()
    )


def test_published_rows_are_met_and_stay_unconfirmed(tmp_path):
    for profile in ("quick", "paper"):
        for run in _all_runs(profile):
            Record(run, {"nll": -300.0 - run.length}).save(tmp_path / profile)
        found = [
            row
            for row in join(published(), rows(Store([tmp_path / profile])))
            if row["item"] == "Table 3" and "Rezende" in row["source"] and row["value"] is not None
        ]
        lengths = sorted({run.length for run in _all_runs(profile) if run.data == PLAIN})
        assert [(row["row"], row["value"]) for row in found] == [
            (f"DLGM+NF planar K={K}", -300.0 - K) for K in lengths
        ]
        assert {row["verdict"] for row in found} == {
            "shortened" if profile == "quick" else "unconfirmed source"
        }
    assert lengths == [0, 2, 5, 10] and [row["published"] for row in found] == [
        -293.7,
        -308.6,
        -317.9,
        -320.7,
    ]


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "A checkout without CIFAR-10, a network and records."
    for name in ("nbs", "site"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("cifar10"))
    shutil.copy(ROOT / "settings.ini", tmp_path / "settings.ini")
    for name, value in (
        ("ROOT", str(tmp_path)),
        ("OFFLINE", "1"),
        ("EXPERIMENTS", "normflow_vi.experiments.vae_cifar"),
    ):
        monkeypatch.setenv(f"NORMFLOW_VI_{name}", value)
    monkeypatch.delenv("NORMFLOW_VI_DATA", raising=False)
    return tmp_path


def test_without_the_images_only_runs_with_a_record_are_planned(bare, monkeypatch):
    assert plan("smoke") == plan("quick") == []
    kept = _all_runs("quick")[1]
    Record(kept, {"nll": -300.0}).save(records_root("quick"))
    assert plan("quick") == plan("quick", "mnist") == [kept]
    asked = []
    monkeypatch.setattr(vae_cifar, "find", lambda source, download: asked.append(download))
    assert plan("smoke") == _all_runs("smoke") and asked == [False], "what lies here is not downloaded"


@pytest.mark.parametrize(
    "profile, data, downloads", [("quick", "auto", 1), ("quick", "mnist", 0), ("smoke", "auto", 0)]
)
def test_downloads_happen_for_runs_that_lack_a_record_only(bare, monkeypatch, profile, data, downloads):
    asked = []

    def absent(source, download):
        asked.append(download)
        raise vae_cifar.DataNotFound("nowhere")

    monkeypatch.setattr(vae_cifar, "find", absent)
    assert plan(profile, data) == [] and sum(asked) == downloads
    for run in _all_runs(profile):
        Record(run, {"nll": -300.0}).save(records_root(profile))
    asked.clear()
    assert plan(profile, data) == _all_runs(profile) and sum(asked) == 0


def test_the_page_says_that_it_was_not_run(bare):
    experiment = experiments.get("vae_cifar")
    manifest = notebooks.draw(make_plan(experiment, "smoke"))
    assert manifest.good and set(manifest.products) == set(experiment.products), manifest.cause
    assert (
        "not run: CIFAR-10 was not found"
        in (execution_folder(experiment.notebook, "smoke") / "notebook.ipynb").read_text()
    )
