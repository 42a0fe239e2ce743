"""Every transform against its contract. A new transform is a new row of TRANSFORMS."""
import mpmath
import pytest
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from normflow_vi.testing import slogdet_of_jacobian
from normflow_vi import Flow
from normflow_vi.transforms import Affine, Chain, Inverse, Planar, Transform


class Shuffle(Transform):
    "Constants and no parameters: the shape of a permutation, mask or fixed rotation."
    def constants(self): return {"order": torch.stack([torch.randperm(self.dim) for _ in range(self.length)])}
    def push(self, z, order): return z[..., order], z.new_zeros(z.shape[:-1])
    def pull(self, y, order): return y[..., order.argsort()], y.new_zeros(y.shape[:-1])


class Conditioned(Transform):
    "A network of half of z, which the context enters as an input: the shape of coupling and autoregressive layers."
    context_to, decays, hidden = "layers", True, 6

    def initial(self):
        inputs, outputs = self.dim // 2 + (self.context_dim or 0), self.dim - self.dim // 2
        return {"w": torch.randn(self.length, inputs, self.hidden), "b": torch.randn(self.length, self.hidden), "v": torch.randn(self.length, self.hidden, 2 * outputs)}

    def shift_and_scale(self, a, w, b, v, context):
        if context is not None: a = torch.cat([a, context.to(a.dtype).expand(*a.shape[:-1], -1)], -1)
        shift, log_scale = ((a @ w + b).tanh() @ v).chunk(2, -1)
        return shift, .1 * log_scale

    def push(self, z, context, **layer):
        a, rest = z.tensor_split([self.dim // 2], -1)
        shift, log_scale = self.shift_and_scale(a, context=context, **layer)
        return torch.cat([rest * log_scale.exp() + shift, a], -1), log_scale.sum(-1)

    def pull(self, y, context, **layer):
        rest, a = y.tensor_split([self.dim - self.dim // 2], -1)
        shift, log_scale = self.shift_and_scale(a, context=context, **layer)
        return torch.cat([a, (rest - shift) * (-log_scale).exp()], -1), -log_scale.sum(-1)


TRANSFORMS = {
    "shuffle": lambda dim, length, context_dim: Shuffle(dim, length, context_dim),
    "conditioned": lambda dim, length, context_dim: Conditioned(dim, length, context_dim),
    "affine": lambda dim, length, context_dim: Affine(dim, length, context_dim),
    "planar": lambda dim, length, context_dim: Planar(dim, length, context_dim),
    "planar-paper": lambda dim, length, context_dim: Planar(dim, length, context_dim, constraint="paper"),
    "chain": lambda dim, length, context_dim: Chain(Affine(dim, context_dim=context_dim), Planar(dim, length, context_dim)),
    "inverse": lambda dim, length, context_dim: Inverse(Chain(Affine(dim, context_dim=context_dim), Planar(dim, length, context_dim))),
}
C = 4
every = pytest.mark.parametrize("name", TRANSFORMS)
both_sources = pytest.mark.parametrize("context_dim", [None, C], ids=["owned", "amortised"])


def make(name, dim=3, length=4, context_dim=None, scale=1., dtype=torch.float64):
    "A transform with parameters drawn anew: at scale 1 as it starts, jittered; beyond, that many times larger."
    transform = TRANSFORMS[name](dim, length, context_dim).to(dtype)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.copy_(scale * (parameter + .3 * torch.randn_like(parameter)))
    return transform


def context_for(n, context_dim, dtype=torch.float64):
    return None if context_dim is None else torch.randn(n, context_dim, dtype=dtype)


@every
@both_sources
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_log_det_is_that_of_the_jacobian(name, context_dim, dim):
    for input_scale in (1., 3., 10., 100.):
        for _ in range(5):
            transform, context = make(name, dim, context_dim=context_dim), context_for(25, context_dim)
            z = input_scale * torch.randn(25, dim, dtype=torch.float64)
            log_det = transform.forward(z, context)[1]
            assert ((log_det - slogdet_of_jacobian(transform, z, context)).abs() <= 1e-10 * (1 + log_det.abs())).all()


@every
@both_sources
def test_inverse_by_its_residual(name, context_dim):
    for length, scale in [(4, 1.), (1, 3.)] * 3:
        transform, context = make(name, length=length, context_dim=context_dim, scale=scale), context_for(200, context_dim)
        y = 3 * torch.randn(200, 3, dtype=torch.float64)
        z, minus = transform.inverse(y, context)
        again, log_det = transform.forward(z, context)
        assert ((again - y).abs() <= 1e-10 * (1 + y.abs())).all()
        assert torch.allclose(minus, -log_det, atol=1e-6)


@every
@both_sources
def test_single_precision(name, context_dim):
    double = make(name, context_dim=context_dim)
    single = TRANSFORMS[name](3, 4, context_dim)
    single.load_state_dict(double.state_dict())
    z, context = torch.randn(500, 3), context_for(500, context_dim, torch.float32)
    wide = double.forward(z.double(), None if context is None else context.double())[1]
    assert ((single.forward(z, context)[1] - wide).abs() <= 1e-4 * (1 + wide.abs())).all()


@every
@both_sources
def test_double_input_gets_double_arithmetic(name, context_dim):
    "With single-precision parameters, owned or in the head; a context may have either precision."
    single = TRANSFORMS[name](3, 4, context_dim)
    if context_dim is not None:
        z, context = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, context_dim)
        for c in (context, context.double()):
            log_det = single.forward(z, c)[1]
            assert log_det.dtype == torch.float64 and torch.allclose(log_det, slogdet_of_jacobian(single, z, c), rtol=0, atol=1e-10)
        return
    z = torch.randn(5, 3, dtype=torch.float64)
    y, log_det = single.forward(z)
    assert y.dtype == log_det.dtype == torch.float64
    assert torch.allclose(log_det, slogdet_of_jacobian(single, z), rtol=0, atol=1e-10)


@every
@both_sources
def test_values_have_sample_and_batch_axes(name, context_dim):
    transform, context = make(name, context_dim=context_dim), context_for(7, context_dim)
    z = torch.randn(5, 7, 3, dtype=torch.float64)
    y, log_det = transform.forward(z, context)
    assert y.shape == z.shape and log_det.shape == (5, 7)
    for s in range(5):
        one, one_det = transform.forward(z[s], context)
        assert torch.allclose(y[s], one, atol=1e-12) and torch.allclose(log_det[s], one_det, atol=1e-12)


@every
@both_sources
def test_runs_are_one_more_axis(name, context_dim):
    "`vmap` over stacked parameters equals the loop over modules: how seeds, and components of a mixture, are batched."
    runs = [make(name, context_dim=context_dim) for _ in range(3)]
    z, context = torch.randn(3, 7, 3, dtype=torch.float64), context_for(7, context_dim)
    parameters, buffers = stack_module_state(runs)
    def one(p, b, z): return functional_call(runs[0], (p, b), (z, context))
    y, log_det = vmap(one)(parameters, buffers, z)
    backwards = vmap(lambda p, b, y: functional_call(_Direction(runs[0], "inverse"), ({f"t.{k}": v for k, v in p.items()}, {f"t.{k}": v for k, v in b.items()}), (y, context)))
    again, minus = backwards(parameters, buffers, y)
    for r, run in enumerate(runs):
        expected, expected_det = run.forward(z[r], context)
        assert torch.allclose(y[r], expected, atol=1e-12) and torch.allclose(log_det[r], expected_det, atol=1e-12)
        assert torch.allclose(minus[r], run.inverse(y[r], context)[1], atol=1e-12)
    assert torch.allclose(again, z, atol=1e-6)


class _Direction(torch.nn.Module):
    "A method of a module as its `forward`, which is what `functional_call` calls."
    def __init__(self, t, name): super().__init__(); self.t, self.name = t, name
    def forward(self, *args, **more): return getattr(self.t, self.name)(*args, **more)


def test_flows_are_batched_over_runs_too():
    "Density and draws, the latter with one generator for all runs."
    runs = [Flow(make("chain")).double() for _ in range(3)]
    parameters, buffers = stack_module_state(runs)
    def call(name, p, b, *args, **more):
        renamed = [{f"t.{k}": v for k, v in tensors.items()} for tensors in (p, b)]
        return functional_call(_Direction(runs[0], name), tuple(renamed), args, more)
    x = torch.randn(7, 3, dtype=torch.float64)
    log_q = vmap(lambda p, b: call("log_prob", p, b, x))(parameters, buffers)
    assert all(torch.allclose(log_q[r], run.log_prob(x), atol=1e-10) for r, run in enumerate(runs))
    draw = vmap(lambda p, b: call("rsample_and_log_prob", p, b, (5,), generator=torch.Generator().manual_seed(0)), randomness="different")
    z, log_q = draw(parameters, buffers)
    assert all(torch.allclose(run.log_prob(z[r]), log_q[r], atol=1e-6) for r, run in enumerate(runs)) and not torch.allclose(z[0], z[1])


@every
@both_sources
def test_amortised_equals_owned_row_by_row(name, context_dim):
    "A context batch of equal rows is one unconditional transform: nothing else depends on where tensors come from."
    if context_dim is None: pytest.skip("compares the other source with this one")
    transform = make(name, context_dim=context_dim)
    context = torch.randn(1, context_dim, dtype=torch.float64)
    z = torch.randn(6, 3, dtype=torch.float64)
    together = transform.forward(z, context.expand(6, -1))
    for i in range(6):
        alone = transform.forward(z[i:i + 1], context)
        assert torch.allclose(together[0][i:i + 1], alone[0]) and torch.allclose(together[1][i:i + 1], alone[1])


@every
@both_sources
def test_traces_to_one_graph(name, context_dim):
    transform, context = make(name, context_dim=context_dim), context_for(7, context_dim)
    z = torch.randn(7, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: transform.forward(z, context), fullgraph=True, backend="eager")
    for got, expected in zip(compiled(z), transform.forward(z, context)): assert torch.allclose(got, expected, atol=1e-12)


@every
def test_function_transforms(name):
    transform = make(name)
    def log_det(z): return transform.forward(z)[1]
    z = torch.randn(6, 3, dtype=torch.float64)
    slopes = vmap(grad(log_det))(z)
    assert slopes.shape == (6, 3) and torch.allclose(slopes[0], grad(log_det)(z[0])) and torch.allclose(slopes[0], jacrev(log_det)(z[0]))
    step = 1e-5 * torch.eye(3, dtype=torch.float64)                              # and they are the derivative
    numeric = torch.stack([(log_det(z + h) - log_det(z - h)) / 2e-5 for h in step], -1)
    assert torch.allclose(slopes, numeric, atol=1e-6)


@every
@both_sources
def test_gradients_reach_every_parameter(name, context_dim):
    transform, context = make(name, context_dim=context_dim), context_for(9, context_dim)
    if not list(transform.parameters()): pytest.skip("no parameters")
    y, log_det = transform.forward(torch.randn(9, 3, dtype=torch.float64), context)
    (y.square().sum() + log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in transform.parameters())


@every
def test_inverse_direction_has_gradients(name):
    "Density estimation differentiates the inverse: in the values and in the parameters, also where a root is solved for."
    transform = make(name, length=2)
    parameters = dict(transform.named_parameters())
    y = torch.randn(5, 3, dtype=torch.float64)
    if not parameters: pytest.skip("no parameters")
    def loss(shift): return functional_call(_Backwards(transform), {f"t.{k}": v + shift for k, v in parameters.items()}, (y,))
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(loss(shift), shift)
    numeric = (loss(torch.tensor(1e-6)) - loss(torch.tensor(-1e-6))) / 2e-6
    assert abs(slope - numeric) <= 1e-5 * (1 + abs(numeric))


def test_planar_inverse_has_second_derivatives():
    planar = make("planar", length=2)
    def log_det(y): return planar.inverse(y)[1]
    y, step = torch.randn(3, dtype=torch.float64), 1e-4
    hessian = torch.func.jacrev(grad(log_det))(y)
    numeric = torch.stack([(grad(log_det)(y + step * e) - grad(log_det)(y - step * e)) / (2 * step) for e in torch.eye(3, dtype=torch.float64)])
    assert torch.allclose(hessian, numeric, atol=1e-6)


class _Backwards(torch.nn.Module):
    def __init__(self, t): super().__init__(); self.t = t
    def forward(self, y):
        z, log_det = self.t.inverse(y)
        return z.square().sum() + log_det.sum()


def planar_in_extended_precision(z, u, w, b, offset):
    "log|det| of one planar layer from the formulas of the paper, with 60 digits."
    with mpmath.workdps(60):
        z, u, w = ([mpmath.mpf(float(x)) for x in v] for v in (z, u, w))
        dot = lambda a, c: sum(x * y for x, y in zip(a, c))
        alpha, norm2 = dot(w, u), dot(w, w)
        m = mpmath.log1p(mpmath.exp(alpha + offset)) - 1
        u_hat = [ui + (m - alpha) * wi / norm2 for ui, wi in zip(u, w)]
        h = mpmath.tanh(dot(w, z) + mpmath.mpf(float(b)))
        return float(mpmath.log(1 + (1 - h * h) * dot(w, u_hat)))


@pytest.mark.parametrize("scale", [1., 10., 100.])
@pytest.mark.parametrize("constraint", ["identity", "paper"])
def test_planar_against_extended_precision(scale, constraint):
    from normflow_vi.transforms.planar import CONSTRAINTS
    offset = CONSTRAINTS[constraint]
    for _ in range(40):
        transform = make("planar" if constraint == "identity" else "planar-paper", length=1, scale=scale)
        z = torch.randn(3, dtype=torch.float64) / scale
        u, w, b = (transform.source()[n][0].detach() for n in ("u", "w", "b"))
        expected = planar_in_extended_precision(z, u, w, b, offset)
        assert abs(transform.forward(z)[1].item() - expected) <= 1e-10 * (1 + abs(expected))


@pytest.mark.parametrize("draws", [2000, pytest.param(100_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1., 10., 100.])
def test_planar_determinant_never_changes_sign(draws, dtype, scale):
    "Many parameter draws as one amortised batch: every slope along w is positive and finite, so is the log-determinant."
    from normflow_vi.transforms.planar import CONSTRAINTS, constrain
    u, w = scale * torch.randn(2, draws, 5, dtype=dtype)
    for offset in CONSTRAINTS.values():
        u_hat, slope = constrain(u, w, offset)
        assert u_hat.isfinite().all() and (slope >= 0).all() and slope.isfinite().all()
    transform = Planar(5, context_dim=11).to(dtype)
    with torch.no_grad():
        transform.source.linear.weight.copy_(torch.eye(11) / transform.head_scale); transform.source.linear.bias.zero_()
    y, log_det = transform.forward(torch.randn(draws, 5, dtype=dtype), torch.cat([u, w, scale * torch.randn(draws, 1, dtype=dtype)], -1))
    assert y.isfinite().all() and log_det.isfinite().all()


@every
def test_state_survives_saving(name, tmp_path):
    transform = make(name)
    torch.save(transform.state_dict(), tmp_path/"t.pt")
    other = make(name)
    other.load_state_dict(torch.load(tmp_path/"t.pt", weights_only=True))
    z = torch.randn(5, 3, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(transform.forward(z), other.forward(z)))


# Planted bugs: the checks above must notice each of them.

def _divide_by_the_norm(u, w, c):
    alpha = (w * u).sum(-1)
    slope = torch.nn.functional.softplus(alpha + c)
    return u + ((slope - 1 - alpha) / w.norm(dim=-1))[..., None] * w, slope

BUGS = {
    "norm instead of its square": ("constrain", _divide_by_the_norm),
    "log-det forgets the slope": ("log_slope", lambda h, slope: (h * h + (1 - h * h)).log() + 0 * slope),
    "log-det with h instead of h squared": ("log_slope", lambda h, slope: (h.abs() + (1 - h * h) * slope).log()),
    "log-det without gradient": ("log_slope", lambda h, slope: (h * h + (1 - h * h) * slope).log().detach()),
    "inverse takes a single step": ("solve_slope", lambda target, slope: _original_solve(target, slope, 0)),
}
from normflow_vi.transforms.planar import solve_slope as _original_solve


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, wrong = BUGS[bug]
    monkeypatch.setattr(f"normflow_vi.transforms.planar.{name}", wrong)
    checks = [lambda: test_log_det_is_that_of_the_jacobian("planar", None, 2), lambda: test_inverse_by_its_residual("planar", None),
              lambda: test_function_transforms("planar")]
    caught = 0
    for check in checks:
        try: check()
        except (AssertionError, RuntimeError): caught += 1
    assert caught, f"nothing noticed: {bug}"
