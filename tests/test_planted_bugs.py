"""A kit that cannot fail proves nothing: each of these bugs is planted, alone, and the contract's checks must notice it."""
import pytest
import torch

from normflow_vi.cases import CASES
from normflow_vi.contract import CHECKS, walk
from normflow_vi.transforms import planar

CASE = {case.name: case for case in CASES}


def divided_by_the_norm(u, w, c):
    alpha = (w * u).sum(-1)
    slope = torch.nn.functional.softplus(alpha + c)
    return u + ((slope - 1 - alpha) / w.norm(dim=-1))[..., None] * w, slope


# what is wrong: (row of the table, the function in its place, the wrong one)
BUGS = {
    "planar: the norm instead of its square": ("planar", "planar.constrain", divided_by_the_norm),
    "planar: log-det forgets the slope": ("planar", "planar.log_slope", lambda h, slope: (h * h + (1 - h * h)).log() + 0 * slope),
    "planar: log-det with |h| for h squared": ("planar", "planar.log_slope", lambda h, slope: (h.abs() + (1 - h * h) * slope).log()),
    "planar: log-det without gradient": ("planar", "planar.log_slope", lambda h, slope: (h * h + (1 - h * h) * slope).log().detach()),
    "planar: inverse takes a single step": ("planar", "planar.solve_slope", lambda target, slope, solve=planar.solve_slope: solve(target, slope, 0)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, monkeypatch):
    row, place, wrong = BUGS[bug]
    monkeypatch.setattr(f"normflow_vi.transforms.{place}", wrong)
    with pytest.raises((AssertionError, RuntimeError)): walk(CASE[row], [name for name in CHECKS if name != "graph"])          # tracing is slow, and sees no values
