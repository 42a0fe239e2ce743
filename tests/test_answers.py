"""The eight schools, against integrals done another way; a good and a poor fit of them told apart.

The page of answers answers.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from normflow_vi import Flow, fit
from normflow_vi.flows import RealNVP
from normflow_vi.targets.schools import SCHOOLS, eight_schools
from normflow_vi.transforms import Affine

PAGE = Path(__file__).parent.parent / "nbs" / "01_flows" / "70_answers.ipynb"
EFFECTS, ERRORS = SCHOOLS.double().numpy()
QUESTIONS = [
    "My fit gives nan",
    "My KL is negative",
    "It finds one mode of two",
    "Has my fit lost a mode?",
    "Which flow for 1, 10, 100 dimensions?",
    "How do I know it is good?",
    "My parameters must be positive",
    "It is slow",
    "I have samples, not a density",
    "How do I fit a density given something?",
    "I want to calibrate the whole procedure",
    "How do I keep the result and use it elsewhere?",
    "Does my model fit the data?",
    "My data are large",
]


def test_the_data_are_those_of_rubin():
    assert EFFECTS.tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    assert ERRORS.tolist() == [15, 10, 16, 11, 9, 11, 10, 18]


def test_eight_schools_is_the_joint_density():
    z = np.random.default_rng(0).normal(size=(200, 10)) * ([5, 1.5] + 8 * [10])
    mu = z[:, 0]
    tau = np.exp(z[:, 1])
    theta = z[:, 2:]
    expected = (
        stats.norm.logpdf(mu, 0, 5)
        + stats.halfcauchy.logpdf(tau, scale=5)
        + z[:, 1]
        + stats.norm.logpdf(theta, mu[:, None], tau[:, None]).sum(1)
        + stats.norm.logpdf(EFFECTS, theta, ERRORS).sum(1)
    )
    assert np.allclose(eight_schools(torch.from_numpy(z)).numpy(), expected, rtol=1e-12)


def marginal(log_tau):
    """log p(y, log tau): given tau alone the eight effects are Gaussian with one common variance of 25
    between them.
    """
    tau = math.exp(log_tau)
    return (
        stats.multivariate_normal.logpdf(EFFECTS, np.zeros(8), np.diag(ERRORS**2 + tau**2) + 25)
        + stats.halfcauchy.logpdf(tau, scale=5)
        + log_tau
    )


def test_its_evidence_is_exact():
    mass = sum(
        integrate.quad(lambda t: math.exp(marginal(t) + 31), a, b, epsabs=1e-13, epsrel=1e-12)[0]
        for a, b in ((-40, -10), (-10, 0), (0, 3), (3, 8), (8, 40))
    )
    assert abs(math.log(mass) - 31 - eight_schools.log_z) < 1e-7


def test_it_keeps_shape_precision_and_slope():
    z = torch.randn(3, 4, 10)
    assert eight_schools(z).shape == (3, 4)
    assert eight_schools(z[0, 0]).shape == ()
    assert eight_schools(z).dtype == torch.float32
    assert torch.allclose(eight_schools(z).double(), eight_schools(z.double()), rtol=1e-5)
    found = torch.func.vmap(torch.func.grad(lambda row: eight_schools(row)))(z[0])
    expected = torch.func.grad(lambda rows: eight_schools(rows).sum())(z[0])
    assert torch.allclose(found, expected, rtol=1e-5)
    for log_tau in (-40.0, 80.0, 1e3, 1e6):
        far = torch.full((10,), 7.0).index_fill(0, torch.tensor(1), log_tau).requires_grad_()
        assert eight_schools(far).isfinite()
        assert torch.autograd.grad(eight_schools(far), far)[0].isfinite().all()
    with pytest.raises(ValueError, match="=10"):
        eight_schools(torch.zeros(5, 3))


@pytest.fixture(scope="module")
def fits():
    "A coupling flow and a mean-field flow, both with fewer updates than by default."
    torch.manual_seed(0)
    return fit(Flow(RealNVP(10, 4, hidden=(32, 32))), eight_schools, steps=2000), fit(
        Flow(Affine(10)), eight_schools, steps=1500, draws=128
    )


def verdict(found):
    return found.summary().splitlines()[0]


def test_a_flow_has_the_funnel(fits):
    flow, _ = fits
    assert flow.kl.value < 0.2
    assert flow.ess > 4000
    near = (flow.log_w - eight_schools.log_z).abs() < 0.5  # the ESS hangs on a few draws
    assert near.double().mean() > 0.8
    assert abs(flow.evidence.value - eight_schools.log_z) < 0.06
    assert "not to be trusted" not in verdict(flow)
    assert abs(flow.z[:, 1].mean() - 0.802) < 0.25
    assert flow.z[:, 1].std() > 0.8  # log tau: exactly 0.802 and 1.171


def test_a_mean_field_fit_is_told_apart_by_more_than_k_hat(fits):
    flow, poor = fits
    assert poor.k_hat > 0.7
    assert "not to be trusted" in verdict(poor)
    assert 1.9 < poor.kl.value < 2.3
    assert poor.elbo.value < flow.elbo.value - 1.5 - 5 * (flow.elbo.std_error + poor.elbo.std_error)
    assert poor.ess < 500 < flow.ess / 8
    assert abs(poor.z[:, 1].mean() - 0.802) > 0.7
    assert poor.z[:, 1].std() < 0.4
    assert "differ" in next(line for line in poor.summary().splitlines() if line.startswith("z[1]"))


def sections():
    "The page of answers as pairs of a heading and its cells."
    found = []
    for cell in json.loads(PAGE.read_text())["cells"]:
        text = "".join(cell["source"])
        if heading := re.match(r"## (.+)", text) if cell["cell_type"] == "markdown" else None:
            found.append((heading[1], []))
        if found:
            found[-1][1].append((cell["cell_type"], text))
    return found


def test_every_question_has_an_answer_a_demonstration_and_a_check():
    assert [heading for heading, _ in sections()] == QUESTIONS
    for heading, cells in sections():
        code = [text for kind, text in cells if kind == "code"]
        assert len(cells[0][1]) > 200, f"{heading}: an answer with a link"
        assert ".ipynb)" in cells[0][1], f"{heading}: an answer with a link"
        assert any("assert" in text for text in code), f"{heading}: a demonstration that checks something"
