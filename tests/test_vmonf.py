"""The estimator `VMoNF`: scikit-learn's conventions, densities, clusters, labels, bad input."""

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import normflow_vi
from normflow_vi import Flow, VMoNF
from normflow_vi.data.shapes import circles, pinwheel
from normflow_vi.flows import RealNVP
from normflow_vi.transforms import Affine, Chain, Transform

TINY = {"max_epochs": 1, "batch_size": 1000, "random_state": 0}


class WithoutLabels(VMoNF):
    "For somebody who hands a target to a clusterer and does not want it used."

    def fit(self, X, y=None):
        return super().fit(X)


# Checks that hand over a target which is no component's number: `VMoNF` refuses it by name, as it
# should. All of them pass where the target is ignored.
NOT_LABELS = """
    check_fit_score_takes_y check_estimators_overwrite_params check_dont_overwrite_parameters
    check_estimators_fit_returns_self check_readonly_memmap_input check_n_features_in_after_fitting
    check_positive_only_tag_during_fit check_estimators_dtypes check_dtype_object
    check_f_contiguous_array_estimator check_methods_sample_order_invariance
    check_methods_subset_invariance check_fit2d_1sample check_fit2d_1feature check_dict_unchanged
    check_fit2d_predict1d
"""


def refused(estimator):
    "Which checks fail, and why."
    reason = "hands over a target that is no component's number, which is refused by name"
    return {} if type(estimator) is WithoutLabels else dict.fromkeys(NOT_LABELS.split(), reason)


@parametrize_with_checks(
    [VMoNF(**TINY), WithoutLabels(**TINY)], expected_failed_checks=refused, xfail_strict=True
)
def test_conventions_of_scikit_learn(estimator, check):
    check(estimator)


def two_groups(count=200, share=0.5, seed=0):
    "Two columns of very different scales and places in two groups, and the group."
    rng = np.random.default_rng(seed)
    group = (rng.random(count) < share).astype(int)
    centre = np.column_stack([100 + 50 * group, 1e-3 * group])
    return centre + rng.normal(size=(count, 2)) * [5, 1e-4], group


@pytest.fixture(scope="module")
def fitted():
    "Two groups, and an estimator that knows one in ten of them."
    X, group = two_groups()
    y = np.where(np.arange(len(X)) % 10 == 0, group, -1)
    settings = {"max_epochs": 60, "learning_rate": 1e-2, "random_state": 0}
    return VMoNF(2, RealNVP(2, 4, hidden=(8,)), **settings).fit(X, y), X, group


def test_what_a_fit_leaves(fitted):
    mixture, X, group = fitted
    assert (mixture.labels_ == group).all() and mixture.classes_.tolist() == [0, 1]
    assert mixture.n_features_in_ == 2 and mixture.n_iter_ == 60 and len(mixture.history_.steps) == 60
    assert np.allclose(mixture.weights_, 0.5) and np.allclose(mixture.predict_proba(X).sum(1), 1)
    assert np.array_equal(mixture.labels_, mixture.predict(X))
    assert mixture.score(X) == pytest.approx(mixture.score_samples(X).mean())
    assert mixture.score(X) - 0.5 < mixture.lower_bound_ <= mixture.score(X) + 1e-9
    assert not hasattr(VMoNF(**TINY).fit(X), "classes_")


def test_the_density_is_that_of_the_data_as_given(fitted):
    """Its integral over the plane is one, in whatever units the columns are."""
    mixture, X, _ = fitted
    low, high = X.min(0) - 2 * X.std(0), X.max(0) + 2 * X.std(0)
    axes = [np.linspace(a, b, 300) for a, b in zip(low, high, strict=True)]
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    assert np.exp(mixture.score_samples(lattice)).sum() * cell == pytest.approx(1, abs=0.01)


def test_draws_come_with_their_component(fitted):
    mixture, X, group = fitted
    drawn, component = mixture.sample(2000)
    assert drawn.shape == (2000, 2) and (mixture.predict(drawn) == component).mean() > 0.99
    for k in range(2):
        spread, gap = X[group == k].std(0), drawn[component == k].mean(0) - X[group == k].mean(0)
        assert (abs(gap) < 0.5 * spread).all()
    assert np.array_equal(mixture.sample(5)[0], mixture.sample(5)[0])
    with pytest.raises(ValueError, match="n_samples=0"):
        mixture.sample(0)


def test_a_copy_by_pickle_answers_the_same(fitted):
    mixture, X, _ = fitted
    twin = pickle.loads(pickle.dumps(mixture))
    for ask in ("predict", "predict_proba", "responsibilities", "score_samples"):
        assert np.array_equal(getattr(twin, ask)(X), getattr(mixture, ask)(X))


def test_a_clone_has_the_words_and_not_the_training(fitted):
    mixture, X, _ = fitted
    twin = clone(mixture).set_params(max_epochs=3)
    assert twin.flow is not mixture.flow and twin.learning_rate == 1e-2 and mixture.max_epochs == 60
    with pytest.raises(NotFittedError):
        twin.predict(X)
    before = [p.clone() for p in mixture.flow.parameters()]
    twin.fit(X)
    after = [*mixture.flow.parameters(), *twin.flow.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before * 2, strict=True))  # templates are not trained


def test_in_a_pipeline_and_in_a_search():
    X, group = two_groups(60)
    mixture = VMoNF(max_epochs=3, random_state=0)
    piped = make_pipeline(StandardScaler(), clone(mixture)).fit(X)
    assert np.array_equal(piped.predict(X), mixture.fit(X).predict(X))
    difference = piped.score(X) - mixture.score(X)
    assert difference == pytest.approx(np.log(X.std(0)).sum(), abs=1e-3)
    search = GridSearchCV(mixture, {"n_components": np.array([1, 2])}, cv=2).fit(X)
    assert search.best_params_["n_components"] in (1, 2) and np.isfinite(search.best_score_)


def test_equal_for_equal_random_states_and_no_global_stream_moves():
    X, _ = two_groups(60)

    def streams():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()

    before = streams()
    one = VMoNF(max_epochs=3, consistency=0.1, random_state=3).fit(X)
    np.random.seed(1), torch.manual_seed(1)
    moved = streams()
    two = VMoNF(max_epochs=3, consistency=0.1, random_state=3).fit(X)
    other = VMoNF(max_epochs=3, consistency=0.1).fit(X)
    other.sample(3)
    assert np.array_equal(one.score_samples(X), two.score_samples(X))
    assert not np.array_equal(one.score_samples(X), other.score_samples(X))
    assert streams() == moved != before
    generator = np.random.RandomState(0)
    drawn = [VMoNF(max_epochs=1, random_state=generator).fit(X).score(X) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_one_wing_a_component():
    X, wing = (t.numpy() for t in pinwheel([300] * 5, torch.Generator().manual_seed(0)))
    quick = {"max_epochs": 150, "learning_rate": 1e-2, "temperature_rate": 1e-2, "random_state": 0}
    mixture = VMoNF(5, **quick).fit(X)
    table = contingency_matrix(wing, mixture.labels_)
    assert table[linear_sum_assignment(-table)].sum() >= 0.9 * len(X)


def test_a_few_labels_say_what_is_meant():
    X, ring = (t.numpy() for t in circles([300, 300], torch.Generator().manual_seed(1)))
    some = np.full(len(ring), -1)
    for k in range(2):
        some[np.flatnonzero(ring == k)[:16]] = k
    quick = {"max_epochs": 150, "learning_rate": 5e-3, "temperature_rate": 1e-2, "random_state": 0}
    alone, told = (VMoNF(2, **quick).fit_predict(X, y) for y in (None, some))
    assert (told == ring).mean() > max((alone == ring).mean(), (alone != ring).mean()) + 0.15


def test_learned_weights_are_the_shares():
    X, group = two_groups(1000, share=0.2)
    settings = {"max_epochs": 50, "batch_size": 100, "learning_rate": 1e-2, "random_state": 0}
    mixture = VMoNF(2, Affine(2), weights="learned", **settings).fit(X)
    error = (0.2 * 0.8 / len(X)) ** 0.5
    assert abs(min(mixture.weights_) - group.mean()) < 4 * error
    assert np.allclose(VMoNF(2, weights=[3, 1], **TINY).fit(X).weights_, [0.75, 0.25])


def test_without_a_classifier():
    X, group = two_groups()
    mixture = VMoNF(2, way="responsibilities", max_epochs=60, learning_rate=1e-2, random_state=0).fit(X)
    assert adjusted_rand_score(group, mixture.labels_) == 1
    assert mixture.lower_bound_ == pytest.approx(mixture.score(X))
    assert np.array_equal(mixture.predict_proba(X), mixture.responsibilities(X))


def test_flows_of_different_kinds():
    X, _ = two_groups(60)
    mixture = VMoNF(2, [Chain(Affine(2)), Flow(RealNVP(2, 2))], max_epochs=3, random_state=0).fit(X)
    kinds = [type(part.transform).__name__ for part in mixture.model_.mixture.components]
    assert kinds == ["Chain", "AffineCoupling"] and np.isfinite(mixture.score(X))


@pytest.mark.parametrize("X, count", [([[1.0, 2.0]], 1), ([[3.0], [4.0], [9.0]], 2), ([[1.0], [1.0]], 1)])
def test_the_smallest(X, count):
    """One point, one column, one component, a column without spread."""
    mixture = VMoNF(count, max_epochs=3, random_state=0).fit(X)
    assert mixture.labels_.shape == (len(X),) and np.isfinite(mixture.score(X))
    assert mixture.sample(2)[0].shape == (2, len(X[0]))


def test_one_column_has_a_density_of_mass_one():
    X = np.concatenate([np.random.default_rng(0).normal(m, 1, 100) for m in (-50, 30)])[:, None]
    mixture = VMoNF(2, max_epochs=60, learning_rate=1e-2, random_state=0).fit(X)
    axis = np.linspace(-300, 300, 20_001)
    assert np.exp(mixture.score_samples(axis[:, None])).sum() * 0.03 == pytest.approx(1, abs=0.01)
    assert adjusted_rand_score(np.repeat([0, 1], 100), mixture.labels_) == 1


class OneWay(Transform):
    "A transform without an inverse."

    inverse_kind = "none"


X4 = np.arange(8.0).reshape(4, 2) ** 2
BAD = {
    "no component": ({"n_components": 0}, X4, None, "n_components=0: expected an integer"),
    "half a component": ({"n_components": 1.5}, X4, None, "n_components=1.5"),
    "few points": ({"n_components": 5}, X4, None, "n_samples=4.*n_components=5 points or more"),
    "nan": ({}, np.where(X4 == 0, np.nan, X4), None, "X contains NaN"),
    "infinite": ({}, np.where(X4 == 0, np.inf, X4), None, "X contains infinity"),
    "label above": ({}, X4, [0, 1, 2, -1], r"y=\[2\].*0 to 1 for n_components=2"),
    "label below": ({}, X4, [0, 1, -2, -1], r"y=\[-2\].*-1 for no label"),
    "label between": ({}, X4, [0, 0.5, 1, 1], r"y=\[0.5\].*integers"),
    "label nan": ({}, X4, [0, np.nan, 1, 1], r"y=\[nan\].*integers"),
    "words": ({}, X4, ["a", "b", "a", "b"], "y=.*integers"),
    "too few labels": ({}, X4, [0, 1], "inconsistent numbers of samples"),
    "unlabelled component": ({"n_components": 3}, X4, [0, 2, -1, -1], r"none of \[1\]"),
    "way": ({"way": "em"}, X4, None, "way='em'.*classifier, responsibilities"),
    "init": ({"init": "zeros"}, X4, None, "init='zeros'.*kmeans, random"),
    "weights": ({"weights": "free"}, X4, None, "weights='free'.*uniform, learned"),
    "weight below 0": ({"weights": [1, -1]}, X4, None, "weights=.*above 0"),
    "weights of three": ({"weights": [1, 1, 1]}, X4, None, "weights=.*2 finite"),
    "epochs": ({"max_epochs": 0}, X4, None, "max_epochs=0"),
    "batch": ({"batch_size": 0}, X4, None, "batch_size=0"),
    "rate": ({"learning_rate": -1.0}, X4, None, "learning_rate=-1.0"),
    "temperature": ({"temperature_rate": -1.0}, X4, None, "rate=-1.0"),
    "consistency": ({"consistency": -1.0}, X4, None, "consistency=-1.0"),
    "consistency of what": ({"consistency": 1.0, "way": "responsibilities"}, X4, None, "consistency=1.0"),
    "device": ({"device": "abacus"}, X4, None, "abacus"),
    "random_state": ({"random_state": "now"}, X4, None, "now"),
    "flow of three": ({"flow": RealNVP(3, 2)}, X4, None, "flow=.*dim=3.*dim=2"),
    "one flow of two": ({"flow": [RealNVP(2, 2)]}, X4, None, "flow=.*list of 2"),
    "no inverse": ({"flow": OneWay(2)}, X4, None, "has an inverse"),
    "no flow": ({"flow": "RealNVP"}, X4, None, "flow: expected a transform, got 'RealNVP'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    words, X, y, message = BAD[name]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        VMoNF(**{"max_epochs": 1, **words}).fit(X, y)


def test_another_width_is_refused_after_the_fit(fitted):
    with pytest.raises(ValueError, match="3 features, but VMoNF is expecting 2"):
        fitted[0].score_samples(np.zeros((4, 3)))


def test_without_scikit_learn():
    """The import says what to install; the rest of the package works, and so does a star."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from normflow_vi import *\n"
        "assert 'VMoNF' not in globals() and Flow and fit\n"
        "try:\n    from normflow_vi import VMoNF\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'normflow_vi[mixtures]'" in done.stdout, done.stderr


def test_the_front_door_knows_it():
    assert normflow_vi.VMoNF is VMoNF and "VMoNF" in normflow_vi.__all__
    with pytest.raises(AttributeError, match="VMoNG"):
        normflow_vi.VMoNG  # noqa: B018
