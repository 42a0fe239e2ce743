"""Gradient estimators: their means against closed forms and integrals, their variances where they must
vanish, what they refuse.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal, constraints
from torch.func import functional_call, grad, vmap

from helpers import CASE
from normflow_vi import Chain, Flow
from normflow_vi.engine.runs import OneRun, StackedRuns
from normflow_vi.objectives import (
    elbo,
    forward_kl,
    free_energy,
    importance_weighted,
    renyi,
)
from normflow_vi.objectives.gradients import GRADIENTS, path_draws, stopped_log_prob
from normflow_vi.testing.contract import C
from normflow_vi.transforms import Affine, BatchNorm, Inverse, Planar
from normflow_vi.transforms.continuously_indexed import ContinuouslyIndexed
from normflow_vi.transforms.coupling import AffineCoupling

PLAIN, STICKING, DOUBLY = GRADIENTS
paths = pytest.mark.parametrize("gradient", [STICKING, DOUBLY])


class Loss(nn.Module):
    "A loss as a module, for the names of its parameters."

    def __init__(self, value, **parts):
        super().__init__()
        self.value = value
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *arguments):
        return self.value(self, *arguments)


def gradients(value, repeats, **parts):
    "`{parameter: (repeats, ...)}`: independent gradients of `value(module)`, whose submodules are `parts`."
    module = Loss(value, **parts)
    tensors = {name: p.detach() for name, p in module.named_parameters()}

    def one(_):
        return grad(lambda tensors: functional_call(module, tensors, ()))(tensors)

    return vmap(one, randomness="different")(torch.zeros(repeats))


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / math.sqrt(len(draws))


def agree(found, expected, sigmas=3.5):
    """Whether gradients by name agree with others, or with known values, within so many standard errors,
    and are not all zero.
    """
    for name, draws in found.items():
        mean, error = mean_and_error(draws)
        if name in expected:
            other = expected[name]
            if other.shape == draws.shape:
                other, more = mean_and_error(other)
                error = (error**2 + more**2).sqrt()
            assert ((mean - other).abs() <= sigmas * error + 1e-9).all(), (
                f"{name}: {mean} against {other}, error {error}"
            )


def gaussian(mean=0.5, scale=0.7, dim=1):
    q = Flow(Affine(dim)).double()
    with torch.no_grad():
        q.transform.source.shift.fill_(mean)
        q.transform.source.log_scale.fill_(math.log(scale))
    return q


def standard(z):
    return -0.5 * z.square().sum(-1)


SHIFT = "q.transform.source.shift"
LOG_SCALE = "q.transform.source.log_scale"


# Means: a Gaussian q against N(0, 1), where the gradient of the ELBO is (-mean, 1 - scale^2), and integrals
# over two draws give that of the others.


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_elbo_gradient_is_the_closed_form(gradient):
    q = gaussian()
    beta = 0.6
    found = gradients(lambda m: elbo(standard, m.q, 4, gradient=gradient).value, 4000, q=q)
    agree(found, {SHIFT: torch.tensor([[-0.5]]), LOG_SCALE: torch.tensor([[1 - 0.49]])})
    found = gradients(
        lambda m: free_energy(standard, m.q, 4, beta=beta, gradient=gradient).value,
        4000,
        q=q,
    )
    agree(
        found,
        {
            SHIFT: torch.tensor([[0.5 * beta]]),
            LOG_SCALE: torch.tensor([[0.49 * beta - 1]]),
        },
    )


def two_draws(alpha, mean, log_scale, slope):
    "The bound with K = 2 against exp(-slope z^2 / 2), by the midpoint rule over both noises."
    n = 400
    half = 8.0
    e = half * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    mass = Normal(0.0, 1.0).log_prob(e).double().exp() * 2 * half / n
    log_w = (
        -0.5 * slope * (mean + log_scale.exp() * e) ** 2
        + 0.5 * e * e
        + 0.5 * math.log(2 * math.pi)
        + log_scale
    )
    a = 1 - alpha
    both = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w))
    bound = both.mean(0) if a == 0 else ((a * both).logsumexp(0) - math.log(2)) / a
    return (mass[:, None] * mass * bound).sum()


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 0.995, 2.0])
@pytest.mark.parametrize("gradient", [PLAIN, DOUBLY])
def test_renyi_gradient_of_two_draws_is_the_integral(alpha, gradient):
    "For the posterior's parameters and for one of the model."
    at = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, math.log(0.7), 0.8)]
    exact = torch.autograd.grad(two_draws(alpha, *at), at)
    model = nn.ParameterDict({"slope": nn.Parameter(torch.tensor(0.8, dtype=torch.float64))})

    def value(m):
        return renyi(
            lambda z: m.model["slope"] * standard(z),
            m.q,
            alpha,
            samples=2,
            outer=3,
            gradient=gradient,
        ).value

    found = gradients(value, 12_000, q=gaussian(), model=model)
    agree(
        found,
        {
            SHIFT: exact[0].view(1, 1),
            LOG_SCALE: exact[1].view(1, 1),
            "model.slope": exact[2],
        },
    )
    assert found["model.slope"].std() > 0


def test_dropping_the_score_of_weighted_draws_is_biased():
    "Why that pair is refused: under the weights of the bound the score has a mean."
    at = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, math.log(0.7), 1.0)]
    exact = torch.autograd.grad(two_draws(0.0, *at), at)[1]

    def value(m):
        z, log_q = path_draws(m.q, (2,))
        return (standard(z) - log_q).logsumexp(0) - math.log(2)

    mean, error = mean_and_error(gradients(value, 40_000, q=gaussian())[LOG_SCALE])
    assert abs(mean - exact) > 5 * error


def planar(context_dim=None):
    torch.manual_seed(3)
    return Flow(Chain(Affine(2, context_dim=context_dim), Planar(2, 3, context_dim))).double()


def bimodal(z):
    return torch.logaddexp(-(z - 1).square().sum(-1), -(z + 1).square().sum(-1))


BOUNDS = {
    "elbo": lambda q, g: elbo(bimodal, q, 3, gradient=g),
    "importance weighted": lambda q, g: importance_weighted(bimodal, q, 5, gradient=g),
    "renyi": lambda q, g: renyi(bimodal, q, 0.5, 5, gradient=g),
}


@pytest.mark.parametrize(
    "bound, gradient",
    [("elbo", STICKING), ("elbo", DOUBLY), ("importance weighted", DOUBLY), ("renyi", DOUBLY)],
)
@pytest.mark.parametrize("kind", ["owned", "amortised", "on a support"])
def test_means_agree_for_a_planar_flow(bound, gradient, kind):
    """With a context, it is the encoder whose gradient must be right: the context is among what is stopped.

    On a support, the last step is not inverted.
    """
    parts = {"q": planar(3 if kind == "amortised" else None)}
    x = torch.randn(4, 2, dtype=torch.float64)
    if kind == "amortised":
        parts["encoder"] = nn.Linear(2, 3).double()
    if kind == "on a support":
        parts["q"] = Flow(parts["q"].transform, support=constraints.positive).double()
        parts["q"].place.scale.fill_(0.3)

    def value(gradient):
        return lambda m: BOUNDS[bound](m.q(m.encoder(x)) if kind == "amortised" else m.q, gradient).value

    reference, found = (gradients(value(g), 6000, **parts) for g in (PLAIN, gradient))
    agree(found, reference, 4.2)  # some 50 numbers at once
    assert all((draws.std(0) > 0).any() for draws in found.values())


@pytest.mark.parametrize("context_dim", [None, C], ids=["owned", "context"])
@pytest.mark.parametrize("name", [name for name in CASE if "noise" not in name])
def test_what_is_dropped_is_the_score(name, context_dim):
    """Draw by draw and for every family, the path derivative of log q is the whole one less that at a fixed
    point, for parameters and context.
    """
    q = Flow(CASE[name].draw(4, 2, context_dim)).double().eval()
    context = torch.randn(3, C, dtype=torch.float64, requires_grad=True)
    posterior = q() if q.context_dim is None else q(context)
    inputs = [*q.parameters(), context]

    def slopes(log_q):
        return torch.autograd.grad(
            log_q.square().sum() + 0.0 * sum(p.sum() for p in inputs), inputs
        )  # a volume-preserving flow has no slope

    def seeded():
        return torch.Generator().manual_seed(0)

    z, log_q = posterior.rsample_and_log_prob((5,), seeded())
    _, path = path_draws(posterior, (5,), seeded())
    for whole, score, rest in zip(
        slopes(log_q), slopes(posterior.log_prob(z.detach())), slopes(path), strict=True
    ):
        assert torch.allclose(
            whole - score,
            rest,
            rtol=1e-6,
            atol=1e-6 * (1 + whole.abs().max() + score.abs().max()),
        )


# Values and variances.


@paths
def test_value_and_terms_do_not_depend_on_the_gradient(gradient):
    q = planar()

    def seeded():
        return torch.Generator().manual_seed(1)

    plain, other = (
        renyi(bimodal, q, 0.5 if gradient == DOUBLY else 1.0, 5, 4, seeded(), g) for g in (PLAIN, gradient)
    )
    assert torch.equal(plain.value, other.value)
    assert torch.equal(plain.std_error, other.std_error)
    assert plain.terms == other.terms
    plain, other = (
        free_energy(bimodal, q, 7, 0.3, generator=seeded(), gradient=g).value for g in (PLAIN, gradient)
    )
    assert torch.equal(plain, other)


def test_two_of_them_are_one_for_the_elbo():
    q = planar()

    def value(g):
        return lambda m: elbo(bimodal, m.q, 3, generator=torch.Generator().manual_seed(1), gradient=g).value

    sticking, doubly = (
        torch.autograd.grad(value(g)(Loss(value, q=q)), list(q.parameters())) for g in (STICKING, DOUBLY)
    )
    assert all(torch.equal(a, b) for a, b in zip(sticking, doubly, strict=True))


@pytest.mark.parametrize("kind", ["owned", "amortised", "on a support", "flow as base"])
@pytest.mark.parametrize(
    "bound",
    [
        lambda p, q, g: elbo(p, q, 3, gradient=g),
        lambda p, q, g: renyi(p, q, 0.5, 4, gradient=DOUBLY if g == STICKING else g),
        lambda p, q, g: importance_weighted(p, q, 4, gradient=DOUBLY if g == STICKING else g),
    ],
    ids=["elbo", "renyi", "importance weighted"],
)
def test_at_the_optimum_each_path_is_zero(bound, kind):
    """q = p: every draw has gradient zero without the score, and a bound of log Z.

    With it the gradient is noise.
    """
    q = planar(3 if kind == "amortised" else None)
    if kind == "on a support":
        q = Flow(q.transform, support=constraints.interval(-1.0, 2.0)).double()
    if kind == "flow as base":
        q = Flow(AffineCoupling(2, 2), base=q).double()
    posterior = (q(torch.randn(4, 3, dtype=torch.float64)),) if kind == "amortised" else (q,)

    def target(z):
        return stopped_log_prob(posterior[0], z) + 3.0

    def all_gradients(g):
        return torch.stack(
            [
                torch.cat(
                    [
                        p.flatten()
                        for p in torch.autograd.grad(
                            bound(target, posterior[0], g).value, list(q.parameters())
                        )
                    ]
                )
                for _ in range(8)
            ]
        )

    assert all_gradients(STICKING).abs().max() < 1e-5
    assert all_gradients(STICKING).var(0).max() < 1e-10
    assert all_gradients(PLAIN).var(0).max() > 1e-3
    value = bound(target, posterior[0], STICKING)
    assert abs(value.value - 3) < 1e-6
    assert not value.std_error > 1e-6


def test_sticking_the_landing_falls_silent_towards_the_optimum():
    """Its variance goes as the squared distance.

    The other's has a floor, 3 for the Gaussian (1 for the mean, 2 for the log-scale).
    """
    variance = {}
    for gradient in (PLAIN, STICKING):
        for distance in (1.0, 0.1, 0.01):
            bound = partial(elbo, standard, gradient=gradient)
            found = gradients(
                lambda m, f=bound: f(m.q).value,
                4000,
                q=gaussian(distance, math.exp(distance)),
            )
            variance[gradient, distance] = sum(draws.var(0).sum() for draws in found.values())
    assert abs(variance[PLAIN, 0.01] - 3) < 0.5
    assert variance[PLAIN, 0.1] > 3
    assert variance[STICKING, 0.1] < 0.3
    assert 50 < variance[STICKING, 0.1] / variance[STICKING, 0.01] < 200


def test_signal_to_noise_grows_with_the_number_of_draws():
    """For the importance weighted bound the reparameterised gradient of q gets worse with K (Rainforth et
    al. 2018), the doubly reparameterised one better.
    """
    ratio = {}
    for gradient in (PLAIN, DOUBLY):
        for K in (1, 64):
            bound = partial(importance_weighted, standard, samples=K, gradient=gradient)
            found = gradients(lambda m, f=bound: f(m.q).value, 20_000, q=gaussian(0.3, 1.3))
            mean, error = mean_and_error(found[SHIFT])
            ratio[gradient, K] = (abs(mean) / (error * math.sqrt(20_000))).item()
    assert ratio[PLAIN, 64] < 0.5 * ratio[PLAIN, 1]
    assert ratio[DOUBLY, 64] > 3 * ratio[DOUBLY, 1]


# Continuously-indexed flows.


def indexed(context_dim=None):
    torch.manual_seed(5)

    def layer(form):
        return ContinuouslyIndexed(Affine(2, context_dim=context_dim), hidden=(4,), form=form)

    q = Flow(Chain(layer("before"), Planar(2, 2, context_dim), layer("after"))).double()
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return q


@pytest.mark.parametrize(
    "kind, bound, gradient",
    [
        ("chain", "elbo", STICKING),
        ("chain", "renyi", DOUBLY),
        ("amortised", "elbo", STICKING),
        ("amortised", "importance weighted", DOUBLY),
        ("base", "elbo", STICKING),
        ("nested", "renyi", DOUBLY),
    ],
)
def test_means_agree_for_continuously_indexed_flows(kind, bound, gradient):
    """Owned and amortised chains of two, one as the base of another flow, and one inside another.

    The gradients of q and those of r.
    """
    parts = {"q": indexed(3 if kind == "amortised" else None)}
    x = torch.randn(3, 3, dtype=torch.float64)
    if kind == "base":
        parts["q"] = Flow(AffineCoupling(2, hidden=(6,)), base=parts["q"]).double()
    if kind == "nested":
        parts["q"] = Flow(
            ContinuouslyIndexed(ContinuouslyIndexed(Affine(2), hidden=(6,)), form="before", hidden=(6,))
        ).double()
    with torch.no_grad():
        for p in parts["q"].parameters():
            p.add_(0.2 * torch.randn_like(p))
    if kind == "amortised":
        parts["encoder"] = nn.Linear(3, 3).double()

    def value(g):
        return lambda m: BOUNDS[bound](m.q(m.encoder(x)) if kind == "amortised" else m.q, g).value

    reference, found = (gradients(value(g), 5000, **parts) for g in (PLAIN, gradient))
    agree(found, reference, 4.5)  # hundreds of numbers at once
    assert all((draws.std(0) > 0).any() for name, draws in found.items() if "context" not in name)


def test_with_the_exact_auxiliary_the_landing_is_stuck():
    """One layer, all Gaussian, r equal to q(u|z) and p equal to q(z): no gradient for what makes the draws.
    r keeps its score.
    """
    a = 0.8
    sigma = 0.5
    s = -0.3
    b = 1.2
    layer = ContinuouslyIndexed(Affine(1), hidden=())
    var = math.exp(2 * s) + b * b * (a * a + sigma**2) + 2 * math.exp(s) * b * a
    cov = math.exp(s) * a + b * (a * a + sigma**2)
    var_u = a * a + sigma**2
    q = Flow(layer).double()
    with torch.no_grad():
        for prefix, (slope, log_scale) in {
            "q_": (a, math.log(sigma)),
            "ts_": (b, s),
            "r_": (cov / var, 0.5 * math.log(var_u - cov**2 / var)),
        }.items():
            getattr(layer.source, f"{prefix}weight_0").copy_(torch.tensor([[[slope, 0.0]]]))
            getattr(layer.source, f"{prefix}bias_0").copy_(torch.tensor([[0.0, log_scale]]))

    def target(z):
        return Normal(torch.zeros(1, dtype=torch.float64), math.sqrt(var)).log_prob(z).sum(-1)

    for gradient in (PLAIN, STICKING):
        bound = partial(elbo, target, samples=3, gradient=gradient)
        found = gradients(lambda m, f=bound: f(m.q).value, 200, q=q)
        variance = {name: draws.var(0).max() for name, draws in found.items()}
        assert max(v for name, v in variance.items() if ".r_" in name) > 1e-3
        drawing = max(v for name, v in variance.items() if ".r_" not in name)
        assert drawing < 1e-10 if gradient == STICKING else drawing > 1e-3


def test_a_draw_leaves_nothing_behind():
    q = indexed()
    before = {name: type(part) for name, part in q.named_modules()}
    elbo(bimodal, q, 3, gradient=STICKING)
    assert before == {name: type(part) for name, part in q.named_modules()}

    def seeded():
        return torch.Generator().manual_seed(2)

    assert torch.equal(path_draws(q, (5,), seeded())[1], q.rsample_and_log_prob((5,), seeded())[1])


# In training.


@pytest.mark.parametrize("kind", ["planar", "indexed"])
@pytest.mark.parametrize("gradient, bound", [(STICKING, 1.0), (DOUBLY, 0.0)])
def test_stacked_runs_have_their_own_gradients(gradient, bound, kind):
    "Base draws and indices are handed in, so that a run alone sees the same."

    def make(seed):
        torch.manual_seed(seed)
        q = Flow(
            Chain(Affine(2), Planar(2, 3))
            if kind == "planar"
            else Chain(Affine(2), Fixed(Affine(2), hidden=(4,)))
        ).double()
        q.base = Noise(eps)
        return q

    eps = torch.randn(8, 2, dtype=torch.float64)

    def loss(q, batch, step, generator):
        return renyi(bimodal, q, bound, 4, 2, generator, gradient)

    singles = [make(s) for s in range(3)]
    stacked = StackedRuns([make(s) for s in range(3)], loss)
    value, _ = stacked(None, 0, None)
    value.sum().backward()
    for s, q in enumerate(singles):
        single, _ = OneRun([q], loss)(None, 0, None)
        single.backward()
        assert torch.allclose(single, value[s])
        for name, p in q.named_parameters():
            assert torch.allclose(p.grad, stacked.parameters()[name].grad[s], atol=1e-10), name


class Noise(nn.Module):
    "A standard normal base that hands out given draws."

    dim = 2

    def __init__(self, eps):
        super().__init__()
        self.register_buffer("eps", eps)

    def rsample(self, shape, generator=None):
        return self.eps

    def log_prob(self, z):
        return standard(z)


class Fixed(ContinuouslyIndexed):
    def noise(self, like, generator):
        return torch.linspace(-1, 1, 8, dtype=like.dtype)[:, None].expand(like.shape)


@paths
def test_trains_under_the_engine(gradient):
    from normflow_vi.engine.optimizer import Optimizer
    from normflow_vi.engine.trainer import Trainer

    models = [gaussian(1.0, 2.0, 2).float() for _ in range(2)]

    def loss(q, batch, step, generator):
        return free_energy(standard, q(), 8, generator=generator, gradient=gradient)

    Trainer(
        models,
        loss,
        steps=200,
        seeds=[0, 1],
        optimizer=Optimizer("adam", 5e-2),
        log_every=50,
        device="cpu",
        threads=1,
    ).run()
    for q in models:
        assert q.transform.source.shift.abs().max() < 0.05
        assert q.transform.source.log_scale.abs().max() < 0.05


# What is refused.


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda q: elbo(standard, q, gradient="score"),
            ["gradient='score'", *GRADIENTS],
        ),
        (lambda q: free_energy(standard, q, gradient="path"), ["gradient='path'"]),
        (lambda q: renyi(standard, q, 0, 1, gradient=None), ["gradient=None"]),
        (
            lambda q: renyi(standard, q, 0.5, 2, gradient=STICKING),
            [STICKING, "alpha=0.5", "samples=2", DOUBLY],
        ),
        (
            lambda q: importance_weighted(standard, q, 5, gradient=STICKING),
            [STICKING, "importance weighted", "samples=5"],
        ),
        (
            lambda q: forward_kl(q, torch.zeros(3, 1), gradient=STICKING),
            [STICKING, "forward_kl"],
        ),
        (
            lambda q: forward_kl(q, torch.zeros(3, 1), gradient=DOUBLY),
            [DOUBLY, "forward_kl"],
        ),
        (lambda q: renyi(standard, q, math.inf), ["alpha=inf"]),
        (lambda q: renyi(standard, q, "0"), ["alpha='0'"]),
        (lambda q: renyi(standard, q, True), ["alpha=True"]),
        (lambda q: renyi(standard, q, 0.0, 0), ["samples=0"]),
        (lambda q: importance_weighted(standard, q, 2, 0), ["outer=0"]),
        (
            lambda q: elbo(standard, Flow(BatchNorm(1)), 3, gradient=STICKING),
            ["BatchNorm", "eval()"],
        ),
        (
            lambda q: elbo(standard, Flow(OneWay(1)), 3, gradient=STICKING),
            ["inverse_kind='none'", STICKING],
        ),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError) as raised:
        call(gaussian())
    assert all(word in str(raised.value) for word in words), raised.value


class OneWay(Affine):
    inverse_kind = "none"


def test_what_has_no_stopped_density():
    class Drawn:
        def rsample_and_log_prob(self, shape, generator=None):
            return torch.randn(*shape, 1), torch.zeros(shape)

    with pytest.raises(TypeError, match="Flow.*Drawn"):
        elbo(standard, Drawn(), gradient=STICKING)
    with pytest.raises(NotImplementedError, match="inside Inverse"):
        elbo(bimodal, Flow(Inverse(ContinuouslyIndexed(Affine(2)))), gradient=STICKING)
    assert elbo(standard, Flow(BatchNorm(1)).eval(), gradient=STICKING).value.isfinite()


def test_allowed_where_it_is_the_elbo():
    for bound in (
        lambda q: renyi(standard, q, 1, 5, gradient=STICKING),
        lambda q: importance_weighted(standard, q, 1, 4, gradient=STICKING),
    ):
        assert bound(gaussian()).value.isfinite()
