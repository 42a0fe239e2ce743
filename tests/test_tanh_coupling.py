"""Couplings with one tanh unit beyond their contract: other code for the equation, the mixes,
digits of single precision, planted bugs.
"""

import numpy as np
import pytest
import torch

from helpers import CASE, caught, normals
from normflow_vi.testing.contract import walk
from normflow_vi.transforms import TanhCoupling
from normflow_vi.transforms.permutation import polish_rotation
from normflow_vi.transforms.tanh_coupling import _multiply_mixes

mixes = pytest.mark.parametrize("mix", ["perm", "ortho"])


def each(turn):
    "`Q_1, ..., Q_K` from `R_k = Q_k ... Q_1`."
    turn = polish_rotation(turn.double()).numpy()
    return [turn[0], *(turn[k] @ turn[k - 1].T for k in range(1, len(turn)))]


@mixes
@pytest.mark.parametrize("dim", [1, 2, 7, 40])
def test_against_numpy(mix, dim):
    "Values and inverse of eighty layers by numpy, point by point."
    layers = TanhCoupling(dim, 80, mix=mix).double()
    half = dim // 2
    us, ws, bs = (layers.source()[name].detach().numpy() for name in ("u", "w", "b"))
    z = normals(20, dim)
    expected = z.numpy().copy()
    for Q, u, w, b in zip(each(layers.turn), us, ws, bs, strict=True):
        expected = expected @ Q.T
        unit = np.tanh(expected[:, :half] @ w + b)
        expected[:, half:] += unit[:, None] * u
    y, log_det = layers.forward(z)
    assert np.allclose(y.detach().numpy(), expected, atol=1e-10)
    assert torch.allclose(layers.inverse(y)[0], z, atol=1e-11)
    assert torch.equal(log_det, torch.zeros(20, dtype=torch.float64))


def test_mixes_are_permutations_other_than_the_identity():
    for Q in each(_multiply_mixes("perm", 50, 3)):
        assert np.isin(Q, (0, 1)).all()
        assert (Q.sum(0) == 1).all()
        assert (Q.sum(1) == 1).all()
        assert not np.array_equal(Q, np.eye(3))


def test_rotations_are_uniform():
    "Of `Q_k`, not only of their products: both signs of the determinant, and `E Q_11^4 = 3 / (D (D + 2))`."
    Q = np.stack(each(_multiply_mixes("ortho", 4000, 3)))
    fourth = Q[:, 0, 0] ** 4
    assert abs((np.linalg.det(Q) > 0).mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs(fourth.mean() - 3 / 15) < 4 * fourth.std() / 4000**0.5


@mixes
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_single_precision(mix, size):
    """A stack of eighty layers and its gradients: the constraint of the planar kernel, which
    divides by |w|^2, costs no more than rounding over |w|.
    """
    wide = TanhCoupling(40, 80, mix=mix).double()
    with torch.no_grad():
        wide.source.w.mul_(size)
    narrow = TanhCoupling(40, 80, mix=mix)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    z = torch.randn(200, 40)
    found = []
    expected = []
    for layers, points, into in ((narrow, z, found), (wide, z.double(), expected)):
        y, log_det = layers.forward(points)
        assert not log_det.any()
        into += [y, *torch.autograd.grad(y.sin().mean(0).sum(), list(layers.parameters()))]
    blurred = 1e-5 * max(1.0, size, 0.01 / size)  # a steep unit magnifies rounding, and so does a small w
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() < blurred * e.norm()


def test_the_mix_comes_back_with_the_model():
    one = TanhCoupling(30, 2)
    other = TanhCoupling(30, 2)
    assert not torch.equal(one.turn, other.turn)
    other.load_state_dict(one.state_dict())
    z = torch.randn(5, 30)
    assert torch.equal(one.forward(z)[0], other.forward(z)[0])
    assert [name for name, _ in one.named_parameters()] == ["source.u", "source.w", "source.b"]


@pytest.mark.parametrize(
    "place, found, wrong",
    [
        ("_unmix", "A, B = turn", "B, A = turn.flip(-2)"),
        ("_unmix", "turn.tensor_split", "turn.mT.tensor_split"),
        ("TanhCoupling.push_stack", "end.mT", "end"),
        ("TanhCoupling.pull_stack", "-u.flip", "u.flip"),
        ("TanhCoupling.pull_stack", "b.flip(-1)", "b"),
        ("TanhCoupling.pull_stack", "y @ end", "y @ end.mT"),
        ("_push_orthogonal", "y.new_zeros(y.shape[:-1])", "y.new_full(y.shape[:-1], 1e-16)"),
    ],
)
def test_planted_bugs(monkeypatch, place, found, wrong):
    def check():
        for mix in ("perm", "ortho"):
            test_against_numpy(mix, 6)

    caught(monkeypatch, check, f"tanh_coupling.{place}", found, wrong)


def test_a_rotation_that_stays_in_single_precision_is_noticed(monkeypatch):
    caught(
        monkeypatch,
        lambda: walk(CASE["tanh-coupling-ortho"], ("double",)),
        "tanh_coupling.TanhCoupling.prepare",
        "turn = polish_rotation(turn)",
        "pass",
    )


def test_options_and_decay():
    """The text shows the options, by which models of one shape are told apart; no tensor of the
    stack is a network's weight.
    """
    assert repr(TanhCoupling(4, 2, mix="ortho")) != repr(TanhCoupling(4, 2)) != repr(TanhCoupling(4, 3))
    assert (
        TanhCoupling(4, 2).source.weight_decayed == () == TanhCoupling(4, 2, 3).source.linear.weight_decayed
    )
