"""What an index costs: a continuously-indexed layer beside the flow that it wraps, one thread on one core.

    .venv/bin/python benchmarks/cif_step.py [--dim 40 --length 5 --batch 100]

A step is: draws of a standard normal, `length` autoregressive spline layers (residual masked
networks, `depth` hidden layers of `width` units, 8 bins), the mean of `log q(z) + |z|^2 / 2`, and its
gradients in all weights. There is no update. "indexed": each layer inside a `ContinuouslyIndexed` one
with an index of two numbers and networks of 10 + 10 units. "equal size": the flow without indices,
its networks as wide as makes the parameters as many. "tighter": the indexed flow with one further
index for each draw, which goes back through the flow, one variable after the other.
"""

import torch
from harness import arguments, interleaved, report

from normflow_vi.flows import CIF, NSF, Flow, ManyIndices

given = arguments(
    "time continuously-indexed layers", dim=40, length=5, width=32, depth=5, batch=100, rounds=15, turn=3
)


def network(width):
    return {"hidden": (width,) * given.depth, "residual": True}


def count(module):
    return sum(p.numel() for p in module.parameters())


def plain(width):
    return NSF(given.dim, given.length, "autoregressive", **network(width))


def turn_of(posterior):
    """A turn of steps of a flow."""
    parameters = list(posterior.parameters())

    def turn():
        for _ in range(given.turn):
            z, log_q = posterior.rsample_and_log_prob((given.batch,))
            value = (log_q + z.square().sum(-1) / 2).mean()
            torch.autograd.grad(value, parameters)

    return turn


torch.manual_seed(0)
inner = Flow(plain(given.width))
indexed = Flow(CIF(given.dim, given.length, index_dim=2, **network(given.width)))
width = given.width
while count(plain(width)) < count(indexed):
    width += 1
equal = Flow(plain(width))
flows = {"inner flow": inner, "indexed": indexed, f"equal size (width {width})": equal}
for name, flow in flows.items():
    print(f"  {name:<34} {count(flow):>9,} parameters")
candidates = {name: turn_of(flow) for name, flow in flows.items()}
candidates["indexed, tighter bound (M = 1)"] = turn_of(ManyIndices(indexed, 1))
report(
    f"autoregressive splines, {given.length} layers, D = {given.dim}, batch {given.batch}",
    interleaved(candidates, given.rounds),
    per=given.turn,
)
