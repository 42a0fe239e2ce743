"""Rational-quadratic splines: one call in each direction with its gradients.

One thread on one core, one interleaved run.

Ours needs nothing more than `make setup`. The peers go into two folders of their own, beside it:

    .venv/bin/python -m pip install --target /tmp/peers --no-deps nflows==0.14 zuko==1.6.0 umnn==1.71 tqdm
    .venv/bin/python -m venv /tmp/peers-jax
    /tmp/peers-jax/bin/python -m pip install jax==0.10.2 flowjax==19.1.2
    .venv/bin/python benchmarks/spline.py --peers /tmp/peers --jax /tmp/peers-jax/bin/python

What is not there is named and left out. 100 rows of 20 numbers, each with 8 bins of its own on [-3,
3] and, being normal with standard deviation 1.5, a chance of 1 in 22 to lie outside; gradients with
respect to the numbers and all parameters. The parameters are converted for each peer, outside the
time measured, so that all compute the same functions; flowjax trains the slopes at the two ends as
well, the others hold them at 1. Agreement: values, log-slopes and the gradient with respect to the
numbers against our torch reference, in double precision (flowjax: single).
"""

import math
from functools import partial

import torch
from harness import Neighbour, arguments, gap, interleaved, parts_of, report, torch_only, with_peers
from torch.nn.functional import pad

from normflow_vi.transforms.spline import FLOOR, OFFSET, Spline

given = arguments("time rational-quadratic splines", rows=100, columns=20, bins=8, rounds=15)
jax = Neighbour(given.jax) if given.jax else None
TURN = 50
BINS = given.bins
BOUND = 3.0
law = Spline(given.bins, 3.0)


def parts(theta):
    return theta.split([BINS, BINS, theta.shape[-1] - 2 * BINS], -1)


def nflows_spline():
    """The function, and the parameters it needs: it adds no offset to the slopes."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline as spline

    def apply(z, theta, inverse):
        return spline(z, *parts(theta), inverse=inverse, tail_bound=BOUND)

    return apply, lambda theta: torch.cat([*parts(theta)[:2], parts(theta)[2] + OFFSET], -1)


def zuko_spline():
    """The function, and the parameters it needs: it squashes them, has no least width, and takes
    the exponential for the slopes.
    """
    from zuko.transforms import MonotonicRQSTransform

    def apply(z, theta, inverse):
        transform = MonotonicRQSTransform(*parts(theta), bound=BOUND)
        return (transform.inv if inverse else transform).call_and_ladj(z)

    def unsquash(value, scale):
        return value / (1 - value.abs() * scale / -math.log(1e-3))

    def convert(theta):
        widths, heights, slopes = parts(theta)
        shares = [(FLOOR + (1 - FLOOR * BINS) * part.softmax(-1)).log() for part in (widths, heights)]
        centred = [part - (part.amax(-1, keepdim=True) + part.amin(-1, keepdim=True)) / 2 for part in shares]
        return torch.cat(
            [
                *(unsquash(part, 2) for part in centred),
                unsquash((torch.nn.functional.softplus(slopes + OFFSET) + FLOOR).log(), 1),
            ],
            -1,
        )

    return apply, convert


def ours(z, theta, inverse):
    return (law.pull if inverse else law.push)(z, theta)


def turn(apply, z, theta, gy, gl, inverse):
    """Forward and backward passes of one candidate."""

    def call():
        for _ in range(TURN):
            torch.autograd.grad(apply(z, theta, inverse), (z, theta), (gy, gl))

    return call


def answers(apply, z, theta, gy, gl, inverse):
    values = apply(z, theta, inverse)
    return *(value.detach() for value in values), *torch.autograd.grad(values, (z, theta), (gy, gl))


def leaf(t, dtype):
    return t.to(dtype).clone().requires_grad_()


torch.manual_seed(0)
shape = given.rows, given.columns
z = 1.5 * torch.randn(shape, dtype=torch.float64)
theta = torch.randn(*shape, law.size, dtype=torch.float64)
gy = torch.randn(shape)
gl = torch.randn(shape)
peers = with_peers({"nflows": nflows_spline, "zuko": zuko_spline})
for inverse in (False, True):
    single = partial(leaf, dtype=torch.float32)
    double = partial(leaf, dtype=torch.float64)
    candidates = {
        "ours, kernel": turn(ours, single(z), single(theta), gy, gl, inverse),
        "ours, torch reference": torch_only(turn(ours, single(z), single(theta), gy, gl, inverse)),
    }
    expected = torch_only(answers)(ours, double(z), double(theta), gy.double(), gl.double(), inverse)
    agreement = {
        "ours": gap(answers(ours, double(z), double(theta), gy.double(), gl.double(), inverse), expected)
    }
    for name, (apply, convert) in peers.items():
        candidates[name] = turn(apply, single(z), single(convert(theta)), gy, gl, inverse)
        agreement[name] = gap(
            answers(apply, double(z), double(convert(theta)), gy.double(), gl.double(), inverse)[:3],
            expected[:3],
        )
    if jax:
        slopes = pad(parts(theta)[2], (1, 1)) + OFFSET
        y, log_slope, _, gz = jax.ask(
            build="spline",
            theta=torch.cat([*parts(theta)[:2], slopes], -1).flatten(0, 1),
            z=z.flatten(),
            gy=gy.flatten(),
            gl=gl.flatten(),
            bound=BOUND,
            inverse=inverse,
        )
        agreement["flowjax"] = gap((y, log_slope, gz), [t.flatten() for t in expected[:3]])
        candidates["flowjax"] = jax.timed("pull" if inverse else "push", TURN)
    found = interleaved(candidates, given.rounds)
    report(
        f"spline, {z.numel()} numbers, {BINS} bins, {'inverse' if inverse else 'forward'} direction and "
        "its gradients, float32",
        found,
        per=TURN,
    )
    parts_of(found, "ours, kernel", [name for name in found if name != "ours, kernel"])
    print(
        "agreement with our torch reference:",
        *(f"{name} {value:.1e}" for name, value in agreement.items()),
        sep="  ",
    )
