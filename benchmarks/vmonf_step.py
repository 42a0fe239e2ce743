"""A mixture of masked autoregressive flows on images: forward and backward of its bound.

One thread on one core, one interleaved run.

    .venv/bin/python benchmarks/vmonf_step.py --peers /tmp/peers

The peers' folder is made as `planar.py` says. A step is that of the thesis on MNIST: five masked
autoregressive flows of five layers with 200 hidden units on 100 images of 784 numbers, a classifier
with 512 hidden units, the exact bound, and its gradients with respect to all weights. There is no
update: Adam is the same for all. Classifier and bound are ours for all candidates.

Each library has its own starting weights and its own law of the scale (ours bounds the log-scale
smoothly, zuko clips it softly, nflows takes a softplus). "naive loop": plain torch, modules with
masked weights, one layer after the other, with the weights of ours; its values and gradients must
be those of ours in double precision. For the peers the number of parameters must be that of ours
within 3 %.

"torch's products" and "oneDNN's": what `numerics.product` decides for; the naive loop and the peers
have torch's, and "+ switch" sends every product of the process to oneDNN by torch's global switch.
"""

import torch
from harness import Masked, arguments, gap, interleaved, onednn_everywhere, parts_of, report, with_peers
from torch import nn

from normflow_vi.flows import MAF, Flow
from normflow_vi.models.classifier import Classifier
from normflow_vi.models.mixture import MixtureOfFlows
from normflow_vi.objectives.enumerated import enumerated_elbo
from normflow_vi.transforms.base import bounded

given = arguments(
    "time steps of a mixture of masked autoregressive flows",
    components=5,
    length=5,
    dim=784,
    width=200,
    batch=100,
    rounds=7,
    turn=2,
)
COUNT, K, D = given.components, given.length, given.dim
torch.manual_seed(0)
X = torch.randn(given.batch, D)
CLASSIFIER = Classifier(D, COUNT, (512,))


class Candidate:
    """A function `log_probs(x) -> (n, components)`, and its parameters."""

    def __init__(self, log_probs, parameters):
        self.log_probs, self.parameters = log_probs, list(parameters)

    def slopes(self, x):
        """The bound, and its gradients with respect to all parameters."""
        log_q = CLASSIFIER(x.float()).to(x.dtype)
        value = enumerated_elbo(self.log_probs(x), log_q).mean()
        everything = [*self.parameters, *CLASSIFIER.parameters()]
        return value, torch.autograd.grad(value, everything)

    def turn(self):
        for _ in range(given.turn):
            self.slopes(X)


def ours():
    torch.manual_seed(1)
    mixture = MixtureOfFlows([Flow(MAF(D, K, hidden=(given.width,))) for _ in range(COUNT)])
    with torch.no_grad():
        mixture.logits.zero_()
    return mixture, Candidate(mixture.component_log_probs, mixture.parameters())


def unstack(maf):
    """The layers of one flow as plain modules, the last one first."""
    steps, masks = [], maf.masks()
    for k in reversed(range(K)):
        tensors = {name: p.detach()[k] for name, p in maf.source.named_parameters()}
        parts = [mask.expand(K, *mask.shape[-2:])[k] for mask in masks]
        steps.append(
            nn.ModuleList(
                Masked(tensors[f"weight_{i}"], tensors[f"bias_{i}"], m) for i, m in enumerate(parts)
            )
        )
    return nn.ModuleList(steps)


def naive(mixture):
    """The same mixture, one component, one layer after the other."""
    model = nn.ModuleList(unstack(part.transform) for part in mixture.components)

    def log_prob(steps, x):
        total = 0.0
        for layers in steps:
            h = x
            for layer in layers[:-1]:
                h = layer(h).relu()
            shift, s = layers[-1](h).unflatten(-1, (D, 2)).unbind(-1)
            log_scale = bounded(s, 5.0)
            x = (x - shift) * (-log_scale).exp()
            total = total - log_scale.sum(-1)
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1) + total

    def log_probs(x):
        each = torch.stack([log_prob(steps, x) for steps in model], -1)
        return each - torch.tensor(float(COUNT)).log()

    return Candidate(log_probs, model.parameters())


def zuko():
    from zuko.flows import MAF as ZukoMAF

    made = nn.ModuleList(ZukoMAF(D, transforms=K, hidden_features=(given.width,)) for _ in range(COUNT))

    def log_probs(x):
        return torch.stack([flow().log_prob(x) for flow in made], -1)

    return Candidate(log_probs, made.parameters())


def nflows():
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow as NFlow
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    def step():
        return MaskedAffineAutoregressiveTransform(D, given.width, num_blocks=0, use_residual_blocks=False)

    def flow():
        layers = [part for _ in range(K) for part in (step(), ReversePermutation(D))]
        return NFlow(CompositeTransform(layers), StandardNormal([D]))

    made = nn.ModuleList(flow() for _ in range(COUNT))
    return Candidate(lambda x: torch.stack([part.log_prob(x) for part in made], -1), made.parameters())


def check_agreement():
    """Raise unless ours and the naive loop have one value and gradients of one norm."""
    mixture, mine = ours()
    mixture.double()
    loop, x = naive(mixture), X.double()
    found = []
    for candidate in (mine, loop):
        value, slopes = candidate.slopes(x)
        found.append([value, torch.cat([s.flatten().double() for s in slopes]).norm()])
    error = gap(*found)
    print(f"ours and the naive loop agree within {error:.1e} in double precision")
    if not error < 1e-9:
        raise AssertionError(f"ours differs from the naive loop by {error:.1e}")


check_agreement()
mixture, mine = ours()
peers = {"naive loop": naive(mixture)} | with_peers({"zuko": zuko, "nflows": nflows})
count = sum(p.numel() for p in mine.parameters)
for name, peer in peers.items():
    part = sum(p.numel() for p in peer.parameters) / count
    print(f"  {name:<12} {part:.3f} of our {count:,} parameters")
    if abs(part - 1) > 0.03:
        raise AssertionError(f"{name}: its work is not that of ours: {part}")
candidates = {"ours": mine.turn, "ours + switch": onednn_everywhere(mine.turn)}
for name, peer in peers.items():
    candidates[name] = peer.turn
    candidates[f"{name} + switch"] = onednn_everywhere(peer.turn)
found = interleaved(candidates, given.rounds)
report(
    f"{COUNT} masked autoregressive flows, K = {K}, D = {D}, {given.width} hidden units, "
    f"batch {given.batch}, forward and backward, float32",
    found,
    per=given.turn,
)
for name in ("ours", "ours + switch"):
    parts_of(found, name, [other for other in found if not other.startswith("ours")])
