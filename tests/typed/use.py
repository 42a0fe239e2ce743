"""The public names as a user with a type checker uses them; it is checked, and never run."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

from normflow_vi import VAE, Chain, Estimate, Fit, Flow, Inverse, VMoNF, fit, load_data
from normflow_vi.data import Data
from normflow_vi.evaluate import LogMarginal, calibration, log_marginal
from normflow_vi.flows import CIF, IAF, MAF, NICE, NSF, FlowDistribution, RealNVP
from normflow_vi.models.likelihoods import Bernoulli
from normflow_vi.models.networks import MLP
from normflow_vi.models.posteriors import posterior
from normflow_vi.objectives import elbo, forward_kl, free_energy, importance_weighted
from normflow_vi.targets import ENERGIES
from normflow_vi.transforms import Affine, AffineCoupling, Planar, Sylvester, Transform


class Double(Transform):
    "A transform of one's own."

    def push(self, z: Tensor, **layer: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * z, z.new_zeros(z.shape[:-1])


def bend() -> Flow:
    chain = Chain(Affine(2), Inverse(Planar(dim=2, length=8)), AffineCoupling(2, hidden=(8,)), Double(2))
    y, log_det = chain.forward(torch.zeros(3, 2))
    back, log_det_back = Planar(2).inverse(y)
    gap: Tensor = (back + y).abs().max() + log_det.sum() - log_det_back.sum()
    kind: str = chain.inverse_kind
    dim: int = chain.dim
    print(kind.upper(), dim + 1, gap.item())
    return Flow(chain, support=constraints.positive)


def coupled() -> list[Flow]:
    layers = Chain(NICE(4, 2, scale=True), RealNVP(4, 2, hidden=(8, 8)), NSF(4, 2, bins=4))
    return [Flow(layers), Flow(IAF(4, 2)), Flow(Inverse(MAF(4, 2, context_dim=3))), Flow(CIF(4, length=2))]


def draw(q: Flow) -> Tensor:
    z, log_q = q.rsample_and_log_prob((100,), torch.Generator())
    q0: FlowDistribution = q()
    same: Tensor = q0.log_prob(z) - q.log_prob(z) + log_q
    return q.sample(10).mean() + q.rsample((3, 4)).sum() + same.sum() + q0.sample([2]).sum()


def learn(log_density: Callable[[Tensor], Tensor], samples: Tensor) -> Fit:
    q = Flow(
        Sylvester(dim=2, length=4, context_dim=None), base=MultivariateNormal(torch.zeros(2), torch.eye(2))
    )
    result = fit(q, log_density, steps=100, restarts=2, seed=1, log_z=0.0)
    result = fit(q, ENERGIES["U1"], draws=64)
    result = fit(q, samples=samples, validation=0.2)
    bound: Estimate | None = result.elbo
    if bound is not None:
        print(bound.value.item(), bound.std_error.item(), bound)
    if result.k_hat is not None and result.ess is not None:
        print(result.k_hat + result.ess)
    path: Path = result.save("fit.safetensors")
    print(result.summary().splitlines()[0], result.history.steps.tolist(), result.draws().shape)
    return Fit.load(path)


def bound(q: Flow, samples: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    first: Estimate = elbo(ENERGIES["U2"], q, samples=100, generator=generator)
    second = free_energy(lambda z: -z.square().sum(-1), q(), samples=10, beta=0.5)
    third = importance_weighted(ENERGIES["U2"], q, samples=5, outer=2)
    return first.value + second.value + third.value + forward_kl(q, samples).value


def model() -> LogMarginal:
    data: Data = load_data("digits", binarize="static", device="cpu")
    family = posterior("planar", 4, 2, context_dim=32)
    vae = VAE(MLP(784, (32,)), MLP(4, (32,), 784), family, likelihood=Bernoulli())
    x = data.test.pixels()
    pictures: Tensor = vae.sample(10) + vae.reconstruct(x[:10])
    found = log_marginal(vae.log_joint, vae.q, x, samples=50, seed=3)
    print(pictures.shape, found.nll, found.log_p.mean().item())
    return found


def calibrate(q: Flow) -> bool:
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    tested = calibration.sbc(prior, lambda theta: theta + torch.randn_like(theta), q, simulations=50)
    p_values: dict[str, Tensor] = tested.p_values
    print(tested.summary(), tested.words["distance"], tested.histogram.shape, p_values.keys())
    return tested.passed


def cluster(samples: Tensor) -> float:
    mixture: VMoNF = VMoNF(n_components=3, flow=RealNVP(2, 4), max_epochs=2).fit(samples.numpy())
    drawn, component = mixture.sample(10)
    score: float = mixture.score(drawn) + mixture.predict(drawn).sum() + component.sum()
    return score
