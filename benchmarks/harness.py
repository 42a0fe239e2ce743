"""Interleaved timing: candidates take turns; medians of processor time, minima of wall time."""
import statistics
import time

import torch

torch.set_num_threads(1)


def interleaved(candidates, rounds=15, warmup=2):
    """`{name: function}` -> `{name: (median processor ms, least wall ms)}`; every round calls each function once, in turn."""
    seen = {name: [] for name in candidates}
    for round_ in range(warmup + rounds):
        for name, call in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if round_ >= warmup: seen[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: (1e3 * statistics.median(cpu for cpu, _ in times), 1e3 * min(wall for _, wall in times)) for name, times in seen.items()}


def report(title, found, per=1):
    """Print a table; `per`: how many updates one call makes."""
    first = next(iter(found.values()))
    print(title)
    for name, (cpu, wall) in found.items():
        print(f"  {name:<34} {cpu / per:8.3f} ms processor   {wall / per:8.3f} ms wall   ratio {cpu / first[0]:.2f} / {wall / first[1]:.2f}")
