"""Elementwise and linear layers: PReLU, BatchNorm in training mode, permutations and rotations, PLU
and Householder.
"""

import math
from functools import partial

import mpmath
import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from helpers import CASE, caught, dtypes, emitting, exact, many_draws, moved, near, normals, scales
from normflow_vi.engine.optimizer import Optimizer
from normflow_vi.engine.trainer import Trainer
from normflow_vi.flows import Flow
from normflow_vi.objectives import estimate
from normflow_vi.testing.cases import feed_batch
from normflow_vi.testing.contract import draw_context
from normflow_vi.transforms.affine import Affine
from normflow_vi.transforms.base import Chain, Inverse
from normflow_vi.transforms.batchnorm import BatchNorm
from normflow_vi.transforms.linear import PLU, Householder, compact_reflections, matvec
from normflow_vi.transforms.permutation import Orthogonal, Permutation, draw_rotations
from normflow_vi.transforms.prelu import PReLU

# Closed forms in extended precision, from the owned tensors of one layer.


def layer(transform, *names):
    return [exact(getattr(transform.source, name)[0]) for name in names]


@scales
def test_prelu_against_extended_precision(scale):
    for _ in range(20):
        transform = CASE["prelu"].draw(4, length=1, scale=scale)
        z = 3 * normals(4)
        y, log_det = transform.forward(z)
        with mpmath.workdps(50):
            (log_alpha,) = layer(transform, "log_alpha")
            slopes = []
            for a, v in zip(log_alpha, exact(z), strict=True):
                slopes.append(mpmath.exp(a) if v < 0 else mpmath.mpf(1))
            expected = [s * v for s, v in zip(slopes, exact(z), strict=True)]
            assert near(log_det, mpmath.log(mpmath.fprod(slopes)))
            assert near(y, expected, 1e-12 * scale)


@scales
def test_batchnorm_against_extended_precision(scale):
    for _ in range(20):
        transform = CASE["batchnorm"].draw(4, length=1, scale=scale)
        z = 3 * normals(4)
        y, log_det = transform.forward(z)
        with mpmath.workdps(50):
            log_gamma, beta = layer(transform, "log_gamma", "beta")
            mean = exact(transform.running_mean[0])
            var = exact(transform.running_var[0])
            eps = mpmath.mpf(transform.eps)
            slopes = [mpmath.exp(g) / mpmath.sqrt(v + eps) for g, v in zip(log_gamma, var, strict=True)]
            expected = [b + s * (v - m) for b, s, v, m in zip(beta, slopes, exact(z), mean, strict=True)]
            assert near(log_det, mpmath.log(mpmath.fprod(slopes)))
            assert near(y, expected, 1e-12 * scale)


@scales
def test_plu_against_the_determinant_in_extended_precision(scale):
    "Entries from exp(-300) to exp(300): elimination needs many more digits than 50."
    for _ in range(5):
        transform = CASE["plu"].draw(4, length=1, scale=scale)
        z = normals(4)
        y, log_det = transform.forward(z)
        with mpmath.workdps(1000):
            lu, bias = layer(transform, "lu", "bias")
            lower = mpmath.eye(4)
            upper = mpmath.matrix(4, 4)
            for i in range(4):
                upper[i, i] = mpmath.exp(lu[i][i])
                for j in range(i):
                    lower[i, j] = lu[i][j]
                    upper[j, i] = lu[j][i]
            product = lower * upper
            w = mpmath.matrix(4, 4)
            for i, row in enumerate(transform.order[0].tolist()):
                w[i, :] = product[row, :]
            assert near(log_det, mpmath.log(abs(mpmath.det(w))))
            expected = w * mpmath.matrix(exact(z))
            size = w.apply(abs) * mpmath.matrix(exact(z.abs()))
            for i, found in enumerate(y.tolist()):
                allowed = 1e-12 * scale * (1 + size[i])
                assert abs(found - expected[i] - bias[i]) <= allowed


@scales
def test_householder_against_extended_precision(scale):
    for M in (1, 3, 6):
        transform = moved(Householder(4, reflections=M), scale)
        z = normals(4)
        with mpmath.workdps(50):
            found = exact(z)
            for v in layer(transform, "v")[0]:
                factor = 2 * mpmath.fdot(v, found) / mpmath.fdot(v, v)
                found = [f - factor * x for f, x in zip(found, v, strict=True)]
        assert near(transform.forward(z)[0], found, 1e-12)


# Orthogonality.


@pytest.mark.parametrize("dim", [1, 2, 5, 40])
@pytest.mark.parametrize("make", [Orthogonal, Householder, Permutation])
def test_is_orthogonal_in_double_precision_however_it_was_stored(make, dim):
    for stored in (
        lambda t: t,
        lambda t: t.double(),
        lambda t: t.double().float(),
        lambda t: t.double().float().double(),
    ):
        q = stored(make(dim, 3)).forward(torch.eye(dim, dtype=torch.float64))[0]
        assert (q @ q.T - torch.eye(dim)).abs().max() < 1e-12
        assert abs(torch.linalg.slogdet(q).logabsdet) < 1e-12


def test_haar_prefers_no_direction():
    """E Q_ij = 0, E Q_ij^2 = 1 / D, E Q_ij^4 = 3 / (D (D + 2)), for every entry; both determinants
    are equally likely.
    """
    torch.manual_seed(0)
    q = draw_rotations(20_000, 4)
    assert q.mean(0).abs().max() < 0.02
    assert (q.square().mean(0) - 1 / 4).abs().max() < 0.01
    assert (q.pow(4).mean(0) - 3 / 24).abs().max() < 0.01
    assert abs(torch.linalg.det(q).mean()) < 0.03


def test_householder_survives_vectors_that_are_parallel_short_or_zero():
    v = normals(4, 4)
    eye = torch.eye(4, dtype=torch.float64)
    for changed in (
        v[:1] + 1e-8 * v,
        v[:1].expand(4, 4),
        0 * v,
        1e-16 * v,
        1e-13 * v,
        v * torch.tensor([[1e-14], [1.0], [1e14], [0.0]]).double(),
    ):
        changed = changed.clone().requires_grad_()
        kept, r = compact_reflections(changed)
        q = eye - kept.mT @ r
        assert (q @ q.T - eye).abs().max() < 1e-12
        assert torch.allclose(torch.linalg.det(q), torch.ones((), dtype=torch.float64))
        matvec(q, torch.ones(4).double()).sin().sum().backward()
        assert changed.grad.isfinite().all()
    same, small = compact_reflections(1e-14 * v)
    v, r = compact_reflections(v)  # of any length but 0
    assert torch.allclose(same.mT @ small, v.mT @ r)


def test_reversal_twice_is_the_identity_and_orders_differ_between_layers():
    z = torch.randn(10, 30)
    assert torch.equal(Permutation(30, 2, kind="reverse").forward(z)[0], z)
    assert torch.equal(Permutation(30, kind="reverse").forward(z)[0], z.flip(-1))
    assert len(Permutation(30, 4).order.unique(dim=0)) == 4
    assert len(Orthogonal(3, 4).q.unique(dim=0)) == 4


@pytest.mark.parametrize("make", [Permutation, Orthogonal, PLU])
def test_constants_are_not_trained(make):
    assert not {"order", "q"} & {name.split(".")[-1] for name, _ in make(4, 2).named_parameters()}


# PReLU: its density jumps, so a grid has to respect the orthants.


@pytest.mark.parametrize("context_dim", [None, 4])
@pytest.mark.parametrize("dim, n", [(1, 2000), (2, 300)])
def test_prelu_density_integrates_to_one_orthant_by_orthant(dim, n, context_dim):
    transform = CASE["prelu"].draw(dim, 2, context_dim)
    context = draw_context(1, context_dim)
    mass = 0.0
    sides = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for signs in torch.cartesian_prod(*[sides] * dim).reshape(-1, dim):
        far = transform.forward(9 * signs[None], context)[0][0].detach()  # nine standard deviations out
        grid = torch.cartesian_prod(*(middles * edge for edge in far)).reshape(-1, dim)
        with torch.no_grad():
            z, log_det = transform.inverse(grid, context)
        log_q = log_det - 0.5 * (z * z).sum(-1) - 0.5 * dim * math.log(2 * math.pi)
        cell = (far / n).prod().abs()
        mass += (log_q.exp().sum() * cell).item()
    assert abs(mass - 1) < 1e-3


def test_prelu_is_the_identity_on_the_positive_side_for_every_slope():
    z = torch.tensor([[0.0, 1.0, 1e30]], requires_grad=True)
    for log_alpha in (-200.0, 200.0):
        transform = PReLU(3)
        with torch.no_grad():
            transform.source.log_alpha.fill_(log_alpha)
        y, log_det = transform.forward(z)
        back, minus = transform.inverse(z)
        (slope,) = torch.autograd.grad(y.sum() + log_det.sum(), z)
        assert torch.equal(y, z)
        assert log_det.item() == 0
        assert torch.equal(slope, torch.ones(1, 3))
        assert torch.equal(back, z)
        assert minus.item() == 0


# Many draws, as one amortised batch.


@many_draws
@dtypes
@scales
@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("kind", [PReLU, BatchNorm, PLU])
def test_many_draws_are_finite(kind, limit, scale, dtype, draws):
    "Log-scales within +-5 for the papers' formulas, at every size with `max_log_scale`."
    log_scale = scale * torch.randn(draws, 1, 5, dtype=dtype)
    z = torch.randn(draws, 5, dtype=dtype)
    if limit is None:
        log_scale = log_scale.clamp(-5, 5)
    lu = scale * torch.randn(draws, 1, 5, 5, dtype=dtype)
    diagonal = torch.diag_embed(lu.diagonal(dim1=-2, dim2=-1))
    given = {
        "log_alpha": log_scale,
        "log_gamma": log_scale,
        "lu": lu - diagonal + torch.diag_embed(log_scale),
    }
    make = partial(kind, 5, 1, max_log_scale=limit)
    transform, context = emitting(make, draws, scale, dtype, **given)
    if kind is PLU:
        layers = transform.prepare(**transform.source(context, dtype))
        assert (layers["upper"].diagonal(dim1=-2, dim2=-1) > 0).all()
        assert layers["upper"].isfinite().all()  # det W > 0 up to the sign of P
    for value, log_det in (transform.forward(z, context), transform.inverse(z, context)):
        assert value.isfinite().all()
        assert log_det.isfinite().all()
        assert (log_det.abs() <= 25.01).all()


@many_draws
@dtypes
@scales
def test_many_reflections_keep_lengths(scale, dtype, draws):
    transform, context = emitting(lambda c: Householder(5, 1, c, reflections=3), draws, scale, dtype)
    z = torch.randn(draws, 5, dtype=dtype)
    y, log_det = transform.forward(z, context)
    axes = torch.eye(5, dtype=dtype)[:, None].expand(5, draws, 5)
    q = transform.forward(axes, context)[0].movedim(0, -1)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(y.norm(dim=-1), z.norm(dim=-1), rtol=200 * eps)
    assert (torch.linalg.det(q) < 0).all()
    assert not log_det.any()
    assert torch.allclose(transform.inverse(y, context)[0], z, atol=1000 * eps)


# BatchNorm in training mode.


def test_batchnorm_moves_its_running_statistics_towards_those_of_the_batch():
    norm = BatchNorm(3, 2, momentum=0.3).double()
    batches = 2 + 3 * normals(4, 50, 3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    mean = torch.zeros(2, 3).double()
    var = torch.ones(2, 3).double()
    for batch in batches:
        value = batch
        total = 0.0
        means = []
        variances = []
        for gamma, beta in zip(norm.source.log_gamma, norm.source.beta, strict=True):
            means.append(value.mean(0))
            variances.append(value.var(0, correction=0))
            spread = variances[-1] + 1e-5
            total = total + (gamma - 0.5 * spread.log()).sum()
            value = beta + gamma.exp() * (value - means[-1]) / spread.sqrt()
        mean = 0.7 * mean + 0.3 * torch.stack(means)
        var = 0.7 * var + 0.3 * torch.stack(variances)
        y, log_det = norm.forward(batch)
        assert torch.allclose(y, value)
        assert torch.allclose(log_det, total.expand(50))
        assert torch.allclose(norm.running_mean, mean)
        assert torch.allclose(norm.running_var, var)
        assert not norm.running_mean.requires_grad
        assert "running_mean" not in dict(norm.named_parameters())


def test_batchnorm_in_training_has_the_gradients_of_its_statistics():
    "A shift of the whole batch moves nothing."
    z = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    y, log_det = BatchNorm(3).double().forward(z)
    assert torch.autograd.grad((y**3).sum() + log_det.sum(), z)[0].sum(0).abs().max() < 1e-10


def test_batchnorm_only_training_forward_moves_anything():
    norm = feed_batch(BatchNorm(3))
    z = torch.randn(20, 3)
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    inverse = norm.inverse(z)  # in training mode
    for found, expected in zip(norm.eval().inverse(z), inverse, strict=True):
        assert torch.equal(found, expected)
    norm.forward(z)
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())
    norm.train().forward(z)
    assert not torch.equal(norm.running_mean, before["running_mean"])


def test_batchnorm_replaces_its_statistics_so_earlier_graphs_stay_whole():
    norm = feed_batch(BatchNorm(3))
    z = torch.randn(20, 3, requires_grad=True)
    held = norm.running_var
    version = norm.running_var._version
    loss = norm.inverse(z)[0].square().sum()  # its graph holds the running statistics,
    loss = loss + norm.forward(z)[0].sin().sum()  # which this moves
    loss.backward()
    assert held._version == version
    assert norm.running_var is not held
    assert z.grad.isfinite().all()


def test_batchnorm_buffers_keep_their_type():
    norm = BatchNorm(3)
    y, log_det = norm.forward(normals(20, 3))
    assert y.dtype == log_det.dtype == torch.float64
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert "running_var" in norm.state_dict()
    assert norm.running_var.shape == (1, 3)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (1, 1, 3)])
def test_batchnorm_refuses_one_value(shape):
    with pytest.raises(ValueError, match="at least 2 values"):
        BatchNorm(3).forward(torch.randn(shape))
    BatchNorm(3).eval().forward(torch.randn(shape))


@pytest.mark.parametrize("context_dim", [None, 4])
def test_batchnorm_in_training_traces_and_maps_over_runs(context_dim):
    norms = [BatchNorm(3, 2, context_dim).double() for _ in range(3)]
    z = normals(3, 5, 20, 3)
    context = draw_context(20, context_dim)
    parameters, buffers = stack_module_state(norms)

    def one(p, b, z):
        tensors = p | b
        return (
            *functional_call(norms[0], tensors, (z, context)),
            tensors["running_mean"],
            tensors["running_var"],
        )

    untouched = norms[0].running_var.clone()
    together = vmap(one)(parameters, buffers, z)
    assert torch.equal(norms[0].running_var, untouched)  # functional_call leaves the module alone
    for r, norm in enumerate(norms):
        torch._dynamo.reset()
        call = partial(norm.forward, context=context)
        traced = torch.compile(call, fullgraph=True, backend="eager")(z[r])
        for found, expected in zip(together, (*traced, norm.running_mean, norm.running_var), strict=True):
            assert torch.allclose(found[r], expected, atol=1e-12)


class Batches:
    "A fixed stream of training batches."

    def __init__(self, seed):
        self.data = (
            3 * torch.randn(30, 40, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            + seed
        )
        self.step = 0

    def next(self):
        self.step += 1
        return self.data[self.step - 1]

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def density_flow(seed):
    torch.manual_seed(seed)
    return Flow(
        Inverse(Chain(PLU(2), BatchNorm(2, 2), PReLU(2), Affine(2)))
    ).double()  # single precision: Adam makes steps of the rounding error in the bias before BatchNorm


def trained(seeds):
    "Thirty updates of a density fit by the training engine."
    flows = [density_flow(seed).train() for seed in seeds]
    Trainer(
        flows,
        lambda q, batch, step, generator: estimate(-q().log_prob(batch)),
        steps=30,
        optimizer=Optimizer(learning_rate=1e-2),
        seeds=seeds,
        batches=[Batches(seed) for seed in seeds],
        log_every=10,
        validate=lambda q, step: {"nll": -q.log_prob(Batches(9).data[0]).mean()},
        validate_every=10,
    ).run()
    return flows


def test_batchnorm_under_the_training_engine():
    "Three seeds as one program and one alone give the statistics of a plain loop."
    seeds = [1, 2, 3]
    together = trained(seeds)
    for seed, flow in zip(seeds, together, strict=True):
        by_hand = density_flow(seed).train()
        stream = Batches(seed)
        adam = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
        for step in range(30):
            adam.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 30))
            loss = -by_hand.log_prob(stream.next()).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        norm, expected = (q.transform.transform.transforms[1] for q in (flow, by_hand))
        assert torch.allclose(norm.running_mean, expected.running_mean, rtol=1e-6)
        assert torch.allclose(norm.running_var, expected.running_var, rtol=1e-6)
        assert norm.running_mean[0].abs().max() > 0.1  # they did move
        (alone,) = trained([seed]) if seed == 2 else (flow,)
        for name, t in alone.state_dict().items():
            assert torch.allclose(t, flow.state_dict()[name], rtol=1e-6, atol=1e-6), name
    assert not torch.allclose(
        together[0].transform.transform.transforms[1].running_mean,
        together[1].transform.transform.transforms[1].running_mean,
    )


def test_a_sampling_fit_moves_the_statistics_of_its_samples():
    q = Flow(Chain(Affine(2), BatchNorm(2, momentum=1.0)))
    with torch.no_grad():
        q.transform.transforms[0].source.shift.fill_(3.0)
    q.rsample_and_log_prob((4000,), generator=torch.Generator().manual_seed(0))
    assert (q.transform.transforms[1].running_mean - 3).abs().max() < 0.1


# What is refused.


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PReLU(2, alpha=0.0), "alpha"),
        (lambda: PReLU(2, alpha=-1), "alpha"),
        (lambda: PReLU(2, alpha=math.nan), "alpha"),
        (lambda: PReLU(2, max_log_scale=0), "max_log_scale"),
        (lambda: BatchNorm(2, eps=0.0), "eps"),
        (lambda: BatchNorm(2, momentum=0.0), "momentum"),
        (lambda: BatchNorm(2, momentum=1.1), "momentum"),
        (lambda: BatchNorm(2, max_log_scale=-1.0), "max_log_scale"),
        (lambda: Permutation(2, kind="shift"), "kind"),
        (lambda: PLU(2, max_log_scale=math.inf), "max_log_scale"),
        (lambda: Householder(2, reflections=0), "reflections"),
        (lambda: Householder(2, reflections=2.0), "reflections"),
        (lambda: Orthogonal(2.0), "dim"),
    ],
)
def test_one_clear_error(call, words):
    with pytest.raises(ValueError, match=f"^{words}="):
        call()


def test_the_sign_fix_is_needed(monkeypatch):
    "Without it every matrix is orthogonal and the kit is content; the test of the distribution is not."
    caught(
        monkeypatch,
        test_haar_prefers_no_direction,
        "permutation.draw_rotations",
        " * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]",
        "",
    )
