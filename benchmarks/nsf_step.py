"""Neural spline flow as a posterior: forward and backward of `log q` with a simple target.

One thread on one core, one interleaved run.

    .venv/bin/python benchmarks/nsf_step.py --peers /tmp/peers --jax /tmp/peers-jax/bin/python

The peers' folders are made as `planar.py` says. A step is: 100 draws of a standard normal in 40
dimensions, K = 5 autoregressive layers of rational-quadratic splines (8 bins on [-3, 3]) in the
direction with fast draws, the mean of `log q(z) + |z|^2 / 2`, and its gradients with respect to all
weights (`--context C`: given 100 contexts of width C, and to them). There is no update: Adam is the
same for all.

A layer is a masked network with a first layer of 64 units and two residual blocks, and the
variables are shuffled from layer to layer; in zuko the masks do that, and nothing is moved. Each
library has its own starting weights and its own degrees of the hidden units. In a block zuko
rectifies once, the others twice; before the last layer ours rectifies and the others do not. zuko
squashes the parameters of a spline and gives no bin a least width. flowjax has no residual blocks
(five hidden layers instead) and trains the slopes at the two ends as well: 25 numbers a spline,
and 23 for the others. The naive loop is plain torch: modules with masked weights, splines by
`searchsorted` and `gather`, with the weights of ours; its values and gradients must be those of
ours in double precision. What the peers do cannot be compared number by number, so their work is:
parameters must be those of ours within 3 % (flowjax: 8 %), and the share of the masked weights that
live within an eighth of itself. With contexts the peers differ: ours feeds them to all hidden layers,
nflows and normflows to the first and to one in each block, zuko and flowjax to the first.

"indexed": each layer inside a continuously-indexed one, with an index of two numbers. "+ switch":
every product of the process sent to oneDNN by torch's global switch; left out where that would
round to bfloat16.
"""

from functools import partial

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
from torch.nn.functional import pad, softplus

from normflow_vi.flows import CIF, NSF
from normflow_vi.transforms.spline import FLOOR, OFFSET

given = arguments(
    "time steps of a neural spline flow",
    dim=40,
    width=64,
    blocks=2,
    length=5,
    bins=8,
    bound=3,
    context=0,
    batch=100,
    rounds=15,
    turn=5,
)
jax = Neighbour(given.jax) if given.jax else None
D, K, BINS, BOUND = given.dim, given.length, given.bins, float(given.bound)
C = given.context or None
HIDDEN = (given.width,) * (2 * given.blocks + 1)
torch.manual_seed(0)
CONTEXT = torch.randn(given.batch, C) if C else None


# ---- the candidates ----


def kept_by(layer):
    """The tensors of one spline layer of ours, network layer by network layer."""
    named = dict(layer.source.named_parameters())
    names = [f"{part}_{i}" for i in range(len(HIDDEN) + 1) for part in ("weight", "bias", "context")]
    return [named[name] for name in names if name in named]


def ours(make, **options):
    """Our flow, a chain of spline layers and permutations, by `NSF` or `CIF`."""
    torch.manual_seed(1)
    how = {"bins": BINS, "bound": BOUND, "residual": True, "context_dim": C}
    return make(D, K, mix="perm", hidden=HIDDEN, **how, **options)


def candidate_of(flow):
    """Our flow of spline layers as a candidate."""
    layers = flow.transforms[::2]
    masks = [mask for layer in layers for mask in layer.masks()]
    return Candidate(flow.forward, [p for layer in layers for p in kept_by(layer)], masks)


def unstack(layer):
    """The network of one spline layer as plain modules."""
    tensors = {name: p.detach()[0] for name, p in layer.source.named_parameters()}
    masks = [mask.reshape(mask.shape[-2:]) for mask in layer.masks()]
    parts = [(tensors[f"weight_{i}"], tensors[f"bias_{i}"], mask) for i, mask in enumerate(masks)]
    contexts = [tensors.get(f"context_{i}") for i in range(len(masks))]
    return nn.ModuleList(Masked(*part, context) for part, context in zip(parts, contexts, strict=True))


def run(network, h, context):
    """What a network with residual blocks says at `h`."""
    first, *blocks, last = network
    h = first(h, context)
    for enter, leave in zip(blocks[::2], blocks[1::2], strict=True):
        h = h + leave(enter(h.relu(), context).relu(), context)
    return last(h.relu(), context)


def knots(raw):
    """Knots on `[-BOUND, BOUND]`, from widths or heights before the softmax."""
    shares = FLOOR + (1 - FLOOR * BINS) * raw.softmax(-1)
    inner = BOUND * (2 * shares.cumsum(-1)[..., :-1] - 1)
    return pad(pad(inner, (1, 0), value=-BOUND), (0, 1), value=BOUND)


def plain_spline(z, theta):
    """`(y, log dy/dz)` as in Durkan et al. 2019, eqs. 4 and 5."""
    widths, heights, raw = theta.split([BINS, BINS, BINS - 1], -1)
    slopes = pad(softplus(raw + OFFSET) + FLOOR, (1, 1), value=1.0)
    x, y = knots(widths), knots(heights)
    value, inside = z.clamp(-BOUND, BOUND), z.abs() < BOUND
    k = torch.searchsorted(x.detach()[..., 1:-1].contiguous(), value.detach()[..., None], right=True)
    x0, y0, d0 = (t.gather(-1, k)[..., 0] for t in (x, y, slopes))
    x1, y1, d1 = (t.gather(-1, k + 1)[..., 0] for t in (x, y, slopes))
    xi, m = (value - x0) / (x1 - x0), (y1 - y0) / (x1 - x0)
    eta = 1 - xi
    beta = m + (d0 + d1 - 2 * m) * xi * eta
    y = y0 + (y1 - y0) * (m * xi**2 + d0 * xi * eta) / beta
    log_slope = 2 * (m / beta).log() + (d1 * xi**2 + 2 * m * xi * eta + d0 * eta**2).log()
    return torch.where(inside, y, z), torch.where(inside, log_slope, 0.0)


def naive(flow):
    """The same flow, one layer after the other."""
    model = nn.ModuleList(unstack(layer) for layer in flow.transforms[::2])
    orders = [mix.order[0] for mix in flow.transforms[1::2]]

    def apply(z, context=None):
        total = 0.0
        for network, order in zip(model, orders, strict=True):
            theta = run(network, z, context).unflatten(-1, (D, 3 * BINS - 1))
            z, log_slope = plain_spline(z, theta)
            z, total = z[..., order], total + log_slope.sum(-1)
        return z, total

    return Candidate(apply, model.parameters(), [layer.mask for network in model for layer in network])


def masks_in(module):
    """The masks of all masked layers, without the part of a context."""
    masks = [part.mask for part in module.modules() if hasattr(part, "mask")]
    return [mask[:, :D] if mask.shape[1] == D + (C or 0) else mask for mask in masks]


def nflows():
    from nflows.transforms import CompositeTransform, RandomPermutation
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Layer

    how = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND, "num_blocks": given.blocks}
    parts = [(Layer(D, given.width, C, **how), RandomPermutation(D)) for _ in range(K)]
    flow = CompositeTransform([part for pair in parts for part in pair])
    return Candidate(flow.forward, flow.parameters(), masks_in(flow))


def normflows():
    from normflows.flows import AutoregressiveRationalQuadraticSpline as Layer
    from normflows.flows import Permute

    how = {"num_bins": BINS, "tail_bound": BOUND, "init_identity": False}
    layers = nn.ModuleList(Layer(D, given.blocks, given.width, C, **how) for _ in range(K))
    mixes = [Permute(D) for _ in range(K)]

    def apply(z, context=None):
        total = 0.0
        for layer, mix in zip(layers, mixes, strict=True):
            z, log_det = layer.inverse(z, context)  # the direction of one pass
            z, total = mix.forward(z)[0], total + log_det
        return z, total

    return Candidate(apply, layers.parameters(), masks_in(layers))


def zuko():
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform as Layer
    from zuko.transforms import MonotonicRQSTransform

    law = {
        "univariate": partial(MonotonicRQSTransform, bound=BOUND),
        "shapes": [(BINS,), (BINS,), (BINS - 1,)],
    }
    network = {"hidden_features": (given.width,) * given.blocks, "residual": True}
    orders = [torch.randperm(D) for _ in range(K)]
    layers = nn.ModuleList(Layer(D, C or 0, order=order, **law, **network) for order in orders)

    def apply(z, context=None):
        total = 0.0
        for layer in layers:
            z, log_det = layer(context).call_and_ladj(z)
            total = total + log_det
        return z, total

    return Candidate(apply, layers.parameters(), masks_in(layers))


# ---- agreement, and equal work ----


def same_shape(slopes):
    """Gradients of ours in the shapes that the naive loop has."""
    return [
        slope[0].mT if slope.dim() == 3 else slope.reshape(slope.shape[-2:]).squeeze(0) for slope in slopes
    ]


def check_agreement():
    """Raise unless ours and the naive loop have one value and one set of gradients.

    The weights of the last layers are ten times those of the start, far from the identity.
    """
    flow = ours(NSF, kind="autoregressive").double()
    with torch.no_grad():
        for layer in flow.transforms[::2]:
            getattr(layer.source, f"weight_{len(HIDDEN)}").mul_(10)
    z = torch.randn(given.batch, D).double()
    context = None if CONTEXT is None else CONTEXT.double()
    value, slopes = candidate_of(flow).slopes(z, context)
    expected, others = naive(flow).slopes(z, context)
    error = gap([value, *same_shape(slopes)], [expected, *others])
    print(f"ours and the naive loop agree within {error:.1e} in double precision: value and all gradients")
    if not error < 1e-10:
        raise AssertionError(f"ours differs from the naive loop by {error:.1e}")


def check_work(name, found, expected):
    """Print the work of a candidate; raise unless it is that of ours, where it should be."""
    parts = [a / b for a, b in zip(found, expected, strict=True)]
    print(f"  {name:<12} {found[0]:>9,} parameters ({parts[0]:.3f}), {100 * found[1]:.1f} % of weights live")
    most = 0.08 if name == "flowjax" else 0.03
    if not C and (abs(parts[0] - 1) > most or abs(parts[1] - 1) > 0.125):
        raise AssertionError(f"{name}: its work is not that of ours: {parts}")


def products_of(candidate):
    """A turn of nothing but the products with the masked weights, and the two of each backward."""
    weights = [p.detach()[0] for p in candidate.parameters if p.dim() == 3 and len(p[0]) != C]
    entering = [torch.randn(given.batch, len(weight)) for weight in weights]

    def call():
        for _ in range(given.turn):
            for h, weight in zip(entering, weights, strict=True):
                y = h @ weight
                h.t() @ y
                y @ weight.t()

    return call


check_agreement()
flow = ours(NSF, kind="autoregressive")
mine = candidate_of(flow)
indexed = ours(CIF, index_dim=2, form="before")
peers = {"naive loop": naive(flow)}
peers |= with_peers({"nflows": nflows, "normflows": normflows, "zuko": zuko})
print("work, and as a part of that of ours:")
for name, candidate in {"ours": mine, **peers}.items():
    check_work(name, candidate.work(), mine.work())
timed = {"ours": mine, "ours, indexed": Candidate(indexed.forward, indexed.parameters())} | peers
turns = {name: one.turn(given.turn, (given.batch, D), CONTEXT) for name, one in timed.items()}
turns["(masked products alone)"] = products_of(mine)
candidates = dict(turns)
if rounds_to_bfloat16():
    print("torch's switch to oneDNN would round to bfloat16 on this processor: left out")
else:
    candidates |= {f"{name} + switch": onednn_everywhere(turn) for name, turn in turns.items()}
if jax:
    sizes = {"dim": D, "context": C or 0, "width": given.width, "layers": len(HIDDEN)}
    law = {"bins": BINS, "bound": BOUND}
    check_work("flowjax", jax.ask(build="iaf", length=K, batch=given.batch, **sizes, **law), mine.work())
    candidates["flowjax"] = jax.timed("iaf", given.turn)
found = interleaved(candidates, given.rounds)
report(
    f"autoregressive spline flow, K = {K}, D = {D}, {BINS} bins, hidden {HIDDEN}, context {C}, "
    f"batch {given.batch}, forward and backward, float32",
    found,
    per=given.turn,
)
for name in [name for name in ("ours", "ours + switch") if name in found]:
    parts_of(found, name, [other for other in found if not other.startswith(("ours", "("))])
parts_of(found, "ours, indexed", ["ours"])
