"""Inverse autoregressive flow behind an encoder: forward and backward of `log q` with a simple target.

One thread on one core, one interleaved run.

    .venv/bin/python benchmarks/iaf_step.py --peers /tmp/peers --jax /tmp/peers-jax/bin/python

The peers' folders are made as `planar.py` says. A step is: 100 draws of a standard normal in 40
dimensions, K = 8 steps of the flow given 100 contexts of width 400, the mean of `log q(z) + |z|^2 /
2`, and its gradients with respect to all weights and to the contexts, as an encoder needs them.
There is no update: Adam is the same for all.

A step of the flow is a masked network with one hidden layer of 320 units (`--layers 2`: two), and
the variables are reversed from step to step. Each library has its own starting weights, its own
degrees of the hidden units and its own law: gates in ours, in the naive loop and in pyro
(`stable=True`); scale and shift in zuko (a soft clip of the log-scale), nflows (softplus) and
flowjax (softplus). The naive loop is plain torch: modules with masked weights, one step after the
other, with the weights of ours; its values and gradients must be those of ours in double precision.
What the peers do cannot be compared number by number, so their work is: parameters, and the share
of the masked weights that live, must be those of ours within 3 % (`--layers 2`: nflows, pyro, zuko
and flowjax feed the context to the first hidden layer only; ours to both, which is more work).

"torch's products" and "oneDNN's": what `numerics.product` decides for. `+ switch`: every product of
the process sent to oneDNN by torch's global switch; left out where that would round to bfloat16.
"""

from unittest import mock

import torch
from harness import (
    Candidate,
    Masked,
    Neighbour,
    arguments,
    gap,
    interleaved,
    onednn_everywhere,
    parts_of,
    report,
    rounds_to_bfloat16,
    with_peers,
)
from torch import nn

from normflow_vi.numerics import product
from normflow_vi.transforms import InverseAutoregressive

given = arguments(
    "time steps of an inverse autoregressive flow",
    dim=40,
    width=320,
    layers=1,
    length=8,
    context=400,
    batch=100,
    rounds=15,
    turn=10,
)
jax = Neighbour(given.jax) if given.jax else None
D, C, K = given.dim, given.context, given.length
HIDDEN = (given.width,) * given.layers
torch.manual_seed(0)
CONTEXT = torch.randn(given.batch, C)


# ---- the candidates ----


def ours():
    torch.manual_seed(1)
    iaf = InverseAutoregressive(D, K, C, HIDDEN)
    masks = [mask.expand(K, *mask.shape[-2:]) for mask in iaf.masks()]
    return iaf, Candidate(iaf.forward, iaf.parameters(), masks)


def naive(iaf):
    """The same flow, one step and one layer after the other."""
    steps, masks = [], iaf.masks()
    for k in range(K):
        tensors = {name: p.detach()[k] for name, p in iaf.source.named_parameters()}
        layers = []
        for i, mask in enumerate(masks):
            mask = mask.expand(K, *mask.shape[-2:])[k]
            parts = (tensors[f"weight_{i}"], tensors[f"bias_{i}"], mask, tensors.get(f"context_{i}"))
            layers.append(Masked(*parts))
        steps.append(nn.ModuleList(layers))
    model = nn.ModuleList(steps)

    def apply(z, context):
        total = 0.0
        for layers in model:
            h = z
            for layer in layers[:-1]:
                h = layer(h, context).relu()
            m, s = layers[-1](h, context).unflatten(-1, (D, 2)).unbind(-1)
            gate = s.sigmoid()
            z = gate * z + (1 - gate) * m
            total = total + nn.functional.logsigmoid(s).sum(-1)
        return z, total

    return Candidate(apply, model.parameters(), [layer.mask for layers in model for layer in layers])


def orders():
    """The order of the variables in each step."""
    return [torch.arange(D).flip(0) if k % 2 else torch.arange(D) for k in range(K)]


def zuko():
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform

    made = [MaskedAutoregressiveTransform(D, C, order=o, hidden_features=HIDDEN) for o in orders()]

    def apply(z, context):
        total = 0.0
        for step in made:
            z, log_det = step(context).call_and_ladj(z)
            total = total + log_det
        return z, total

    networks = [layer for step in made for layer in step.hyper if hasattr(layer, "mask")]
    masks = [m[:, :D] if m.shape[1] == D + C else m for m in (layer.mask for layer in networks)]
    return Candidate(apply, [p for step in made for p in step.parameters()], masks)


def nflows():
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    def step():
        return MaskedAffineAutoregressiveTransform(
            D, given.width, context_features=C, num_blocks=given.layers - 1, use_residual_blocks=False
        )

    flow = CompositeTransform([part for _ in range(K) for part in (step(), ReversePermutation(D))])
    masks = [part.mask for part in flow.modules() if hasattr(part, "mask")]
    return Candidate(flow.forward, flow.parameters(), masks)


def pyro():
    from pyro.distributions.transforms import ConditionalAffineAutoregressive
    from pyro.nn import ConditionalAutoRegressiveNN

    networks = [ConditionalAutoRegressiveNN(D, C, list(HIDDEN), permutation=o) for o in orders()]
    steps = [ConditionalAffineAutoregressive(network, stable=True) for network in networks]

    def apply(z, context):
        total = 0.0
        for step in steps:
            layer = step.condition(context)
            y = layer(z)
            total = total + layer.log_abs_det_jacobian(z, y)  # remembered since the call
            z = y
        return z, total

    masks = [layer.mask for network in networks for layer in network.layers]
    masks = [m[:, C:] if m.shape[1] == D + C else m for m in masks]
    return Candidate(apply, [p for network in networks for p in network.parameters()], masks)


# ---- agreement, and equal work ----


def in_double(candidate, z, context):
    """Value and slope of the context in double precision; the candidate's module has been converted."""
    value, slopes = candidate.slopes(z.double(), context.double())
    return [value, slopes[-1]]


def check_agreement():
    """Raise unless ours and the naive loop have one value and one gradient of the contexts."""
    iaf, mine = ours()
    loop = naive(iaf.double())
    z = torch.randn(given.batch, D)
    error = gap(in_double(mine, z, CONTEXT), in_double(loop, z, CONTEXT))
    print(f"ours and the naive loop agree within {error:.1e} in double precision")
    if not error < 1e-10:
        raise AssertionError(f"ours differs from the naive loop by {error:.1e}")


def check_work(name, found, expected):
    """Print the work of a candidate; raise unless it is that of ours, where it should be."""
    parts = [a / b for a, b in zip(found, expected, strict=True)]
    print(f"  {name:<12} {found[0]:>9,} parameters ({parts[0]:.3f}), {100 * found[1]:.1f} % of weights live")
    if given.layers == 1 and max(abs(part - 1) for part in parts) > 0.03:
        raise AssertionError(f"{name}: its work is not that of ours: {parts}")


def products_of(library):
    """A decorator like `harness.torch_products`, for either library."""

    def decorate(function):
        def call(*arguments):
            with mock.patch.object(product, "product_library", lambda: library):
                return function(*arguments)

        return call

    return decorate


def context_products():
    """A turn of nothing but the products of the contexts with their weights, and the two of each backward."""
    for _ in range(given.turn):
        for weight in iaf.source.context_0.detach():
            y = CONTEXT @ weight
            CONTEXT.t() @ y
            y @ weight.t()


def turn_of(candidate):
    """A turn of steps."""
    return candidate.turn(given.turn, (given.batch, D), CONTEXT)


check_agreement()
iaf, mine = ours()
peers = {"naive loop": naive(iaf)} | with_peers({"zuko": zuko, "nflows": nflows, "pyro": pyro})
print("work, and as a part of that of ours:")
for name, candidate in {"ours": mine, **peers}.items():
    check_work(name, candidate.work(), mine.work())
candidates = {
    "ours, torch's products": products_of("torch")(turn_of(mine)),
    "ours, oneDNN's": products_of("onednn")(turn_of(mine)),
}
switch = not rounds_to_bfloat16()
if not switch:
    print("torch's switch to oneDNN would round to bfloat16 on this processor: left out")
for name, peer in peers.items():
    candidates[name] = turn_of(peer)
    if switch:
        candidates[f"{name} + switch"] = onednn_everywhere(turn_of(peer))
if switch:
    candidates["ours + switch"] = onednn_everywhere(turn_of(mine))
candidates["(products of the contexts alone)"] = context_products
if jax:
    sizes = {"dim": D, "context": C, "width": given.width, "layers": given.layers}
    work = jax.ask(build="iaf", length=K, batch=given.batch, **sizes)
    check_work("flowjax", work, mine.work())
    candidates["flowjax"] = jax.timed("iaf", given.turn)
found = interleaved(candidates, given.rounds)
report(
    f"inverse autoregressive flow, K = {K}, D = {D}, hidden {HIDDEN}, context {C}, batch {given.batch}, "
    "forward and backward, float32",
    found,
    per=given.turn,
)
for name in found:
    if name.startswith("ours"):
        parts_of(found, name, [other for other in found if not other.startswith(("ours", "("))])
