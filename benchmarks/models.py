"""The models that the scripts time: the DLGM on random bits of MNIST's shape, and a planar flow on
U1; and the DLGM once more in plain torch, as one writes it without a library.
"""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

from normflow_vi.data import Batches, Split
from normflow_vi.engine.optimizer import Optimizer
from normflow_vi.engine.trainer import Trainer
from normflow_vi.experiments import energies
from normflow_vi.fitting import density_loss
from normflow_vi.models.vae import dlgm
from normflow_vi.objectives import free_energy
from normflow_vi.targets import U1

BITS = Split(
    (torch.rand(5000, 784, generator=torch.Generator().manual_seed(0)) < 0.13).to(torch.uint8), None, "static"
)
ADAM = Optimizer("adam", 1e-3, schedule="constant")


def image_loss(model, x, step, generator):
    return free_energy(lambda z: model.log_joint(x, z), model.q(x), anneal="kl", generator=generator)


def image_model(length, seed=0, family="planar"):
    torch.manual_seed(seed)
    return dlgm(torch.full((784,), 0.13), family, length)


def image_trainer(length, seeds, steps=10**6, device="cpu"):
    bits = BITS.to(device)
    return Trainer(
        [image_model(length, seed).to(device) for seed in seeds],
        image_loss,
        steps=steps,
        optimizer=ADAM,
        seeds=list(seeds),
        batches=[Batches(bits, 100, seed) for seed in seeds],
        log_every=100,
        device=device,
    )


def energy_trainer(length, seeds, samples=512, steps=10**6):
    return Trainer(
        [energies.build(length, seed) for seed in seeds],
        density_loss(U1.log_density, samples),
        steps=steps,
        optimizer=ADAM,
        seeds=list(seeds),
        log_every=100,
    )


def flow_of(model):
    return model.posterior.transform.transforms[1]


def paper_model(length, family="planar"):
    """The image model, its planar layers with the constraint of the paper, which is that of all
    libraries but one.
    """
    model = image_model(length, length, family)
    if length and family == "planar":
        flow_of(model).constraint = "paper"
    return model


def weights_of(model):
    """Weights of encoder, decoder, Gaussian and planar layers; the last ones times the scale of
    their head.
    """
    found = [p.detach() for p in model.parameters()]
    return (
        found if len(found) == 12 else [*found[:12], *(flow_of(model).source.scale * p for p in found[12:])]
    )


class Plain:
    """The image model in plain torch, from `weights_of` it; `emit(h)` makes of a context what
    `flow(emitted, z) -> (z, log_det)` needs, and `more` are the weights of both.
    """

    def __init__(self, weights, emit=None, flow=None, more=()):
        self.network = [nn.Parameter(p.clone()) for p in weights[:12]]
        self.emit = emit or (lambda h: h)
        self.flow = flow
        self.parameters = [*self.network, *more]

    def encode(self, x):
        """What the flow needs, mean, and logarithm of the standard deviation."""
        p = self.network
        h = linear(linear(x, *p[0:2]).relu(), *p[2:4]).relu()
        return self.emit(h), *linear(h, *p[10:12]).chunk(2, -1)

    def log_likelihood(self, x, z):
        p = self.network
        logits = linear(linear(linear(z, *p[4:6]).relu(), *p[6:8]).relu(), *p[8:10])
        return -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)

    def log_weights(self, x, noise, encoded=None):
        """`log p(x, z) - log q(z)` of the draws `z` made from `noise`."""
        emitted, shift, log_scale = encoded or self.encode(x)
        z = shift + log_scale.exp() * noise
        log_det = 0.0
        if self.flow:
            z, log_det = self.flow(emitted, z)
        return (
            self.log_likelihood(x, z)
            - 0.5 * (z * z).sum(-1)
            + 0.5 * (noise * noise).sum(-1)
            + log_scale.sum(-1)
            + log_det
        )

    def loss(self, x, noise=None):
        """The free energy of a batch; `noise` is drawn unless given."""
        return -self.log_weights(
            x, torch.randn(len(x), len(self.network[11]) // 2) if noise is None else noise
        ).mean()


def through(layers, z):
    """`z` through functions `z -> (z, log_det)`, one after the other."""
    total = 0.0
    for layer in layers:
        z, log_det = layer(z)
        total = total + log_det
    return z, total


def naive_layer(z, u, w, b, m=softplus):
    """One planar layer as the paper writes it, with parameters for each point; `m` of `w.u` is what
    `1 + w.u_hat` shall be.
    """
    alpha = (w * u).sum(-1, keepdim=True)
    u_hat = u + (m(alpha) - 1 - alpha) * w / (w * w).sum(-1, keepdim=True)
    h = torch.tanh((w * z).sum(-1, keepdim=True) + b)
    psi = (1 - h * h) * w
    return z + u_hat * h, torch.log(torch.abs(1 + (psi * u_hat).sum(-1)))


def naive_model(weights, m=softplus):
    """`Plain` with planar layers one by one, all emitted by one linear layer."""
    if len(weights) == 12:
        return Plain(weights)
    head = [nn.Parameter(p.clone()) for p in weights[12:]]
    D = len(weights[11]) // 2
    K = len(head[1]) // (2 * D + 1)

    def emit(h):
        u, w, b = linear(h, *head).split([K * D, K * D, K], -1)
        return list(
            zip(
                u.unflatten(-1, (K, D)).unbind(-2),
                w.unflatten(-1, (K, D)).unbind(-2),
                b.split(1, -1),
                strict=True,
            )
        )

    def flow(layers, z):
        return through([lambda z, layer=layer: naive_layer(z, *layer, m) for layer in layers], z)

    return Plain(weights, emit, flow, head)
