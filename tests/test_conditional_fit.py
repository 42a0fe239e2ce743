"""Fits to samples that are given something: densities known exactly, what the context is worth, bad input."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints

from normflow_vi import Fit, Flow, fit
from normflow_vi.engine.errors import NonFinite
from normflow_vi.fitting import redraw_parameters
from normflow_vi.flows import RealNVP
from normflow_vi.flows.tracing import conditional_steps
from normflow_vi.objectives import Estimate
from normflow_vi.transforms import PLU, Affine, Chain, Inverse, Planar

A = torch.tensor([[1.0, -0.5, 0.0], [0.3, 0.8, -1.0]])
L = torch.tensor([[0.5, 0.0], [0.3, 0.2]])
B = torch.tensor([100.0, -1.0])
NOISE = torch.Generator().manual_seed(0)
C = torch.randn(3000, 3, generator=NOISE)
X = C @ A.T + B + torch.randn(3000, 2, generator=NOISE) @ L.T
QUICK = {"steps": 200, "learning_rate": 0.05}


def linear(**options):
    "A flow that can be N(A c + b, S) for any A, b and S."
    torch.manual_seed(0)
    return Flow(Chain(PLU(2), Affine(2, context_dim=3)), **options)


@pytest.fixture(scope="module")
def linear_fit():
    return fit(linear(), samples=X, context=C, **QUICK)


def held_out(result):
    "The pairs by which a fit was judged: those it keeps begin with them."
    n = len(X) // 10
    return result.samples[:n], result.context[:n]


def test_the_density_of_a_linear_model_is_found(linear_fit):
    "The held-out NLL falls short of the exact density's by under four standard errors of the difference."
    x, c = held_out(linear_fit)
    exact = MultivariateNormal(c @ A.T + B, scale_tril=L).log_prob(x)
    with torch.no_grad():
        ours = linear_fit.q(c).log_prob(x)
    assert torch.allclose(ours.mean().double(), linear_fit.log_likelihood.value.double(), atol=1e-4)
    lost = exact - ours
    assert lost.mean() < 4 * lost.std() / len(x) ** 0.5 + 0.01
    entropy = 1 + math.log(2 * math.pi) + L.diagonal().log().sum()
    assert abs(-linear_fit.log_likelihood.value - entropy) < 4 * linear_fit.log_likelihood.std_error


def test_q_of_a_context_is_the_density_given_it(linear_fit):
    c = torch.tensor([0.5, -1.0, 2.0])
    z = linear_fit.q(c).sample((20_000,), torch.Generator().manual_seed(1))
    error = L.matmul(L.T).diagonal().sqrt()
    assert ((z.mean(0) - (A @ c + B)).abs() < 0.1 * error).all()
    assert torch.allclose(z.T.cov(), L @ L.T, rtol=0.1)
    assert linear_fit.q(C[:7]).log_prob(X[:7]).shape == (7,)


def test_a_context_of_others_costs_the_mutual_information(linear_fit):
    "What the context says of the samples is lost if it is that of other samples."
    others = torch.randperm(len(C), generator=torch.Generator().manual_seed(1))
    lost = fit(linear(), samples=X, context=C[others], **QUICK)
    information = 0.5 * torch.logdet(A @ A.T + L @ L.T) - L.diagonal().log().sum()
    rise = linear_fit.log_likelihood.value - lost.log_likelihood.value
    error = linear_fit.log_likelihood.std_error.hypot(lost.log_likelihood.std_error)
    assert abs(rise - information) < 4 * error


def test_it_says_what_it_is(linear_fit):
    first, second = str(linear_fit).splitlines()[:2]
    assert "conditional density" in first
    nll = f"{-linear_fit.log_likelihood.value:.3f} ± {linear_fit.log_likelihood.std_error:.3f} nats"
    assert second.startswith(f"held-out conditional NLL: {nll}")
    assert "pairs held out" in second
    assert linear_fit.verdict is linear_fit.k_hat is linear_fit.moments is None
    all_used = fit(linear(), samples=X[:50], context=C[:50], steps=2)
    assert "of sample and context: it cannot show overfitting" in str(all_used)
    assert "overfits" not in str(linear_fit)
    held = linear_fit.log_likelihood
    worse = replace(linear_fit, log_likelihood=Estimate(held.value - 1, held.std_error))
    assert re.search(r"held-out conditional NLL: 1\.\d+.* it overfits by (0\.9|1\.)", str(worse))


def test_its_pairs_belong_together_and_its_draws_are_given_them(linear_fit):
    samples, context = linear_fit.samples, linear_fit.context
    left = samples - context @ A.T - B
    assert left.std(0).max() < 0.6  # the samples' own are 1.2 and 1.3
    z = linear_fit.draws()
    assert z.shape == (10_000, 2)
    assert torch.equal(z, linear_fit.draws())
    assert ((z[: len(context)] - context @ A.T - B).std(0) < 0.6).all()


def test_a_file_keeps_it(linear_fit, tmp_path):
    again = Fit.load(linear_fit.save(tmp_path / "given.fit"))
    assert again.summary() == linear_fit.summary()
    assert torch.equal(again.context, linear_fit.context)
    assert torch.equal(again.draws(), linear_fit.draws())
    assert torch.equal(again.q(C).log_prob(X), linear_fit.q(C).log_prob(X))


def test_a_picture_shows_the_samples(linear_fit):
    plt = pytest.importorskip("matplotlib.pyplot")
    for figure, panels in ((linear_fit.plot(), 4), (linear_fit.plot_pairs(), 3)):
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert len(shown) == panels
        names = {text for axes in shown for text in axes.get_legend_handles_labels()[1]}
        assert {"samples", "q, given the contexts"} <= names
        plt.close(figure)


def test_it_is_no_set_of_draws(linear_fit):
    with pytest.raises(ValueError, match=r"to_arviz.*q\(c\).sample"):
        linear_fit.to_arviz()
    with pytest.raises(ValueError, match="context: got none"):
        linear_fit.q.sample((5,))


def test_arrays_and_double_precision():
    few = {"steps": 5, "validation": 0.2}
    one = fit(linear(), samples=X[:200].numpy(), context=C[:200].double().numpy(), **few)
    two = fit(linear(), samples=X[:200], context=C[:200], **few)
    assert torch.equal(one.log_likelihood.value, two.log_likelihood.value)
    assert len(one.history.valid["nll"])
    double = fit(linear().double(), samples=X[:200], context=C[:200], **few)
    assert double.context.dtype == double.draws().dtype == torch.float64


def test_the_seed_decides_and_the_best_start_is_kept():
    results = [
        fit(linear(), samples=X, context=C, restarts=3, seed=seed, steps=30, learning_rate=0.05)
        for seed in (1, 1, 2)
    ]
    values = [[bound.value.item() for bound in result.bounds] for result in results]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 3
    assert values[0] == sorted(values[0], reverse=True)
    x, c = held_out(results[0])
    assert abs(results[0].q(c).log_prob(x).mean().item() - values[0][0]) < 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(2, context_dim=3),
        lambda: Inverse(Planar(2, 4, context_dim=3)),
        lambda: RealNVP(2, 2, hidden=(8,), context_dim=3),
    ],
)
def test_new_starts_of_an_amortised_flow(make):
    "Weights of the same distribution, drawn anew; biases as the transform begins."
    torch.manual_seed(0)
    q = Flow(make())
    first, again, other = (dict(redraw_parameters(q, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for name, old in q.named_parameters():
        if name.endswith("source.linear.weight"):
            assert 0.5 < first[name].std() / old.std() < 2
        if name.endswith("source.linear.bias") and "Affine" in str(q.transform):
            assert torch.equal(first[name], old)


def test_on_a_support_by_a_few_classes():
    "Two classes of positive numbers: log-normal, each with its own scale."
    k = torch.arange(2000) % 2
    eps = torch.randn(2000, 1, generator=torch.Generator().manual_seed(3))
    x = (torch.tensor([0.2, 1.0])[k][:, None] * eps + 3.0 * k[:, None]).exp()
    c = torch.nn.functional.one_hot(k, 2).float()
    torch.manual_seed(0)
    result = fit(Flow(Affine(1, context_dim=2)), samples=x, context=c, support=constraints.positive, **QUICK)
    low, high = (result.q(row).sample((5000,)).log() for row in torch.eye(2))
    assert min(low.exp().min(), high.exp().min()) > 0
    assert abs(low.mean()) < 0.05
    assert abs(low.std() - 0.2) < 0.03
    assert abs(high.mean() - 3) < 0.15
    assert abs(high.std() - 1) < 0.1


def test_where_a_number_stops_being_one_is_named():
    with pytest.raises(NonFinite, match=r"transforms\[1\] \(Affine\)"), pytest.warns(match="size"):
        fit(linear(), samples=X, context=1e4 * C, steps=5)
    q = Flow(Chain(Affine(2), Planar(2, 3, context_dim=3)))
    rows, total = torch.cat([X, C], 1)[:6], 0.0
    for _, step in conditional_steps(q):
        rows, term = step(rows)
        total = total + term
    assert torch.allclose(total, q(C[:6]).log_prob(X[:6]), rtol=1e-4)


BAD = {
    "missing": ({"samples": X}, r"context: missing; q has context_dim=3.*\(N, 3\)"),
    "alone": ({"context": C}, "context: got one without samples="),
    "of a density": ({"log_density": lambda z: z.sum(-1), "context": C}, "context: got one without samples="),
    "other rows": ({"samples": X, "context": C[:-1]}, r"\(3000, 3\).*got \(2999, 3\)"),
    "other width": ({"samples": X, "context": C[:, :2]}, "context_dim=3"),
    "three axes": ({"samples": X, "context": C[:, None]}, r"\(3000, 3\).*got \(3000, 1, 3\)"),
    "numbers": ({"samples": X, "context": C[:, 0]}, r"context\[:, None\]"),
    "labels": ({"samples": X, "context": torch.arange(3000)}, r"int64.*one_hot\(labels, 3\)"),
    "labels in numpy": ({"samples": X, "context": np.arange(3000)}, r"int64.*one_hot\(labels, 3\)"),
    "whole rows": ({"samples": X, "context": C.long()}, r"int64.*context\.float\(\)"),
    "a list": ({"samples": X, "context": C.tolist()}, "context: expected a floating-point tensor, got list"),
    "a gap": ({"samples": X, "context": C.where(C < 3, math.nan)}, "finite.*nan.* in row"),
    "too large": ({"samples": X, "context": 1e300 * C.double()}, "finite in torch.float32"),
    "gradient": ({"samples": X, "context": C.clone().requires_grad_()}, r"context\.detach\(\)"),
    "the samples": ({"samples": X, "context": torch.cat([C[:, :2], X[:, 1:]], 1)}, "column 1.*no maximum"),
    "modes": ({"samples": X, "context": C, "modes": "all"}, "belong to a log_density"),
    "until": ({"samples": X, "context": C, "until": "good"}, "belong to a log_density"),
    "gap in x": ({"samples": X.where(C[:, :1] < 3, math.nan), "context": C}, "samples: expected finite"),
    "amortised": ({"log_density": lambda z: z.sum(-1)}, "context_dim=3.*without a context"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_error(name):
    given, message = BAD[name]
    q = linear()
    before = {key: value.clone() for key, value in q.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        fit(q, **given)
    assert all(torch.equal(value, before[key]) for key, value in q.state_dict().items())
    assert q.place.support is None


def test_a_flow_that_takes_none_gets_none():
    with pytest.raises(ValueError, match="context: got one, but q takes none"):
        fit(Flow(Affine(2)), samples=X, context=C)


@pytest.mark.parametrize(("scale", "shift", "said"), [(1, 30, "size"), (1e-3, 0, "larger"), (1, 0, None)])
def test_units_of_a_context_far_from_one_are_spoken_of(scale, shift, said):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(Flow(RealNVP(2, 1, hidden=(4,), context_dim=3)), samples=X, context=scale * C + shift, steps=1)
    assert [said in str(one.message) for one in found] == ([True] if said else [])
    assert all(one.filename == __file__ for one in found)
