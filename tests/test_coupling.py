"""Coupling layers beyond the walked contract: masks, structure, extended precision, many draws."""

import itertools
import math

import mpmath
import pytest
import torch
from torch.func import jacrev

from helpers import caught, dtypes, exact, many_draws, moved, near, normals, over_draws, scales, tensors_of
from normflow_vi.testing.contract import C
from normflow_vi.transforms.coupling import AdditiveCoupling, AffineCoupling, Coupling, _conditioning_entries
from normflow_vi.transforms.laws import Gate, ScaleShift, Shift

EYE = {n: torch.eye(n, dtype=torch.float64) for n in range(1, 25)}
MASKS = [
    ("half", 2, None),
    ("half", 5, None),
    ("checkerboard", 6, None),
    ("checkerboard", 7, None),
    ("checkerboard", 12, (3, 4)),
    ("checkerboard", 18, (2, 3, 3)),
    ("channel", 24, (4, 2, 3)),
    ("channel", 12, (3, 2, 2)),
    (torch.tensor([0, 1, 0, 0, 1]).bool(), 5, None),
    (torch.zeros(3).bool(), 3, None),
]
each_mask = pytest.mark.parametrize("mask, dim, shape", MASKS, ids=str)


def jacobian(transform, z):
    return jacrev(lambda z: transform.forward(z)[0])(z).detach()


# Masks and orders


@pytest.mark.parametrize("shape", [(1,), (5,), (6,), (3, 4), (1, 3, 3), (4, 2, 3)])
def test_masks_are_what_they_say(shape):
    entries = list(itertools.product(*map(range, shape)))
    size = math.prod(shape)
    first = [i < size // 2 for i in range(size)]
    odd = [sum(entry[-2:]) % 2 == 1 for entry in entries]
    assert _conditioning_entries("half", size, shape).tolist() == first
    assert _conditioning_entries("checkerboard", size, shape).tolist() == odd
    if len(shape) == 1 or shape[0] > 1:
        channels = [entry[0] < shape[0] // 2 for entry in entries]
        assert _conditioning_entries("channel", size, shape).tolist() == channels
    for name in ("half", "checkerboard"):
        assert _conditioning_entries(name, size, shape, length=2).sum() <= size // 2


def entries_of(mask):
    "The numbers of the entries that are true."
    return set(mask.nonzero().flatten().tolist())


@each_mask
def test_layers_alternate(mask, dim, shape):
    transform = AdditiveCoupling(dim, 5, mask=mask, shape=shape, hidden=())
    order = transform.order
    back = transform.back
    chosen = _conditioning_entries(mask, dim, shape)
    kept = int(chosen.sum())
    count = torch.arange(dim).expand(5, -1)
    assert torch.equal(order.gather(1, back), count)
    assert torch.equal(back.gather(1, order), count)
    for k in range(5):
        assert torch.equal(order[k], order[k % 2])
        assert torch.equal(order[k].flip(0), order[1 - k % 2])
    assert set(order[0, :kept].tolist()) == entries_of(chosen)
    if 2 * kept == dim:
        assert set(order[1, :kept].tolist()) == entries_of(~chosen)


@each_mask
@pytest.mark.parametrize("law", [Shift(), ScaleShift(), Gate()], ids=lambda law: type(law).__name__)
def test_jacobian_has_exact_zeros_where_the_mask_says_so(mask, dim, shape, law):
    z = normals(dim)
    chosen = _conditioning_entries(mask, dim, shape)
    layer = moved(Coupling(dim, law, mask=mask, shape=shape, hidden=(7,), activation="tanh"))
    matrix = jacobian(layer, z)
    assert torch.equal(matrix[chosen], EYE[dim][chosen])  # kept entries
    others = matrix[~chosen]
    among = others[:, ~chosen]
    assert torch.equal(among, among.diagonal().diag())  # others entries do not see each other
    assert (others[:, chosen] != 0).all()  # and all see all kept ones
    if isinstance(law, Shift):
        assert (matrix.diagonal() == 1).all()


@each_mask
def test_second_layer_keeps_the_other_end(mask, dim, shape):
    """In a stack of two, an entry neither layer keeps conditions nothing: its column has only its
    diagonal entry.
    """
    transform = moved(AffineCoupling(dim, 2, mask=mask, shape=shape, hidden=(7,), activation="tanh"))
    matrix = jacobian(transform, normals(dim))
    kept = transform.kept
    conditions = set(transform.order[:, :kept].flatten().tolist())
    for i in range(dim):
        others = torch.cat([matrix[:i, i], matrix[i + 1 :, i]])
        assert (others != 0).any() if i in conditions else (others == 0).all()
    if kept:
        assert len(conditions) == 2 * kept
        assert (matrix.diagonal() != 1).any()


@pytest.mark.parametrize("hidden", [(), (3,), (4, 6)])
def test_no_weight_is_dead(hidden):
    "As many weights as `kept -> moved` networks have, and a gradient in every one of them."
    transform = moved(AffineCoupling(5, 3, C, hidden=hidden, activation="tanh"))
    widths = [2, *hidden, 6]
    of_layers = sum((m + 1) * n for m, n in itertools.pairwise(widths))
    of_context = sum(C * n for n in hidden or (6,))
    expected = of_layers + of_context
    assert sum(p.numel() for p in transform.parameters()) == 3 * expected
    y, log_det = transform.forward(normals(50, 5), normals(50, C))
    (y.square().sum() + log_det.sum()).backward()
    assert all((p.grad != 0).all() for p in transform.parameters())


def test_what_is_refused():
    def message(*words, **options):
        with pytest.raises(ValueError) as raised:
            AffineCoupling(**options)
        for word in words:
            assert word in str(raised.value), raised.value

    message("mask", "half, checkerboard, channel", dim=4, mask="halves")
    message("shape=(2, 3)", "dim=4", dim=4, shape=(2, 3))
    message("shape=0", dim=4, shape=(0, 3))
    message("two channels", dim=4, shape=(1, 4), mask="channel")
    message("mask", "(4,)", "(5,)", dim=4, mask=torch.zeros(5).bool())
    message("mask", "boolean", "float32", dim=4, mask=torch.zeros(4))
    message("none is left", dim=4, mask=torch.ones(4).bool())
    message("3 of 4", "length=2", dim=4, length=2, mask=torch.tensor([1, 1, 1, 0]).bool())
    message("3 of 5", "length=2", dim=5, length=2, mask=torch.tensor([1, 1, 1, 0, 0]).bool())
    message("max_log_scale", dim=4, max_log_scale=0)
    message("hidden", dim=4, hidden=8)
    message("activation", "tanh", dim=4, activation="sine")
    AffineCoupling(4, mask=torch.tensor([1, 1, 1, 0]).bool())  # a single layer may


# Values


def test_laws_start_where_they_say():
    bias = Coupling(6, Gate(), 2, hidden=(32,)).source.bias_1.view(2, 3, 2)
    assert (bias[..., 1] - 1.5).abs().max() < 0.1 > bias[..., 0].abs().max()
    assert bias[..., 0].any()


def test_additive_coupling_preserves_volume():
    transform = moved(AdditiveCoupling(5, 4), 10.0)
    z = normals(20, 5)
    assert transform.forward(z)[1].count_nonzero() == 0
    assert transform.inverse(z)[1].count_nonzero() == 0


@pytest.mark.parametrize("dim, context_dim", [(1, None), (1, C), (2, C), (5, C)])
def test_conditioned_on_what_is_kept_and_on_the_context(dim, context_dim):
    "Values may lack the batch axis that a context has."
    transform = moved(AffineCoupling(dim, 3, context_dim, hidden=(8,)))
    z = normals(dim)
    context = None if context_dim is None else normals(6, C)
    y, log_det = transform.forward(z, context)
    assert y.shape == ((dim,) if context_dim is None else (6, dim))
    assert log_det.shape == y.shape[:-1]
    if context_dim is not None:
        rows = z.expand(6, -1)
        assert torch.allclose(y, transform.forward(rows, context)[0])
        assert len(set(log_det.tolist())) == 6
        back, _ = transform.inverse(z, context)
        assert torch.allclose(back, transform.inverse(rows, context)[0])


def in_extended_precision(transform, z, context):
    "Value and log-det of one affine coupling layer with 50 digits, from the weights and the formulas."
    with mpmath.workdps(50):

        def read(name, i):
            return mpmath.matrix(exact(getattr(transform.source, f"{name}_{i}")[0]))

        order = transform.order[0].tolist()
        kept = transform.kept
        last = len(transform.hidden)
        z = exact(z[order])
        act = {"relu": lambda v: max(v, mpmath.mpf(0)), "tanh": mpmath.tanh}[transform.activation]
        context = mpmath.matrix(exact(context)).T
        h = mpmath.matrix(z[:kept]).T
        for i in range(last + 1):
            if i > 0:
                h = h.apply(act)
            h = h * read("weight", i) + read("bias", i).T
            if i < last:
                h += context * read("context", i)
        shifts = list(h)[::2]
        log_scales = list(h)[1::2]
        limit = transform.law.max_log_scale
        if limit is not None:
            log_scales = [limit * mpmath.tanh(s / limit) for s in log_scales]
        values = z[:kept]
        for zi, shift, log_scale in zip(z[kept:], shifts, log_scales, strict=True):
            values.append(shift + mpmath.exp(log_scale) * zi)
        in_place = [values[order.index(i)] for i in range(len(order))]
        return in_place, mpmath.fsum(log_scales)


@scales
@pytest.mark.parametrize(
    "options", [{"activation": "relu"}, {"activation": "tanh"}, {"max_log_scale": 3.0}], ids=str
)
def test_against_extended_precision(scale, options):
    for draw in range(15):
        mask = ("half", "checkerboard")[draw % 2]
        transform = moved(AffineCoupling(5, 1, C, hidden=(6, 6), mask=mask, **options), scale)
        z = normals(5) / scale
        context = normals(C) / scale
        y, log_det = transform.forward(z, context)
        values, expected = in_extended_precision(transform, z, context)
        assert near(log_det, expected)
        if scale == 1 or "max_log_scale" in options:
            assert near(y, values)


@many_draws
@dtypes
@scales
def test_many_draws(draws, dtype, scale):
    """Every draw is a stack of layers of its own: finite values, and a log-det within what
    `max_log_scale` allows; for free log-scales within +-5 as well.
    """
    bounded = AffineCoupling(5, 3, hidden=(8, 8), max_log_scale=5.0).to(dtype)
    free = AffineCoupling(5, 3, hidden=(8, 8), activation="tanh").to(dtype)
    z = torch.randn(draws, 5, dtype=dtype)
    drawn = tensors_of(bounded, draws, scale, dtype)
    for transform, parameters in ((bounded, drawn), (free, within_five(drawn))):
        y, log_det = over_draws(transform, parameters, z)
        assert y.isfinite().all()
        assert log_det.isfinite().all()
        assert (log_det.abs() <= 3 * 3 * 5 * (1 + 1e-5)).all()
        assert log_det.std() > 1  # and the draws are spread over it


def within_five(drawn):
    """The same draws, the weights and biases that make log-scales divided so that `|s| <= 5` for
    hidden units within +-1.
    """
    weight = drawn["source.weight_2"]
    bias = drawn["source.bias_2"]
    size = weight.abs().sum(-2) + bias.abs()
    is_log_scale = torch.arange(6) % 2 == 1
    factor = torch.where(is_log_scale, 5 / size, torch.ones_like(size))
    return drawn | {
        "source.weight_2": weight * factor[..., None, :],
        "source.bias_2": bias * factor,
    }


def test_layers_that_never_alternate_are_caught(monkeypatch):
    "A correct bijection, so not a matter of the kit: the test of the order sees it."
    caught(
        monkeypatch,
        lambda: test_layers_alternate("half", 5, None),
        "coupling._alternate_orders",
        "order.flip(-1) if k % 2 else order",
        "order",
    )


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("mix", ["perm", "ortho"])
def test_a_mixed_stack_is_the_chain_of_mixes_and_couplings(mix, dim):
    from normflow_vi.transforms import Chain, Orthogonal, Permutation

    stack = AdditiveCoupling(dim, 4, mix=mix, hidden=(8,)).double()
    parts = []
    for k in range(4):
        fixed = {"perm": Permutation, "ortho": Orthogonal}[mix](dim).double()
        layer = AdditiveCoupling(dim, hidden=(8,)).double()
        with torch.no_grad():
            if mix == "ortho":
                fixed.q.copy_(stack.matrix[k : k + 1])
            else:
                fixed.order.copy_(stack.matrix[k : k + 1].argmax(-1))
            for name, tensor in stack.source().items():
                layer.source()[name].copy_(tensor[k : k + 1])
        parts += [fixed, layer]
    z = normals(50, dim)
    y, log_det = stack.forward(z)
    assert torch.allclose(y, Chain(*parts).forward(z)[0])
    assert not log_det.any()
    assert torch.allclose(stack.inverse(y)[0], z)


def test_what_is_no_mix():
    with pytest.raises(ValueError, match="mix='plu': allowed are perm, ortho or None"):
        AdditiveCoupling(2, mix="plu")
