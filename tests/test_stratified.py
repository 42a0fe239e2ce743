"""Mixtures of flows as posteriors: the stratified bound, fits to targets known exactly, wrong arguments."""

import math

import pytest
import torch
from torch.distributions import constraints

from normflow_vi import Fit, Flow, fit
from normflow_vi.flows import CIF, GaussianMixture, RealNVP
from normflow_vi.models.mixture import MixtureOfFlows
from normflow_vi.objectives import free_energy
from normflow_vi.objectives.stratified import stratified_free_energy
from normflow_vi.transforms import PLU, Affine, BatchNorm, Chain, Planar

SHARES = torch.tensor([0.2, 0.3, 0.5])
MEANS = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, 5.0]])
SDS = torch.tensor([[0.5, 1.0], [1.0, 0.7], [0.8, 0.4]])
TARGET = GaussianMixture(SHARES, MEANS, torch.diag_embed(SDS**2))
QUICK = {"steps": 200, "learning_rate": 0.05, "draws": 60, "evaluation_draws": 2000}


def log_f(z):
    return TARGET.log_prob(z) + 3.0


def three(make=lambda: Affine(2), count=3, **options):
    return MixtureOfFlows([Flow(make()) for _ in range(count)], learn_weights=True, **options)


def row(shares=(0.2, 0.3, 0.5), make=lambda: RealNVP(2, 2, hidden=(4,))):
    "Flows side by side, not quite Gaussian, in double precision."
    torch.manual_seed(0)
    mixture = three(make, len(shares), weights=torch.tensor(shares)).double()
    with torch.no_grad():
        for k, part in enumerate(mixture.components):
            part.place.loc.fill_(2.0 * k - 2)
            for p in part.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return mixture


def bowl(z):
    return -0.5 * (z - 1).square().sum(-1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("batched", [True, False])
def test_agrees_with_ordinary_monte_carlo(batched):
    q = row()
    assert q.is_batched
    q.is_batched = batched
    for beta in (1.0, 0.3):
        strata = stratified_free_energy(bowl, q, 2000, beta, seeded(1))
        plain = free_energy(bowl, q, 6000, beta, generator=seeded(2))
        assert (strata.value - plain.value).abs() < 4 * strata.std_error.hypot(plain.std_error)
        assert strata.std_error < 0.8 * plain.std_error
        name = "free_energy"
        assert (strata.terms[name] - plain.terms[name]).abs() < 0.2


def test_the_standard_error_is_the_spread_of_repeats():
    q = row()
    each = [stratified_free_energy(bowl, q, 100, generator=seeded(seed)) for seed in range(150)]
    spread = torch.stack([one.value for one in each]).std()
    stated = torch.stack([one.std_error for one in each]).mean()
    assert abs(spread / stated - 1) < 4 / math.sqrt(2 * 150)
    assert stratified_free_energy(bowl, q, 1).std_error.isnan()


def test_gradients_are_those_of_finite_differences():
    "By the weights' logits and by a parameter of a component, with the same draws."
    q = row()
    tensors = [q.logits, *list(q.components[1].parameters())[-1:]]
    value = stratified_free_energy(bowl, q, 300, generator=seeded()).value
    slopes = torch.autograd.grad(value, tensors)
    assert all(slope.abs().max() > 1e-3 for slope in slopes)
    for tensor, slope in zip(tensors, slopes, strict=True):
        flat = tensor.data.view(-1)
        for i in range(min(3, len(flat))):
            ends = []
            for h in (1e-5, -1e-5):
                kept = flat[i].item()
                flat[i] += h
                ends.append(stratified_free_energy(bowl, q, 300, generator=seeded()).value.item())
                flat[i] = kept
            assert abs((ends[0] - ends[1]) / 2e-5 - slope.view(-1)[i]) < 1e-6


def test_the_weights_gradient_is_that_of_the_closed_form():
    "Unit Gaussians far apart: F = sum_k pi_k (log pi_k + c_k), and its derivative by the logits."
    parts = [Flow(Affine(2)) for _ in range(3)]
    for k, part in enumerate(parts):
        part.place.loc.fill_(50.0 * k)
    q = MixtureOfFlows(parts, SHARES, learn_weights=True).double()
    c = torch.tensor([1.0, -0.5, 2.0]).double()

    def target(z):
        k = (z[:, 0] / 50).round().long()
        return -0.5 * (z - 50 * k[:, None]).square().sum(-1) - math.log(2 * math.pi) - c[k]

    F = stratified_free_energy(target, q, 20, generator=seeded())
    (slope,) = torch.autograd.grad(F.value, q.logits)
    pi = q.log_weights.detach().exp()
    g = pi.log() + c
    assert torch.allclose(F.value, (pi * g).sum()) and F.std_error < 1e-12
    assert torch.allclose(slope, pi * (g - (pi * g).sum()))


def test_one_component_is_a_free_energy():
    q = row((1.0,))
    strata = stratified_free_energy(bowl, q, 50, 0.3, seeded())
    plain = free_energy(bowl, q.components[0], 50, 0.3, generator=seeded())
    assert torch.allclose(strata.value, plain.value) and torch.allclose(strata.std_error, plain.std_error)
    assert strata.terms.keys() == plain.terms.keys()


def test_draws_are_those_of_the_density():
    q = row()
    z, log_q = q.rsample_and_log_prob((4000,), seeded())
    assert torch.allclose(log_q, q.log_prob(z))
    of_component = q.responsibilities(z).mean(0) - SHARES
    assert of_component.abs().max() < 4 * 0.5 / math.sqrt(4000)


def near_the_modes(make=lambda: Affine(2)):
    "Components about as far off the modes as a mode is wide, with equal weights."
    mixture = three(make)
    for part, mean in zip(mixture.components, MEANS, strict=True):
        part.place.loc.copy_(mean + torch.tensor([0.7, -0.7]))
    return mixture


@pytest.fixture(scope="module")
def fitted():
    mixture = near_the_modes()
    return mixture, fit(mixture, log_f, log_z=3.0, modes="ignore", anneal=False, **QUICK)


def sorted_weights(mixture):
    return mixture.log_weights.detach().exp().sort().values


def test_reaches_log_z_on_a_known_mixture(fitted):
    mixture, result = fitted
    assert -4 * result.kl.std_error < result.kl.value < 0.01
    assert (sorted_weights(mixture) - SHARES).abs().max() < 0.01
    assert result.verdict == "good"
    with torch.no_grad():
        strata = stratified_free_energy(log_f, mixture, 1000, generator=seeded())
    assert abs(-strata.value - 3.0) < 0.01  # the mixture itself is in the units of the target


def test_the_mixture_and_the_flow_are_one_density(fitted, tmp_path):
    mixture, result = fitted
    assert result.q.base is mixture
    assert torch.allclose(result.q.log_prob(result.z), mixture.log_prob(result.z), atol=1e-4)
    again = Fit.load(result.save(tmp_path / "mixture.fit"))
    assert torch.equal(again.q.log_prob(result.z), result.q.log_prob(result.z))


def test_a_fit_goes_on_where_it_ended(fitted):
    mixture, result = fitted
    more = fit(
        mixture, log_f, log_z=3.0, modes="ignore", anneal=False, **QUICK | {"steps": 5, "learning_rate": 1e-4}
    )
    assert more.kl.value < 0.02


def test_modes_all_puts_a_component_at_each_mode():
    pytest.importorskip("sklearn")
    target = GaussianMixture(SHARES, 10 * MEANS, torch.diag_embed(SDS**2))
    mixture = three()
    result = fit(mixture, target.log_prob, log_z=0.0, modes="all", **QUICK | {"steps": 60})
    assert result.kl.value < 0.01 and result.verdict == "good"
    assert (sorted_weights(mixture) - SHARES).abs().max() < 0.01


def test_a_transform_restarts_and_a_support_go_with_it():
    "A target on the positive quadrant; a flow with a mixture as its base; two starts as one program."
    q = Flow(PLU(2), base=near_the_modes(lambda: Chain(Affine(2))), support=constraints.positive)

    def log_positive(z):
        y = z.log()
        return log_f(y) - y.sum(-1)

    start = {"anneal": False, "place": False, "modes": "ignore"}
    result = fit(q, log_positive, log_z=3.0, restarts=2, **start, **QUICK | {"steps": 100})
    assert result.q.sample((100,)).min() > 0
    assert result.kl.value < 0.2  # a lost mode would cost 0.22 or more
    assert len(result.bounds) == 2


def test_fixed_weights_stay():
    mixture = MixtureOfFlows([Flow(Affine(2)) for _ in range(3)], SHARES)
    fit(mixture, log_f, modes="ignore", **QUICK | {"steps": 5})
    assert torch.allclose(mixture.log_weights.exp(), SHARES)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: CIF(2, 1), {}, ["q.base.components[0]", "ContinuouslyIndexed"]),
        (lambda: Chain(Affine(2), BatchNorm(2)), {}, ["q.base.components[0]", "BatchNorm"]),
        (lambda: Affine(2), {"alpha": 0.5}, ["alpha=0.5", "ELBO"]),
        (lambda: Affine(2), {"gradient": "sticking-the-landing"}, ["gradient='sticking-the-landing'"]),
        (lambda: Affine(2), {"samples": torch.randn(20, 2)}, ["samples", "variational_mixture"]),
        (lambda: Affine(2), {"context": torch.randn(20, 2)}, ["context"]),
    ],
)
def test_what_does_not_fit_is_refused(make, options, words):
    mixture = three(make)
    mixture.components[0].place.loc.fill_(7.0)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    target = {} if "samples" in options else {"log_density": log_f}
    with pytest.raises(ValueError, match=".") as caught:
        fit(mixture, **target, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    for name, tensor in mixture.state_dict().items():
        assert torch.allclose(tensor, before[name], atol=1e-6), name


def test_a_mixture_deep_inside_is_refused():
    with pytest.raises(ValueError, match="q.base.base"):
        fit(Flow(Affine(2), base=Flow(Planar(2, 1), base=three())), log_f)
    with pytest.raises(ValueError, match="support="):
        fit(MixtureOfFlows([Flow(Affine(1), support=constraints.positive)]), lambda z: -z.sum(-1))
    with pytest.raises(TypeError, match="mixture"):
        stratified_free_energy(log_f, Flow(Affine(2)))
    with pytest.raises(ValueError, match="samples=0"):
        stratified_free_energy(log_f, three(), 0)
