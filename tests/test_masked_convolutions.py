"""Autoregressive steps over maps of latents: what may be seen, what is, and the volume they change."""

import copy

import pytest
import torch

from normflow_vi.models.masked_convolutions import (
    InverseAutoregressiveMaps,
    MaskedConvolutions,
    build_mask,
)
from normflow_vi.transforms.made import hidden_degrees

HIDDEN = [(), (5,), (5, 6)]


def jacobian(function, z):
    """The derivatives of the maps `function(z)`, places in reading order, the maps of a place together."""
    found = torch.autograd.functional.jacobian(function, z)
    order = torch.arange(z.numel()).view(z.shape[1:]).permute(1, 2, 0).flatten()
    return found.reshape(z.numel(), z.numel())[order][:, order]


def stirred(network, by=0.3):
    """The network in double precision with all its numbers moved."""
    torch.manual_seed(3)
    network = network.double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(by * torch.randn_like(p))
    return network


def allowed(maps, h, w):
    """Which entry may depend on which by the order alone, `(D, D)`: those before it."""
    return torch.ones(maps * h * w, maps * h * w).tril(-1).bool()


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("maps", [1, 3])
def test_the_jacobian_is_strictly_triangular_before_and_after_training(maps, hidden):
    """Exact zeros, not small numbers."""
    network = MaskedConvolutions(maps, hidden).double()
    optimizer = torch.optim.Adamax(network.parameters(), 0.2)
    context = torch.randn(1, hidden[0], 4, 3).double() if hidden else None
    z = torch.randn(1, maps, 4, 3).double()
    for _ in range(4):
        for part in (0, 1):
            J = jacobian(lambda z, part=part: network(z, context)[part], z)
            assert (J[~allowed(maps, 4, 3)] == 0).all()
            assert J[allowed(maps, 4, 3)].any()
        sum(part.square().sum() for part in network(torch.randn(6, maps, 4, 3).double())).backward()
        optimizer.step()


def test_numbers_added_to_the_parameters_do_not_open_the_mask():
    """Not even a direction that does not start at zero where the mask is."""
    network = stirred(MaskedConvolutions(2, (4,)))
    J = jacobian(lambda z: network(z)[0], torch.randn(1, 2, 3, 3).double())
    assert (J.triu() == 0).all()


def test_training_leaves_masked_directions_at_zero():
    network = MaskedConvolutions(2, (4,))
    optimizer = torch.optim.Adamax(network.parameters(), 0.1)
    for _ in range(3):
        sum(part.square().sum() for part in network(torch.randn(6, 2, 4, 4))).backward()
        optimizer.step()
    own = torch.arange(2) + 1
    mask = build_mask(own, hidden_degrees(2, 4, least=0), strict=False)
    direction = network.hidden[0].parametrizations.weight.original1
    assert (direction[mask == 0] == 0).all()
    assert (direction[mask == 1] != 0).all()


def test_what_one_layer_sees_is_what_the_mask_says():
    """The same as a loop over places, maps and neighbours."""
    maps, h, w = 2, 3, 4
    network = stirred(MaskedConvolutions(maps, ()))
    J = jacobian(lambda z: network(z)[0], torch.zeros(1, maps, h, w).double())
    for place in range(h * w):
        for other in range(h * w):
            dy, dx = other // w - place // w, other % w - place % w
            for i in range(maps):
                for j in range(maps):
                    earlier = (dy, dx) in [(-1, -1), (-1, 0), (-1, 1), (0, -1)]
                    seen = earlier or (place == other and j < i)
                    assert (J[place * maps + i, other * maps + j] != 0) == seen


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_the_log_determinant_is_that_of_the_whole_jacobian(length, hidden):
    steps = stirred(InverseAutoregressiveMaps(2, length, hidden))
    z = torch.randn(1, 2, 3, 3).double()
    context = torch.randn(1, hidden[0], 3, 3).double() if hidden else None
    J = jacobian(lambda z: steps(z, context)[0], z)
    log_det = steps(z, context)[1].sum()
    torch.testing.assert_close(J.slogdet().logabsdet, log_det, atol=1e-10, rtol=1e-10)
    assert J.det() > 0
    assert abs(log_det) > 1e-3


def test_every_other_step_goes_the_opposite_way():
    """Two steps depend on entries before and after; the second alone on those after."""
    steps = stirred(InverseAutoregressiveMaps(2, 2, (5,)))
    second = copy.deepcopy(steps)
    with torch.no_grad():
        for p in second.steps[0].parameters():
            p.zero_()
        second.steps[0].last.parametrizations.weight.original1.fill_(1.0)
        second.steps[0].hidden[0].parametrizations.weight.original1.fill_(1.0)
    z = torch.randn(1, 2, 3, 3).double()
    J = jacobian(lambda z: second(z)[0], z)
    assert (J.tril(-1) == 0).all() and J.triu(1).any()
    J = jacobian(lambda z: steps(z)[0], z)
    assert J.tril(-1).any() and J.triu(1).any()


def test_the_context_is_no_latent_and_is_seen_everywhere():
    network = stirred(MaskedConvolutions(2, (4,)))
    z, context = torch.randn(1, 2, 3, 3).double(), torch.randn(1, 4, 3, 3).double()
    found = torch.autograd.functional.jacobian(lambda c: network(z, c)[0], context)[0, :, :, :, 0]
    assert found[1].flatten(2).abs().amax(-1).gt(0).all()  # of the second map, at every place
    middle = found[1, 1, 1]
    assert (middle[:, 2, 2] == 0).all()  # within the reach of the convolution after it


def test_without_a_scale_volumes_stay():
    steps = stirred(InverseAutoregressiveMaps(3, 1, (), scale=False))
    z = torch.randn(2, 3, 4, 4).double()
    moved, log_det = steps(z)
    assert (log_det == 0).all() and not torch.equal(moved, z)
    doubled, _ = steps(2 * z)
    zero, _ = steps(0 * z)
    torch.testing.assert_close(doubled - zero, 2 * (moved - zero))  # a linear map of z


def test_no_graph_breaks():
    steps = InverseAutoregressiveMaps(2, 2, (4,))
    z, context = torch.randn(3, 2, 4, 4), torch.randn(3, 4, 4, 4)
    compiled = torch.compile(steps, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, context), steps(z, context))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": 0}, "maps=0: expected an integer of at least 1"),
        ({"maps": 2, "length": 0}, "length=0: expected an integer of at least 1"),
        ({"maps": 2, "hidden": (0,)}, "hidden=0: expected an integer of at least 1"),
    ],
)
def test_one_clear_error(arguments, message):
    with pytest.raises(ValueError) as caught:
        InverseAutoregressiveMaps(**arguments)
    assert message in str(caught.value)
