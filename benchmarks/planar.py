r"""Planar flows: a whole training step in two dimensions, and the stack alone with emitted
parameters.

One thread on one core, one interleaved run.

Ours needs nothing more than `make setup`. The peers go into two folders of their own, beside it:

    .venv/bin/python -m pip install --target /tmp/peers --no-deps normflows==1.7.3 pyro-ppl==1.9.2 \
        pyro-api==0.1.2 opt_einsum==3.4.0 zuko==1.6.0 nflows==0.14 umnn==1.71 tqdm
    .venv/bin/python -m venv /tmp/peers-jax
    /tmp/peers-jax/bin/python -m pip install jax==0.10.2 flowjax==19.1.2
    .venv/bin/python benchmarks/planar.py --peers /tmp/peers --jax /tmp/peers-jax/bin/python

What is not there is named and left out. zuko has no planar flow.

The training step: 1,000 draws, K = 32 layers, the energy U1, backward, Adam. All start at the same
weights, with the constraint of the paper (flowjax has another one; its weights are converted, so
that its layers are the same maps). Ours runs as `fit` runs it, with gradient clipping and one log
point in each turn of 50 updates ("fit's engine"), and bare: `free_energy` and torch's fused Adam.
The peers run bare, with Adam as torch (as optax) makes it by default; `--fused 1` gives those in
torch the fused Adam too. flowjax runs in the loop of the library, and bare.

The stack: K = 80, D = 40, batch 100, forward and backward, from one tensor as a network's head
emits it, `(100, 80 (2 D + 1))`, to gradients with respect to it and to `z`. normflows shares its
parameters among the batch: less work. The naive loop takes its layers apart by `unbind`; "by index"
writes `u[:, k]`, whose gradient is a whole tensor for every layer. Agreement: values, log-dets and
gradients against the naive loop, in double precision (flowjax: single).
"""

import math

import torch
from harness import Neighbour, arguments, gap, interleaved, parts_of, report, torch_only, with_peers
from models import naive_layer, through
from torch import nn

from normflow_vi.engine.optimizer import Optimizer
from normflow_vi.engine.trainer import Trainer
from normflow_vi.fitting import density_loss
from normflow_vi.flows import Flow
from normflow_vi.objectives import free_energy
from normflow_vi.targets import U1
from normflow_vi.transforms import Planar

given = arguments(
    "time planar flows", length=32, samples=1000, deep=80, dim=40, batch=100, rounds=15, fused=0
)
jax = Neighbour(given.jax) if given.jax else None
torch.manual_seed(0)


def for_flowjax(u, w, b):
    """`(..., 2 D + 1)` numbers `w, u, b` with which flowjax, whose constraint has one logarithm
    more, makes the same layers.
    """
    alpha = (w * u).sum(-1, keepdim=True)
    return torch.cat(
        [w, u + ((alpha.exp().expm1()).log() - alpha) * w / (w * w).sum(-1, keepdim=True), b[..., None]], -1
    )


class Emitted(nn.Module):
    """Stands where a transform has its tensors: hands out views of a head's output, as an amortised
    transform gets them.
    """

    def __init__(self, head, length, dim):
        super().__init__()
        self.head, self.length, self.dim = head, length, dim

    def forward(self, context=None, dtype=None):
        K = self.length
        D = self.dim
        u, w, b = self.head.split([K * D, K * D, K], -1)
        return {"u": u.unflatten(-1, (K, D)), "w": w.unflatten(-1, (K, D)), "b": b}


# ---- the training step ----


def ours_flow(u, w, b):
    layers = Planar(u.shape[-1], len(u), constraint="paper").to(u.dtype)
    for name, value in {"u": u, "w": w, "b": b}.items():
        getattr(layers.source, name).data.copy_(value)
    return Flow(layers)


def ours(u, w, b):
    flow = ours_flow(u, w, b)
    return (
        flow.transform.forward,
        list(flow.parameters()),
        lambda: free_energy(U1.log_density, flow(), samples=given.samples).value,
    )


def mean_energy(apply, u):
    """The loss of a flow on `N(0, I)`, written out."""

    def loss():
        z0 = torch.randn(given.samples, u.shape[-1])
        z, log_det = apply(z0)
        return (-0.5 * (z0 * z0).sum(-1) - math.log(2 * math.pi) - log_det - U1.log_density(z)).mean()

    return loss


def naive_flow(u, w, b):
    columns = [[nn.Parameter(part.clone()) for part in tensor] for tensor in (u, w, b)]
    layers = [lambda z, u=u, w=w, b=b: naive_layer(z, u, w, b) for u, w, b in zip(*columns, strict=True)]
    return (lambda z: through(layers, z)), sum(columns, []), mean_energy(lambda z: through(layers, z), u)


def normflows_flow(u, w, b):
    import normflows

    layers = [
        normflows.flows.Planar((u.shape[-1],), u=u_k[None].clone(), w=w_k[None].clone(), b=b_k[None].clone())
        for u_k, w_k, b_k in zip(u, w, b, strict=True)
    ]
    model = normflows.NormalizingFlow(
        normflows.distributions.DiagGaussian(u.shape[-1], trainable=False), layers, U1_for_normflows()
    )
    return (
        (lambda z: through(layers, z)),
        [getattr(layer, name) for name in "uwb" for layer in layers],
        lambda: model.reverse_kld(given.samples),
    )


def U1_for_normflows():
    class Target(nn.Module):
        def log_prob(self, z):
            return U1.log_density(z)

    return Target()


def pyro_flow(u, w, b):
    from pyro import distributions

    layers = [distributions.transforms.Planar(u.shape[-1]).to(u.dtype) for _ in u]
    for layer, *values in zip(layers, u, w, b, strict=True):
        for parameter, value in zip((layer.u, layer.w, layer.bias), values, strict=True):
            parameter.data.copy_(value)
    base = distributions.Normal(torch.zeros(u.shape[-1]), torch.ones(u.shape[-1]))

    def apply(z):
        return through(
            [lambda z, layer=layer: (y := layer(z), layer.log_abs_det_jacobian(z, y)) for layer in layers], z
        )

    def loss():
        for layer in layers:
            layer.clear_cache()
        q = distributions.TransformedDistribution(base, layers)
        z = q.rsample((given.samples,))
        return (q.log_prob(z) - U1.log_density(z)).mean()

    return apply, [getattr(layer, name) for name in ("u", "w", "bias") for layer in layers], loss


def updates(loss, parameters, fused):
    """A turn of bare updates."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=fused)

    def turn():
        for _ in range(TURN):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    return turn


def engine(flow):
    """A turn of the engine as `fit` uses it: clipping, one log point."""
    trainer = Trainer(
        [flow],
        density_loss(U1.log_density, given.samples),
        steps=TURN,
        optimizer=Optimizer("adam", 1e-3, clip=10.0, schedule="constant"),
        seeds=[0],
        log_every=TURN,
    )

    def turn():
        trainer.run()
        trainer.steps += TURN

    return turn


def answers(apply, parameters, z, gy, gl):
    """Values, log-dets, and the gradients of `sum gy y + sum gl log_det`, each family of parameters
    as one flat tensor.
    """
    y, log_det = apply(z)
    found = torch.autograd.grad((y * gy).sum() + (log_det * gl).sum(), [z, *parameters])
    return y, log_det, found[0], torch.cat([g.flatten() for g in found[1:]])


TURN = 50
K = given.length
u, w, b = (torch.empty(size).uniform_(-1, 1) for size in [(K, 2), (K, 2), (K,)])
makers = with_peers(
    {
        "naive loop": lambda: naive_flow,
        "normflows": lambda: __import__("normflows") and normflows_flow,
        "pyro": lambda: __import__("pyro") and pyro_flow,
    }
)
candidates = {"ours, fit's engine": engine(ours_flow(u, w, b))}
flow = ours(u, w, b)
candidates["ours, bare"] = updates(flow[2], flow[1], True)
flow = ours(u, w, b)
candidates["ours, torch reference, bare"] = torch_only(updates(flow[2], flow[1], True))
for name, make in makers.items():
    _, parameters, loss = make(u, w, b)
    candidates[name] = updates(loss, parameters, True if given.fused else None)
wide = [t.double() for t in (u, w, b)]
z = torch.randn(given.samples, 2, dtype=torch.float64).requires_grad_()
gy = torch.randn_like(z)
gl = torch.randn_like(z[:, 0])
expected = answers(*naive_flow(*wide)[:2], z, gy, gl)
agreement = {
    name: gap(answers(*make(*wide)[:2], z, gy, gl), expected)
    for name, make in {"ours": ours, **makers}.items()
    if name != "naive loop"
}
agreement["ours, torch"] = gap(torch_only(answers)(*ours(*wide)[:2], z, gy, gl), expected)
if jax:
    y, log_det, density = jax.ask(build="fit", params=for_flowjax(*wide), z=z, samples=given.samples)
    agreement["flowjax (values)"] = gap(
        (y, log_det, density), [t.detach() for t in (*expected[:2], U1.log_density(expected[0]))]
    )
    candidates |= {"flowjax, its loop": jax.timed("fit", TURN), "flowjax, bare": jax.timed("step", TURN)}
found = interleaved(candidates, given.rounds)
report(
    f"planar K = {K} on U1, {given.samples} draws, whole training step, float32, Adam of the peers: "
    f"{'fused' if given.fused else 'default'}",
    found,
    per=TURN,
)
for mine in ("ours, fit's engine", "ours, bare"):
    parts_of(found, mine, ["naive loop", "normflows", "pyro", "flowjax, its loop", "flowjax, bare"])
print(
    "agreement with the naive loop:", *(f"{name} {value:.1e}" for name, value in agreement.items()), sep="  "
)


# ---- the stack alone, emitted parameters ----


def emitted_ours(head, K, D):
    layers = Planar(D, K, constraint="paper").to(head.dtype)
    layers.source = Emitted(head, K, D)
    return layers.forward


def emitted_naive(head, K, D, apart=lambda t: t.unbind(1)):
    def apply(z):
        parts = Emitted(head, K, D)()
        layers = [
            lambda z, u=u, w=w, b=b: naive_layer(z, u, w, b[:, None])
            for u, w, b in zip(*(apart(parts[name]) for name in "uwb"), strict=True)
        ]
        return through(layers, z)

    return apply


def by_index(head, K, D):
    return emitted_naive(head, K, D, lambda t: [t[:, k] for k in range(K)])


def emitted_pyro(head, K, D):
    from pyro.distributions.transforms import ConditionalPlanar

    def apply(z):
        parts = Emitted(head, K, D)()
        emitted = zip(*(parts[name].unbind(1) for name in "buw"), strict=True)
        layers = [
            ConditionalPlanar(lambda context, b=b, u=u, w=w: (b[:, None], u, w)).condition(None)
            for b, u, w in emitted
        ]
        return through(
            [lambda z, layer=layer: (y := layer(z), layer.log_abs_det_jacobian(z, y)) for layer in layers], z
        )

    return apply


def once(apply, leaves, z, gy, gl):
    """A turn of forward and backward passes."""

    def turn():
        for _ in range(TURN):
            torch.autograd.grad(apply(z), leaves, (gy, gl))

    return turn


TURN = 10
K = given.deep
D = given.dim
B = given.batch
head = (math.sqrt(1 / D) * torch.randn(B, K * (2 * D + 1))).requires_grad_()
z = torch.randn(B, D, requires_grad=True)
gy = torch.randn(B, D)
gl = torch.randn(B)
wide = [t.detach().double() for t in (head, z, gy, gl)]
wide_head, wide_z = (t.requires_grad_() for t in wide[:2])
makers = {"naive loop": emitted_naive, "naive loop by index": by_index} | with_peers(
    {"pyro": lambda: __import__("pyro") and emitted_pyro}
)
candidates = {
    "ours, kernel": once(emitted_ours(head, K, D), (head, z), z, gy, gl),
    "ours, torch reference": torch_only(once(emitted_ours(head, K, D), (head, z), z, gy, gl)),
}
expected = answers(emitted_naive(wide_head, K, D), [wide_head], wide_z, *wide[2:])
agreement = {}
for name, make in {"ours": emitted_ours, **makers}.items():
    if name != "ours":
        candidates[name] = once(make(head, K, D), (head, z), z, gy, gl)
    agreement[name] = gap(answers(make(wide_head, K, D), [wide_head], wide_z, *wide[2:]), expected)
agreement["ours, torch"] = gap(
    torch_only(answers)(emitted_ours(wide_head, K, D), [wide_head], wide_z, *wide[2:]), expected
)
shared = with_peers(
    {
        "normflows, shared parameters": lambda: normflows_flow(
            *(t[0].detach() for t in Emitted(head, K, D)().values())
        )
    }
)
for name, (apply, parameters, _) in shared.items():
    candidates[name] = once(apply, [*parameters, z], z, gy, gl)
if jax:
    parts = Emitted(wide_head, K, D)()
    values = jax.ask(build="amortised", params=for_flowjax(**parts).detach(), z=z, gy=gy, gl=gl)
    agreement["flowjax (values, gradient of z)"] = gap(
        (*values[:2], values[3]), [t.detach() for t in expected[:3]]
    )
    candidates["flowjax"] = jax.timed("amortised", TURN)
found = interleaved(candidates, given.rounds)
report(
    f"planar stack alone, emitted parameters, K = {K}, D = {D}, batch {B}, forward and backward, float32",
    found,
    per=TURN,
)
parts_of(found, "ours, kernel", [name for name in found if name != "ours, kernel"])
print(
    "agreement with the naive loop:",
    *(f"{name} {value:.1e}" for name, value in agreement.items() if name != "naive loop"),
    sep="  ",
)
