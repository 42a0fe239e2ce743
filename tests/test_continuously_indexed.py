"""Continuously-indexed layers: what must integrate to one does, known answers are met, the rest of
the library uses them unchanged.
"""

import math
from functools import partial

import mpmath
import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from helpers import caught, dtypes, exact, many_draws, moved, near, normals, over_draws, scales, tensors_of
from normflow_vi import Chain, Flow, fit
from normflow_vi.evaluate import log_marginal
from normflow_vi.objectives import elbo, free_energy
from normflow_vi.testing import cases
from normflow_vi.testing.contract import C, Case, Direction, walk
from normflow_vi.transforms import Affine, Planar
from normflow_vi.transforms.continuously_indexed import FORMS, ContinuouslyIndexed, log_normal_at
from normflow_vi.transforms.coupling import AffineCoupling
from normflow_vi.transforms.spline_layers import SplineAutoregressive

both_forms = pytest.mark.parametrize("form", FORMS)
both_sources = pytest.mark.parametrize("context_dim", [None, C], ids=["owned", "context"])


class Frozen(cases.Frozen):
    "The layer with the same noise at every point and call, or with noise that a test hands it."

    eps = None

    def noise(self, like, generator):
        return super().noise(like, generator) if self.eps is None else self.eps


INSIDE = {
    "affine": lambda dim, length, context_dim: Affine(dim, length, context_dim),
    "planar": lambda dim, length, context_dim: Planar(dim, length, context_dim),
    "chain": lambda dim, length, context_dim: Chain(
        Affine(dim, context_dim=context_dim), AffineCoupling(dim, length, context_dim, hidden=(6,))
    ),
    "spline": lambda dim, length, context_dim: SplineAutoregressive(dim, length, context_dim, hidden=(8,)),
}


# The contract around other transforms than that of the table's rows, which is a planar one.


def around(cls, inside, form, then=lambda layer: layer):
    return Case(
        "indexed",
        lambda dim, length, context_dim: then(
            cls(
                INSIDE[inside](dim, length, context_dim),
                index_dim=2,
                hidden=(6,),
                form=form,
                context_dim=context_dim,
            )
        ),
    )


@pytest.mark.parametrize(
    "inside, form, names",
    [
        ("affine", "after", ("inverse", "log_det")),
        ("affine", "before", ("inverse", "rows", "runs")),
        ("chain", "before", ("inverse", "axes", "slopes")),
        ("spline", "after", ("inverse", "runs")),
    ],
)
def test_given_u_it_is_a_bijection_of_the_contract(inside, form, names):
    walk(around(ContinuouslyIndexed, inside, form, lambda layer: layer.given(torch.randn(2))), names)


@pytest.mark.parametrize(
    "inside, form, names",
    [
        ("affine", "before", ("axes", "rows", "runs", "slopes", "parameter_slopes", "reaches", "saved")),
        ("chain", "after", ("rows", "runs", "reaches")),
        ("spline", "before", ("rows", "reaches")),
    ],
)
def test_with_frozen_noise_most_of_the_contract_holds(inside, form, names):
    walk(around(Frozen, inside, form), names)


# Integrals.


def base_log_prob(w):
    return -0.5 * ((w * w).sum(-1) + w.shape[-1] * math.log(2 * math.pi))


def midpoints(half, n):
    "Midpoints of `n` equal steps over `[-half, half]`, and the length of a step."
    counted = torch.arange(n, dtype=torch.float64) + 0.5
    return half * (2 * counted / n - 1), 2 * half / n


def masses(layer, dim, n, half, context=None):
    """Three sums over a grid, each 1: the joint q(z, u), the bracket of `forward` against a
    normalised f, and that of `inverse` as an importance weight.
    """
    axis, step = midpoints(half, n)
    grid = torch.cartesian_prod(*[axis] * (dim + 1))
    point = grid[:, :dim]
    last = grid[:, dim:]
    cell = step ** (dim + 1)
    context = None if context is None else context.expand(len(grid), -1)
    with torch.no_grad():
        w, log_det = layer.given(last).inverse(point, context)
        log_joint = base_log_prob(w) + log_det + log_normal_at(last, *layer.index(w))
        layer.eps = last
        z, bracket = layer.forward(point, context)
        log_q = base_log_prob(point) - bracket
        log_f = base_log_prob((z - 0.3) / 1.1) - dim * math.log(1.1)
        log_forward = base_log_prob(point) + base_log_prob(last) + log_f - log_q
        w, minus = layer.inverse(point, context)
        log_inverse = base_log_prob(last) + base_log_prob(w) + minus
    return {
        "joint": (log_joint.exp().sum() * cell).item(),
        "forward": (log_forward.exp().sum() * cell).item(),
        "inverse": (log_inverse.exp().sum() * cell).item(),
    }


def drawn_layer(make, inside, form, dim, context_dim, **options):
    "A layer in float64 whose networks matter: the last layer of each is as large as the others."
    transform = INSIDE[inside](dim, 1, context_dim)
    layer = make(transform, hidden=(6,), form=form, context_dim=context_dim, **options)
    layer = layer.double().eval()
    with torch.no_grad():
        for name, parameter in layer.source.named_parameters():
            if name.endswith("_1"):
                parameter.mul_(3.0)
    return layer


@both_forms
@both_sources
@pytest.mark.parametrize(
    "inside, dim, n, half",
    [
        ("affine", 1, 400, 15.0),
        ("planar", 1, 250, 12.0),
        ("chain", 1, 400, 15.0),
        ("spline", 1, 250, 9.0),
        ("affine", 2, 64, 11.0),
        ("chain", 2, 72, 13.0),
    ],
)
def test_what_must_integrate_to_one_does(inside, dim, n, half, form, context_dim):
    layer = drawn_layer(Frozen, inside, form, dim, context_dim)
    context = None if context_dim is None else 0.2 * normals(1, context_dim)
    found = masses(layer, dim, n, half, context)
    for mass in found.values():
        assert abs(mass - 1) < 1e-3, found


def test_so_it_does_around_a_spline_on_the_plane():
    "Once: its slopes have kinks, which a coarse grid sees."
    found = masses(drawn_layer(Frozen, "spline", "before", 2, None), 2, 64, 7.0)
    for mass in found.values():
        assert abs(mass - 1) < 1e-3, found


def test_the_context_reaches_r_and_the_inside():
    """And nothing else: with an inside that takes none, z is the same whatever the context, its
    log-weight is not.
    """
    w = normals(50, 2)
    contexts = normals(2, 50, C)
    plain = Frozen(Affine(2), context_dim=C).double()
    conditional = drawn_layer(Frozen, "chain", "after", 2, C)
    z, weight = plain.forward(w, contexts[0])
    again, other = plain.forward(w, contexts[1])
    assert torch.equal(z, again)
    assert not torch.allclose(weight, other)
    z, _ = conditional.forward(w, contexts[0])
    other, _ = conditional.forward(w, contexts[1])
    assert not torch.allclose(z, other)
    assert Frozen(Affine(2, context_dim=C)).context_dim == C


# Known answers.


def tight(form, mean, cov, index_noise=0.5):
    """A linear layer on `w ~ N(mean, cov)` with the exact `r`, and the mean and covariance of its output.

    With u = a.w + noise, and z = A w + b u + m, the pair (z, u) is Gaussian."""
    D = len(mean)
    a = torch.randn(D)
    s = 0.3 * torch.randn(D)
    t = torch.randn(D)
    shift = torch.randn(D)
    log_scale = 0.3 * torch.randn(D)
    layer = ContinuouslyIndexed(Affine(D), hidden=(), form=form).double()
    a, s, t, shift, log_scale = (v.double() for v in (a, s, t, shift, log_scale))
    A = torch.diag((s + log_scale).exp())
    if form == "after":
        b = t
        m = s.exp() * shift
    else:
        b = A @ t
        m = shift
    out_mean = A @ mean + b * (a @ mean) + m
    var_u = a @ cov @ a + index_noise**2
    cov_wu = A @ cov @ a  # of A w and u
    cov_zu = cov_wu + b * var_u
    mixed = torch.outer(cov_wu, b)
    out_cov = A @ cov @ A.T + mixed + mixed.T + var_u * torch.outer(b, b)
    gain = torch.linalg.solve(out_cov, cov_zu)
    left = var_u - gain @ cov_zu
    zero = torch.zeros(D, dtype=torch.float64)
    values = {
        "q_weight_0": torch.stack([a, zero], -1),
        "q_bias_0": torch.tensor([0.0, math.log(index_noise)], dtype=torch.float64),
        "ts_weight_0": torch.cat([t, zero])[None],
        "ts_bias_0": torch.cat([zero, s]),
        "r_weight_0": torch.stack([gain, zero], -1),
        "r_bias_0": torch.stack([a @ mean - gain @ out_mean, 0.5 * left.log()]),
    }
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer.source, name).copy_(value[None])
        layer.transform.source.shift.copy_(shift[None])
        layer.transform.source.log_scale.copy_(log_scale[None])
    return layer, out_mean, out_cov


@both_forms
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_exact_auxiliary_gives_log_q_draw_by_draw(form, length, dim):
    """Also for a chain, where each r looks at the output of its own layer, and for the density of
    given points, whatever index is drawn.
    """
    mean = torch.zeros(dim, dtype=torch.float64)
    cov = torch.eye(dim, dtype=torch.float64)
    layers = []
    for _ in range(length):
        layer, mean, cov = tight(form, mean, cov)
        layers.append(layer)
    q = Flow(Chain(*layers)).double()
    exact = torch.distributions.MultivariateNormal(mean, cov)
    z, log_q = q.rsample_and_log_prob((1000,))
    assert torch.allclose(log_q, exact.log_prob(z), rtol=0, atol=1e-8)
    assert torch.allclose(q.log_prob(z), exact.log_prob(z), rtol=0, atol=1e-8)
    bound = elbo(lambda z: exact.log_prob(z) + 2.0, q(), samples=500)
    assert abs(bound.value - 2) < 1e-8
    assert bound.std_error < 1e-9
    draws = q.sample((40_000,))
    variances = cov.diagonal()
    assert ((draws.mean(0) - mean).abs() < 5 * variances.sqrt() / 200).all()
    assert torch.allclose(torch.cov(draws.T), cov, atol=0.1 * variances.max().item())


@both_forms
def test_the_density_of_a_point_is_bounded_in_the_mean_and_reached_in_the_limit(form):
    layer = drawn_layer(ContinuouslyIndexed, "planar", form, 1, None)
    q = Flow(layer).double()
    z = torch.tensor([-1.5, -0.3, 0.4, 1.7], dtype=torch.float64)[:, None]
    axis, step = midpoints(12.0, 3000)
    with torch.no_grad():
        u = axis[:, None, None].expand(-1, 4, 1)
        w, log_det = layer.given(u).inverse(z.expand(3000, 4, 1))
        log_joint = base_log_prob(w) + log_det + log_normal_at(u, *layer.index(w))
        exact = log_joint.logsumexp(0) + math.log(step)
        draws = q.log_prob(z.expand(40_000, 4, 1))
    short = exact - draws.mean(0)
    weight = (draws - exact).exp()
    assert (short > -4 * draws.std(0) / 200).all()
    assert (short > 0.003).any()
    off = (weight.mean(0) - 1).abs()
    assert (off < 5 * weight.std(0) / 200 + 1e-3).all()  # unbiased for the density itself
    blocks = draws.unflatten(0, (-1, 1000)).logsumexp(1) - math.log(1000)
    assert ((exact - blocks.mean(0)).abs() < 0.02).all()


def network_in_extended_precision(layer, prefix, x):
    "Both halves of what a network of the layer emits, the second within +-5."
    mp = mpmath.mp
    parts = {}
    for name in ("weight_0", "bias_0", "weight_1", "bias_1"):
        parts[name] = mp.matrix(exact(getattr(layer.source, f"{prefix}{name}")[0]))
    h = mp.matrix(x).T * parts["weight_0"] + parts["bias_0"].T
    out = list(h.apply(mp.tanh) * parts["weight_1"] + parts["bias_1"].T)
    half = len(out) // 2
    return out[:half], [5 * mp.tanh(v / 5) for v in out[half:]]


def log_density(u, mean, log_std):
    "Of a normal distribution, in extended precision."
    mp = mpmath.mp
    standard = (u - mean) / mp.exp(log_std)
    return -(standard**2) / 2 - log_std - mp.log(2 * mp.pi) / 2


@scales
@both_forms
def test_against_extended_precision(form, scale):
    """The whole bracket for given noise, from the formulas of the paper with 50 digits.

    Log-scales stay within +-5, as without a bound `exp` leaves the range of doubles.
    """
    mp = mpmath.mp
    for _ in range(10):
        layer = moved(Frozen(Affine(2), hidden=(3,), form=form, max_log_scale=5.0), scale, jitter=3.0)
        layer.transform.source.log_scale.data.div_(scale)
        w = normals(2)
        layer.eps = normals(1)
        z, bracket = layer.forward(w)
        with mp.workdps(50):
            (m_q,), (s_q,) = network_in_extended_precision(layer, "q_", exact(w))
            u = m_q + mp.exp(s_q) * exact(layer.eps)[0]
            t, s = network_in_extended_precision(layer, "ts_", [u])
            shift = exact(layer.transform.source.shift[0])
            log_scale = exact(layer.transform.source.log_scale[0])
            at = exact(w)
            if form == "before":
                at = [mp.exp(si) * (wi + ti) for si, wi, ti in zip(s, at, t, strict=True)]
            at = [a + mp.exp(b) * c for a, b, c in zip(shift, log_scale, at, strict=True)]
            if form == "after":
                at = [mp.exp(si) * gi + ti for si, gi, ti in zip(s, at, t, strict=True)]
            (m_r,), (s_r,) = network_in_extended_precision(layer, "r_", at)
            log_q = log_density(u, m_q, s_q)
            log_r = log_density(u, m_r, s_r)
            assert near(bracket, sum(s) + sum(log_scale) - log_q + log_r)
            assert near(z, at)


@many_draws
@dtypes
@pytest.mark.parametrize("scale, bound", [(1.0, None), (1.0, 5.0), (10.0, 5.0), (100.0, 5.0)])
@both_forms
def test_many_parameter_draws_stay_finite(draws, dtype, scale, bound, form):
    """As one batch, in both directions.

    Without a bound the last layers are small enough for log-scales within +-5.
    """
    inside = Affine(3, max_log_scale=5.0)
    layer = ContinuouslyIndexed(inside, index_dim=2, form=form, max_log_scale=bound).to(dtype)
    tensors = tensors_of(layer, draws, scale, dtype)
    if not bound:
        tensors = {name: 0.4 * t if "_2" in name else t for name, t in tensors.items()}
    for name in ("forward", "inverse"):
        value, weight = over_draws(layer, tensors, torch.randn(draws, 3, dtype=dtype), name)
        assert value.isfinite().all(), name
        assert weight.isfinite().all(), name
    given = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    given["u"] = torch.randn(draws, 2, dtype=dtype)
    at_index = layer.given(torch.zeros(2, dtype=dtype))
    _, log_det = over_draws(at_index, given, torch.randn(draws, 3, dtype=dtype))
    # Three log-scales of the index and three of the inside: no sign to change.
    assert (log_det.abs() <= 30.1).all()


# Drawing.


def test_a_generator_repeats_it():
    q = Flow(Chain(*(ContinuouslyIndexed(Planar(2, 2), index_dim=2) for _ in range(3))))

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    z, log_q = q.rsample_and_log_prob((50,), seeded(1))
    again, log_q_again = q.rsample_and_log_prob((50,), seeded(1))
    other, _ = q.rsample_and_log_prob((50,), seeded(2))
    assert torch.equal(z, again)
    assert torch.equal(log_q, log_q_again)
    assert not torch.equal(z, other)
    third = q.log_prob(z, seeded(3))
    assert torch.equal(third, q.log_prob(z, seeded(3)))
    assert not torch.equal(third, q.log_prob(z, seeded(4)))
    nested = ContinuouslyIndexed(ContinuouslyIndexed(Affine(2)), form="before")
    state = torch.get_rng_state()
    for call in (
        lambda: q.rsample_and_log_prob((5,), seeded(1)),
        lambda: nested.forward(z, None, seeded(1)),
        lambda: nested.inverse(z, None, seeded(1)),
    ):
        assert torch.equal(call()[0], call()[0])
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the global one alone


def test_draws_follow_q_of_u():
    """With z = w + t(u) and t = u, the difference z - w is the index: its mean and standard
    deviation are those of q(u|w).
    """
    layer = ContinuouslyIndexed(Affine(1), hidden=()).double()
    with torch.no_grad():
        layer.source.ts_weight_0.copy_(torch.tensor([[[1.0, 0.0]]]))
        layer.source.ts_bias_0.zero_()
        layer.source.q_weight_0.copy_(torch.tensor([[[0.5, 0.4]]]))

    def check(u, mean, log_std):
        assert abs(u.mean() - mean) < 5 * log_std.exp() / 200
        assert abs(u.std().log() - log_std) < 5 / math.sqrt(2 * 40_000)

    for at in (-1.0, 2.0):
        w = torch.full((40_000, 1), at, dtype=torch.float64)
        u = layer.forward(w)[0] - w
        check(u, *layer.index(w[:1]))
        u = w - layer.inverse(w)[0]  # and in the other direction r(u|z)
        check(u, *layer.auxiliary(w[:1]))


def test_gradients_in_every_parameter_are_those_of_differences():
    "For given noise, in both directions: the draw is reparameterised."
    layer = drawn_layer(Frozen, "planar", "after", 2, None)
    w = normals(20, 2)
    step = 1e-6
    for name in ("forward", "inverse"):
        module = Direction(layer, name)
        parameters = dict(module.named_parameters())
        directions = {key: torch.randn_like(p) for key, p in parameters.items()}

        def total(changed, module=module):
            z, weight = functional_call(module, changed, (w,))
            return z.sin().sum() + weight.sum()

        slopes = torch.autograd.grad(total(parameters), list(parameters.values()))
        for (key, p), slope in zip(parameters.items(), slopes, strict=True):
            above = total(parameters | {key: p + step * directions[key]})
            below = total(parameters | {key: p - step * directions[key]})
            numeric = (above - below) / (2 * step)
            difference = (slope * directions[key]).sum() - numeric
            assert abs(difference) <= 1e-5 * (1 + abs(numeric)), (name, key)


@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_runs_are_one_more_axis(name):
    """Stacked parameters under `vmap`: each run draws for itself, also from one generator for all
    of them, which repeats them all.
    """
    runs = [drawn_layer(ContinuouslyIndexed, "planar", "after", 2, None) for _ in range(3)]
    w = normals(7, 2)

    def draw(runs, generator=None):
        def call(p, b):
            return functional_call(Direction(runs[0], name), (p, b), (w,), {"generator": generator})

        return vmap(call, randomness="different")(*stack_module_state([Direction(run, name) for run in runs]))

    def seeded():
        return torch.Generator().manual_seed(0)

    z, weight = draw(runs)
    assert z.shape == (3, 7, 2)
    assert weight.shape == (3, 7)
    assert z.isfinite().all()
    assert not torch.equal(z, draw(runs)[0])
    z, weight = draw(runs, seeded())
    again, _ = draw(runs, seeded())
    assert torch.equal(z, again)  # (frozen rows compare with the loop, value by value)
    for same in (draw(runs[:1] * 2), draw(runs[:1] * 2, seeded())):
        assert not torch.allclose(same[0][0], same[0][1])


@both_sources
def test_traces_to_one_graph_while_drawing(context_dim):
    layer = drawn_layer(ContinuouslyIndexed, "affine", "after", 2, context_dim)
    context = None if context_dim is None else normals(7, C)
    w = normals(7, 2)
    for call in (layer.forward, layer.inverse):
        torch._dynamo.reset()
        compiled = torch.compile(partial(call, context=context), fullgraph=True, backend="eager")
        z, weight = compiled(w)
        assert z.shape == (7, 2)
        assert weight.shape == (7,)
        assert z.isfinite().all()


@pytest.mark.parametrize(
    "parameters, values",
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.float32)],
)
def test_precision_is_the_wider_one(parameters, values):
    layer = Frozen(Affine(2, context_dim=C), index_dim=3).to(parameters)
    w = torch.randn(5, 2, dtype=values)
    context = torch.randn(5, C)
    wider = torch.promote_types(parameters, values)
    for found in (
        layer.forward(w, context),
        layer.inverse(w, context),
        layer.given(torch.randn(3)).forward(w, context),
    ):
        for part in found:
            assert part.dtype == wider
    if values == torch.float64:
        wide = Frozen(Affine(2, context_dim=C), index_dim=3).double()
        wide.load_state_dict(layer.state_dict())
        for found, expected in zip(layer.forward(w, context), wide.forward(w, context), strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)


# The rest of the library uses them unchanged.


def test_bound_on_a_gaussian_target():
    torch.manual_seed(3)
    q = Flow(Chain(*(ContinuouslyIndexed(Planar(2, 2), form=form) for form in FORMS))).double()
    bound = elbo(lambda z: -0.5 * (z * z).sum(-1), q(), samples=4000)
    assert bound.value <= math.log(2 * math.pi) + 3 * bound.std_error
    assert bound.value < math.log(2 * math.pi) - 0.01


def test_amortised_posterior_through_the_evaluator():
    """z ~ N(0, I), x | z ~ N(z, I): the importance-weighted estimate over (z, u) rises to log p(x),
    the bound stays below.
    """
    unit = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def log_joint(x, z):
        return {
            "log_prior": unit.log_prob(z).sum(-1),
            "log_likelihood": torch.distributions.Normal(z, 1.0).log_prob(x).sum(-1),
        }

    affine = Affine(2, context_dim=2)
    with torch.no_grad():
        affine.source.linear.weight.zero_()
        affine.source.linear.weight[:2].copy_(0.5 / affine.head_scale * torch.eye(2))
        affine.source.linear.bias[2:].fill_(-0.2 / affine.head_scale)
    q = Flow(
        Chain(
            affine,
            ContinuouslyIndexed(Affine(2), context_dim=2),
            ContinuouslyIndexed(Planar(2, context_dim=2)),
        )
    ).double()
    x = normals(20, 2)
    truth = torch.distributions.Normal(torch.zeros_like(x), math.sqrt(2)).log_prob(x).sum(-1)
    few, many = (log_marginal(log_joint, q, x, samples=samples) for samples in (20, 5000))
    assert (truth - many.log_p).abs().mean() < 0.05
    assert (truth - many.elbo > 0).all()
    assert (truth - few.log_p).mean() > (truth - many.log_p).mean()
    q(x).rsample_and_log_prob((3,))[1].sum().backward()
    for p in q.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()


def test_annealed_objective_traces():
    q = Flow(Chain(ContinuouslyIndexed(Affine(2)), ContinuouslyIndexed(Affine(2))))
    torch._dynamo.reset()
    loss = torch.compile(
        lambda beta: free_energy(lambda z: -0.5 * (z * z).sum(-1), q(), samples=5, beta=beta).value,
        fullgraph=True,
        backend="eager",
    )
    assert loss(torch.tensor(0.5)).isfinite()


def test_fit_closes_most_of_the_gap():
    "Two modes, and an inside that is affine: without an index the gap is at least ln 2 = 0.69."

    def modes(z):
        two = torch.logsumexp(-0.5 * ((z - torch.tensor([-1.5, 1.5])) / 0.3) ** 2, -1)
        return two - math.log(2 * 0.3) - 0.5 * math.log(2 * math.pi)

    torch.manual_seed(0)
    q = Flow(Chain(ContinuouslyIndexed(Affine(1)), ContinuouslyIndexed(Affine(1))))
    before = elbo(modes, q(), samples=2000)
    # A start alone may end in one mode.
    result = fit(q, log_density=modes, steps=600, learning_rate=1e-2, draws=100, restarts=3)
    assert before.value < -0.7, before
    assert -0.5 < result.elbo.value, result.elbo
    assert result.elbo.value <= 3 * result.elbo.std_error, result.elbo


def test_fit_to_samples_uses_the_bound():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500, 1) * 0.3 - 1, torch.randn(500, 1) * 0.3 + 1])
    q = Flow(ContinuouslyIndexed(Affine(1)))
    before = q.log_prob(x).mean().item()
    result = fit(q, samples=x, steps=300, learning_rate=1e-2, draws=100)
    assert result.log_likelihood.value > before + 0.1


# What it says of itself.


def test_options_show():
    layer = ContinuouslyIndexed(Planar(3, 2), index_dim=2, hidden=(7,), form="before", max_log_scale=3.0)
    for word in (
        "dim=3",
        "index_dim=2",
        "hidden=(7,)",
        "activation='tanh'",
        "form='before'",
        "max_log_scale=3.0",
        "Planar",
    ):
        assert word in repr(layer)
    assert layer.forward_kind == "closed form"
    assert layer.inverse_kind == "iterative"
    assert layer.length == 1
    assert layer.dim == 3
    assert layer.given(torch.zeros(2)).inverse_kind == "iterative"
    assert len({repr(ContinuouslyIndexed(Affine(2), form=form)) for form in FORMS}) == 2


@pytest.mark.parametrize(
    "error, words, call",
    [
        (TypeError, ("transform", "Linear"), lambda: ContinuouslyIndexed(torch.nn.Linear(2, 2))),
        (ValueError, ("form", "after, before"), lambda: ContinuouslyIndexed(Affine(2), form="icml")),
        (ValueError, ("index_dim",), lambda: ContinuouslyIndexed(Affine(2), index_dim=0)),
        (ValueError, ("hidden",), lambda: ContinuouslyIndexed(Affine(2), hidden=(10, 0))),
        (ValueError, ("activation", "tanh"), lambda: ContinuouslyIndexed(Affine(2), activation="sin")),
        (ValueError, ("max_log_scale", "above 0"), lambda: ContinuouslyIndexed(Affine(2), max_log_scale=-1)),
        (ValueError, ("context_dim",), lambda: ContinuouslyIndexed(Affine(2), context_dim=0)),
        (
            ValueError,
            ("context_dim=3", "context_dim=4"),
            lambda: ContinuouslyIndexed(Affine(2, context_dim=4), context_dim=3),
        ),
        (
            ValueError,
            ("u", "index_dim=2"),
            lambda: ContinuouslyIndexed(Affine(2), index_dim=2).given(torch.zeros(3)),
        ),
        (
            ValueError,
            ("context",),
            lambda: ContinuouslyIndexed(Affine(2), context_dim=3).forward(torch.zeros(5, 2)),
        ),
        (ValueError, ("dim=2",), lambda: ContinuouslyIndexed(Affine(2)).forward(torch.zeros(5, 3))),
    ],
)
def test_wrong_arguments_are_named(error, words, call):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value), raised.value


# Planted bugs of which the kit knows nothing; those which it catches are in tests/test_planted_bugs.py.


def check_integrals():
    for form in FORMS:
        found = masses(drawn_layer(Frozen, "affine", form, 1, None), 1, 200, 12.0)
        for mass in found.values():
            assert abs(mass - 1) < 1e-3, found


FORWARD, INVERSE = "ContinuouslyIndexed.forward", "ContinuouslyIndexed.inverse"
BUGS = {
    "sign of log r": (FORWARD, "log_q + self.network", "log_q - self.network", check_integrals),
    "sign of log q": (FORWARD, "log_det - log_q", "log_det + log_q", check_integrals),
    "sign of log r, inverse": (INVERSE, "log_det - log_r", "log_det + log_r", check_integrals),
    "sign of log q, inverse": (INVERSE, "log_r + self.network", "log_r - self.network", check_integrals),
    "u from q, weighed by r": (
        FORWARD,
        "- log_q",
        '- self.network("r_").log_prob(u, w, tensors)',
        check_integrals,
    ),
    "r at w": (FORWARD, "log_prob(u, z,", "log_prob(u, w,", check_integrals),
    "variance for deviation": ("log_normal_at", "(-log_std).exp()", "(-2 * log_std).exp()", check_integrals),
    "r without the context": (
        "_start_index_networks",
        "2 * index_dim, context_dim,",
        "2 * index_dim, None,",
        test_the_context_reaches_r_and_the_inside,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, found, wrong, check = BUGS[bug]
    caught(monkeypatch, check, f"continuously_indexed.{name}", found, wrong)
