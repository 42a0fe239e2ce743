"""Whether a fit deserves trust: starts that diverged, walls, modes far away, tails, draws from elsewhere."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import normflow_vi.fitting
from normflow_vi import Chain, Fit, Flow, fit, judge
from normflow_vi.evaluate.diagnosis import log_mean_weight
from normflow_vi.evaluate.particles import smc
from normflow_vi.evaluate.witness import Witness, evidence_interval
from normflow_vi.fitting.files import trusted_classes
from normflow_vi.fitting.summary import _restarts_line
from normflow_vi.flows import CIF, IAF, GaussianMixture, ProductMixture, RealNVP, fit_mixture
from normflow_vi.objectives import Estimate
from normflow_vi.targets.schools import eight_schools
from normflow_vi.transforms import Affine, Planar

QUICK = dict(steps=60, draws=32, evaluation_draws=1000)


def square(z):
    return -0.5 * z.square().sum(-1)


def normal(z):
    return square(z) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def two_modes(z):
    "Three tenths of the mass at the origin, seven tenths at a distance of 20; normalised."
    far = normal(z - torch.tensor([20.0, 0.0]))
    return torch.logaddexp(normal(z) + math.log(0.3), far + math.log(0.7))


def numbers(*values, error=0.02):
    return tuple(Estimate(torch.tensor(value), torch.tensor(error)) for value in values)


def is_of_its_flow(result, log_density):
    "Whether the log-weights of a fit are those of the flow that it holds."
    with torch.no_grad():
        log_w = log_density(result.z) - result.q.log_prob(result.z)
    return torch.allclose(log_w, result.log_w, atol=1e-2)


# Training


@pytest.mark.parametrize("length", [8, 16])
def test_a_deep_flow_on_a_funnel_stays_finite(length):
    torch.manual_seed(0)
    q = Flow(RealNVP(10, length))
    result = fit(q, eight_schools, steps=100, draws=64, modes="ignore", evaluation_draws=500)
    assert result.retreats == 0
    assert result.log_w.isfinite().all()
    assert result.kl.value < 3


def test_a_log_density_that_fails_once_is_survived():
    calls = []

    def transient(z):
        calls.append(len(z))
        return square(z) * (math.nan if len(calls) == 40 else 1.0)

    result = fit(Flow(Affine(1)), transient, **QUICK, place=False, modes="ignore")
    assert result.retreats == 1
    assert "60 steps, as asked" in result.summary()
    assert "went back once, at half the rate" in result.summary()
    untroubled = fit(Flow(Affine(1)), square, **QUICK, place=False, modes="ignore")
    assert "went back" not in untroubled.summary()


def test_one_start_of_four_that_diverges_is_given_up(monkeypatch):
    make = normflow_vi.fitting.restarted_copies

    def with_a_broken_one(q, restarts, seed):
        copies = make(q, restarts, seed)
        with torch.no_grad():
            for parameter in copies[2].parameters():
                parameter.fill_(1e30)
        return copies

    monkeypatch.setattr(normflow_vi.fitting, "restarted_copies", with_a_broken_one)
    q = Flow(Affine(2))
    result = fit(q, square, restarts=4, **QUICK, place=False, modes="ignore")
    values = torch.stack([bound.value for bound in result.bounds])
    assert values.isfinite().tolist() == [True, True, True, False]
    assert "restarts: 4, 1 without a finite bound" in result.summary()
    assert all(p.isfinite().all() for p in q.parameters())
    assert is_of_its_flow(result, square)


def test_a_start_that_went_astray_is_not_excused_by_its_own_error():
    astray = numbers(-3.3e10, error=2.9e10)
    assert "2 of 3 reach the best" in _restarts_line(numbers(-23.65, -23.66) + astray)
    assert "they agree" in _restarts_line(numbers(-23.65, -23.66))


def test_a_wall_inside_the_target():
    "The target ends at 0, and what q puts beyond has no weight."

    def walled(z):
        return torch.where(z[:, 0] > 0, square(z - 2.5), -math.inf)

    q = Flow(Affine(1))
    q.place.loc += 2.5
    result = fit(q, walled, steps=200, draws=64, evaluation_draws=4000)
    outside = (result.log_w == -math.inf).double().mean()
    assert 0 < outside < 0.05
    assert (result.z[result.log_w == -math.inf] <= 0).all()
    assert result.verdict == "usable"
    first, second = result.summary().splitlines()[:2]
    assert "of its draws lie outside the target's support, most of them below 0" in first
    assert "in z[0]" in first
    assert "support=" in second


def test_rare_draws_without_a_log_weight_count_as_outside():
    def rare(z):
        bad = torch.as_tensor(len(z) > 500) & (z[:, 0] > 2.6)
        return square(z) + torch.where(bad, math.nan, 0.0)

    result = fit(Flow(Affine(1)), rare, **QUICK, place=False, modes="ignore")
    outside = result.log_w == -math.inf
    assert 0 < outside.double().mean() < 0.01
    assert not result.log_w.isnan().any()
    assert result.z.isfinite().all()
    assert "of its draws lie outside the target's support" in result.summary()


# Densities far away


@pytest.mark.parametrize("point", [(100.0, -100.0), (1e8, 1e8), (math.inf, 0.0)])
def test_far_from_the_mass_the_log_density_is_no_nan(point):
    torch.manual_seed(0)
    q = Flow(RealNVP(2, 4, hidden=(16,), max_log_scale=None))
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.mul_(6.0)
    value = torch.tensor([point, (0.1, 0.2)])
    log_q = q.log_prob(value)
    assert log_q[0] < -1000
    assert log_q[1].isfinite()
    runs = {name: torch.stack([p, p]) for name, p in q.named_parameters()}
    batched = torch.func.vmap(lambda p: torch.func.functional_call(q, p, ()).log_prob(value))(runs)
    assert torch.equal(batched[0], log_q)


def test_an_overflow_is_minus_infinity_and_what_is_nan_is_nan():
    q = Flow(Chain(Affine(2), RealNVP(2, 2, max_log_scale=None)))
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.mul_(30.0)
    points = torch.tensor([[1e20, -1e20], [math.nan, 0.0]])
    assert q.transform.inverse(points)[0][0].isnan().any()
    log_q = q.log_prob(points)
    assert log_q[0] == -math.inf
    assert log_q[1].isnan()
    for parameter in q.parameters():
        held = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[-1] = math.nan
        assert q.log_prob(points).isnan().all()
        with torch.no_grad():
            parameter.copy_(held)


# Modes and tails


def test_a_mode_at_a_distance_of_twenty_is_missed_and_noticed():
    torch.manual_seed(0)
    result = fit(Flow(Affine(2)), two_modes, steps=200, draws=64, evaluation_draws=1000)
    assert result.k_hat < 0.7
    assert result.ess > 500
    assert result.verdict == "not to be trusted"
    share, error = result.missing.value, result.missing.std_error
    assert min(abs(share - 0.3), abs(share - 0.7)) < 4 * max(error, 0.02)
    low, high = result.log_z_interval
    assert low < -0.3
    assert -0.1 < high < 0.2
    first, second = result.summary().splitlines()[:2]
    assert "draws from elsewhere put" in first
    assert 'modes="all"' in second


def test_without_a_witness_nobody_notices():
    result = fit(Flow(Affine(2)), two_modes, **QUICK, modes="ignore")
    assert result.witness is result.missing is result.log_z_interval is None
    assert "from elsewhere" not in result.summary()


def test_all_modes_are_found_with_their_shares():
    torch.manual_seed(0)
    q = Flow(Affine(2))
    result = fit(q, two_modes, modes="all", steps=100, draws=64, evaluation_draws=4000)
    far = (result.z[:, 0] > 10).double().mean()
    assert abs(far - 0.7) < 0.02
    assert result.verdict == "good"
    assert abs(result.evidence.value) < 4 * max(result.evidence.std_error, 0.005)
    assert is_of_its_flow(result, two_modes)


def test_a_student_t_and_the_interval_of_its_evidence():
    constant = math.lgamma(3.5) - math.lgamma(1) - 2.5 * math.log(2 * math.pi)
    result = fit(
        Flow(Affine(5)),
        lambda z: constant - 3.5 * torch.log1p(z.square().sum(-1) / 2),
        steps=300,
        draws=64,
    )
    low, high = result.log_z_interval
    assert low < 0 < high
    assert result.verdict == "not to be trusted"
    assert result.evidence.value + 4 * result.evidence.std_error < high, "the weights alone do not know"


def test_an_elbo_far_below_the_evidence_is_not_to_be_trusted():
    log_w = torch.full((10_000,), -2e4)
    log_w[:150] = 0.1 * torch.randn(150)
    result = Fit(Flow(Affine(2)), None, 100, True, torch.randn(10_000, 2), log_w)
    assert result.verdict == "not to be trusted"


def test_until_good():
    torch.manual_seed(0)
    q = Flow(Affine(2))
    result = fit(q, two_modes, until="good", steps=100, draws=64, evaluation_draws=1000)
    assert result.verdict == "good"
    assert result.q is q
    assert not q.training
    assert is_of_its_flow(result, two_modes)


def test_attempts_that_are_no_better_are_not_kept(monkeypatch):
    compared = []
    monkeypatch.setattr(normflow_vi.fitting, "rank_of", lambda fit: compared.append(fit) or (0, 0.0))
    once, again = Flow(Affine(2)), Flow(Affine(2))
    first = fit(once, two_modes, **QUICK)
    kept = fit(again, two_modes, **QUICK, until="good")
    assert len(compared) >= 2, "an attempt was made"
    assert torch.equal(kept.log_w, first.log_w)
    assert torch.equal(again.log_prob(torch.ones(1, 2)), once.log_prob(torch.ones(1, 2)))
    assert is_of_its_flow(kept, two_modes)


WRONG = [
    (dict(modes="some"), "modes='some'.*report.*ignore.*all"),
    (dict(until="perfect"), "until='perfect'.*good"),
    (dict(samples=torch.zeros(20, 2), modes="all"), "belong to a log_density"),
    (dict(samples=torch.zeros(20, 2), until="good"), "belong to a log_density"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=lambda value: str(value)[:30])
def test_what_does_not_fit_is_named(given, message):
    target = {} if "samples" in given else {"log_density": square}
    with pytest.raises(ValueError, match=message):
        fit(Flow(Affine(2)), **target, **given, steps=3)


def test_a_base_of_ones_own_stays():
    base = MultivariateNormal(torch.zeros(2), torch.eye(2))
    q = Flow(Affine(2), base=base)
    held = q.base
    with pytest.raises(ValueError, match="modes='all'.*as one already"):
        fit(q, square, modes="all", steps=3)
    assert q.base is held


# The witness


def as_wide_as(loc, scale):
    return Independent(Normal(torch.full((2,), loc), torch.full((2,), scale)), 1)


WITNESSED = {
    "an iterative inverse": lambda: Flow(Planar(2, 2)),
    "a sequential inverse": lambda: Flow(IAF(2, 2, hidden=(8,))),
    "a base with units": lambda: Flow(Affine(2), base=as_wide_as(10.0, 3.0)),
}


@pytest.mark.parametrize("name", WITNESSED)
def test_a_witness_agrees_with_a_fit_that_is_close(name):
    torch.manual_seed(0)
    result = fit(WITNESSED[name](), normal, steps=200, draws=64, evaluation_draws=1000)
    witness = result.witness
    assert witness.z.shape == (*witness.log_w.shape, 2)
    assert result.missing.value < 0.02
    with torch.no_grad():
        log_q = result.q.log_prob(witness.z.flatten(0, 1)).view_as(witness.log_w)
    assert torch.allclose(witness.log_w, normal(witness.z) - log_q, atol=1e-2)
    low, high = result.log_z_interval
    assert low - 0.01 < 0 < high + 0.01
    assert high - low < 0.3


def test_a_flow_without_a_density_has_no_witness():
    result = fit(Flow(CIF(2, 1, hidden=(8,))), normal, **QUICK)
    assert result.witness is None
    assert "(as far as its own draws can tell)" in result.summary() or result.verdict != "good"


def test_the_interval_spans_both_estimates():
    torch.manual_seed(0)
    log_w = 0.1 * torch.randn(4000)
    witness = Witness(torch.randn(4, 100, 2), 1.0 + 0.1 * torch.randn(4, 100), torch.zeros(4, 100))
    low, high = evidence_interval(log_w, witness)
    assert low < log_mean_weight(log_w).value < witness.evidence.value < high
    assert witness.missing(log_w).value > 0.5


def test_a_witness_comes_back_from_a_file(tmp_path):
    result = fit(Flow(Affine(2)), two_modes, **QUICK)
    again = Fit.load(result.save(tmp_path / "one.fit"))
    assert type(again.witness) is Witness
    for part in ("z", "log_w", "barrier"):
        found, kept = getattr(again.witness, part), getattr(result.witness, part)
        assert torch.equal(found.nan_to_num(), kept.nan_to_num())
    assert again.log_z_interval == result.log_z_interval
    assert again.retreats == result.retreats
    assert again.summary() == result.summary()


# Particles


def test_the_integral_of_particles_is_unbiased():
    found = [
        smc(lambda z: square(z - 2), torch.zeros(1), torch.full((1,), 8.0), 32, moves=1, seed=seed)
        for seed in range(20)
    ]
    ratios = torch.stack([(one.log_z - 0.5 * math.log(2 * math.pi)).exp() for one in found]).flatten()
    error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - 1) < 4 * error
    assert error < 0.1


def test_particles_stay_where_the_density_is():
    def half(z):
        return torch.where(z[:, 0] > 0, square(z), -math.inf)

    found = smc(half, torch.zeros(1), torch.full((1,), 8.0))
    assert (found.draws > 0).all()
    exact = 0.5 * math.log(math.pi / 2)
    assert abs(found.evidence.value - exact) < 4 * max(found.evidence.std_error, 0.03)
    assert abs(found.draws.mean() - math.sqrt(2 / math.pi)) < 0.1


def test_particles_of_one_seed_are_the_same():
    one, two, other = (
        smc(square, torch.zeros(2), torch.full((2,), 5.0), 16, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.z, two.z)
    assert torch.equal(one.log_z, two.log_z)
    assert not torch.equal(one.z, other.z)


# Mixtures as bases


CROSS = torch.tensor([[-9.0, 0.0], [9.0, 0.0]])


def cross(shares=(0.3, 0.7)):
    return GaussianMixture(torch.tensor(shares), CROSS, torch.eye(2).repeat(2, 1, 1))


def wells():
    return ProductMixture(
        torch.tensor([[1.0, 3.0], [1.0, 0.0]]), torch.tensor([[-9.0, 9.0], [0.0, 0.0]]), torch.ones(2, 2)
    )


@pytest.mark.parametrize("make", [cross, wells])
def test_shares_are_learned_from_weighted_draws(make):
    base = make()
    z = torch.cat([CROSS[:1].repeat(10, 1), CROSS[1:].repeat(10, 1)])
    weights = torch.cat([torch.full((10,), 0.08), torch.full((10,), 0.02)])
    base.learn_shares(z, weights)
    left, right = base.log_prob(CROSS).tolist()
    assert left - right == pytest.approx(math.log(4), abs=1e-3)
    assert base.rsample((4000,))[:, 0].lt(0).double().mean() == pytest.approx(0.8, abs=0.03)


def test_a_product_is_the_joint_mixture_of_its_parts():
    joint = cross(shares=(0.25, 0.75))
    z = 5 * torch.randn(100, 2)
    assert torch.allclose(wells().log_prob(z), joint.log_prob(z), atol=1e-4)
    assert torch.allclose(wells().rsample((20_000,)).std(0), joint.rsample((20_000,)).std(0), rtol=0.05)


def test_the_kind_of_mixture_follows_the_draws():
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (2000, 2)) * 2.0 - 1
    noise = 0.1 * torch.randn(2000, 2)
    assert type(fit_mixture(signs + noise)) is ProductMixture
    assert type(fit_mixture(signs[:, :1].repeat(1, 2) + noise)) is GaussianMixture
    assert fit_mixture(torch.randn(2000, 2)) is None


@pytest.mark.parametrize("make", [cross, wells])
def test_a_mixture_is_a_base_like_any_other(make, tmp_path):
    q = Flow(Affine(2), base=make())
    z = CROSS + 0.5
    shifts = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    name = next(name for name, p in q.named_parameters() if "shift" in name)
    held = dict(q.named_parameters())

    def moved(shift):
        tensors = {**held, name: shift.expand_as(held[name])}
        return torch.func.functional_call(q, tensors, ()).log_prob(z)

    batched = torch.func.vmap(moved)(shifts)
    assert torch.allclose(batched, torch.stack([moved(shift) for shift in shifts]), atol=1e-5)
    assert type(q.base) in trusted_classes()
    result = fit(q, two_modes, **QUICK, place=False, modes="ignore")
    again = Fit.load(result.save(tmp_path / "one.fit"))
    assert type(again.q.base) is type(q.base)
    assert torch.equal(again.q.log_prob(z), q.log_prob(z))


def test_a_good_fit_names_what_is_a_little_off():
    "N(0, 0.95^2) for N(0, 1): 0.003 nats, and a standard deviation that is a twentieth short."
    draws = 0.95 * torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    log_q = torch.distributions.Normal(0.0, 0.95).log_prob(draws[:, 0])
    said = judge(square(draws), log_q, draws)
    assert said.verdict == "good"
    assert "its sd of z[0] is off by 0.05 sd" in said.summary().splitlines()[0]
    assert "for moments use the weights" in said.summary()
    exact = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    same = judge(square(exact), normal(exact), exact)
    assert "off by" not in same.summary().splitlines()[0]
