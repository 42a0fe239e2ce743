"""Fits of every family to every known target, drawn at random: how many stop, how many say nothing?

    .venv/bin/python benchmarks/never_stop.py [--fits 1000 --steps 300 --seed 0]

Families, lengths (2 to 16), targets (1 to 101 dimensions), supports and seeds are drawn; all else is the
defaults of `fit`. `--steps 0` lets each fit end by itself. A line is printed for each fit that raises, and
for each whose verdict or interval is no number; at the end, how many there were, and what the fits went
through: how often they went back, and their verdicts.
"""

import argparse
import random
from collections import Counter

import torch

from normflow_vi import Flow, fit
from normflow_vi.flows import IAF, MAF, NICE, NSF, RealNVP
from normflow_vi.targets import KNOWN
from normflow_vi.transforms import Affine, Chain, Planar, Radial, Sylvester

FAMILIES = {
    "affine": lambda dim, length: Affine(dim),
    "planar": lambda dim, length: Planar(dim, length),
    "radial": lambda dim, length: Radial(dim, length),
    "sylvester": lambda dim, length: Sylvester(dim, length),
    "nice": lambda dim, length: NICE(dim, length, "perm", scale=True),
    "realnvp": RealNVP,
    "iaf": lambda dim, length: Chain(IAF(dim, length), Affine(dim)),
    "iaf plain": lambda dim, length: IAF(dim, length, form="plain"),
    "maf": MAF,
    "nsf": lambda dim, length: Chain(NSF(dim, length), Affine(dim)),
}
SLOW = {"maf": 20, "sylvester": 50}  # dimensions up to which a family is tried: draws one after the other


def number_line(z):
    "A skewed density on the line, with the log-density of two normal ones."
    return torch.logaddexp(-0.5 * z.square().sum(-1), -2 * (z - 3).square().sum(-1))


def draw_case(generator):
    "A family, a length, a dimension, and a log-density without its answers."
    family, length = generator.choice(list(FAMILIES)), generator.choice((2, 4, 8, 12, 16))
    name = generator.choice(["line", *KNOWN])
    if name == "line":
        return ("planar", length, 1, name, number_line)
    target = KNOWN[name]()
    if target.dim > SLOW.get(family, 1000):
        family = "realnvp"
    return family, length, target.dim, name, target.hidden


def attempt(case, steps, seed):
    "`(fit, None)`, or `(None, error)`."
    family, length, dim, _, log_density = case
    torch.manual_seed(seed)
    try:
        return fit(Flow(FAMILIES[family](dim, length)), log_density, steps=steps, seed=seed), None
    except Exception as error:  # whatever stops a fit is what is looked for
        return None, error


def main():
    parser = argparse.ArgumentParser(description="how many fits stop?")
    for name, default in (("fits", 1000), ("steps", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator, stopped, silent, retreats, verdicts = random.Random(given.seed), 0, 0, 0, Counter()
    for number in range(given.fits):
        case = draw_case(generator)
        found, error = attempt(case, given.steps or None, number)
        if found is None:
            stopped += 1
            print(f"{number}: {case[:4]} stopped: {type(error).__name__}: {error}", flush=True)
            continue
        interval = found.log_z_interval or (0.0, 0.0)
        if found.verdict is None or not all(abs(end) < float("inf") for end in interval):
            silent += 1
            print(f"{number}: {case[:4]} {found.verdict} {interval}", flush=True)
        retreats += bool(found.retreats)
        verdicts[found.verdict] += 1
    counts = f"{stopped} stopped, {silent} without a number, {retreats} went back"
    print(f"{given.fits} fits: {counts}; {dict(verdicts)}")


if __name__ == "__main__":
    main()
