"""Several runs of the image model as one batched program: milliseconds of a step for 1, 8 and 32 of
them, with K planar layers; on a GPU also how many kernels a step launches.

.venv/bin/python benchmarks/joint.py --device cuda
"""

import argparse
import time

import torch
from models import image_trainer
from torch.profiler import ProfilerActivity, profile

from normflow_vi.utils.modules import undisturbed

parser = argparse.ArgumentParser(description="time joint runs of an image model")
parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
parser.add_argument("--lengths", type=int, nargs="+", default=(0, 10, 40, 80))
parser.add_argument("--runs", type=int, nargs="+", default=(1, 8, 32))
parser.add_argument("--steps", type=int, default=20)
given = parser.parse_args()
on_gpu = given.device == "cuda"
torch.set_num_threads(1)


def milliseconds(training):
    """The least wall time of a step."""
    least = float("inf")
    for _ in range(given.steps + 3):  # the first ones warm up, and the least is none of them
        start = time.perf_counter()
        training.advance()
        if on_gpu:
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return 1e3 * least


def launches(training):
    """How many kernels a step starts on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        training.advance()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if "LaunchKernel" in event.key)


print(
    f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'one thread of a CPU'}, "
    "batch 100 for each run"
)
for length in given.lengths:
    for runs in given.runs:
        training = image_trainer(length, range(runs), device=given.device)
        with undisturbed(1, training.device):
            took = milliseconds(training)
            print(
                f"K = {length:<3} {runs:>3} runs  {took:8.2f} ms a step  {took / runs:7.3f} ms a run"
                + (f"  {launches(training):>5} launches" if on_gpu else ""),
                flush=True,
            )
