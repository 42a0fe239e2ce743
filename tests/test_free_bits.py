"""Free bits: log q latent by latent, the maximum for each group, and the runs of the sweep."""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from normflow_vi.experiments import iaf_free_bits as plan
from normflow_vi.experiments import images, vae_iaf
from normflow_vi.flows import Flow, FlowDistribution
from normflow_vi.objectives import annealing, free_energy
from normflow_vi.objectives.free_bits import draw_by_latent, free_bits, log_normal_terms
from normflow_vi.results.store import Store
from normflow_vi.testing import expect_fail
from normflow_vi.transforms import Affine, Chain, Inverse, InverseAutoregressive, MaskedAutoregressive, Planar

DIM, CONTEXT = 5, 3


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def posterior(length, strength=3.0, **options):
    "A diagonal Gaussian and `length` steps whose networks do much, given a context."
    torch.manual_seed(0)
    parts = [Affine(DIM, context_dim=CONTEXT)]
    if length:
        parts.append(InverseAutoregressive(DIM, length, CONTEXT, **{"hidden": (16,)} | options))
    flow = Flow(Chain(*parts))
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(strength if p.dim() > 2 else 1.0)
    return flow


CASES = {
    "diagonal": dict(length=0),
    "one step": dict(length=1),
    "two steps": dict(length=2),
    "three, same order": dict(length=3, order="natural"),
    "plain form": dict(length=2, form="plain", strength=1.5),
    "bounded": dict(length=2, form="plain", max_log_scale=0.5),
    "linear networks": dict(length=2, hidden=()),
    "residual blocks": dict(length=2, hidden=(16, 16, 16), residual=True, strength=1.5),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# Terms of log q


@cases
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["double", "single"]
)
def test_the_terms_add_up_to_log_q(case, dtype, within):
    flow, context = posterior(**case).to(dtype), torch.randn(4, CONTEXT, generator=seeded(), dtype=dtype)
    z, terms = draw_by_latent(flow(context), (50,), seeded())
    same_z, log_q = flow(context).rsample_and_log_prob((50,), seeded())
    assert torch.equal(z, same_z)
    assert terms.shape == z.shape == (50, 4, DIM)
    scale = 1 + terms.abs().sum(-1)  # what is added up
    assert ((terms.sum(-1) - log_q).abs() <= within * scale).all()
    if dtype == torch.float64:
        torch.testing.assert_close(terms.sum(-1), flow(context).log_prob(z), atol=1e-8, rtol=1e-8)


@cases
def test_the_terms_have_the_gradients_of_log_q(case):
    flow, context = posterior(**case).double(), torch.randn(4, CONTEXT, generator=seeded()).double()
    found = []
    for draw in (
        lambda: draw_by_latent(flow(context), (7,), seeded())[1].sum(-1),
        lambda: flow(context).rsample_and_log_prob((7,), seeded())[1],
    ):
        flow.zero_grad()
        draw().square().sum().backward()
        found.append([p.grad.clone() for p in flow.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_term_of_one_step_is_the_log_density_of_its_variable_given_those_before():
    "It depends on no later variable, and its slope is the Jacobian's entry on the diagonal."
    flow = posterior(1).double()
    context = torch.randn(CONTEXT, generator=seeded()).double()
    eps = torch.randn(DIM, generator=seeded(2)).double()

    def terms(value):
        return draw_by_latent(FlowDistribution(_as_normal(value), flow.transform, context))

    slopes = torch.func.jacrev(lambda value: terms(value)[0])(eps).diagonal()
    torch.testing.assert_close(terms(eps)[1], log_normal_terms(eps) - slopes.log(), atol=1e-12, rtol=0)
    reach = torch.func.jacrev(lambda value: terms(value)[1])(eps)
    assert (reach.triu(1) == 0).all()
    assert (reach.tril(-1) != 0).any()


def _as_normal(value):
    "A standard normal whose draw is `value`."
    base = Flow(Affine(DIM)).base
    base.rsample = lambda shape, generator=None: value.expand(*shape, DIM)
    return base


def test_divergences_of_a_diagonal_gaussian_are_those_of_the_formula():
    flow, context = posterior(0).double(), torch.randn(3, CONTEXT, generator=seeded()).double()
    z, log_q = draw_by_latent(flow(context), (20_000,), seeded())
    kl = log_q - log_normal_terms(z)
    tensors = flow.transform.transforms[0].fetch_tensors(context, torch.float64)
    normal = torch.distributions.Normal(tensors["shift"][:, 0], tensors["log_scale"][:, 0].exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert ((kl.mean(0) - exact).abs() < 5 * kl.std(0) / len(kl) ** 0.5).all()


def test_at_the_prior_every_draw_of_every_term_is_zero():
    z, log_q = draw_by_latent(Flow(Affine(DIM))(), (100,), seeded())
    assert torch.equal(log_q, log_normal_terms(z))


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (Planar(2), "Planar"),
        (Chain(Affine(2), Planar(2)), "Planar"),
        (MaskedAutoregressive(2), "MaskedAutoregressive"),
        (Inverse(Affine(2)), "Inverse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_transforms_have_no_terms(transform, named):
    with expect_fail(ValueError, "q", named, "Affine"):
        draw_by_latent(Flow(transform)())


def test_other_bases_and_supports_have_no_terms():
    studentised = torch.distributions.Independent(torch.distributions.StudentT(torch.full((2,), 5.0)), 1)
    for q in (
        Flow(Affine(2), studentised),
        Flow(Affine(2), support=torch.distributions.constraints.positive),
    ):
        with expect_fail(ValueError, "q", "N(0, I)"):
            draw_by_latent(q())


def test_a_context_of_the_wrong_size_is_named():
    with expect_fail(ValueError, "context", str(CONTEXT)):
        draw_by_latent(posterior(1)(torch.zeros(4, CONTEXT + 1)))


# The objective


def some_terms(seed=0, shape=(2, 30, 6)):
    generator = seeded(seed)
    kl = torch.randn(shape, generator=generator, dtype=torch.float64) + torch.linspace(-0.2, 2, shape[-1])
    return -80 + torch.randn(shape[:-1], generator=generator, dtype=torch.float64), kl


@pytest.mark.parametrize("free", [0, 0.0, 0.125, 1.0, 100.0])
def test_the_objective_is_that_of_the_paper(free):
    log_likelihood, kl = some_terms()
    found = free_bits(log_likelihood, kl, free)
    expected = -log_likelihood.mean() + kl.mean((0, 1)).clamp(min=free).sum()
    torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(found.terms["free_energy"], kl.sum(-1).mean() - log_likelihood.mean())
    assert found.value >= found.terms["free_energy"]


def test_gradients_pass_where_a_group_is_above_lambda_and_nowhere_else():
    log_likelihood, kl = some_terms()
    slopes = grad(lambda kl: free_bits(log_likelihood, kl, 0.5).value)(kl)
    above = kl.mean((0, 1)) > 0.5
    assert above.any() and not above.all()
    torch.testing.assert_close(slopes, (above / log_likelihood.numel()).expand_as(kl).double())


def test_lambda_zero_is_the_free_energy_unless_an_estimate_is_below_zero():
    log_likelihood, kl = some_terms()
    kl = kl - kl.mean((0, 1)).clamp(max=0)  # all means at least zero
    found = free_bits(log_likelihood, kl, 0.0)
    torch.testing.assert_close(found.value, found.terms["free_energy"], atol=1e-12, rtol=0)
    kl[..., 2] -= kl[..., 2].mean() + 0.25
    found = free_bits(log_likelihood, kl, 0.0)
    assert math.isclose(found.value - found.terms["free_energy"], 0.25, rel_tol=1e-9)


def test_near_the_prior_lambda_zero_counts_the_noise_of_the_estimate():
    "A cone of slope sqrt(v / 2 pi n) where the divergence is a bowl."
    a, v, n = 0.004, 4.0, 100
    x, eps = torch.randn(2, 4000, 1, n, 1, generator=seeded()).double()
    kl = a * v**0.5 * x * eps + 0.5 * v * (a * x) ** 2  # log q - log p of a draw from N(a x, 1)
    counted = vmap(lambda kl: free_bits(torch.zeros(1, n), kl, 0.0).value)(kl)
    cone, error = a * (v / (2 * math.pi * n)) ** 0.5, counted.std() / len(counted) ** 0.5
    assert abs(counted.mean() - cone - 0.25 * a**2 * v) < 4 * error
    assert counted.mean() > 5 * (0.5 * a**2 * v)


def test_the_maximum_is_of_the_mean_over_the_batch_and_not_a_mean_of_maxima():
    kl = torch.tensor([[[0.0], [2.0]]])
    assert free_bits(torch.zeros(1, 2), kl, 0.5).value == 1.0


def test_several_runs_are_one_program():
    parts = [some_terms(seed) for seed in (0, 1)]
    log_likelihood, kl = (torch.stack(some) for some in zip(*parts, strict=True))
    together = vmap(lambda a, b: free_bits(a, b, 0.5).value)(log_likelihood, kl)
    alone = torch.stack([free_bits(a, b, 0.5).value for a, b in parts])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("free", [-1, -1e-9, math.nan, math.inf, True, "1", None])
def test_bad_lambdas_are_named(free):
    with expect_fail(ValueError, f"free={free!r}", "at least 0"):
        free_bits(*some_terms(), free)


def test_shapes_that_do_not_belong_together_are_named():
    log_likelihood, kl = some_terms()
    for wrong in (kl[0], kl.sum(-1), kl[:, :5]):
        with expect_fail(ValueError, "kl has shape", "(2, 30)"):
            free_bits(log_likelihood, wrong, 0.5)


# The sweep


@pytest.fixture(scope="module")
def smoke():
    return plan.plan("smoke", "digits")


@pytest.fixture(scope="module")
def digits(smoke):
    return images.dataset(smoke[0])


def test_every_posterior_gets_every_treatment():
    short = {"annealed", "plain", 0, 0.125, 0.25, 0.5, 1, 2}
    for profile, treatments, seeds, more in (
        ("quick", short, {0}, {0, 1}),
        ("paper", short | {4, 8}, {0, 1, 2}, {0, 1, 2}),
    ):
        for flow in ("diagonal", "iaf-320"):
            own = [run for run in plan.plan(profile, "digits") if run.flow == flow]
            assert {plan.treatment_of(run) for run in own} == treatments
            assert {run.seed for run in own if plan.treatment_of(run) == 2} == seeds
            for chosen in ("annealed", "plain", 0):
                assert {run.seed for run in own if plan.treatment_of(run) == chosen} == more


@pytest.mark.parametrize("flow", ["diagonal", "iaf-320"])
def test_an_annealed_loss_is_that_of_the_other_pages(flow, smoke, digits):
    run = next(run for run in smoke if run.flow == flow)
    model = vae_iaf.build(run, digits)
    x = vae_iaf.draw_once(run, digits).train.pixels(indices=slice(20))
    for step in (0, 7, 30):
        ours = plan.make_loss(None, 20)(model, x, step, seeded())
        usual = images.image_loss(20)(model, x, step, seeded())
        torch.testing.assert_close(ours.value, usual.value)
        torch.testing.assert_close(ours.terms["free_energy"], usual.terms["free_energy"])
    assert annealing(30, 20) == 1


def test_free_bits_train_and_the_record_says_where_the_divergence_is(smoke, digits, tmp_path):
    "Two seeds as one program; the terms at the end add up to the divergence that was measured otherwise."
    (run, *_) = [run for run in smoke if run.flow == "iaf-320" and plan.treatment_of(run) == 0.5]
    other = plan.Run.from_dict(run.to_dict() | {"seed": 1})
    records = plan.train([run, other], None, "cpu")
    model = plan.trainer([run], data=digits).models[0]
    x = vae_iaf.draw_once(run, digits).test.pixels()
    marginal = free_energy(
        lambda z: model.log_joint(x, z), model.q(x), samples=10, generator=seeded(run.seed)
    )
    kl = marginal.terms["log_q"] - marginal.terms["log_prior"]
    assert math.isclose(plan.divergences(model, x, run.seed).sum(), kl, rel_tol=1e-4)
    for record in records:
        assert record.arrays["kl_curves"].shape == (len(record.arrays["step"]), vae_iaf.DIM)
        assert record.value("vlb") == -record.value("F")
        record.save(tmp_path)
    assert (records[0].arrays["kl_curves"] != records[1].arrays["kl_curves"]).any()
    (some,) = plan.best_sweep(Store([tmp_path]), [run]).items()
    assert some[0] == ("IAF 2/320", 0.5)
    assert [record.run.seed for record in some[1]] == [0, 1]


def test_the_same_numbers_at_every_training(smoke):
    run = next(run for run in smoke if run.flow == "diagonal")
    one, other = (plan.train([run], None, "cpu")[0] for _ in range(2))
    assert one.values == other.values
    assert np.array_equal(one.arrays["kl_curves"], other.arrays["kl_curves"])


def test_active_latents_have_more_than_a_hundredth_of_a_nat():
    assert plan.count_active(np.array([-0.3, 0.0, 0.0099, 0.0101, 2.0])) == 2
