"""Flows as distributions: mass, agreement of the two directions, shapes, bases."""

import copy
import math

import pytest
import torch
from torch.distributions import (
    Exponential,
    Gamma,
    Gumbel,
    Independent,
    Kumaraswamy,
    LogNormal,
    Normal,
    TransformedDistribution,
    Uniform,
    constraints,
    transforms,
)

from helpers import dtypes
from normflow_vi import Chain, Flow, Inverse
from normflow_vi.transforms import Affine, Planar


def flow(dim, context_dim=None):
    q = Flow(Chain(Affine(dim, context_dim=context_dim), Planar(dim, 6, context_dim))).double()
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return q


@pytest.mark.parametrize("context_dim", [None, 3], ids=["owned", "amortised"])
@pytest.mark.parametrize("dim, points, width", [(1, 4001, 60.0), (2, 501, 25.0)])
def test_density_integrates_to_one(dim, points, width, context_dim):
    q = flow(dim, context_dim)
    context = None if context_dim is None else torch.randn(1, context_dim, dtype=torch.float64)
    axis = torch.linspace(-width, width, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    with torch.no_grad():
        log_q = q(*([context] if context_dim else [])).log_prob(grid[:, None] if context_dim else grid)
    assert abs(log_q.exp().sum() * (axis[1] - axis[0]) ** dim - 1) < 1e-3


@pytest.mark.parametrize("context_dim", [None, 3], ids=["owned", "amortised"])
def test_one_pass_agrees_with_the_inverse(context_dim):
    q = flow(3, context_dim)
    posterior = q() if context_dim is None else q(torch.randn(5, context_dim, dtype=torch.float64))
    z, log_q = posterior.rsample_and_log_prob((50,))
    assert z.shape == (50, *posterior.batch_shape, 3)
    assert log_q.shape == z.shape[:-1]
    assert torch.allclose(posterior.log_prob(z), log_q, atol=1e-7)


def test_is_a_torch_distribution():
    q = flow(2)
    assert isinstance(q(), torch.distributions.Distribution)
    assert q().event_shape == (2,)
    assert q().has_rsample
    assert not q.sample((4,)).requires_grad
    assert q.rsample((4,)).requires_grad
    assert q.sample().shape == (2,)
    assert q.sample((4, 3)).shape == (4, 3, 2)


def test_a_generator_makes_draws_repeatable_and_leaves_the_global_one_alone():
    q = flow(2)

    def draw():
        return q.rsample_and_log_prob((10,), generator=torch.Generator().manual_seed(3))[0]

    before = torch.random.get_rng_state()
    assert torch.equal(draw(), draw())
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_bases():
    base = Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
    z, log_q = Flow(Affine(2), base=base).rsample_and_log_prob((100,))
    assert z.abs().max() <= 1
    assert torch.allclose(log_q, torch.full((100,), -2 * math.log(2)))


def test_moves_to_another_precision():
    q = Flow(Planar(2, 3)).double()
    z, log_q = q.rsample_and_log_prob((5,))
    assert z.dtype == log_q.dtype == torch.float64


NESTED = {
    "gumbel": Gumbel(torch.tensor([0.1, 0.2]), torch.ones(2)),
    "lognormal": LogNormal(torch.tensor([0.1, 0.2]), torch.ones(2)),
    "kumaraswamy": Kumaraswamy(torch.tensor([2.0, 3.0]), torch.ones(2)),
    "composed": TransformedDistribution(
        Normal(torch.zeros(2), torch.ones(2)),
        transforms.ComposeTransform(
            [
                transforms.AffineTransform(torch.tensor([0.1, 0.2]), torch.ones(2)),
                transforms.TanhTransform(),
            ]
        ).inv.inv,
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_all_tensors_of_a_base_move(name):
    """To a device without memory, where tensors left behind are an error.

    And to double precision, where the distribution is that which was built from the same numbers.
    """
    given = Flow(Affine(2), base=Independent(NESTED[name], 1))
    double = copy.deepcopy(given).double()
    z = NESTED[name].sample((20,))
    assert torch.allclose(given.log_prob(z), NESTED[name].log_prob(z).sum(-1), rtol=1e-5)
    assert torch.allclose(double.log_prob(z.double()).float(), given.log_prob(z), rtol=1e-3, atol=1e-3)
    assert double.sample(3).dtype == torch.float64
    assert copy.deepcopy(given).sample(3).dtype == given.sample(3).dtype == torch.float32
    assert copy.deepcopy(given).to("meta").rsample_and_log_prob((3,))[1].device.type == "meta"
    assert NESTED[name].sample().device.type == "cpu", "the user's own stays where it is"


def test_bounds_of_a_support_move():
    bounds = constraints.interval(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.1]))
    shared = constraints.positive
    q = Flow(Affine(3), support=constraints.cat([bounds, shared], -1, [2, 1]))
    assert copy.deepcopy(q).to("meta").rsample_and_log_prob((3,))[1].device.type == "meta"
    moved = q.double().support.cseq
    assert moved[0].lower_bound.dtype == torch.float64 == q.sample().dtype
    assert moved[1] is shared
    assert bounds.lower_bound.dtype == torch.float32


# Outside

SUPPORTS = {
    "positive": (constraints.positive, [-1.0, 1.0]),
    "nonnegative": (constraints.nonnegative, [0.0, 1.0]),
    "interval": (constraints.interval(0.0, 5.0), [6.0, 1.0]),
    "halves": (
        constraints.cat([constraints.less_than(0.0), constraints.real], -1, [1, 1]),
        [0.1, 0.0],
    ),
    "simplex": (constraints.simplex, [0.3, 0.3, 0.3]),
    "corner": (constraints.simplex, [0.0, 0.5, 0.5]),
}


def log_prob_and_slopes(q, z):
    "Log-densities, and the gradients of their sum."
    log_q = q.log_prob(z)
    return log_q.detach(), torch.autograd.grad(log_q.sum(), list(q.parameters()), materialize_grads=True)


@dtypes
@pytest.mark.parametrize("name", SUPPORTS)
def test_outside_the_support_the_density_is_zero(name, dtype):
    "And spoils no gradient of the rows beside it. What is nan stays nan."
    support, point = SUPPORTS[name]
    q = Flow(Chain(Affine(2), Planar(2, 3)), support=support).to(dtype)
    point = torch.tensor(point, dtype=dtype)
    z = q.sample(5)
    inside, slopes = log_prob_and_slopes(q, z)
    found, found_slopes = log_prob_and_slopes(q, torch.cat([point[None], z]))
    assert found[0] == -math.inf
    assert torch.equal(found[1:], inside)
    assert inside.isfinite().all()
    assert all(torch.allclose(f, s, rtol=1e-4, atol=1e-5) for f, s in zip(found_slopes, slopes, strict=True))
    assert any(s.any() for s in slopes)
    assert q.log_prob(torch.full_like(point, math.nan)).isnan()


def test_outside_for_every_row_of_a_context():
    q = Flow(Affine(2, context_dim=3), support=constraints.positive)
    context = torch.randn(4, 3)
    assert q(context).log_prob(torch.tensor([-1.0, 1.0])).tolist() == 4 * [-math.inf]
    z = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])[:, None]
    assert torch.equal(q(context).log_prob(z).isinf(), torch.tensor([[False], [True]]).expand(2, 4))


@pytest.mark.parametrize(
    "base",
    [
        Exponential(torch.ones(2)),
        Gamma(torch.ones(2), 1.0),
        LogNormal(torch.zeros(2), torch.ones(2)),
        Uniform(torch.zeros(2), torch.ones(2)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_outside_the_support_of_a_base(base):
    q = Flow(Affine(2), base=Independent(base, 1))
    z = torch.tensor([[0.5, 0.5], [0.5, -0.5]])
    log_q, slopes = log_prob_and_slopes(q, z)
    assert torch.allclose(log_q[0], base.log_prob(z[0]).sum())
    assert log_q[1] == -math.inf
    assert all(s.isfinite().all() for s in slopes)


def test_draws_are_inside():
    "Also those whose entries add to one only as single precision can."
    for support in (constraints.simplex, constraints.positive, constraints.unit_interval):
        q = Flow(Affine(1000), support=support)
        assert q.log_prob(q.sample(2000 if support is constraints.simplex else 10)).isfinite().all()


def test_inverse_exchanges_costs():
    planar = Planar(2, 3)
    assert (planar.forward_kind, planar.inverse_kind) == ("closed form", "iterative")
    assert (Inverse(planar).forward_kind, Inverse(planar).inverse_kind) == ("iterative", "closed form")
    assert Chain(Affine(2), Inverse(planar)).forward_kind == "iterative"


class OneWay(Affine):
    inverse_kind = "none"


def test_a_direction_that_does_not_exist_says_so():
    with pytest.raises(NotImplementedError, match="OneWay has no inverse"):
        Flow(OneWay(2)).log_prob(torch.zeros(2))
    with pytest.raises(ValueError, match="forward"):
        Flow(Inverse(OneWay(2)))
    with pytest.raises(NotImplementedError, match="OneWay has no inverse"):
        Inverse(OneWay(2)).forward(torch.zeros(2))


def test_log_density_of_a_known_case():
    q = Flow(Affine(2))
    with torch.no_grad():
        q.transform.source.shift.fill_(1.0)
        q.transform.source.log_scale.fill_(math.log(3))
    x = torch.randn(10, 2)
    assert torch.allclose(q.log_prob(x), Normal(1.0, 3.0).log_prob(x).sum(-1))


def test_a_flow_is_a_base_for_another():
    inner = flow(2)
    outer = Affine(2).double()
    with torch.no_grad():
        outer.source.shift.fill_(1.0)
    both = Flow(outer, base=inner)
    chained = Flow(Chain(inner.transform, outer)).double()
    x = torch.randn(20, 2, dtype=torch.float64)
    assert torch.allclose(both.log_prob(x), chained.log_prob(x), atol=1e-9)

    def draw(q):
        return q.rsample((5,), generator=torch.Generator().manual_seed(0))

    assert torch.allclose(draw(both), draw(chained))


class Moving(Affine):
    "A layer that behaves differently in training, and remembers what it has seen."

    def constants(self):
        return {"seen": torch.zeros(self.length, self.dim)}

    def push(self, z, shift, log_scale, seen):
        if self.training:
            self.seen += 1
        return super().push(z, shift, log_scale)


def test_judging_a_fit_does_not_train_it():
    from normflow_vi import fit

    q = Flow(Moving(2))
    fit(
        q,
        log_density=lambda z: -0.5 * z.square().sum(-1),
        steps=3,
        draws=4,
        evaluation_draws=50,
        modes="ignore",  # the layer has no inverse
    )
    assert not q.training, "neither the trial before nor the draws that judge may move the buffers"
    assert (q.transform.seen == 3).all(), (
        "neither the trial before nor the draws that judge may move the buffers"
    )


def test_the_same_seed_gives_the_same_fit_whatever_the_base():
    from normflow_vi import fit

    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        torch.rand(noise)
        q = Flow(Affine(2), base=Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
        results.append(
            fit(
                q,
                log_density=lambda z: -0.5 * (z - 1).square().sum(-1),
                steps=20,
                draws=8,
                evaluation_draws=50,
            ).elbo.value
        )
    assert torch.equal(*results)


def test_a_base_that_only_bounds_its_density_keeps_the_bound_a_bound():
    """Draws and log-weights of a continuously-indexed base come from one pass.

    Its `log_prob` at those draws would be another draw of a lower bound.
    """
    from normflow_vi.flows import CIF

    q = Flow(Affine(2), base=Flow(CIF(2, 2, hidden=(8,), index_hidden=(4,))))
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        z, log_q = q.rsample_and_log_prob((100_000,))
    weights = (-0.5 * z.square().sum(-1) - torch.log(torch.tensor(2 * torch.pi)) - log_q).exp()
    assert abs(weights.mean() - 1) <= 3 * weights.std() / 100_000**0.5
    with torch.no_grad():
        q.transform.source.shift.fill_(1.0)
    assert q.sample(5).shape == (5, 2)


def test_what_is_no_base():
    import pytest

    with pytest.raises(ValueError, match="context_dim=3"):
        Flow(Affine(2), base=Flow(Affine(2, context_dim=3)))
    with pytest.raises(TypeError, match="transform"):
        Flow(Affine)
