"""Two checkouts of this project side by side: does a rebuilding change what a training step costs?

    .venv/bin/python benchmarks/versions.py OLD NEW [--rounds 15]

`OLD` and `NEW` are folders, for example worktrees of two commits. Each gets a process of its own on the same
core; the two take turns, and the one that waits sleeps. The models are those of `planar.py`, `vae_step.py`
and `overhead.py`. Printed are the least and the median processor time of a turn, and the ratios new to old.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = {
    "planar K = 32, 1,000 draws": 10,
    "DLGM diagonal": 10,
    "DLGM planar K = 10": 6,
    "DLGM planar K = 80": 2,
}
ENGINE = {"engine: DLGM diagonal": 40, "engine: planar K = 8, 512 draws": 100}
CASES = STEPS | ENGINE  # what a turn does: so many updates


def load(*places):
    """The first of several `module:name` that this checkout has."""
    import importlib

    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(f"normflow_vi.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this checkout has none of {', '.join(places)}")


def make_trainer(case):
    """The trainer of a case, whatever this checkout calls its modules."""
    import torch

    trainer = load("engine.trainer:Trainer", "training:Trainer")
    optimizer = load("engine.optimizer:Optimizer", "training:Optimizer")("adam", 1e-3, schedule="constant")
    common = dict(steps=10**6, optimizer=optimizer, seeds=[0], log_every=100)
    torch.manual_seed(0)
    if "DLGM" not in case:
        length, draws = (32, 1000) if "32" in case else (8, 512)
        loss = load("fitting:density_loss")(load("targets:U1").log_density, draws)
        return trainer([load("experiments.energies:build")(length, 0)], loss, **common)
    length = int(case.rpartition("=")[2]) if "K" in case else 0
    bits = (torch.rand(5000, 784, generator=torch.Generator().manual_seed(0)) < 0.13).to(torch.uint8)
    split = load("data.batches:Split", "data:Split")(bits, None, "static")
    model = load("models.vae:dlgm", "vae:dlgm")(torch.full((784,), 0.13), "planar", length)
    bound = load("objectives:free_energy")

    def loss(model, x, step, generator):
        return bound(lambda z: model.log_joint(x, z), model.q(x), anneal="kl", generator=generator)

    batches = [load("data.batches:Batches", "data:Batches")(split, 100, 0)]
    return trainer([model], loss, batches=batches, **common)


def serve():
    """In a checkout's process: one turn of a case for each line on standard input; its seconds go out."""
    import torch

    torch.set_num_threads(1)
    trainers = {}
    for line in sys.stdin:
        case = line.strip()
        if case not in trainers:
            trainers[case] = make_trainer(case)
            for _ in range(3):
                trainers[case].advance()
        start = time.process_time()
        for _ in range(CASES[case]):
            trainers[case].advance()
        seconds = time.process_time() - start
        getattr(trainers[case], "curves", trainers[case]).window = []  # what a log point would do
        print(seconds, flush=True)


def start(folder):
    """The process of a checkout."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "NORMFLOW_VI_ROOT": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def take_turn(process, case):
    """Seconds of one turn."""
    process.stdin.write(case + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(old, new, rounds):
    """Print a row for each case."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sides = [start(old), start(new)]
    print("| case | old, ms an update: least, median | new | ratio of the least | ratio of the medians |")
    print("|---|---|---|---|---|")
    for case, updates in CASES.items():
        times = [[], []]
        for turn in range(rounds + 1):
            for side in (0, 1) if turn % 2 else (1, 0):
                times[side].append(1000 * take_turn(sides[side], case) / updates)
        least = [min(side[1:]) for side in times]
        middle = [statistics.median(side[1:]) for side in times]
        cells = [f"{a:.2f}, {b:.2f}" for a, b in zip(least, middle, strict=True)]
        ratios = f"{least[1] / least[0]:.3f} | {middle[1] / middle[0]:.3f}"
        print(f"| {case} | {cells[0]} | {cells[1]} | {ratios} |", flush=True)
    for process in sides:
        process.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("old", type=Path)
        parser.add_argument("new", type=Path)
        parser.add_argument("--rounds", type=int, default=15)
        given = parser.parse_args()
        compare(given.old.resolve(), given.new.resolve(), given.rounds)
