"""Residual networks with normalised weights: shapes, a start from data, what is refused."""

import pytest
import torch

from normflow_vi.models.resnet import WeightNormDecoder, WeightNormEncoder, starting_from_data

MAPS = (2, 3, 4)


def layers_of(network):
    return [part for part in network.modules() if hasattr(part, "parametrizations")]


@pytest.mark.parametrize("pixels", [64, 81, 784])
def test_sides_that_are_no_multiple_of_eight_come_back(pixels):
    x = torch.rand(3, 2, pixels)
    features = WeightNormEncoder(pixels, out_dim=5, maps=MAPS)(x)
    assert features.shape == (3, 2, 5)
    assert WeightNormDecoder(5, pixels, units=6, maps=MAPS)(features).shape == x.shape
    twice = WeightNormDecoder(5, 2 * pixels, units=6, maps=MAPS, per_pixel=2)
    assert twice(features).shape == (3, 2, 2 * pixels)


@pytest.mark.parametrize(
    "make", [lambda: WeightNormEncoder(64, 5, MAPS), lambda: WeightNormDecoder(5, 64, 6, MAPS)]
)
def test_every_layer_starts_with_outputs_of_size_one(make):
    """The outputs of all layers are looked at in a second, ordinary pass over the same batch."""
    network = make()
    x = 3 + torch.randn(200, network.in_dim)
    with starting_from_data(network):
        network(x)
    seen = []
    for layer in layers_of(network):
        layer.register_forward_hook(
            lambda layer, given, output: seen.append(output.transpose(0, 1).flatten(1))
        )
    network(x)
    assert len(seen) == len(layers_of(network)) > 5
    for output in seen:
        live = output.std(1, correction=0) > 1e-2  # a unit that is constant on the batch stays so
        assert output.mean(1).abs().max() < 1e-3
        assert (output[live].std(1, correction=0) - 1).abs().max() < 1e-2


def test_outside_the_block_nothing_is_changed():
    network = WeightNormEncoder(64, 5, MAPS)
    x = torch.rand(20, 64)
    with starting_from_data(network):
        network(x)
    before = {name: p.clone() for name, p in network.named_parameters()}
    network(5 * x)
    torch.testing.assert_close(dict(network.named_parameters()), before, atol=0, rtol=0)
    assert network(x).requires_grad


def test_a_start_that_fails_leaves_no_hook():
    network = WeightNormEncoder(64, 5, MAPS)
    with pytest.raises(ValueError, match="in_dim"), starting_from_data(network):
        network(torch.rand(3, 63))
    before = {name: p.clone() for name, p in network.named_parameters()}
    network(torch.rand(20, 64))
    torch.testing.assert_close(dict(network.named_parameters()), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: WeightNormEncoder(63), "in_dim=63"),
        (lambda: WeightNormEncoder(64, out_dim=0), "out_dim=0"),
        (lambda: WeightNormEncoder(64, maps=(1, 2)), "maps="),
        (lambda: WeightNormEncoder(64, maps=(1, 2, 0)), "maps=0"),
        (lambda: WeightNormDecoder(0), "in_dim=0"),
        (lambda: WeightNormDecoder(3, 65, per_pixel=2), "per_pixel=2"),
    ],
)
def test_what_does_not_fit_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
