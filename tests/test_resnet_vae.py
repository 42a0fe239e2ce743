"""The residual VAE with layers of latents: its densities, its two passes, its start, its errors."""

import itertools
import math

import pytest
import torch

from normflow_vi.evaluate import log_marginal
from normflow_vi.models.likelihoods import ChannelLogistic, DiscretisedLogistic
from normflow_vi.models.resnet_vae import ResNetVAE
from normflow_vi.objectives import elbo, free_energy

SHAPE = (8, 8, 3)
KINDS = list(itertools.product(("diagonal", "linear", "iaf"), ("bidirectional", "bottom-up")))
each_kind = pytest.mark.parametrize(("posterior", "inference"), KINDS)


def small(posterior="iaf", inference="bidirectional", **sizes):
    torch.manual_seed(1)
    sizes = {"shape": SHAPE, "stages": 2, "depth": 2, "maps": 5, "latents": 2} | sizes
    return ResNetVAE(posterior=posterior, inference=inference, **sizes).double()


def some_images(count=4, shape=SHAPE, levels=256):
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(0, levels, (count, math.prod(shape)), generator=generator)
    return k.double() / (levels - 1)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


# Two ways to one bound


@each_kind
def test_training_and_evaluators_see_one_model(posterior, inference):
    """One draw through both passes is the draw and the weight that evaluators ask for."""
    model, x = small(posterior, inference), some_images()
    log_likelihood, kl = model.draw_terms(x, seeded())
    z, log_q = model.q(x).rsample_and_log_prob((1,), seeded())
    parts = model.log_joint(x, z)
    assert z.shape == (1, 4, model.dim) and kl.shape == (4, 4, 2)
    torch.testing.assert_close(parts["log_likelihood"][0], log_likelihood)
    torch.testing.assert_close((log_q - parts["log_prior"])[0], kl.sum((0, 2)))  # maps add up to the total


@each_kind
def test_all_that_it_has_learns(posterior, inference):
    model, x = small(posterior, inference), some_images()
    log_likelihood, kl = model.draw_terms(x, seeded())
    (kl.sum() - log_likelihood.sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_objectives_and_the_evaluator_take_it():
    model, x = small(), some_images()
    bound = elbo(lambda z: model.log_joint(x, z), model.q(x), samples=3, generator=seeded())
    F = free_energy(lambda z: model.log_joint(x, z), model.q(x), samples=3, anneal="kl", generator=seeded())
    torch.testing.assert_close(F.value, -bound.value)
    found = log_marginal(model.log_joint, model.q, x, samples=3, block=5, seed=5)
    assert (found.log_p > found.elbo).all()


@each_kind
def test_draws_of_one_image_do_not_depend_on_the_others(posterior, inference):
    model, x = small(posterior, inference), some_images()
    with torch.no_grad():
        z, _ = model.q(x).rsample_and_log_prob((2,), seeded())
        together = model.log_joint(x, z)
        alone = model.log_joint(x[2:3], z[:, 2:3])
    for name in together:
        torch.testing.assert_close(together[name][:, 2:3], alone[name])


# Densities


def fixed_noise(monkeypatch, noise):
    """Draws of the model become the entries of `noise` `(D,)`, in the order in which they are asked for."""
    from normflow_vi.models import resnet_vae

    place = [0]

    def draw(like, generator):
        first, place[0] = place[0], place[0] + like.numel()
        return noise[first : place[0]].view(like.shape)

    monkeypatch.setattr(resnet_vae, "_draw_noise", draw)


@each_kind
def test_log_q_is_the_change_of_variables_from_the_noise(posterior, inference, monkeypatch):
    """`log q(z) = log N(noise) - log |det dz/dnoise|`, with the whole Jacobian, over all layers at once."""
    model = small(posterior, inference, shape=(4, 4, 1), stages=1)
    for p in model.parameters():
        p.data.mul_(1.5)
    x, noise = some_images(1, (4, 4, 1)), torch.randn(model.dim).double()

    def push(noise):
        fixed_noise(monkeypatch, noise)
        z, log_q = model.q(x).rsample_and_log_prob()
        return z[0], log_q[0]

    J = torch.autograd.functional.jacobian(lambda noise: push(noise)[0], noise)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum() - J.slogdet().logabsdet
    torch.testing.assert_close(push(noise)[1], expected)


def test_the_prior_is_what_samples_come_from(monkeypatch):
    """Without a posterior: noise pushed down has the density that `log_joint` states."""
    model = small(shape=(4, 4, 1), stages=1)
    noise = torch.randn(model.dim).double()
    fixed_noise(monkeypatch, noise)
    kept = []
    original = model._descend

    def watch(top, choose):
        def note(i, prior, own):
            z = choose(i, prior, own)
            kept.append((z, prior))
            return z

        return original(top, note)

    monkeypatch.setattr(model, "_descend", watch)
    image = model.sample(1)
    z = torch.cat([part.flatten() for part, _ in kept[::-1]])
    normal = sum(torch.distributions.Normal(m, s.exp()).log_prob(z).sum() for z, (m, s) in kept)
    monkeypatch.setattr(model, "_descend", original)
    locations, log_prior = model._decode(z[None])
    torch.testing.assert_close(log_prior[0], normal)
    torch.testing.assert_close(model.likelihood.mean(locations), image)


@pytest.mark.parametrize("inference", ["bidirectional", "bottom-up"])
def test_a_tiny_model_sums_to_one(inference):
    """All 16 binary images of 2 by 2 pixels; the error is that of the weights."""
    model = small("iaf", inference, shape=(2, 2, 1), stages=1, latents=1, levels=2)
    everything = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
    with torch.no_grad():
        model.last.parametrizations.weight.original0.mul_(3.0)
    found = log_marginal(model.log_joint, model.q, everything, samples=3000, block=8000)
    p = found.log_p.exp()
    error = (p * found.error).square().sum().sqrt()
    assert abs(p.sum() - 1) < 4 * error
    assert error < 0.03 and p.max() > 2 * p.min()


def test_the_mean_divergence_is_never_below_zero():
    """A single draw may be; in the mean over draws each layer's total is a divergence given those above."""
    model, x = small(), some_images(2)
    with torch.no_grad():
        kl = torch.stack([model.draw_terms(x, seeded(seed))[1].sum((0, 2)) for seed in range(200)])
    assert (kl.mean(0) > -4 * kl.std(0) / 200**0.5).all()


def test_bottom_up_latents_do_not_depend_on_the_way_down():
    model, x = small(inference="bottom-up"), some_images()
    with torch.no_grad():
        before, _ = model.q(x).rsample_and_log_prob((), seeded())
        model.top.add_(1.0)
        for layer in model.layers:
            layer.down_first.bias.add_(0.5)
        after, _ = model.q(x).rsample_and_log_prob((), seeded())
    assert torch.equal(before, after)
    both = small(), some_images()
    with torch.no_grad():
        before, _ = both[0].q(x).rsample_and_log_prob((), seeded())
        both[0].top.add_(1.0)
        after, _ = both[0].q(x).rsample_and_log_prob((), seeded())
    assert not torch.equal(before, after)


# Likelihood


def test_channel_scales_are_the_emitted_ones_spread_over_the_pixels():
    shared, emitted = ChannelLogistic(3), DiscretisedLogistic()
    with torch.no_grad():
        shared.raw.copy_(torch.tensor([-4.0, -2.0, 0.0]))
    x, m = some_images(5, (2, 2, 3)).float(), torch.randn(5, 12)
    both = torch.cat([m, shared.raw.detach().repeat(4).expand(5, -1)], 1)
    torch.testing.assert_close(shared.log_prob(x, m), emitted.log_prob(x, both))
    torch.testing.assert_close(shared.mean(m), emitted.mean(both))
    drawn, again = (model.sample(out, seeded()) for model, out in ((shared, m), (emitted, both)))
    torch.testing.assert_close(drawn, again)


def test_the_levels_of_a_pixel_have_mass_one():
    shared = ChannelLogistic(1, levels=16).double()
    x = torch.arange(16).double()[:, None] / 15
    for location in (-2.0, 0.1, 3.0):
        mass = shared.log_prob(x, torch.full((16, 1), location).double()).exp().sum()
        assert abs(mass - 1) < 1e-12


# Start


@pytest.mark.parametrize("inference", ["bidirectional", "bottom-up"])
def test_the_start_gives_every_convolution_mean_zero_and_variance_one(inference):
    model, x = small(inference=inference), some_images(30)
    model.start(x, seeded())
    seen = []
    layers = [part for part in model.modules() if hasattr(part, "parametrizations")]
    for part in layers:
        part.register_forward_hook(lambda part, given, output: seen.append(output))
    with torch.no_grad():
        model._start_pass(x, seeded())
    assert len(seen) == len(layers)
    for output in seen:
        assert output.mean((0, 2, 3)).abs().max() < 1e-8
        assert (output.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-8


def test_a_started_step_is_near_the_identity():
    """The factor 0.1 before the outputs of the masked convolutions."""
    model, x = small(), some_images(30)
    model.start(x, seeded())
    z = torch.randn(30, 2, 4, 4).double()
    moved, log_det = model.layers[0].flow(z, torch.randn(30, 5, 4, 4).double())
    assert (moved - z).square().mean().sqrt() < 0.4 and log_det.abs().mean() < 0.3


def test_a_few_updates_go_a_long_way():
    torch.manual_seed(0)
    x = (0.5 + 0.2 * torch.randn(40, 1).clamp(-2, 2)).expand(40, 192).mul(255).round() / 255
    model = ResNetVAE(SHAPE, depth=1, maps=8, latents=2)
    model.start(x, seeded())
    optimizer = torch.optim.Adamax(model.parameters(), 0.01)
    values = []
    for _ in range(60):
        log_likelihood, kl = model.draw_terms(x, seeded())
        values.append(kl.sum((0, 2)).mean() - log_likelihood.mean())
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.85 * values[0]


# Sizes and errors


def test_sizes_up_to_the_papers():
    """Twenty layers of 160 maps; no memory is taken."""
    with torch.device("meta"):
        model = ResNetVAE(depth=20, maps=160, latents=32, hidden_layers=2)
    assert model.sides == (16,) * 20 and model.dim == 20 * 32 * 256
    assert 40e6 < sum(p.numel() for p in model.parameters()) < 43e6


@pytest.mark.parametrize("side", [5, 6, 7, 8])
def test_any_side_comes_back(side):
    model = small(shape=(side, side, 3), depth=1)
    assert model.sample(2).shape == (2, side * side * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth=0: expected an integer of at least 1"),
        ({"stages": 0}, "stages=0: expected an integer of at least 1"),
        ({"stages": 6}, "stages=6: expected fewer"),
        ({"maps": 0}, "maps=0: expected an integer of at least 1"),
        ({"latents": 0}, "latents=0: expected an integer of at least 1"),
        ({"hidden_layers": 0}, "hidden_layers=0: expected an integer of at least 1"),
        ({"length": 0}, "length=0: expected an integer of at least 1"),
        ({"levels": 1}, "levels=1: expected an integer of at least 2"),
        ({"posterior": "planar"}, "posterior='planar': allowed are diagonal, linear, iaf"),
        ({"inference": "up"}, "inference='up': allowed are bidirectional, bottom-up"),
        ({"shape": (8, 8)}, "shape=(8, 8): expected a square image's height, width and colours"),
        ({"shape": (8, 6, 3)}, "shape=(8, 6, 3): expected a square"),
    ],
)
def test_one_clear_error(arguments, message):
    with pytest.raises(ValueError) as caught:
        small(**arguments)
    assert message in str(caught.value)


def test_wrong_images_and_latents_are_named():
    model, x = small(), some_images()
    for call in (model.draw_terms, model.q, model.start, model.check):
        with pytest.raises(ValueError, match=r"x has shape \(4, 100\): expected \(N, 192\)"):
            call(x[:, :100])
    with pytest.raises(ValueError, match="last axis must be dim="):
        model.log_joint(x, torch.zeros(4, 7).double())
    with pytest.raises(ValueError, match="row 1, pixel 3"):
        model.check(x.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(0.5).double()))
