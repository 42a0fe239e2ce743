"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib

import pytest
import torch

import normflow_vi
from helpers import MODULES

FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples_of(name):
    """The docstrings of a module that hold examples."""
    module = importlib.import_module(name)
    return [test for test in FINDER.find(module, module=module) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("__main__", "_modidx"))])
def test_examples(name):
    for example in examples_of(name):
        torch.manual_seed(0)
        report = []
        doctest.DocTestRunner(verbose=False).run(example, out=report.append)
        assert not report, "".join(report)


def test_a_wrong_example_is_noticed():
    """The check above can fail."""
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(wrong, out=report.append)
    assert "Expected" in "".join(report)


def test_what_users_type_has_an_example():
    for name in "Flow Chain Inverse fit load_data VAE VMoNF".split():
        assert ">>>" in getattr(normflow_vi, name).__doc__, name
