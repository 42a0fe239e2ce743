"""Inverse autoregressive flows where the answer is known: exact posteriors, contexts, trained masks."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from helpers import moved, normals
from normflow_vi.engine.optimizer import Optimizer
from normflow_vi.engine.trainer import Trainer
from normflow_vi.flows import Flow
from normflow_vi.models.likelihoods import Gaussian
from normflow_vi.models.posteriors import posterior
from normflow_vi.models.vae import VAE
from normflow_vi.testing import slogdet_of_jacobian
from normflow_vi.transforms import Affine, Chain, InverseAutoregressive
from normflow_vi.transforms.linear import Triangular

forms = pytest.mark.parametrize("form", ["gated", "plain"])
contexts = pytest.mark.parametrize("context_dim", [None, 3], ids=["owned", "context"])
hiddens = pytest.mark.parametrize("hidden", [(), (8,), (8, 8)], ids=str)


# A linear-Gaussian model, whose posterior is a Gaussian with a full covariance

PIXELS, DIM, SIGMA = 6, 3, 0.5


class LinearGaussian:
    """`p(z) = N(0, I)`, `x | z = N(W z + b, sigma^2 I)`: matrix, offset, and what follows from them.

    The posterior is `N(to_mean (x - b), C)` with `C = sigma^2 M^-1` and `M = W^T W + sigma^2 I`;
    `factor` is the lower Cholesky factor of `C`. Source: Tipping & Bishop 1999.
    """

    def __init__(self):
        self.W, self.b = normals(PIXELS, DIM), normals(PIXELS)
        M = self.W.T @ self.W + SIGMA**2 * torch.eye(DIM)
        self.precision = M / SIGMA**2
        self.to_mean = torch.linalg.solve(M, self.W.T)
        self.factor = torch.linalg.cholesky(self.precision.inverse())
        self.evidence = MultivariateNormal(self.b, self.W @ self.W.T + SIGMA**2 * torch.eye(PIXELS))
        self.x = self.evidence.sample((20,))
        self.log_p = self.evidence.log_prob(self.x)

    def log_weights(self, transform):
        "`log p(x, z) - log q(z|x)` of 500 draws for each image, `(500, 20)`, for a posterior transform."
        model = VAE(
            nn.Identity(), nn.Linear(DIM, PIXELS), Flow(transform), likelihood=Gaussian(SIGMA)
        ).double()
        with torch.no_grad():
            model.decoder.weight.copy_(self.W)
            model.decoder.bias.copy_(self.b)
            z, log_q = model.q(self.x).rsample_and_log_prob((500,))
            return sum(model.log_joint(self.x, z).values()) - log_q

    def best_diagonal(self):
        "The best diagonal Gaussian: its precisions are the diagonal of the posterior's precision."
        affine = Affine(DIM, context_dim=PIXELS).double()
        emit(affine, self.to_mean, self.b, {"log_scale": -0.5 * self.precision.diagonal().log()})
        return affine


def emit(transform, to_shift, b, constants):
    "Let the head of a transform emit `shift = to_shift (x - b)`, and `constants` whatever the context."
    head, rows = transform.source, 0
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.zero_()
        for name, shape in head.shapes.items():
            part = slice(rows, rows + shape.numel())
            rows = part.stop
            if name == "shift":
                head.linear.weight[part] = to_shift / head.scale
                head.linear.bias[part] = -(to_shift @ b) / head.scale
            else:
                head.linear.bias[part] = constants[name].flatten() / head.scale


def as_triangular(truth):
    "The exact posterior: scales, then a unit lower triangular matrix and the mean."
    affine = Affine(DIM, context_dim=PIXELS).double()
    emit(affine, torch.zeros(DIM, PIXELS).double(), truth.b, {"log_scale": truth.factor.diagonal().log()})
    triangular = Triangular(DIM, context_dim=PIXELS).double()
    unit = truth.factor / truth.factor.diagonal()
    emit(triangular, truth.to_mean, truth.b, {"below": unit[tuple(torch.tril_indices(DIM, DIM, -1))]})
    return Chain(affine, triangular)


def as_linear_network(truth):
    """The exact posterior as an inverse autoregressive step with linear networks.

    One covariance serves all images here, so its weights may be shared by them.
    """
    iaf = InverseAutoregressive(DIM, 1, PIXELS, (), form="plain").double()
    tensors = {name: p[0] for name, p in iaf.source.named_parameters()}
    weight, bias, context = (
        tensors[f"{kind}_0"].unflatten(-1, (DIM, 2)) for kind in ("weight", "bias", "context")
    )
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
        weight[..., 0] = truth.factor.tril(-1).T
        bias[:, 0], bias[:, 1] = -truth.to_mean @ truth.b, truth.factor.diagonal().log()
        context[..., 0] = truth.to_mean.T
    return iaf


@pytest.mark.parametrize("exact", [as_triangular, as_linear_network])
def test_a_linear_flow_is_the_posterior_of_a_linear_gaussian_model(exact):
    "Every weight is the evidence, so the gap is zero for every draw."
    truth = LinearGaussian()
    log_w = truth.log_weights(exact(truth))
    assert (log_w - truth.log_p).abs().max() < 1e-6
    assert (log_w.mean(0) - truth.log_p).abs().max() < 1e-6


def test_a_diagonal_gaussian_has_the_gap_of_the_formula():
    truth = LinearGaussian()
    gap = 0.5 * (truth.precision.diagonal().log().sum() - truth.precision.logdet())
    zero = torch.zeros(DIM).double()
    diagonal = MultivariateNormal(zero, torch.diag(1 / truth.precision.diagonal()))
    assert abs(kl_divergence(diagonal, MultivariateNormal(zero, truth.precision.inverse())) - gap) < 1e-10
    short = (truth.log_p - truth.log_weights(truth.best_diagonal())).mean(1)
    assert gap > 0.1
    assert abs(short.mean() - gap) < 4 * short.std() / len(short) ** 0.5


def test_linear_weights_that_move_the_scale_are_no_gaussian():
    "Why linear networks are not the linear flow in general: a scale may follow an earlier variable."
    truth = LinearGaussian()
    iaf = as_linear_network(truth)
    with torch.no_grad():
        iaf.source.weight_0[0].unflatten(-1, (DIM, 2))[0, 1, 1] = 0.5
    assert (truth.log_weights(iaf) - truth.log_p).std(0).min() > 0.1


# Contexts


@forms
@pytest.mark.parametrize("residual", [False, True], ids=["layers", "residual"])
def test_the_context_reaches_every_hidden_layer_of_every_step(form, residual):
    "With all other ways for the context cut, every output moves with it, the first variable's too."
    hidden = (24, 24, 24)
    iaf = moved(InverseAutoregressive(4, 3, 5, hidden, "tanh", residual=residual, form=form))
    kept = {
        name: p.detach().clone() for name, p in iaf.source.named_parameters() if name.startswith("context")
    }
    assert sorted(kept) == ["context_0", "context_1", "context_2"]
    z, context = normals(4), normals(5)
    for k in range(3):
        for name in kept:
            with torch.no_grad():
                for other in kept:
                    getattr(iaf.source, other).zero_()
                getattr(iaf.source, name)[k] = kept[name][k]
            slopes = torch.func.jacrev(lambda c: iaf.forward(z, c)[0])(context)
            assert slopes.isfinite().all()
            assert slopes.any(1).all(), f"{name} of step {k} does not reach every variable"
            assert torch.func.grad(lambda c: iaf.forward(z, c)[1])(context).any()


@forms
def test_an_encoder_gets_a_gradient_through_the_steps_alone(form):
    iaf = InverseAutoregressive(4, 2, 5, (16, 16), form=form).double()
    encoder = nn.Linear(7, 5).double()
    z, log_q = Flow(iaf)(encoder(normals(10, 7))).rsample_and_log_prob((3,))
    (log_q + z.square().sum(-1)).mean().backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in encoder.parameters())
    for name, p in iaf.source.named_parameters():
        assert p.grad.flatten(1).any(1).all(), f"{name}: a step without a gradient"


# Masks after training


def ring(z):
    "An unnormalised density that no Gaussian has."
    return -((z.norm(dim=-1) - 2) ** 2) / 0.18 - 0.1 * z[..., 0]


def by_the_trainer(iaf, context):
    def loss(model, batch, step, generator):
        z = torch.randn(64, 4, generator=generator)
        y, log_det = model.forward(z, context)
        return SimpleNamespace(value=(-log_det - ring(y)).mean(), terms={})

    optimizer = Optimizer("adam", 1e-2, weight_decay=0.1)
    Trainer([iaf], loss, steps=300, optimizer=optimizer, seeds=[0]).run()


def by_torch(iaf, context):
    optimizer = torch.optim.AdamW(iaf.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(300):
        y, log_det = iaf.forward(torch.randn(64, 4), context)
        optimizer.zero_grad()
        (-log_det - ring(y)).mean().backward()
        optimizer.step()


def as_read(iaf):
    "The weights of each step as the parallel direction reads them, masks applied."
    return iaf.unstacked(iaf.masked("closed form", iaf.fetch_tensors(torch.zeros(1, 3), torch.float32)))


@forms
@pytest.mark.parametrize("train", [by_the_trainer, by_torch])
def test_masks_hold_after_training(form, train):
    """Weights outside the masks are zeros, not small numbers, and no variable sees a later one.

    Whatever stands in the masked places has no effect, to the last bit, in either direction.
    """
    iaf = InverseAutoregressive(4, 3, 3, (12, 12), "tanh", form=form)
    before = {name: p.detach().clone() for name, p in iaf.source.named_parameters()}
    context = torch.randn(64, 3)
    train(iaf, context)
    assert all((p != before[name]).any() for name, p in iaf.source.named_parameters())
    masks = [mask.expand(3, *mask.shape[-2:]) for mask in iaf.masks()]
    for k, step in enumerate(as_read(iaf)):
        for i, mask in enumerate(masks):
            assert not getattr(iaf.source, f"weight_{i}")[k][~mask[k]].any()
            assert not step[f"weight_{i}"][~mask[k]].any()
            assert step[f"weight_{i}"][mask[k]].all()
        one = step | {"context": context[0]}
        slopes = torch.func.jacrev(lambda z, one=one: iaf.push(z, **one)[0])(torch.randn(4))
        allowed = slopes.tril() if k % 2 == 0 else slopes.triu()
        assert torch.equal(slopes, allowed)
        assert slopes.diagonal().all()
    z = torch.randn(64, 4)
    expected = [*iaf.forward(z, context), *iaf.inverse(z, context)]
    with torch.no_grad():
        for i, mask in enumerate(masks):
            getattr(iaf.source, f"weight_{i}")[~mask] = 1e6
    found = [*iaf.forward(z, context), *iaf.inverse(z, context)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# One latent


@forms
@hiddens
@contexts
def test_one_latent(form, hidden, context_dim):
    iaf = moved(InverseAutoregressive(1, 3, context_dim, hidden, "tanh", form=form))
    z = normals(50, 1)
    context = None if context_dim is None else normals(50, context_dim)
    y, log_det = iaf.forward(z, context)
    back, minus = iaf.inverse(y, context)
    assert y.shape == z.shape
    assert log_det.shape == (50,)
    assert torch.allclose(log_det, slogdet_of_jacobian(iaf, z, context), atol=1e-12)
    assert torch.allclose(back, z, atol=1e-10)
    assert torch.allclose(minus, -log_det, atol=1e-12)
    if context is not None:
        assert (iaf.forward(z, -context)[0] != y).all()


def test_one_latent_behind_an_encoder():
    q = posterior("iaf", 1, 2, 3).double()(normals(5, 3))
    z, log_q = q.rsample_and_log_prob((4,))
    assert z.shape == (4, 5, 1)
    assert torch.allclose(q.log_prob(z), log_q, atol=1e-10)
    line = torch.linspace(-60, 60, 12_001, dtype=torch.float64)
    mass = q.log_prob(line[:, None, None].expand(-1, 5, 1)).exp().sum(0) * (line[1] - line[0])
    assert torch.allclose(mass, torch.ones(5).double(), atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda iaf: iaf.forward(torch.zeros(5, 4), torch.zeros(5, 2)),
            ["context", "(5, 2)", "context_dim=3"],
        ),
        (
            lambda iaf: iaf.inverse(torch.zeros(5, 4), torch.zeros(5, 2)),
            ["context", "(5, 2)", "context_dim=3"],
        ),
        (lambda iaf: iaf.forward(torch.zeros(5, 4)), ["context", "context_dim=3", "None"]),
        (lambda iaf: iaf.forward(torch.zeros(5, 4), torch.zeros(6, 3)), ["context", "(6,)", "(5, 4)"]),
        (lambda iaf: iaf.forward(torch.zeros(5, 3), torch.zeros(5, 3)), ["z", "(5, 3)", "dim=4"]),
        (lambda iaf: Flow(iaf)(torch.zeros(5, 2)), ["context", "(5, 2)", "context_dim=3"]),
        (lambda iaf: Flow(iaf)(), ["context", "none", "context_dim=3"]),
        (
            lambda iaf: Flow(InverseAutoregressive(4))(torch.zeros(5, 3)),
            ["context", "one", "context_dim=None"],
        ),
        (lambda iaf: InverseAutoregressive(4, length=0), ["length=0", "at least 1"]),
        (lambda iaf: InverseAutoregressive(4, length=2.0), ["length=2.0", "integer"]),
        (lambda iaf: InverseAutoregressive(0), ["dim=0", "at least 1"]),
        (lambda iaf: InverseAutoregressive(4, context_dim=0), ["context_dim=0", "at least 1"]),
        (lambda iaf: InverseAutoregressive(4, hidden=(0,)), ["hidden=0", "at least 1"]),
        (lambda iaf: InverseAutoregressive(4, form="affine"), ["form='affine'", "gated, plain"]),
        (lambda iaf: posterior("iaf", 4, -1, 3), ["length=-1", "at least 0"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as raised:
        call(InverseAutoregressive(4, 2, 3, (8,)))
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{raised.value} does not say {missing}"


def test_gates_and_constants_of_the_start():
    "The paper's advice: gates start between sigmoid(1) and sigmoid(2)."
    _, log_det = InverseAutoregressive(6, 1, 3, (32,)).forward(torch.randn(200, 6), torch.randn(200, 3))
    gate = (log_det / 6).exp().mean().item()
    assert 1 / (1 + math.exp(-1.0)) < gate < 1 / (1 + math.exp(-2.0))
