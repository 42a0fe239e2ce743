"""Interleaved timing: candidates take turns on one thread of one core; medians of processor time,
minima of wall time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import linear

from normflow_vi.numerics import compiling as kernels
from normflow_vi.numerics import product

torch.set_num_threads(1)


class Took(NamedTuple):
    """Seconds that a candidate measured itself, because it ran in a process of its own."""

    cpu: float
    wall: float


def interleaved(candidates, rounds=15, warmup=2):
    """`{name: function}` -> `{name: (median processor ms, least wall ms)}`; every round calls each
    function once, in turn.
    """
    seen = {name: [] for name in candidates}
    for round_ in range(warmup + rounds):
        for name, call in candidates.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            found = call()
            took = Took(time.process_time() - cpu, time.perf_counter() - wall)
            if round_ >= warmup:
                seen[name].append(found if isinstance(found, Took) else took)
    return {
        name: (1e3 * statistics.median(took.cpu for took in times), 1e3 * min(took.wall for took in times))
        for name, times in seen.items()
    }


def report(title, found, per=1):
    """Print a table; `per`: how many updates one call makes."""
    first = next(iter(found.values()))
    print(title)
    for name, (cpu, wall) in found.items():
        print(
            f"  {name:<34} {cpu / per:8.3f} ms processor   {wall / per:8.3f} ms wall   ratio "
            f"{cpu / first[0]:.2f} / {wall / first[1]:.2f}"
        )


def parts_of(found, mine, others):
    """Print the time of `mine` as a part of that of each of the `others` that ran, the form in
    which goals are stated.
    """
    print(
        f"  {mine} as a part of:",
        *(
            f"{name} {found[mine][0] / found[name][0]:.3f} / {found[mine][1] / found[name][1]:.3f}"
            for name in others
            if name in found
        ),
        sep="  ",
    )


def arguments(description, **numbers):
    """The options of a script that times released peers; pins this process, and every one it
    starts, to one core.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--peers", help="folder with the peers written in torch")
    parser.add_argument("--jax", help="python of an environment with flowjax")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if given.peers:
        sys.path.append(given.peers)
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    print(
        f"torch {torch.__version__}, one thread on core {core}"
        + ("" if kernels.has_numba() else "; without numba, every kernel is its torch reference")
    )
    return given


def with_peers(builders):
    """`{name: build()}` for those whose library is there; the others are named."""
    built = {}
    for name, build in builders.items():
        try:
            built[name] = build()
        except ImportError as missing:
            print(f"without {name}: {missing}")
    return built


def gap(found, expected):
    """The largest difference of two lists of tensors, relative to `1 + |expected|`."""
    return max(
        ((torch.as_tensor(a, dtype=b.dtype) - b).abs() / (1 + b.abs())).max().item()
        for a, b in zip(found, expected, strict=True)
    )


def torch_only(function):
    """`function` with every kernel switched off: the references in torch, which also run where
    numba is not installed.
    """

    def call(*given):
        with mock.patch.object(kernels, "has_numba", lambda: False):
            return function(*given)

    return call


def torch_products(function):
    """`function` with torch's own matrix products in place of oneDNN's."""

    def call(*given):
        with mock.patch.object(product, "product_library", lambda: "torch"):
            return function(*given)

    return call


def onednn_everywhere(function):
    """`function` with every single-precision product of the process routed to oneDNN, by the global
    switch of torch that does so on this kind of processor (others would round to bfloat16).
    """

    def call(*given):
        switch = torch.backends.mkldnn.matmul
        before = switch.fp32_precision
        switch.fp32_precision = "bf16"
        try:
            return function(*given)
        finally:
            switch.fp32_precision = before

    return call


def rounds_to_bfloat16():
    """Whether torch's switch to oneDNN costs precision on this processor."""
    a = torch.randn(64, 64)
    found = onednn_everywhere(torch.mm)(a, a)
    return gap([found], [a.double() @ a.double()]) > 1e-4


class Neighbour:
    """`flowjax_peer.py` in its own environment, on the same core: it sleeps until it is asked, and
    times itself.
    """

    def __init__(self, python):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "flowjax_peer.py")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
            "JAX_PLATFORMS": "cpu"
        }
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **question):
        self.process.stdin.write(
            json.dumps(
                {
                    name: value.tolist() if isinstance(value, torch.Tensor) else value
                    for name, value in question.items()
                }
            )
            + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"flowjax_peer.py ended, see above for the reason (question: {sorted(question)})"
            )
        return json.loads(answer)

    def timed(self, case, times):
        """A candidate for `interleaved`."""
        return lambda: Took(**self.ask(run=case, times=times))


class Candidate:
    """A flow `apply(z, context) -> (y, log_det)`, its parameters, and the masks of its weights."""

    def __init__(self, apply, parameters, masks=()):
        self.apply, self.parameters, self.masks = apply, list(parameters), list(masks)

    def work(self):
        """Parameters, and the share of the masked weights that live."""
        live = sum(mask.sum().item() for mask in self.masks)
        return sum(p.numel() for p in self.parameters), live / sum(mask.numel() for mask in self.masks)

    def slopes(self, z, context=None):
        """Value, and gradients with respect to all parameters and to the context, if there is one."""
        contexts = [] if context is None else [context.clone().requires_grad_()]
        y, log_det = self.apply(z, *contexts)
        value = (y.square().sum(-1) / 2 - log_det - z.square().sum(-1) / 2).mean()
        return value, torch.autograd.grad(value, [*self.parameters, *contexts])

    def turn(self, steps, shape, context=None):
        """A function that takes so many steps, each with fresh draws of a `shape`."""

        def call():
            for _ in range(steps):
                self.slopes(torch.randn(shape), context)

        return call


class Masked(nn.Linear):
    """A linear layer with a mask, and what a context adds to it."""

    def __init__(self, weight, bias, mask, context=None):
        super().__init__(*weight.shape)
        self.weight, self.bias = nn.Parameter(weight.T.clone()), nn.Parameter(bias.clone())
        self.register_buffer("mask", mask.T.to(weight.dtype))
        if context is not None:
            self.context = nn.Parameter(context.T.clone())

    def forward(self, h, context=None):
        y = linear(h, self.weight * self.mask, self.bias)
        return y + linear(context, self.context) if hasattr(self, "context") else y
