"""The opening of chapter 5: the diagrams of the thesis have their rows, and its table its columns."""

import csv

import pytest

from normflow_vi import experiments
from normflow_vi.reproduce.status import read_csv
from normflow_vi.utils.settings import project_root


@pytest.mark.parametrize("item", ["Fig 4.1", "Fig 4.2"])
def test_the_diagrams_of_the_thesis_are_drawn_by_the_page_of_the_idea(item):
    (row,) = [
        row for row in read_csv("figures.csv") if row["item"] == item and row["source"].startswith("Pires")
    ]
    page = experiments.get("vmonf_idea")
    assert row["notebook"] == page.notebook
    assert row["product"] in page.products
    assert page.plan("paper") == []


def test_every_relative_shares_something_and_lacks_something():
    with open(project_root() / "figures/related_work.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["model"].startswith("VMoNF")
    assert len({row["model"].split()[0] for row in rows}) == len(rows) == 7
    assert all(value.strip() for row in rows for value in row.values())
