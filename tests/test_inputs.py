"""What users bring: inputs that were once taken wrongly, or refused in words that nobody understands.

Each is tested as a kind, in a table where there is one.
"""

import copy
import io
import json
import math
import pickle
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributions import (
    Cauchy,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
    constraints,
    transforms,
)
from torch.func import functional_call

from normflow_vi import Chain, Fit, Flow, fit
from normflow_vi.engine.runs import make_runs
from normflow_vi.evaluate import log_marginal, precompute
from normflow_vi.fitting.checks import check_samples, total_of
from normflow_vi.flows import Place, RealNVP, in_support, is_reachable
from normflow_vi.flows.bases import list_parts, units_of
from normflow_vi.flows.supports import describe_coarseness, mean_and_spread
from normflow_vi.objectives import elbo, estimate
from normflow_vi.objectives.gradients import stopped_log_prob
from normflow_vi.targets import U1
from normflow_vi.testing.cases import CASES
from normflow_vi.transforms import Affine, Planar, Sylvester
from normflow_vi.transforms.base import Transform
from normflow_vi.utils.modules import undisturbed, unvalidated


def square(z):
    return -0.5 * z.square().sum(-1)


def composed(start, *steps):
    "A distribution of torch on vectors of two numbers, from one of numbers and steps."
    return TransformedDistribution(Independent(start.expand((2,)), 1), list(steps))


def logistic_steps():
    return [transforms.SigmoidTransform().inv, transforms.AffineTransform(torch.tensor([0.0, 1.0]), 2.0)]


# Copies and files of a base

INVERTED = {
    "inverse": lambda: composed(Uniform(0.0, 1.0), transforms.SigmoidTransform().inv),
    "inverse of an inverse": lambda: composed(Normal(0.0, 1.0), transforms.SigmoidTransform().inv.inv),
    "inside a composition": lambda: composed(
        Uniform(0.0, 1.0), transforms.ComposeTransform(logistic_steps())
    ),
    "inverse of a composition": lambda: composed(
        Uniform(0.0, 1.0), transforms.ComposeTransform([transforms.ExpTransform().inv.inv]).inv.inv
    ),
    "independent": lambda: composed(
        Uniform(0.0, 1.0), transforms.IndependentTransform(transforms.SigmoidTransform().inv, 1)
    ),
    "side by side": lambda: composed(
        Uniform(0.0, 1.0),
        transforms.CatTransform([transforms.SigmoidTransform().inv, transforms.ExpTransform().inv], -1),
    ),
}


def through_a_file(q):
    torch.save(q, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda q: copy.deepcopy(copy.deepcopy(q)),
    "pickle": lambda q: pickle.loads(pickle.dumps(q)),
    "torch.save": through_a_file,
    "double and back": lambda q: copy.deepcopy(q).double().float(),
}


def same_draws(q, other):
    "Whether two flows draw the same and find the same densities."
    draws = []
    for flow in (q, other):
        torch.manual_seed(1)
        draws.append(
            torch.cat([*flow.rsample_and_log_prob((20,))[:1], flow.log_prob(torch.ones(20, 2))[:, None]], 1)
        )
    return torch.equal(*draws)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", INVERTED)
def test_a_base_with_an_inverted_step_is_copied_whole(name, way):
    "Torch blanks what an inverted transform inverts when it pickles one."
    q = Flow(Planar(2, 2), base=INVERTED[name]())
    assert same_draws(q, COPIES[way](q))


@pytest.mark.parametrize("name", INVERTED)
def test_a_fit_with_an_inverted_step_comes_back_from_its_file(name, tmp_path):
    result = fit(
        Flow(Affine(2), base=INVERTED[name]()), square, steps=3, draws=8, evaluation_draws=50, place=False
    )
    assert same_draws(result.q, Fit.load(result.save(tmp_path / "fit")).q)


# Where a base lives

one = torch.ones(2)
exp, log, sigmoid, tanh = (
    transforms.ExpTransform(),
    transforms.ExpTransform().inv,
    transforms.SigmoidTransform(),
    transforms.TanhTransform(),
)


def shift(loc, scale=1.0):
    return transforms.AffineTransform(loc, scale)


COMPOSED = {  # name: (distribution, points inside, points outside), each for both coordinates
    "shifted exponential": (composed(Exponential(1.0), shift(1.0)), [1.1, 5.0], [0.9, -3.0, -50.0]),
    "turned exponential": (composed(Exponential(1.0), shift(1.0, -2.0)), [0.9, -9.0], [1.1, 4.0]),
    "shifted gamma": (composed(Gamma(2.0, 1.0), shift(-3.0)), [-2.5, 7.0], [-3.5, -20.0]),
    "shifted log-normal": (composed(LogNormal(0.0, 1.0), shift(2.0)), [2.5], [1.9, -1.0]),
    "stretched uniform": (composed(Uniform(0.0, 1.0), shift(-1.0, 4.0)), [-0.9, 2.9], [-1.1, 3.1, 30.0]),
    "shifted half-normal": (composed(HalfNormal(1.0), shift(1.0)), [1.5], [0.5, -4.0]),
    "log of an exponential": (composed(Exponential(1.0), log), [-3.0, 0.0, 2.0], []),
    "log of a shifted exponential": (composed(Exponential(1.0), shift(1.0), log), [0.1, 2.0], [-0.1, -5.0]),
    "exponential of a uniform": (composed(Uniform(0.0, 1.0), exp), [1.1, 2.7], [0.9, 2.8, 0.0, -1.0]),
    "exponential of an exponential": (composed(Exponential(1.0), exp), [1.1, 9.0], [0.9, 0.0, -2.0]),
    "sigmoid of an exponential": (composed(Exponential(1.0), sigmoid), [0.6, 0.9], [0.4, -1.0, 1.5]),
    "stretched sigmoid": (
        composed(Normal(0.0, 1.0), sigmoid, shift(0.0, 3.0)),
        [0.1, 2.9],
        [-0.1, 3.1, -8.0],
    ),
    "tanh, shifted": (composed(Normal(0.0, 1.0), tanh, shift(5.0)), [4.1, 5.9], [3.9, 6.1, 0.0]),
    "logit of a uniform, shifted": (composed(Uniform(0.0, 1.0), sigmoid.inv, shift(1.0)), [-3.0, 4.0], []),
    "logit of half a uniform": (composed(Uniform(0.5, 1.0), sigmoid.inv), [0.1, 4.0], [-0.1, -3.0]),
    "power, shifted": (
        composed(Exponential(1.0), transforms.PowerTransform(torch.tensor(2.0)), shift(1.0)),
        [1.1, 5.0],
        [0.9, -1.0],
    ),
    "one composition": (
        composed(Exponential(1.0), transforms.ComposeTransform([shift(1.0), log, shift(0.0, 2.0)])),
        [0.1, 3.0],
        [-0.1, -4.0],
    ),
    "its inverse, independent": (
        composed(
            Uniform(0.0, 1.0),
            transforms.IndependentTransform(transforms.ComposeTransform([shift(-1.0, 0.5), exp]).inv, 1),
        ),
        [-4.0, 1.9],
        [2.1, 9.0],
    ),
    "independent of a composition": (
        Independent(TransformedDistribution(Exponential(one), [shift(1.0)]), 1),
        [1.1, 5.0],
        [0.9, -3.0],
    ),
    "composition of a composition": (
        TransformedDistribution(composed(Exponential(1.0), shift(1.0)), [shift(2.0, 3.0)]),
        [5.1, 9.0],
        [4.9, 0.0],
    ),
    "cauchy": (composed(Cauchy(0.0, 1.0), shift(1.0)), [-300.0, 300.0], []),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COMPOSED)
def test_a_composition_lives_where_all_its_steps_can_arrive(name, dtype):
    "Its density there is torch's, and minus infinity elsewhere, which spoils no gradient beside it."
    distribution, inside, outside = COMPOSED[name]
    q = Flow(Affine(2), base=distribution).to(dtype)
    z = torch.tensor([[x, inside[0]] for x in inside + outside], dtype=dtype)
    log_q = q.log_prob(z)
    expected = distribution.log_prob(z[: len(inside)].float())
    assert torch.allclose(log_q[: len(inside)].float(), expected, atol=1e-4)
    assert log_q[len(inside) :].tolist() == len(outside) * [-math.inf]
    slopes = torch.autograd.grad(log_q.sum(), list(q.parameters()), materialize_grads=True)
    assert all(slope.isfinite().all() for slope in slopes)
    assert q.log_prob(q.sample((200,))).isfinite().all()


def test_samples_need_a_base_that_lives_everywhere():
    base = composed(Exponential(1.0), shift(1.0))
    with pytest.raises(ValueError, match=r"base lives on a part of R\^2: Trans.*support="):
        fit(Flow(Affine(2), base=base), samples=torch.randn(50, 2), steps=2)


def test_the_prior_of_a_model_gains_nothing_outside_its_support():
    from normflow_vi.models.networks import MLP
    from normflow_vi.models.posteriors import posterior
    from normflow_vi.models.vae import VAE

    prior = composed(Exponential(1.0), shift(1.0))
    model = VAE(MLP(4, (3,)), MLP(2, (3,), 4), posterior("planar", 2, 1, context_dim=3), prior=prior)
    terms = model.log_joint(torch.zeros(1, 4), torch.tensor([[-50.0, 2.0]]))
    assert terms["log_prior"].tolist() == [-math.inf]


# Half precision

HALF = {
    "affine": lambda: Flow(Affine(1000)),
    "ten": lambda: Flow(Affine(10)),
    "planar": lambda: Flow(Planar(300, 2)),
    "coupling": lambda: Flow(RealNVP(100, 2, hidden=(8,))),
    "a base": lambda: Flow(Affine(500), base=Independent(Laplace(torch.zeros(500), 1.0), 1)),
    "a flow as base": lambda: Flow(Affine(500), base=Flow(Affine(500))),
    "positive": lambda: Flow(Affine(300), support=constraints.positive),
    "interval": lambda: Flow(Affine(300), support=constraints.interval(-1.0, 2.0)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_loses_no_nats(name, dtype):
    "The density of draws is that of single precision, with the rounded parameters."
    q = HALF[name]().to(dtype)
    with torch.no_grad():
        z, log_q = q.rsample_and_log_prob((50,))
        single = copy.deepcopy(q).float().double()
        exact = single.log_prob(z.double())
        assert z.dtype == log_q.dtype == torch.float32
        assert (log_q - exact).abs().max() < 2e-5 * exact.abs().max()
        assert (q.log_prob(z) - exact).abs().max() < 2e-5 * exact.abs().max()


# What is no base

BASES = {
    "q()": (lambda: Flow(Affine(2))(), TypeError, r"base: got q\(\).*base=q"),
    "composed with q()": (
        lambda: TransformedDistribution(Flow(Affine(2))(), [shift(1.0)]),
        TypeError,
        r"base: got q\(\).*base=q",
    ),
    "a parameter": (
        lambda: Independent(Normal(torch.zeros(2, requires_grad=True), 1.0), 1),
        ValueError,
        "base: .*requires a gradient.*detach",
    ),
    "a parameter of a step": (
        lambda: composed(Normal(0.0, 1.0), shift(torch.zeros(2, requires_grad=True))),
        ValueError,
        "base: .*requires a gradient.*detach",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_what_would_stay_untrained_is_no_base(name):
    make, kind, message = BASES[name]
    with pytest.raises(kind, match=message):
        Flow(Planar(2), base=make())


# Files


class Forgetful(Affine):
    "A layer that leaves its parameters out of its file."

    def __getstate__(self):
        return super().__getstate__() | {"source": None, "_modules": {}}


class Fickle(torch.nn.Module):
    "A base that comes back from its file with another width."

    dim = 2

    def __init__(self, width=3.0):
        super().__init__()
        self.width = width

    def __deepcopy__(self, memo):
        return Fickle(self.width)

    def __getstate__(self):
        return super().__getstate__() | {"width": 1.0}

    def rsample(self, shape, generator=None):
        return self.width * torch.randn(*shape, 2, generator=generator)

    def log_prob(self, z):
        return Normal(0.0, self.width).log_prob(z).sum(-1)


class Logistic(torch.nn.Module):
    "A base of one's own that holds a torch distribution with an inverted step."

    dim = 2

    def __init__(self):
        super().__init__()
        self.distribution = INVERTED["inverse"]()

    def rsample(self, shape, generator=None):
        return self.distribution.rsample(shape)

    def log_prob(self, z):
        return self.distribution.log_prob(z)


UNSAVABLE = {
    "without parameters": lambda: Flow(Forgetful(2)),
    "another base": lambda: Flow(Affine(2), base=Fickle()),
    "a base of one's own": lambda: Flow(Affine(2), base=Logistic()),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_would_not_come_back_is_not_saved(name, tmp_path):
    "A fit is refused when it is saved, not when it is needed; the earlier file stays."
    path = tmp_path / "fit"
    result = fit(UNSAVABLE[name](), square, steps=2, draws=8, evaluation_draws=50, place=False)
    path.write_text("earlier")
    with pytest.raises(TypeError, match="q cannot be saved: what comes back"):
        result.save(path)
    assert path.read_text() == "earlier"
    assert result.q.sample((3,)).shape == (3, 2)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    from normflow_vi.data.finding import _search_places
    from normflow_vi.plots import save_figure
    from normflow_vi.utils.files import exclusive

    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    result = fit(Flow(Affine(2)), square, steps=2, draws=8, evaluation_draws=50)
    assert result.save("~/fits/one") == home / "fits/one"
    assert same_draws(Fit.load("~/fits/one").q, result.q)
    assert save_figure(result.plot(), "~/figure.png") == home / "figure.png"
    with exclusive("~/runs") as folder:
        assert folder == home / "runs"
    assert _search_places("~/data")[0] == home / "data"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


# A distribution holds its tensors


def exchanged(q, scale=0.3):
    "Other parameters for a flow, which require gradients."
    return {k: (p + scale * torch.randn_like(p)).detach().requires_grad_() for k, p in q.named_parameters()}


HOLDERS = {
    "affine": lambda: Flow(Affine(2)),
    "chain": lambda: Flow(Chain(Affine(2), Planar(2, 3))),
    "coupling": lambda: Flow(RealNVP(2, 2, hidden=(4,))),
    "a flow as base": lambda: Flow(Affine(2), base=Flow(Planar(2, 2))),
    "support": lambda: Flow(Affine(2), support=constraints.positive),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_distribution_keeps_the_tensors_it_was_called_with(name):
    "Values and gradients of `functional_call(q, p, ())` are those of a flow that owns `p`."
    q, x = HOLDERS[name](), torch.rand(5, 2) + 0.5
    p = exchanged(q)
    before = q.log_prob(x)
    held = functional_call(q, p, ())
    other = copy.deepcopy(q)
    other.load_state_dict(p, strict=False)
    log_q, expected = held.log_prob(x), other.log_prob(x)
    assert torch.equal(log_q, expected) and not torch.allclose(log_q, before)
    slopes = torch.autograd.grad(log_q.sum(), list(p.values()), materialize_grads=True)
    own = torch.autograd.grad(expected.sum(), list(other.parameters()), materialize_grads=True)
    assert all(map(torch.equal, slopes, own)) and any(slope.any() for slope in slopes)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(held.sample((5,), generators[0]), other.sample((5,), generators[1]))
    assert torch.equal(q.log_prob(x), before)


def test_a_distribution_keeps_units_and_other_consumers_see_its_tensors():
    q, x = Flow(Affine(2)), torch.randn(5, 2)
    held = functional_call(q, {"place.loc": torch.ones(2)}, ())
    assert torch.allclose(held.log_prob(x), q.log_prob(x - 1))
    p = exchanged(q)
    held = functional_call(q, p, ())
    assert torch.equal(stopped_log_prob(held, x), held.log_prob(x))
    amortised = Flow(Affine(2, context_dim=3))
    held = functional_call(amortised, exchanged(amortised), (torch.randn(5, 3),))
    assert torch.allclose(precompute(held).log_prob(x), held.log_prob(x))
    assert not torch.allclose(held.log_prob(x), amortised(held.context).log_prob(x))


def test_a_distribution_follows_a_flow_that_is_moved_or_updated():
    "As torch's own do: a tensor that is changed in place is the same tensor."
    q = Flow(Chain(Affine(2), Planar(2, 2)))
    held, x = q(), torch.randn(5, 2)
    with torch.no_grad():
        q.transform.transforms[0].source.shift.add_(1.0)
    assert torch.equal(held.log_prob(x), q.log_prob(x))
    q.double()
    assert held.sample().dtype == torch.float64


# What a flow does not have

ABSENT = {
    "mean": lambda q: q.mean,
    "variance": lambda q: q.variance,
    "stddev": lambda q: q.stddev,
    "mode": lambda q: q.mode,
    "entropy": lambda q: q.entropy(),
    "perplexity": lambda q: q.perplexity(),
    "cdf": lambda q: q.cdf(torch.zeros(2)),
    "icdf": lambda q: q.icdf(torch.zeros(2)),
    "expand": lambda q: q.expand((3,)),
    "enumerate_support": lambda q: q.enumerate_support(),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_has_no_closed_form_is_pointed_to_the_draws(name):
    with pytest.raises(NotImplementedError, match=rf"^{name}: .*no closed form.*q\."):
        ABSENT[name](Flow(Affine(2))())


class OneWayOnly(Transform):
    "Neither direction is written."


def test_a_transform_without_a_direction_says_how_to_add_it():
    with pytest.raises(NotImplementedError, match="OneWayOnly has no push.*forward_kind = 'none'"):
        OneWayOnly(2).forward(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="OneWayOnly has no pull.*OneWayOnly.pull.*inverse_kind"):
        OneWayOnly(2).inverse(torch.zeros(2))


# The log-density


def numbers_of(z):
    return z.detach().numpy()


NO_TENSORS = {
    "numpy": (lambda z: -0.5 * (numbers_of(z) ** 2).sum(-1), r"its value is numpy.ndarray"),
    "a numpy part": (
        lambda z: {"log_prior": square(z), "log_likelihood": numbers_of(z).sum(-1)},
        r"log_likelihood is numpy.ndarray",
    ),
    "a list": (lambda z: [-0.5] * len(z), "its value is list"),
    "a number": (lambda z: 0.0, "its value is float"),
    "nothing": (lambda z: None, "its value is NoneType"),
}


@pytest.mark.parametrize("name", NO_TENSORS)
def test_a_log_density_without_a_tensor_is_told_what_to_return(name):
    log_density, message = NO_TENSORS[name]
    message = rf"^log_density: .*{message}; expected a tensor of shape \(64,\).*torch operations"
    with pytest.raises(ValueError, match=message):
        fit(Flow(Affine(2)), log_density, steps=2)


def test_an_error_of_the_users_own_stays_what_it_is():
    with pytest.raises(TypeError, match="^mine$"):
        fit(Flow(Affine(2)), lambda z: (_ for _ in ()).throw(TypeError("mine")), steps=2)


UNIFORM = {
    "a square": (Independent(Uniform(torch.zeros(2), 1.0), 1), constraints.unit_interval),
    "an interval": (Independent(Uniform(-torch.ones(2), 3.0), 1), constraints.interval(-1.0, 3.0)),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_a_uniform_target_on_its_support_is_fitted(name):
    "A constant carries no gradient, and needs none: the evidence is 1."
    target, support = UNIFORM[name]
    q = Flow(Affine(2), support=support)
    result = fit(q, target.log_prob, steps=600, evaluation_draws=2000)
    assert abs(result.evidence.value) < max(0.02, 5 * result.evidence.std_error)
    assert result.elbo.value > -0.1


def test_values_that_differ_need_a_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        fit(Flow(Affine(2)), lambda z: square(z.detach()), steps=2)


def test_a_uniform_target_without_a_support_is_told_to_give_one():
    target = Independent(Uniform(torch.zeros(2), 1.0, validate_args=False), 1, validate_args=False)
    with pytest.raises(ValueError, match="log_density: -inf.*give support="):
        fit(Flow(Affine(2)), target.log_prob, steps=2)


def test_parts_of_a_log_density_are_added():
    parts = {"log_prior": square, "log_likelihood": lambda z: 2 * square(z - 1)}
    total = total_of(lambda z: {name: part(z) for name, part in parts.items()})
    z = torch.randn(5, 2)
    assert torch.equal(total(z), square(z) + 2 * square(z - 1))
    assert torch.equal(total_of(square)(z), square(z)) and total_of(U1) is U1


# Samples


def normal_rows(n, d, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(3))


COARSE = {  # name: (samples, what is said)
    "far away": (1e7 + normal_rows(300, 1), "column 0, about 1e\\+07 with a spread of 0.6.*q.double"),
    "one column": (normal_rows(300, 2) + torch.tensor([0.0, -3e6]), "column 1, about -3e\\+06.*q.double"),
    "too large": (1e200 * normal_rows(300, 1), "row 0 is too large for torch.float32.*q.double"),
    "one too large": (
        torch.cat([normal_rows(30, 1), torch.tensor([[1e39]], dtype=torch.float64)]),
        "row 30 is too large",
    ),
    "too small": (1e-200 * normal_rows(300, 1), "column 0.*cannot be told apart in torch.float32.*q.double"),
    "years in seconds": (1.7e9 + 30 * normal_rows(300, 1), "column 0, about 1.7e\\+09.*q.double"),
}


@pytest.mark.parametrize("name", COARSE)
def test_samples_that_single_precision_cannot_tell_apart_are_refused(name):
    "And are taken by a flow in double precision."
    x, message = COARSE[name]
    q = Flow(Affine(x.shape[1]))
    with pytest.raises(ValueError, match=f"^samples: .*{message}"):
        fit(q, samples=x, steps=2)
    assert torch.equal(check_samples(q.double(), x), x)


FINE = {
    "unit": normal_rows(300, 2),
    "far, but apart": 1e4 + normal_rows(300, 1),
    "exact": 2.0**24 + 2 * torch.arange(300, dtype=torch.float64)[:, None],
    "heavy tails": torch.distributions.Cauchy(0.0, 1.0).cdf(normal_rows(300, 1)).logit() * 1e6,
    "small": 1e-30 * normal_rows(300, 1),
    "already single": (1e7 + normal_rows(300, 1)).float(),
}


@pytest.mark.parametrize("name", FINE)
def test_samples_that_it_can_tell_apart_are_taken(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(check_samples(Flow(Affine(FINE[name].shape[1])), FINE[name]), FINE[name].float())


def test_samples_of_a_flow_in_half_precision_keep_theirs():
    assert check_samples(Flow(Affine(2)).bfloat16(), normal_rows(50, 2)).dtype == torch.float32


def holes(x):
    x = x.numpy().copy()
    x[3, 1] = x[5, 0] = x[5, 1] = -9999.0
    return np.ma.masked_equal(x, -9999.0)


UNREADABLE = {
    "masked": (lambda x: holes(x), ValueError, "3 of 100 values, in 2 of 50 rows, are masked"),
    "masked tensor": (
        lambda x: torch.masked.masked_tensor(x, x > 0.0),
        ValueError,
        r"of 100 values are masked",
    ),
    "sparse": (lambda x: x.to_sparse(), TypeError, "expected a dense tensor.*to_dense"),
    "objects": (lambda x: x.numpy().astype(object), TypeError, "array of numbers, got dtype object"),
    "text": (lambda x: x.numpy().astype(str), TypeError, "array of numbers, got dtype <U"),
    "fields": (
        lambda x: np.zeros(50, [("a", float), ("b", float)]),
        TypeError,
        "array of numbers, got dtype",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_has_no_number_in_each_place_is_refused(name):
    make, kind, message = UNREADABLE[name]
    with pytest.raises(kind, match=f"^samples: .*{message}"):
        fit(Flow(Affine(2)), samples=make(normal_rows(50, 2)), steps=2)


def test_arrays_of_other_layouts_are_read():
    x = normal_rows(50, 2).numpy()
    layouts = [np.ma.masked_array(x), x.astype(">f8"), np.asfortranarray(x), x[::-1][::-1]]
    assert all(torch.equal(check_samples(Flow(Affine(2)).double(), y), torch.tensor(x)) for y in layouts)


def embedded(n, rank, d, dtype=torch.float32):
    return (normal_rows(n, rank) @ torch.randn(rank, d, dtype=torch.float64)).to(dtype)


UNBOUNDED = {
    "rank 2 in six": (embedded(300, 2, 6), "plane of 2 dimensions in R\\^6"),
    "rank 5 in six": (embedded(300, 5, 6), "plane of 5 dimensions"),
    "in double": (embedded(300, 2, 3, torch.float64), "plane of 2 dimensions"),
    "in units": (embedded(300, 2, 3) * torch.tensor([1e-6, 1.0, 1e6]), "plane of 2 dimensions"),
    "a sum": (
        torch.cat([y := normal_rows(99, 2, torch.float32), y.sum(1, keepdim=True)], 1),
        "plane of 2 dimensions",
    ),
    "a constant": (
        torch.cat([normal_rows(50, 2, torch.float32), torch.full((50, 1), 7.5)], 1),
        "column 2 is 7.5",
    ),
    "one row again and again": (torch.ones(9, 2), "column 0 is 1 in every row"),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_samples_without_a_density_are_refused(name):
    x, message = UNBOUNDED[name]
    q = Flow(Affine(x.shape[1]))
    q = q.double() if x.dtype == torch.float64 else q
    with pytest.raises(ValueError, match=f"^samples: .*{message}.*likelihood has no maximum"):
        fit(q, samples=x, steps=2)


def test_a_narrow_density_is_one():
    "Nearly dependent columns have a density still; so have proportions, which lie in a plane that is known."
    x = normal_rows(300, 2)
    x = torch.cat([x, x.sum(1, keepdim=True) + 1e-3 * normal_rows(300, 1).flip(0)], 1)
    assert check_samples(Flow(Affine(3)), x).shape == (300, 3)
    shares = Dirichlet(torch.ones(3)).sample((300,))
    assert check_samples(Flow(Affine(2), support=constraints.simplex), shares).shape == (300, 3)


REPEATED = {
    "counts": lambda: torch.poisson(3 * torch.ones(300, 2)),
    "zeros among numbers": lambda: normal_rows(300, 2, torch.float32).clamp(min=0),
    "rounded": lambda: (normal_rows(300, 2, torch.float32) * 5).round() / 5,
    "few rows": lambda: normal_rows(5, 6, torch.float32),
}


@pytest.mark.parametrize("name", REPEATED)
def test_samples_that_repeat_are_warned_of(name):
    x = REPEATED[name]()
    with pytest.warns(UserWarning, match="^samples: .*without end"):
        fit(Flow(Affine(x.shape[1])), samples=x, steps=2)


def test_ordinary_samples_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (normal_rows(3000, 3), normal_rows(25, 2), normal_rows(200, 1)[torch.randint(200, (200,))]):
            fit(Flow(Affine(x.shape[1])), samples=x, steps=2)


# One row without a batch


def linear_gaussian(x, z):
    return Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(z.sum(-1, keepdim=True), 1.0).log_prob(x).sum(-1)


def encoded(size):
    encoder, flow = torch.nn.Linear(size, 3), Flow(Affine(2, context_dim=3))
    return lambda x: flow(encoder(x))


@pytest.mark.parametrize("size", [4, 300])
def test_one_image_without_a_batch_axis_is_told_so(size):
    posterior, x = encoded(size), torch.randn(size)
    with pytest.raises(ValueError, match=r"one image without an axis for the batch is x\[None\]"):
        log_marginal(linear_gaussian, posterior, x, samples=20)
    assert log_marginal(linear_gaussian, posterior, x[None], samples=20).log_p.shape == (1,)


def test_a_posterior_without_a_batch_is_told_so():
    with pytest.raises(ValueError, match=r"log q of 20 draws has shape \(20,\).*x\[None\]"):
        log_marginal(lambda x, z: square(z), lambda x: Flow(Affine(2)), torch.randn(1, 4), samples=20)


# Broken notebooks

BROKEN = {
    "empty": ("", "not a notebook"),
    "no notebook": ('{"a": 1}', "not a notebook"),
    "half a file": ('{"cells": [', "not a notebook"),
    "no Python": (
        json.dumps(
            {
                "cells": [
                    {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "id": str(i)}
                    for i, source in enumerate((["x = 1\n", "%time x"], ["\n", "y = = 2"]))
                ],
                "metadata": {},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        ),
        r"code cell 2, line 2: invalid syntax",
    ),
}
NOTEBOOK = "nbs/99_trial/10_trial.ipynb"


@pytest.mark.parametrize("name", BROKEN)
def test_the_error_of_a_broken_notebook_names_it(name, project, capsys):
    from normflow_vi.cli import main
    from normflow_vi.reproduce.notebooks import execute, is_executed, notebook_code
    from normflow_vi.reproduce.parameters import ParameterError

    text, message = BROKEN[name]
    (project / NOTEBOOK).write_text(text)
    with pytest.raises(ValueError, match=f"{NOTEBOOK}: {message}"):
        notebook_code(NOTEBOOK)
    manifest = execute(NOTEBOOK)
    assert manifest.status == "failed" and re.search(message, manifest.cause)
    assert not is_executed(NOTEBOOK, "quick")
    if "cells" not in text or name == "half a file":
        with pytest.raises(ParameterError, match="10_trial.ipynb: not a notebook"):
            execute(NOTEBOOK, {"profile": "smoke"})
    assert main(["notebook", NOTEBOOK])
    assert re.search(f"{NOTEBOOK}: {message}", capsys.readouterr().err)


def test_the_error_of_an_index_that_fails_names_it(project, monkeypatch):
    from normflow_vi.reproduce import readme

    def fail(path):
        raise ArithmeticError("it went wrong")

    monkeypatch.setattr(readme, "_execute", fail)
    with pytest.raises(RuntimeError, match="nbs/index.ipynb: ArithmeticError: it went wrong"):
        readme.readme()


# Mixed precision


def both_directions(transform, z, context):
    "What each direction that exists returns, from a fixed random stream."
    found = []
    for direction in ("forward", "inverse"):
        if getattr(transform, f"{direction}_kind") != "none":
            torch.manual_seed(1)
            found += getattr(transform, direction)(z, context)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_autocast_changes_no_digit_of_a_flow(case):
    "In half precision inverses are off by percents, log-determinants by tenths, and some solves are missing."
    for context_dim in (None, 3):
        transform, z = case.make(case.dims[-1], 2, context_dim).eval(), torch.randn(8, case.dims[-1])
        context = None if context_dim is None else torch.randn(8, 3)
        with torch.no_grad():
            expected = both_directions(transform, z, context)
            with torch.autocast("cpu"):
                found = both_directions(transform, z, context)
        assert all(map(torch.equal, found, expected)) and len(found) in (2, 4)


def test_autocast_changes_no_digit_of_a_base_or_a_support():
    base = MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    q = Flow(Sylvester(2, 2), base=base, support=constraints.positive)
    torch.manual_seed(1)
    z, log_q = q.rsample_and_log_prob((9,))
    torch.manual_seed(1)
    with torch.autocast("cpu"):
        found, found_log_q = q.rsample_and_log_prob((9,))
        assert torch.equal(found, z) and torch.equal(found_log_q, log_q)
        assert torch.equal(q.log_prob(z), q().log_prob(z))
        around = torch.nn.Linear(2, 2)(z)
    assert around.dtype == torch.bfloat16, "outside of the flow it is as it was"
    found_log_q.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in q.parameters())


# Supports made of parts

simplex, real, positive = constraints.simplex, constraints.real, constraints.positive
interval = constraints.interval(-1.0, 2.0)
vectors = constraints.independent(positive, 1)
PARTS = {  # name: (support, numbers it takes, coordinates it has)
    "simplex and real": (constraints.cat([simplex, real], -1, [3, 1]), 3, 4),
    "real and simplex": (constraints.cat([real, simplex], -1, [2, 4]), 5, 6),
    "two simplexes": (constraints.cat([simplex, interval, simplex], -1, [2, 2, 3]), 5, 7),
    "dim not said": (constraints.cat([simplex, real], lengths=[3, 1]), 3, 4),
    "no simplex": (constraints.cat([positive, interval], -1, [1, 2]), 3, 3),
    "numbers, dim not said": (constraints.cat([positive, interval], lengths=[1, 2]), 3, 3),
    "vectors": (constraints.cat([vectors, real], -1, [2, 1]), 3, 3),
    "parts of parts": (
        constraints.cat([constraints.cat([simplex, positive], -1, [2, 1]), interval], -1, [3, 1]),
        3,
        4,
    ),
    "a stack": (constraints.stack([positive, real, interval], -1), 3, 3),
    "a stack, dim not said": (constraints.stack([positive, real, interval]), 3, 3),
    "independent": (constraints.independent(constraints.cat([positive, real], -1, [1, 2]), 1), 3, 3),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_support_may_have_parts(name):
    "Draws lie in it, the two directions agree, and the log-determinant is that of the map."
    support, takes, gives = PARTS[name]
    q = Flow(Affine(takes), support=support).double()
    with torch.no_grad():
        q.transform.source.shift.normal_()
    z, log_q = q.rsample_and_log_prob((50,))
    assert z.shape == (50, gives) and q().event_shape == (gives,)
    assert in_support(support, z).all() and is_reachable(support, z).all()
    assert torch.allclose(q.log_prob(z), log_q)
    x = torch.randn(takes, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: q.place(x)[0])(x)
    free = [i for i in range(gives) if i not in last_shares(support)]
    assert torch.allclose(q.place(x)[1], torch.linalg.slogdet(jacobian[free])[1])
    outside = torch.full((gives,), -5.0, dtype=torch.float64)
    assert q.log_prob(torch.stack([outside, z[0]]))[0] == -math.inf
    assert torch.allclose(q.log_prob(torch.stack([outside, z[0]]))[1], log_q[0])


def last_shares(support, start=0):
    "Where the last entries of the simplexes of a support are: they follow from the others."
    places = []
    for part, length in list_parts(support):
        places += [start + length - 1] if part is simplex else last_shares(part, start)
        start += length
    return places


def test_the_parts_of_a_support_are_fitted_and_saved(tmp_path):
    "Dirichlet shares and a log-normal number, exactly normalised."
    shares, number = Dirichlet(torch.tensor([3.0, 4.0, 5.0])), LogNormal(0.5, 0.5)
    support = constraints.cat([simplex, positive], -1, [3, 1])
    q = Flow(Chain(Affine(3), Planar(3, 2)), support=support)
    z = torch.cat([shares.sample((500,)), number.sample((500, 1))], 1)
    for found in (
        fit(
            q,
            lambda z: shares.log_prob(z[:, :3]) + number.log_prob(z[:, 3]),
            steps=300,
            evaluation_draws=2000,
        ),
        fit(Flow(Affine(3), support=support), samples=z, steps=50),
    ):
        assert found.evidence is None or abs(found.evidence.value) < 0.05
        loaded = Fit.load(found.save(tmp_path / "fit")).q
        assert torch.equal(loaded.log_prob(z), found.q.log_prob(z)) and loaded.log_prob(z).isfinite().all()


@pytest.mark.parametrize(
    "support",
    [
        constraints.cat([simplex, real]),
        constraints.cat([simplex, real], -1, [3, 2]),
        constraints.cat([simplex, real], -1, [1, 3]),
    ],
)
def test_lengths_of_parts_that_do_not_fit_are_named(support):
    with pytest.raises(
        ValueError, match=r"support=.*R\^3 cannot be mapped onto it.*coordinates, take.*lengths="
    ):
        Flow(Affine(3), support=support)


# One layer in two places


def twice():
    layer = Affine(2)
    return Flow(Chain(layer, Planar(2, 2), layer))


def test_a_layer_in_two_places_is_still_trained_by_every_gradient():
    "Torch's `functional_call` leaves other tensors in such a layer."
    for gradient in ("reparameterised", "sticking-the-landing"):
        q = twice()
        before = dict(q.named_parameters())
        elbo(square, q, 20, gradient=gradient).value.backward()
        assert all(p is before[name] for name, p in q.named_parameters())
        assert all(p.grad is not None for p in q.parameters()), gradient


def test_runs_side_by_side_may_have_a_layer_in_two_places():
    "The program of two runs gives each the loss and the gradients that it has alone."
    models = [twice() for _ in range(2)]
    z = torch.randn(7, 2)

    def loss(q, batch, step, generator):
        return estimate(-q.log_prob(batch))

    expected = [loss(q, z, 0, None).value.item() for q in models]
    runs = make_runs(models, loss)
    value, _ = runs(torch.stack([z, z]), 0, None)
    assert torch.allclose(value, torch.tensor(expected))
    assert all(slope.any() for slope in torch.autograd.grad(value.sum(), list(runs.parameters().values())))
    assert [loss(q, z, 0, None).value.item() for q in models] == pytest.approx(expected)


# Threads


def in_threads(*functions):
    "What functions return that run at the same time."
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(f) for f in functions]]


def test_the_checks_of_distributions_are_as_before_whichever_fit_ends_first():
    "Also the number of threads: the last to leave puts back what the first one found."
    first_inside, second_inside, first_out = (threading.Event() for _ in range(3))
    before, threads = Distribution._validate_args, torch.get_num_threads()

    def first():
        with unvalidated(), undisturbed(threads + 1, torch.device("cpu")):
            first_inside.set()
            assert second_inside.wait(10)
        first_out.set()

    def second():
        assert first_inside.wait(10)
        with unvalidated(), undisturbed(threads + 2, torch.device("cpu")):
            second_inside.set()
            assert first_out.wait(10)
            assert Distribution._validate_args is False, "the other fit still needs it"

    in_threads(first, second)
    assert Distribution._validate_args is before is True
    assert torch.get_num_threads() == threads


def test_a_base_draws_from_the_generator_that_it_is_given():
    "So that the draws of two trainings in two threads do not mix; without one, from the global stream."
    q = Flow(Affine(2), base=Independent(StudentT(3.0 * torch.ones(2)), 1))

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([q.sample((5,), generator) for _ in range(200)])

    state = torch.get_rng_state()
    expected = [draw(1), draw(2)]
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(*expected)
    assert all(map(torch.equal, in_threads(lambda: draw(1), lambda: draw(2)), expected))
    torch.manual_seed(7)
    found = q.sample((5,))
    torch.manual_seed(7)
    assert torch.equal(found, q.sample((5,))) and not torch.equal(found, q.sample((5,)))
    assert not torch.equal(q.sample((5,), torch.default_generator), q.sample((5,), torch.default_generator))


# Without gradients


def test_a_fit_without_gradients_says_so():
    def attempts(q):
        yield lambda: fit(q, square, steps=2)
        yield lambda: fit(q, samples=normal_rows(50, 2), steps=2)

    for mode, name in ((torch.no_grad, "no_grad"), (torch.inference_mode, "inference_mode")):
        for attempt in attempts(Flow(Affine(2))):
            with mode(), pytest.raises(ValueError, match=rf"fit needs gradients.*torch.{name}\(\)"):
                attempt()
    with torch.inference_mode():
        q = Flow(Affine(2))
    for attempt in attempts(q):
        with pytest.raises(ValueError, match=r"^q: .*torch.inference_mode\(\)"):
            attempt()


# Units

UNITS = {
    "normal": (Normal(torch.tensor([50.0, -3.0]), torch.tensor([1.0, 100.0])), [50.0, -3.0], [1.0, 100.0]),
    "cauchy": (Cauchy(torch.tensor([5.0, 0.0]), torch.tensor([2.0, 1e-3])), [5.0, 0.0], [3.67, 1.835e-3]),
    "uniform": (Uniform(torch.tensor([1.0, 2.0]), torch.tensor([1.1, 4.0])), [1.05, 3.0], [0.0341, 0.6826]),
}


@pytest.mark.parametrize("name", UNITS)
def test_a_base_has_units(name):
    "Those of its middle; of a flow, too; and a standard normal has exactly none."
    distribution, loc, scale = UNITS[name]
    q = Flow(Affine(2), base=Independent(distribution, 1))
    state = torch.get_rng_state()
    for base in (q.base, q):
        found, width = units_of(base, 2)
        assert ((found - torch.tensor(loc)).abs() < 0.2 * torch.tensor(scale)).all()
        assert ((width / torch.tensor(scale)).log().abs() < 0.15).all()
    assert torch.equal(state, torch.get_rng_state())
    zero, one = units_of(Flow(Affine(2)).base.double(), 2)
    assert zero.tolist() == [0, 0] and one.tolist() == [1, 1] and one.dtype == torch.float64


@pytest.mark.parametrize("size", [1e200, 1e-200, 1.0, 1e8])
def test_mean_and_spread_of_any_size(size):
    x = normal_rows(1000, 2) + torch.tensor([0.0, 3.0])
    mean, spread = mean_and_spread(size * x)
    assert torch.allclose(mean / size, x.mean(0)) and torch.allclose(spread / size, x.std(0, correction=0))
    far = 1e7 + x
    assert torch.allclose(mean_and_spread(far)[1], x.std(0, correction=0))
    assert mean_and_spread(torch.zeros(3, 1))[1] == 0


def test_units_that_a_number_format_cannot_resolve_are_described():
    place = Place(2)
    place.loc.copy_(torch.tensor([0.0, 1e8]))
    assert re.search(
        r"coordinate 1 is about 1e\+08 .*torch.float32.*q.double\(\)", describe_coarseness(place)
    )
    assert describe_coarseness(place.double()) is None
    assert describe_coarseness(Place(2)) is None


@pytest.mark.parametrize("make", [lambda q: q, lambda q: q()], ids=["flow", "distribution"])
def test_a_context_in_the_wrong_place_is_refused(make):
    q = make(Flow(Affine(dim=2)))
    context = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got Tensor; .*q\(context\)"):
        q.log_prob(context, context)
    for draw in (q.sample, q.rsample, q.rsample_and_log_prob):
        with pytest.raises(TypeError, match=r"sample_shape: expected an int or ints, got Tensor"):
            draw(context)
        assert draw(torch.Size([4]), torch.Generator().manual_seed(0)) is not None
    with pytest.raises(TypeError, match="sample_shape"):
        q.sample((2.0,))
