"""Evaluators: streaming importance weights against quadrature, closed forms and the diagnosis of all
weights at once; the encoder runs once an image.
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus

from normflow_vi.evaluate import (
    _accumulate,
    _fit_tails,
    ais,
    log_marginal,
    precompute,
    select_rows,
)
from normflow_vi.evaluate.diagnosis import (
    effective_sample_size,
    k_hat,
    log_mean_weight,
    tail_size,
)
from normflow_vi.flows import FlowDistribution
from normflow_vi.models.posteriors import FAMILIES, posterior
from normflow_vi.transforms.base import Amortised


@pytest.mark.parametrize("samples", [1, 2, 20, 21, 30, 100, 999, 5000])
@pytest.mark.parametrize("spread", [0.0, 1e-5, 0.3, 3.0, 300.0])
def test_streamed_weights_are_diagnosed_as_whole_ones(samples, spread):
    """Effective size, error and k-hat of every column, whatever the blocks.

    Ties and weights of zero included.
    """
    log_w = spread * torch.randn(samples, 6, dtype=torch.float64)
    log_w[:, 1] = log_w[:, 1].mul(2).round() / 2
    if samples > 2:
        log_w[: samples // 2, 2] = -math.inf
    for block in (samples, 7 if samples < 1000 else 700):
        sums, top = _accumulate(log_w.split(block), tail_size(samples) + 1)
        assert torch.allclose(sums.total, log_w.sum(0))
        assert len(top) == tail_size(samples) + 1
        for i, column in enumerate(log_w.t()):
            found = (2 * sums.once - sums.twice).exp()[i]
            assert torch.isclose(found, effective_sample_size(column), rtol=1e-8)
            expected = k_hat(column)
            assert _fit_tails(top, samples)[i].item() == (
                expected if math.isinf(expected) else pytest.approx(expected, abs=1e-5)
            )


class Noisy:
    "The posterior of z ~ N(0, I), x | z ~ N(z, I), of another width."

    def __init__(self, x, factor):
        self.q = Independent(Normal(x / 2, factor * math.sqrt(0.5)), 1)

    def rsample_and_log_prob(self, shape, generator=None):
        z = self.q.mean + self.q.stddev * torch.randn(
            *shape, *self.q.mean.shape, generator=generator, dtype=torch.float64
        )
        return z, self.q.log_prob(z)


def log_joint(x, z):
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    return log_prior + Normal(z, 1.0).log_prob(x).sum(-1)


def test_errors_are_those_of_the_mean_weight_and_cover_the_truth():
    x = torch.randn(300, 3, dtype=torch.float64)
    found = log_marginal(log_joint, lambda x: Noisy(x, 1.3), x, samples=400)
    truth = Normal(torch.zeros_like(x), math.sqrt(2)).log_prob(x).sum(-1)
    score = (found.log_p - truth) / found.error
    assert abs(score.mean()) < 0.3
    assert 0.85 < score.std() < 1.15
    generator = torch.Generator().manual_seed(0)
    z, log_q = Noisy(x[:1], 1.3).rsample_and_log_prob((400,), generator)
    one = log_marginal(log_joint, lambda x: Noisy(x, 1.3), x[:1], samples=400)
    weight = log_mean_weight((log_joint(x[:1], z) - log_q)[:, 0])
    assert torch.isclose(one.log_p[0], weight.value)
    assert torch.isclose(one.error[0], weight.std_error)
    assert log_marginal(log_joint, lambda x: Noisy(x, 1.3), x[:5], samples=1).error.isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_held_tensors_draw_alike(family):
    """For every family, a few images of a distribution whose tensors are held are the same images encoded
    alone.
    """
    q = posterior(family, 4, 0 if family == "diagonal" else 2, 5).double()
    context = torch.randn(9, 5, dtype=torch.float64)
    alone = q(context[3:6])
    held = select_rows(precompute(q(context)), slice(3, 6))
    for a, b in zip(
        *(which.rsample_and_log_prob((8,), torch.Generator().manual_seed(0)) for which in (alone, held)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-10)
    assert not any(isinstance(m, Amortised) for m in held.transform.modules())


class Counted(nn.Linear):
    rows = 0

    def forward(self, x):
        self.rows += len(x)
        return super().forward(x)


@pytest.mark.parametrize("samples, block", [(3, 1000), (50, 200), (700, 300)])
def test_an_image_is_encoded_once(samples, block, monkeypatch):
    encoder = Counted(3, 5).double()
    q = posterior("planar", 3, 4, 5).double()
    emitting = []
    of = Amortised.forward

    def forward(self, context, dtype):
        emitting.append(len(context))
        return of(self, context, dtype)

    monkeypatch.setattr(Amortised, "forward", forward)
    seen = []

    def counting(x, z):
        seen.append(z.shape[:2].numel())
        return log_joint(x, z)

    x = torch.randn(260, 3, dtype=torch.float64)
    found = log_marginal(counting, lambda x: q(encoder(x)), x, samples=samples, block=block)
    assert encoder.rows == 260
    assert sum(emitting) == 2 * 260  # two heads: the Gaussian's and the layers'
    assert sum(seen) == 260 * samples
    assert max(seen) <= block
    assert found.log_p.shape == found.k_hat.shape == (260,)
    again = log_marginal(log_joint, lambda x: q(encoder(x)), x, samples=samples, block=block)
    assert torch.equal(again.log_p, found.log_p)
    assert not torch.equal(
        log_marginal(log_joint, lambda x: q(encoder(x)), x, samples, block, seed=1).log_p,
        found.log_p,
    )


def test_a_bernoulli_decoder_by_quadrature():
    """Two latent dimensions, a network of twelve pixels: log p(x) on a grid, by importance weights and by
    annealing.
    """
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 12)).double()
    with torch.no_grad():
        decoder[0].weight.mul_(3)
        decoder[2].weight.mul_(4)

    def joint(x, z):
        logits = decoder(z)
        return {
            "log_prior": Normal(0.0, 1.0).log_prob(z).sum(-1),
            "log_likelihood": (x * logits - softplus(logits)).sum(-1),
        }

    x = (torch.rand(25, 12) < 0.5).double()
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    with torch.no_grad():
        points = torch.cartesian_prod(axis, axis)[:, None].expand(-1, 25, 2)
        grid = sum(joint(x, points).values())
    truth = grid.logsumexp(0) + 2 * math.log(14 / 280)
    wide = Noisy(torch.zeros(25, 2, dtype=torch.float64), 1.7)  # N(0, 1.2^2): the weights are bounded
    weighted = log_marginal(joint, lambda x: wide, x, samples=20_000, block=10**6)
    annealed = ais(joint, x, 2, steps=60, chains=30, leapfrog=4)
    assert ((weighted.log_p - truth).abs() < 4.5 * weighted.error + 1e-3).all()
    assert weighted.error.max() < 0.2
    score = (annealed.log_p - truth) / annealed.error
    assert abs(score.mean()) < 0.8
    assert (score.abs() < 5).all()
    assert annealed.error.mean() < 0.2
    assert all(p.grad is None for p in decoder.parameters())


def test_bad_input():
    def good(x):
        return Noisy(x, 1.0)

    x = torch.zeros(3, 2, dtype=torch.float64)
    for more, words in (
        ({"samples": 0}, "samples=0"),
        ({"samples": 2.5}, "samples"),
        ({"block": 0}, "block=0"),
    ):
        with pytest.raises(ValueError, match=words):
            log_marginal(log_joint, good, x, **more)
    with pytest.raises(ValueError, match="x: expected at least one row"):
        log_marginal(log_joint, good, x[:0])
    with pytest.raises(ValueError, match="x: 1 of 3 rows .* row 1"):
        log_marginal(log_joint, good, x.index_fill(0, torch.tensor([1]), math.nan))
    with pytest.raises(FloatingPointError, match="row 2 .*1 such"):
        log_marginal(lambda x, z: log_joint(x, z) + torch.tensor([0.0, 0.0, math.nan]), good, x)
    with pytest.raises(TypeError, match="x"):
        log_marginal(log_joint, good, [1.0, 2.0])
    assert isinstance(posterior("planar", 2, 1, 3)(torch.zeros(1, 3)), FlowDistribution)
