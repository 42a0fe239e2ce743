"""Targets: their formulas, normalisers, samplers and errors, each against something computed another way."""

import math

import numpy as np
import pytest
import torch

from normflow_vi.targets import (
    ENERGIES,
    U1,
    lattice,
    log_mass,
    pinwheel,
    rings,
    two_circles,
    u1,
    u2,
    u3,
    u4,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


NORMALISED = {
    "lattice(1)": lattice(1),
    "lattice(9)": lattice(9),
    "lattice(16)": lattice(16),
    "wide lattice": lattice(4, sd=0.6),
    "rings": rings(),
    "circles": rings((0.8, 0.4), 0.04),
    "disc": rings((0.01,), 1.0),
}
each_normalised = pytest.mark.parametrize("target", NORMALISED.values(), ids=NORMALISED)


def bump(distance, width):
    "A Gaussian bump of height one."
    return np.exp(-0.5 * (distance / width) ** 2)


def naive(name, x, y):
    """Table 1 of Rezende and Mohamed as printed: exponentials, sums, logarithms."""
    w1 = np.sin(2 * np.pi * x / 4)
    w2 = 3 * bump(x - 1, 0.6)
    w3 = 3 / (1 + np.exp(-(x - 1) / 0.3))
    if name == "U1":
        radius = np.sqrt(x * x + y * y)
        ring = 0.5 * ((radius - 2) / 0.4) ** 2
        return ring - np.log(bump(x - 2, 0.6) + bump(x + 2, 0.6))
    if name == "U2":
        return 0.5 * ((y - w1) / 0.4) ** 2
    if name == "U3":
        return -np.log(bump(y - w1, 0.35) + bump(y - w1 + w2, 0.35))
    return -np.log(bump(y - w1, 0.4) + bump(y - w1 + w3, 0.35))


@pytest.mark.parametrize("name, energy", [("U1", u1), ("U2", u2), ("U3", u3), ("U4", u4)])
def test_energies_are_those_of_the_table(name, energy):
    z = np.random.default_rng(0).uniform(-4, 4, (20_000, 2))
    found = energy(torch.from_numpy(z)).numpy()
    assert np.allclose(found, naive(name, *z.T), rtol=1e-10, atol=1e-10)
    assert energy(torch.zeros(3, 5, 2)).shape == (3, 5)
    assert energy(torch.zeros(2)).dtype == torch.float32


def test_supports():
    """The wall is nothing inside and B(z) beyond; the box is the energy inside and nothing beyond."""
    inside = torch.tensor([[3.9, -4.0], [0.0, 1.0]], dtype=torch.float64)
    beyond = torch.tensor([[4.2, -4.1], [-5.0, 0.0]], dtype=torch.float64)
    for name, energy in (("U2", u2), ("U3", u3), ("U4", u4)):
        assert torch.equal(ENERGIES[name].log_density(inside), -energy(inside))
        assert torch.equal(ENERGIES[f"{name}_box"].log_density(inside), -energy(inside))
        found = -energy(beyond) - ENERGIES[name].log_density(beyond)
        expected = torch.tensor([0.5 * (4 + 1), 0.5 * 100], dtype=torch.float64)
        assert torch.allclose(found, expected, atol=1e-9)
        assert (ENERGIES[f"{name}_box"].log_density(beyond) == -math.inf).all()


def midpoint(target, half, points):
    """The logarithm of the integral by the midpoint rule, for comparison with Gauss-Legendre."""
    step = 2 * half / points
    axis = -half + step * (torch.arange(points, dtype=torch.float64) + 0.5)
    return torch.logsumexp(target.log_density(torch.cartesian_prod(axis, axis)), 0).item() + 2 * math.log(
        step
    )


@pytest.mark.parametrize("name", ENERGIES)
def test_normalisers(name):
    """By another rule of integration, at two resolutions: the finer one is closer, and close."""
    target = ENERGIES[name]
    half = 4.0 if "box" in name else 6.0
    errors = [abs(midpoint(target, half, points) - target.log_z) for points in (600, 1200)]
    assert errors[1] < 2e-5, errors
    assert errors[1] < errors[0] or errors[0] < 1e-7, errors


@pytest.mark.parametrize(
    "name, published",
    [
        ("U1", -1.8775),
        ("U2", -2.1129),
        ("U3", -2.6726),
        ("U4", -2.7247),
        ("U2_box", -2.0821),
        ("U3_box", -2.6417),
        ("U4_box", -2.6846),
    ],
)
def test_normalisers_to_four_digits(name, published):
    assert abs(-ENERGIES[name].log_z - published) < 6e-5


def test_a_narrow_window_misses_the_foot_of_the_wall():
    """Why the integral has to reach beyond 4.8: the check on the constants would notice."""
    assert log_mass(ENERGIES["U2"].log_density, (-4.0, 4.0)) < ENERGIES["U2"].log_z - 0.02


@each_normalised
def test_normalised_targets_have_mass_one(target):
    assert target.log_z == 0
    assert abs(midpoint(target, target.window + 3, 1500)) < 1e-6


@each_normalised
def test_samplers_follow_the_density(target):
    """Draws: their mean log-density is minus the entropy, and their moments are those of the density on a
    grid.
    """
    n = 60_000
    half = target.window + 3
    draws = target.sample(n, seeded()).double()
    points = 1200
    axis = -half + 2 * half / points * (torch.arange(points, dtype=torch.float64) + 0.5)
    z = torch.cartesian_prod(axis, axis)
    log_p = target.log_density(z)
    weights = log_p.exp() * (2 * half / points) ** 2
    for function in (
        lambda z: target.log_density(z),
        lambda z: z[:, 0],
        lambda z: z[:, 1] ** 2,
        lambda z: z[:, 0] * z[:, 1],
        lambda z: z.norm(dim=-1).cos(),
    ):
        values = function(draws)
        exact = (weights * function(z)).sum()
        error = values.std() / math.sqrt(n)
        assert abs(values.mean() - exact) < 5 * error, (values.mean(), exact)


def test_samplers_reach_every_mode():
    draws = lattice(16).sample(16_000, seeded())
    counts = ((draws.clamp(-3.9, 3.9) + 4) / 2).floor().long() @ torch.tensor([4, 1])
    assert (counts.bincount(minlength=16) - 1000).abs().max() < 5 * 31
    r = rings().sample(30_000, seeded()).norm(dim=-1)
    assert (torch.histc(r, 3, 0.5, 3.5) - 10_000).abs().max() < 5 * 82 + 30


@pytest.mark.parametrize("target", [*ENERGIES.values(), *NORMALISED.values()], ids=lambda target: target.name)
def test_values_and_gradients_are_finite_far_away(target):
    """Also under `vmap(grad)`, where flows are trained in batches, and in single precision."""
    directions = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8], [-0.8, 0.6], [1e-12, 1.0]])
    for dtype in (torch.float32, torch.float64):
        z = torch.cat([1e3 * directions, directions, torch.zeros(1, 2)]).to(dtype).requires_grad_()
        values = target.log_density(z)
        (gradient,) = torch.autograd.grad(values.sum(), z)
        assert gradient.isfinite().all()
        assert values.isfinite().all() or "box" in target.name
        found = torch.func.vmap(torch.func.grad(target.log_density))(z.detach())
        assert torch.allclose(found, gradient, rtol=1e-5)
        if "box" not in target.name and "rings" not in target.name:
            assert (gradient[:5] * z[:5]).sum(-1).lt(0).all(), "the way back is downhill"


@pytest.mark.parametrize("target", [*ENERGIES.values(), *NORMALISED.values()], ids=lambda target: target.name)
def test_targets_trace_to_one_graph(target):
    z = torch.randn(7, 2, dtype=torch.float64)
    found = torch.compile(target.log_density, fullgraph=True, backend="eager")(z)
    assert torch.allclose(found, target.log_density(z))


def test_gradients_are_those_of_the_values():
    z = (2 * torch.randn(20, 2, generator=seeded(), dtype=torch.float64)).requires_grad_()
    for target in [t for name, t in ENERGIES.items() if "box" not in name] + [lattice(9), rings()]:
        assert torch.autograd.gradcheck(target.log_density, z)


def test_two_circles():
    points, labels = two_circles(40_001, generator=seeded())
    assert points.shape == (40_001, 2)
    assert labels.bincount().tolist() == [20_001, 20_000]
    for label, radius in enumerate((0.8, 0.4)):
        mean_square = points[labels == label].square().sum(-1)
        assert (
            abs(mean_square.mean() - (radius**2 + 2 * 0.04**2))
            < 5 * mean_square.std() / len(mean_square) ** 0.5
        )
    density = rings((0.8, 0.4), 0.04)
    mine = density.log_density(points)
    its = density.log_density(density.sample(40_001, seeded(1)))
    assert abs(mine.mean() - its.mean()) < 5 * math.hypot(mine.std(), its.std()) / 40_001**0.5, (
        "the density said to be theirs"
    )
    assert (labels[:1000] == labels[1:1001]).float().mean() < 0.6, "the labels are in random order"


@pytest.mark.parametrize("rate", [0.25, 0.4])
def test_pinwheel(rate):
    """Turned back by the angle of its own label, each wing is the Gaussian it began as."""
    n = 50_000
    points, labels = pinwheel(n, rate=rate, generator=seeded())
    assert points.shape == (n, 2)
    assert labels.bincount().tolist() == [n // 5] * 5
    straight, _ = pinwheel(n, rate=0.0, generator=seeded())
    angle = 2 * math.pi * labels / 5
    first, second = straight.T
    x = 2 * (first * angle.cos() - second * angle.sin())
    t = 2 * (first * angle.sin() + second * angle.cos())
    for values, mean, sd in ((x, 1, 0.3), (t, 0, 0.05)):
        assert abs(values.mean() - mean) < 5 * sd / n**0.5
        assert abs(values.std() - sd) < 5 * sd / (2 * n) ** 0.5
    assert torch.allclose(points.norm(dim=-1), straight.norm(dim=-1), atol=1e-5), "the bend is a rotation"
    turned = torch.atan2(second, first) - torch.atan2(points[:, 1], points[:, 0])
    found = (turned - rate * x.exp() + math.pi) % (2 * math.pi)
    expected = torch.tensor(math.pi)
    assert torch.allclose(found, expected, atol=1e-3)


def test_generators_fix_the_draws():
    for draw in (
        lambda g: lattice(9).sample(10, g),
        lambda g: rings().sample(10, g),
        lambda g: pinwheel(10, generator=g)[0],
        lambda g: two_circles(10, generator=g)[0],
    ):
        assert torch.equal(draw(seeded(3)), draw(seeded(3)))
        assert not torch.equal(draw(seeded(3)), draw(seeded(4)))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: lattice(10), ["modes=10", "square"]),
        (lambda: lattice(0), ["modes=0"]),
        (lambda: lattice(9, sd=0), ["sd=0"]),
        (lambda: lattice(9.0), ["modes=9.0", "integer"]),
        (lambda: rings(()), ["radii=()"]),
        (lambda: rings((1.0, -2.0)), ["radii=-2.0"]),
        (lambda: rings(1.0), ["radii=1.0"]),
        (lambda: rings(sd=-1), ["sd=-1"]),
        (lambda: two_circles(10, radii=(1.0,)), ["radii", "two"]),
        (lambda: two_circles(0), ["n=0"]),
        (lambda: two_circles(10, sd=math.inf), ["sd=inf"]),
        (lambda: pinwheel(2.5), ["n=2.5"]),
        (lambda: pinwheel(10, classes=0), ["classes=0"]),
        (lambda: pinwheel(10, radial_sd=math.nan), ["radial_sd=nan"]),
        (lambda: pinwheel(10, rate=math.inf), ["rate=inf", "finite"]),
        (lambda: U1.sample(5), ["U1", "sampler"]),
        (lambda: lattice(9).sample(-1), ["n=-1"]),
        (lambda: U1.grid(0), ["points=0"]),
        (
            lambda: log_mass(U1.log_density, (1.0, 0.0)),
            ["edges=(1.0, 0.0)", "ascending"],
        ),
        (lambda: log_mass(U1.log_density, (0.0, 1.0), 0), ["nodes=0"]),
    ],
)
def test_bad_arguments_are_one_clear_error(call, words):
    with pytest.raises(ValueError) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value
