"""Wrong uses of the public names: each marked line must be refused with the code that it names."""

import torch
from torch import Tensor, nn

from normflow_vi import VAE, Chain, Fit, Flow, fit, load_data
from normflow_vi.evaluate import log_marginal
from normflow_vi.flows import NICE, NSF
from normflow_vi.models.networks import MLP
from normflow_vi.models.posteriors import posterior
from normflow_vi.objectives import elbo
from normflow_vi.targets import ENERGIES
from normflow_vi.transforms import Affine, Planar

q = Flow(Planar(dim=2, length=4))
x = torch.zeros(3, 2)

Planar(dim="2")  # refused: arg-type
Planar(2, context_dim=[3])  # refused: arg-type
Planar(2, layers=8)  # refused: call-arg
NICE(4, 2, context_dim=[3])  # refused: arg-type
NSF(4, 2, bin=4)  # refused: call-arg
Chain(Affine(2), nn.Linear(2, 2))  # refused: arg-type
Chain([Affine(2), Planar(2)])  # refused: arg-type
Flow(x)  # refused: arg-type
Flow(Affine(2), support="positive")  # refused: arg-type
text: str = q.log_prob(x)  # refused: assignment
q().rsample("ten")  # refused: arg-type
q().rsample((2,), seed=0)  # refused: call-arg
q.draw(10)  # refused: operator
fit(x, ENERGIES["U1"])  # refused: arg-type
fit(q, ENERGIES["U1"], 500)  # refused: call-arg, arg-type
fit(q, ENERGIES["U1"], steps="many")  # refused: arg-type
fit(q, samples=[[0.0, 1.0]])  # refused: arg-type
result = fit(q, ENERGIES["U1"])
print(result.bound)  # refused: attr-defined
print(result.elbo + 1.0)  # refused: operator
saved: Fit = result.save("fit")  # refused: assignment
elbo(ENERGIES["U1"], x)  # refused: arg-type
elbo(ENERGIES["U1"], q, sample=10)  # refused: call-arg
load_data(10)  # refused: arg-type
load_data("mnist", train=True)  # refused: call-arg
family = posterior("planar", 4, 2, context_dim=32)
VAE(MLP(784, 32), MLP(4, (32,), 784), family)  # refused: arg-type
vae = VAE(MLP(784, (32,)), MLP(4, (32,), 784), nn.Linear(32, 4))  # refused: arg-type
count: int = log_marginal(vae.log_joint, vae.q, x).nll  # refused: assignment


def choose(value: Tensor) -> Flow:
    return value  # refused: return-value
