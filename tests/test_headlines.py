"""The sentences of the first page hold the numbers of the records, and are left out where there are none."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from normflow_vi.reproduce.headlines import HEADLINES, headlines
from normflow_vi.results.store import Store

BUDGET = {"updates": 7000, "networks": "mlp"}


def record(run, **values):
    return SimpleNamespace(run=run, value=lambda name: values[name], values=values)


class Records:
    """A store whose groups are given: `{(experiment, flow, length): values of the seeds}`."""

    def __init__(self, groups):
        self.groups = groups

    def best(self, experiment, flow=None, length=None, **match):
        chosen = [
            (own, values)
            for (name, own, size), values in self.groups.items()
            if name == experiment and own == flow and length in (None, size)
        ]
        run = SimpleNamespace(profile="paper", seed=0, get=BUDGET.get)
        return [record(run, **each) for _, values in chosen for each in values]


IMAGES = {
    ("vae_mnist", "planar", 0): [{"F": 90.0}, {"F": 92.0}],
    ("vae_mnist", "planar", 80): [{"F": 87.0}],
    ("vae_mnist", "full", 1): [{"F": 88.5}],
    ("vae_iaf", "diagonal", 0): [{"F": 92.0}],
    ("vae_iaf", "linear", 1): [{"F": 90.0}],
    ("vae_iaf", "iaf-320", 8): [{"F": 89.0}],
}


def test_gains_are_means_over_seeds():
    text = headlines(Records(IMAGES))
    assert "80 planar layers gain 4.0 nats" in text and "after 7,000 updates" in text
    assert "full covariance, which is no flow, gains 2.5, one seed each" in text
    assert "adds 1.0 nats" in text and "Of the 3.0 nats" in text and "has 2.0" in text


@pytest.mark.parametrize("missing", IMAGES)
def test_a_sentence_without_its_opponent_is_left_out(missing):
    lines = headlines(Records({key: values for key, values in IMAGES.items() if key != missing}))
    assert len(lines.splitlines()) == 1


def test_without_records_nothing_is_claimed(tmp_path):
    assert headlines(Store([tmp_path])) == ""


def test_those_of_the_report_are_borne_out():
    store = Store([Path(__file__).parents[1] / "results"])
    values = [finding.values for find in HEADLINES if (finding := find(store)) is not None]
    assert len(values) == len(HEADLINES)
    numbers = [value for each in values for value in each.values() if not isinstance(value, str)]
    assert np.isfinite(numbers).all()


LIKELIHOODS = {
    ("cif_images", flow, None): [{"log_p": value}]
    for flow, value in (("diagonal", -99.0), ("nsf", -96.0), ("cif", -95.5), ("nsf-prior", -92.0))
}


@pytest.mark.parametrize("missing", [None, *LIKELIHOODS])
def test_the_flow_behind_the_encoder_stands_beside_the_learned_prior(missing):
    text = headlines(Records({key: values for key, values in LIKELIHOODS.items() if key != missing}))
    if missing is None:
        assert "gains 3.0 nats" in text and "3.5 with continuous indices" in text
        assert "it gains 7.0, one seed each" in text
    else:
        assert text == ""
