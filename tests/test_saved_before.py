"Fits that an earlier version saved are loaded; what they say follows the rules of today."

import json
from pathlib import Path

import pytest
import torch

from normflow_vi import Fit, Flow

FOLDER = Path(__file__).parent / "data" / "saved"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def test_each_file_has_its_expectations():
    assert {path.stem for path in FOLDER.glob("*.fit")} == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_fit_saved_before_is_the_same_today(name, tmp_path):
    expected = EXPECTED[name]
    fit = Fit.load(FOLDER / f"{name}.fit")
    assert type(fit) is Fit and type(fit.q) is Flow
    with torch.no_grad():
        log_prob = fit.q.log_prob(torch.tensor(expected["points"]))
    assert torch.allclose(log_prob, torch.tensor(expected["log_prob"]), rtol=1e-5, atol=1e-6)
    assert fit.steps == expected["steps"]
    assert fit.summary().splitlines()[0] == expected["summary"]
    if expected["elbo"] is None:
        assert fit.elbo is None
    else:
        assert fit.elbo.value.item() == pytest.approx(expected["elbo"], rel=1e-6)
    again = Fit.load(fit.save(tmp_path / "again.fit"))
    assert again.summary() == fit.summary()
