"""A whole training step of the image model, 784-400-400 and back, 40 latents, batches of 100:
diagonal posterior and K planar layers.

One thread on one core, one interleaved run.

    .venv/bin/python benchmarks/vae_step.py --peers /tmp/peers --jax /tmp/peers-jax/bin/python

The peers' folders are made as `planar.py` says. A step is: choose 100 of 50,000 images of MNIST's
shape, binarise them (`--dynamic 0`: they are bits already), forward, backward, update. Random
pixels do: no data set is needed.

Ours is a step of the `Trainer` as the MNIST experiment calls it, with its bookkeeping, weight
decay, rate schedule and fused Adam; once with the matrix products of `numerics.product` and once
with torch's own. What a log point costs beside the curve, which a long training meets every
thousandth step, is printed by itself. The peers' steps are bare: resident floats, an index,
`torch.bernoulli`, and Adam as torch makes it by default (`--fused 1`: fused). Their encoder,
decoder and likelihood are plain torch, the same for all; only the flow differs. The naive loop
writes one layer after the other, all emitted by one linear layer; pyro has a linear layer for each,
as its `ConditionalPlanar` asks for, and once more all by one; normflows has no planar layer with a
context: its parameters are shared by all images, which spares K x 81 outputs of the encoder and so
is less work. `+ switch`: every product of the process sent to oneDNN by torch's global switch. jax:
a program of its own, planar by `lax.scan` with all that can be taken out of it; flowjax:
`Planar(cond_dim=...)`, one linear network a layer, in a `Scan`; both jitted from the choice of the
batch to optax's Adam.

Agreement, before anything is timed: loss and gradients of one batch, same weights and noise,
against the naive loop in double precision (flowjax with its own constraint: against the naive loop
with that one); it raises beyond rounding.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import (
    Neighbour,
    arguments,
    interleaved,
    onednn_everywhere,
    parts_of,
    report,
    torch_products,
    with_peers,
)
from models import Plain, flow_of, image_loss, naive_model, paper_model, through, weights_of
from torch import nn
from torch.nn.functional import softplus

from normflow_vi.data import Batches, Split
from normflow_vi.engine.optimizer import Optimizer
from normflow_vi.engine.trainer import Trainer

given = arguments(
    "time training steps of an image model",
    images=50_000,
    batch=100,
    rounds=15,
    turn=10,
    dynamic=1,
    fused=0,
    length=-1,
)
jax = Neighbour(given.jax) if given.jax else None
D = 40
draw = torch.Generator().manual_seed(0)
GREY = torch.randint(256, (given.images, 784), dtype=torch.uint8, generator=draw) * (
    torch.rand(given.images, 784, generator=draw) < 0.2
)
SPLIT = Split(GREY, None, "dynamic") if given.dynamic else Split((GREY > 127).to(torch.uint8), None, "static")
FLOATS = SPLIT.images.float() / (255 if given.dynamic else 1)


# ---- the models: each from the weights of ours, layers of the flow as the paper has them ----


def apart(head, order):
    """Rows of a head `u, w, b` for all layers `(K (2 D + 1), ...)` -> `(K, 2 D + 1, ...)`, the
    parts of a layer in the `order` given.
    """
    K = len(head) // (2 * D + 1)
    u, w, b = head.split([K * D, K * D, K])
    parts = {"u": u.unflatten(0, (K, D)), "w": w.unflatten(0, (K, D)), "b": b[:, None]}
    return torch.cat([parts[name] for name in order], 1)


def together(layers, order):
    """The inverse of `apart`."""
    parts = dict(zip(order, layers.split([1 if name == "b" else D for name in order], 1), strict=True))
    return torch.cat([parts[name].flatten(0, 1) for name in "uwb"])


def naive(weights, **how):
    """A peer: its loss, its parameters, and how to bring its gradients into the order of ours."""
    model = naive_model(weights, **how)
    return model.loss, model.parameters, list


def normflows_planar(weights):
    import normflows

    K = len(weights[13]) // (2 * D + 1)
    layers = [normflows.flows.Planar((D,)).to(weights[0].dtype) for _ in range(K)]
    model = Plain(
        weights, None, lambda h, z: through(layers, z), [p for layer in layers for p in layer.parameters()]
    )
    return model.loss, model.parameters, None


class Emits(nn.Linear):
    """The network that pyro's layer asks for: `b`, `u` and `w` from a context."""

    def forward(self, h):
        return super().forward(h).split([1, D, D], -1)


def pyro_loss(plain, layers):
    """The free energy by pyro's distributions; `layers(h)`: the conditioned transforms."""
    from pyro.distributions import Normal, TransformedDistribution

    def loss(x):
        h, shift, log_scale = plain.encode(x)
        q = TransformedDistribution(Normal(shift, log_scale.exp()).to_event(1), layers(h))
        z = q.rsample()
        return (
            q.log_prob(z) - Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1) - plain.log_likelihood(x, z)
        ).mean()

    return loss


def pyro(weights):
    """A linear network for each layer, as `ConditionalPlanar` asks for."""
    from pyro.distributions.transforms import ConditionalPlanar

    matrices, biases = (apart(t, "buw") for t in weights[12:])
    networks = [Emits(400, 2 * D + 1) for _ in matrices]
    K = len(matrices)
    for network, weight, bias in zip(networks, matrices, biases, strict=True):
        network.weight.data.copy_(weight), network.bias.data.copy_(bias)
    layers = [ConditionalPlanar(network) for network in networks]
    plain = Plain(
        weights, more=[network.weight for network in networks] + [network.bias for network in networks]
    )

    def ordered(slopes):
        return [
            *slopes[:12],
            *(together(torch.stack(part), "buw") for part in (slopes[12 : 12 + K], slopes[12 + K :])),
        ]

    return pyro_loss(plain, lambda h: [layer.condition(h) for layer in layers]), plain.parameters, ordered


def pyro_one_head(weights):
    """All layers emitted by one linear network, which `ConditionalPlanar` is handed the pieces of."""
    from pyro.distributions.transforms import ConditionalPlanar

    plain = naive_model(weights)
    layer = ConditionalPlanar(lambda parts: parts)
    return (
        pyro_loss(plain, lambda emitted: [layer.condition((b, u, w)) for u, w, b in emitted]),
        plain.parameters,
        list,
    )


# ---- agreement ----


def ours_slopes(model, x):
    """Loss and gradients of ours, those of the planar head as if its scale were in the weights."""
    value = image_loss(model, x, 0, torch.Generator().manual_seed(1)).value
    slopes = list(torch.autograd.grad(value, list(model.parameters())))
    if len(slopes) > 12:
        slopes[12:] = [slope / flow_of(model).source.scale for slope in slopes[12:]]
    return value, slopes


def slopes_of(peer, *batch):
    """The same for a peer, which draws the same noise if it is given none."""
    loss, parameters, ordered = peer
    torch.manual_seed(1)
    value = loss(*batch)
    return value, ordered(torch.autograd.grad(value, parameters))


def slopes_of_jax(name, flow, weights, x, noise, folder):
    """The same for a program that is built, through a file, in the other process."""
    layered = flow == "flowjax" and len(weights) > 12
    path = str(Path(folder) / "model.npz")
    weights = [*weights[:12], *(apart(t, "wub") for t in weights[12:])] if layered else weights
    np.savez(path, x=x, noise=noise, images=SPLIT.images, **{f"p{i}": t for i, t in enumerate(weights)})
    jax.ask(build="image model", path=path, name=name, flow=flow, dynamic=given.dynamic)
    with np.load(f"{path}{name}.npz") as found:
        value = torch.from_numpy(found["value"])
        slopes = [torch.from_numpy(found[f"g{i}"]) for i in range(len(weights))]
    return value, [*slopes[:12], *(together(t, "wub") for t in slopes[12:])] if layered else slopes


def agree(name, found, expected, most=1e-4):
    """Raise unless loss and all gradients are those expected, up to rounding: the largest relative
    error in the norm.
    """
    error = max(
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True)
    )
    print(f"  {name:<34} loss and gradients of a batch are those of the naive loop within {error:.1e}")
    if not error < most:
        raise AssertionError(f"{name} differs from the naive loop by {error:.1e}")


# ---- turns ----


def engine(model):
    """A turn of the trainer's own steps with one point of the learning curves, and what a log point
    does besides.
    """
    trainer = Trainer(
        [model],
        image_loss,
        steps=10**6,
        optimizer=Optimizer("adam", 1e-3, weight_decay=0.1, warmup=500),
        seeds=[0],
        batches=[Batches(SPLIT, given.batch, 0)],
    )

    def turn():
        for _ in range(given.turn):
            trainer.advance()
        trainer.log()

    return turn, lambda: (trainer.examine(), trainer.state())


def bare(loss, parameters):
    """A turn of a plain loop."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True if given.fused else None)
    state = {"order": torch.empty(0, dtype=torch.int64)}

    def turn():
        for _ in range(given.turn):
            if len(state["order"]) < given.batch:
                state["order"] = torch.randperm(given.images)
            rows = state["order"][: given.batch]
            state["order"] = state["order"][given.batch :]
            x = torch.bernoulli(FLOATS[rows]) if given.dynamic else FLOATS[rows]
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()

    return turn


def peers_in_torch(K, weights):
    """What there is to compare with, by name."""
    makers = {"naive loop": naive} | (
        {"pyro": pyro, "pyro, one head": pyro_one_head, "normflows": normflows_planar} if K else {}
    )
    return with_peers({name: lambda make=make: make(weights) for name, make in makers.items()})


def compare(K, folder):
    """One interleaved run."""
    model = paper_model(K)
    x = SPLIT.pixels(torch.Generator().manual_seed(2), torch.arange(given.batch))
    weights = weights_of(model)
    noise = torch.randn(given.batch, D, generator=torch.Generator().manual_seed(1))

    def expected(**how):
        return slopes_of(naive([t.double() for t in weights], **how), x.double(), noise.double())

    exact = expected()
    candidates = {}
    besides = {}
    peers = peers_in_torch(K, weights)
    for name, how in {"ours": lambda call: call, "ours, torch's products": torch_products}.items():
        agree(name, how(ours_slopes)(model, x), exact)
        turn, settle = engine(paper_model(K))
        candidates[name] = how(turn)
        besides[name] = settle
    if K == 40:
        candidates["ours, NICE-perm"] = engine(paper_model(K, "nice-perm"))[0]
    for name, peer in peers.items():
        for label, how in {name: lambda call: call, f"{name} + switch": onednn_everywhere}.items():
            if peer[2]:
                agree(label, how(slopes_of)(peer, x), exact)
            candidates[label] = how(bare(*peer[:2]))
    for name, flow in {"jax": "scan", "flowjax": "flowjax"}.items() if jax else ():
        if not K and flow == "flowjax":
            continue
        how = {"m": lambda alpha: softplus(alpha).log1p()} if flow == "flowjax" else {}
        agree(name, slopes_of_jax(f"{name} {K}", flow, weights, x, noise, folder), expected(**how))
        candidates[name] = jax.timed(f"{name} {K}", given.turn)
    found = interleaved(candidates, given.rounds)
    report(
        f"{f'planar K = {K}' if K else 'diagonal posterior'}, whole training step, batch {given.batch}, "
        f"{'dynamic' if given.dynamic else 'static'} binarisation, float32",
        found,
        per=given.turn,
    )
    for mine in besides:
        parts_of(found, mine, [name for name in found if not name.startswith("ours")])
    report("a log point, beside the curve", interleaved({"ours": besides["ours"]}, 5, 1))


with tempfile.TemporaryDirectory() as folder:
    for K in (0, 10, 40, 80) if given.length < 0 else (given.length,):
        compare(K, folder)
