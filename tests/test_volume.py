"""The least divergence of a map that preserves area, against cases that are known, and against the fits."""

import math

import pytest
import torch

from normflow_vi.evaluate.rearrangement import in_order, search_minimum, volume_floor
from normflow_vi.experiments import energies
from normflow_vi.results.store import Store, records_root
from normflow_vi.targets import ENERGIES

FLOORS = {"U1": (0.0090, 0.909), "U2": (0.0632, 0.874), "U3": (0.0464, 0.881), "U4": (0.0402, 0.958)}
each_energy = pytest.mark.parametrize("name", FLOORS)


def gaussian(sd_1=1.0, sd_2=1.0, angle=0.0, constant=0.0):
    "The logarithm of a Gaussian around (0.2, -0.1), turned by an angle, up to a constant."

    def log_density(z):
        x, y = z[..., 0] - 0.2, z[..., 1] + 0.1
        along, across = (
            math.cos(angle) * x + math.sin(angle) * y,
            math.cos(angle) * y - math.sin(angle) * x,
        )
        return constant - 0.5 * (along / sd_1) ** 2 - 0.5 * (across / sd_2) ** 2

    return log_density


def ridge(length, sd, bend=0.0):
    "Uniform for `|z1| < length / 2`, a Gaussian of deviation `sd` across; `bend` shears it into a wave."

    def log_density(z):
        across = z[..., 1] - bend * torch.sin(z[..., 0])
        inside = z[..., 0].abs() < length / 2
        return torch.where(inside, -0.5 * (across / sd) ** 2, -math.inf)

    return log_density


# Cases with a known answer


@pytest.mark.parametrize("length, sd", [(8.0, 0.4), (4.0, 0.4), (6.0, 0.3)])
def test_straight_ridge(length, sd):
    "(ln pi - 1) / 2 nats, at theta = sqrt(2) L sigma, whatever length and width."
    kl, size = volume_floor(ridge(length, sd), points=1100)
    assert abs(kl - (math.log(math.pi) - 1) / 2) < 1e-4
    assert abs(2 * math.pi * size**2 / (math.sqrt(2) * length * sd) - 1) < 1e-3


def test_a_shear_costs_nothing():
    straight, bent = (volume_floor(ridge(8.0, 0.3, bend), points=1100)[0] for bend in (0.0, 1.0))
    assert abs(straight - bent) < 1e-4


@pytest.mark.parametrize("covariance", [(1.0, 1.0, 0.0), (1.0, 0.4, 0.7), (0.6, 0.9, -1.2)])
def test_a_gaussian_is_reached(covariance):
    kl, size = volume_floor(gaussian(*covariance), 7.0)
    assert abs(kl) < 1e-6
    assert abs(size - math.sqrt(covariance[0] * covariance[1])) < 1e-3


def test_the_constant_does_not_matter():
    plain, shifted = (volume_floor(gaussian(1.0, 0.5, 0.3, c), 7.0, 400) for c in (0.0, 50.0))
    assert plain == pytest.approx(shifted, abs=1e-7)


@each_energy
def test_two_grids_agree(name):
    coarse, fine = (volume_floor(ENERGIES[name].log_density, points=points) for points in (800, 1600))
    assert abs(coarse[0] - fine[0]) < 1e-4
    assert abs(coarse[1] - fine[1]) < 1e-4
    assert fine == pytest.approx(FLOORS[name], abs=6e-4)


def test_larger_window_agrees():
    small, large = (volume_floor(ENERGIES["U1"].log_density, half, 1000)[0] for half in (5.5, 7.0))
    assert abs(small - large) < 1e-4


@each_energy
def test_the_search_ends_at_the_least_of_all_sizes(name):
    "Against a scan over a factor of fifty in the size of the Gaussian."
    heights, cell = in_order(ENERGIES[name].log_density, 5.5, 400)
    area = cell * torch.arange(len(heights) + 1, dtype=torch.float64)
    scanned = []
    for sd in torch.logspace(math.log10(0.05), math.log10(2.5), 200, dtype=torch.float64):
        theta = 2 * math.pi * sd**2
        mass = -torch.exp(-area / theta).diff()
        scanned.append((-1 - theta.log() - (mass * heights).sum()).item())
    least, _ = volume_floor(ENERGIES[name].log_density, points=400)
    assert least <= min(scanned) < least + 1e-3


# Its parts


def test_in_order_is_sorted_and_normalised():
    heights, cell = in_order(gaussian(), 7.0, 300)
    assert (heights.diff() <= 0).all()
    assert abs(heights.exp().sum() * cell - 1) < 1e-6
    area = cell * (torch.arange(len(heights), dtype=torch.float64) + 0.5)
    near = area < 20
    assert (heights + area / (2 * math.pi) + math.log(2 * math.pi))[near].abs().max() < 0.02


def test_no_cell_as_low_as_the_edge():
    heights, cell = in_order(gaussian(), 3.0, 300)
    assert abs(len(heights) * cell / (math.pi * 2.8**2) - 1) < 0.02  # the largest disc: around (0.2, -0.1)


def test_search():
    assert abs(search_minimum(lambda x: (x - 1.25) ** 2, -3.0, 4.0) - 1.25) < 1e-6


# What is refused


def test_too_small_a_window():
    with pytest.raises(ValueError, match="half_width=4.0, points=800: the grid is too small"):
        volume_floor(gaussian(), 4.0)


def test_too_few_points():
    with pytest.raises(ValueError, match="points=60: the grid is too coarse"):
        volume_floor(gaussian(), 7.0, points=60)


@pytest.mark.parametrize("half_width, points, name", [(-1.0, 800, "half_width"), (5.5, 1, "points")])
def test_bad_arguments_are_named(half_width, points, name):
    with pytest.raises(ValueError, match=name):
        volume_floor(gaussian(), half_width, points)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_density_without_mass_is_refused(value):
    with pytest.raises(ValueError, match="log_density has a total mass"):
        volume_floor(lambda z: torch.full(z.shape[:-1], value))


# Beside the fits


def fits_of(prefix):
    "The kept fits of the families whose names begin so, with their energy's name."
    fits = energies.best_fits(Store([records_root("quick")]))
    return [record for record in energies.all_records(fits) if record.run.flow.startswith(prefix)]


@each_energy
def test_no_nice_is_below_the_floor(name):
    "NICE preserves area, so only the error of its divergence can take it below."
    floor, _ = volume_floor(ENERGIES[name].log_density)
    mine = [record for record in fits_of("nice") if record.run.model == name]
    if not mine:
        pytest.skip("no kept fits")
    for record in mine:
        assert record.value("kl") > floor - 4 * record.std_error("kl"), record.run.slug


@each_energy
def test_long_planar_flows_are_below_the_floor(name):
    "So the check above can fail."
    floor, _ = volume_floor(ENERGIES[name].log_density)
    long = [r for r in fits_of("planar") if r.run.model == name and r.run.length == 32]
    if not long or long[0].run.profile != "paper":
        pytest.skip("no long fits")
    assert all(record.value("kl") + 4 * record.std_error("kl") < floor for record in long)
