"""Every transform of the library against its contract: the rows of its table, through the exported kit."""

import inspect

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from helpers import CASE, normals
from normflow_vi import Flow, transforms
from normflow_vi.testing.cases import CASES
from normflow_vi.testing.contract import CHECKS, C, Case, Direction, stack_calls
from normflow_vi.transforms import (
    PLU,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    BatchNorm,
    Chain,
    CircularConvolution,
    ContinuouslyIndexed,
    ConvolutionCoupling,
    Householder,
    Inverse,
    InverseAutoregressive,
    MaskedAutoregressive,
    Orthogonal,
    Permutation,
    Planar,
    PReLU,
    Radial,
    SLog,
    SplineAutoregressive,
    SplineCoupling,
    Sylvester,
    SymmetricConvolution,
)
from normflow_vi.transforms.factories import CIF, IAF, MAF, NICE, NSF, RealNVP

WALKS = [
    (case, check, context_dim)
    for case in CASES
    for check in CHECKS
    if case.tolerance(check) is not None
    for context_dim in (None, C)
]


@pytest.mark.parametrize(
    "case, check, context_dim",
    WALKS,
    ids=[f"{case.name}-{check}-{'amortised' if width else 'owned'}" for case, check, width in WALKS],
)
def test_contract(case, check, context_dim):
    CHECKS[check](case, context_dim)


def test_every_transform_has_a_row():
    "Whatever class the package exports is built by a row of the table, alone or inside another."
    seen = {type(module) for case in CASES for module in case.make(case.dims[-1], 2, None).modules()}
    for name in transforms.__all__:
        if inspect.isclass(cls := getattr(transforms, name)):
            assert any(issubclass(built, cls) for built in seen), f"no row builds {name}"


def test_names_are_rows_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_exception_has_a_reason():
    for case in CASES:
        for check, (tolerance, reason) in case.exceptions.items():
            assert len(reason) > 10, (case.name, check)
            assert tolerance is None or tolerance >= 0, (case.name, check)


def test_flows_are_batched_over_runs_too():
    "Density and draws, the latter with one generator for all runs."
    case = Case("chain", lambda dim, length, context_dim: Chain(Affine(dim), Planar(dim, length)))
    runs = [Flow(case.draw(3)).double() for _ in range(3)]
    x = normals(7, 3)
    log_q = stack_calls(runs, "log_prob")(x.expand(3, 7, 3))
    for run, found in zip(runs, log_q, strict=True):
        assert torch.allclose(found, run.log_prob(x), atol=1e-10)
    drawing = [Direction(run, "rsample_and_log_prob") for run in runs]

    def draw(p, b):
        generator = torch.Generator().manual_seed(0)
        return functional_call(drawing[0], (p, b), ((5,),), {"generator": generator})

    z, log_q = vmap(draw, randomness="different")(*stack_module_state(drawing))
    for run, draws, found in zip(runs, z, log_q, strict=True):
        assert torch.allclose(run.log_prob(draws), found, atol=1e-6)
    assert not torch.allclose(z[0], z[1])


def test_chains_cost_what_their_worst_part_costs_and_join_what_fits():
    maf = MaskedAutoregressive(2, hidden=(4,))
    chain = Chain(Affine(2), maf, Planar(2))
    turned = Inverse(maf)
    assert (chain.forward_kind, chain.inverse_kind) == ("sequential", "iterative")
    assert (turned.forward_kind, turned.inverse_kind) == ("closed form", "sequential")
    for parts, words in (
        ((Affine(2), Affine(3)), "dim must agree"),
        ((Affine(2, context_dim=3), Affine(2, context_dim=4)), "context_dim must agree"),
        ((), "empty chain"),
    ):
        with pytest.raises(ValueError, match=words):
            Chain(*parts)
    with pytest.raises(ValueError, match="length=True"):
        Affine(2, True)


# Where the tensors come from.

HEADS = pytest.mark.parametrize(
    "name",
    [
        "affine",
        "batchnorm",
        "prelu",
        "plu",
        "planar",
        "radial",
        "sylvester",
        "circular-convolution",
        "slog",
        "tanh-coupling-perm",
        "triangular",
        "gated-convolution",
    ],
)


def pair(name, dim, context_dim):
    "A layer with its own tensors, and one that emits them and started from the same numbers."
    layers = []
    for width in (None, context_dim):
        torch.manual_seed(0)
        layers.append(CASE[name].make(dim, 2, width).double().eval())
    return layers


@HEADS
def test_a_context_of_zeros_gives_the_layer_that_owns_its_tensors(name):
    owned, emitted = pair(name, 3, C)
    for key, tensor in owned.source().items():
        assert torch.allclose(emitted.source(torch.zeros(1, C), torch.float64)[key][0], tensor, atol=1e-6)


@HEADS
def test_heads_start_with_the_variance_that_they_are_scaled_to(name):
    _, emitted = pair(name, 20, 50)
    tensors = emitted.source(torch.randn(2000, 50), torch.float64)
    at_zero = emitted.source(torch.zeros(1, 50), torch.float64)
    for key in tensors:
        spread = (tensors[key] - at_zero[key]).std()
        assert abs(spread / emitted.head_scale - 1) < 0.1


def test_what_weight_decay_shrinks():
    """Matrices of networks, and the heads of layers that are an encoder's: neither biases nor the
    tensors of a flow.
    """
    assert AffineCoupling(4, 2, 3, hidden=(5,)).source.weight_decayed == ("weight_0", "context_0", "weight_1")
    assert Affine(4, context_dim=3).source.linear.weight_decayed == ("weight",)
    for layer in (Planar(4, 2), Affine(4, 2), PLU(4), Sylvester(4)):
        assert layer.source.weight_decayed == ()
    for layer in (Planar(4, context_dim=3), PLU(4, context_dim=3)):
        assert layer.source.linear.weight_decayed == ()


# The text of a transform shows its options: stacks of runs are compared by it.

OTHERS = {
    "length": 2,
    "context_dim": 3,
    "max_log_scale": 2.0,
    "constraint": "paper",
    "alpha": 0.5,
    "eps": 0.1,
    "momentum": 0.2,
    "reflections": 2,
    "bottleneck": 2,
    "hidden": (8,),
    "activation": "tanh",
    "mask": "checkerboard",
    "mix": "ortho",
    "bins": 5,
    "bound": 2.0,
    "order": "natural",
    "residual": True,
}
KINDS = {
    (Permutation, "kind"): "reverse",
    (Sylvester, "kind"): "householder",
    (InverseAutoregressive, "form"): "plain",
    (MaskedAutoregressive, "form"): "gated",
}
PAIRED = {
    (Sylvester, "reflections"): {"kind": "householder"},
    (InverseAutoregressive, "max_log_scale"): {"form": "plain"},
    "shape": {"mask": "checkerboard"},
}  # what an option goes with


@pytest.mark.parametrize(
    "cls",
    [
        Affine,
        BatchNorm,
        PReLU,
        SLog,
        Permutation,
        Orthogonal,
        PLU,
        Householder,
        CircularConvolution,
        SymmetricConvolution,
        Planar,
        Radial,
        Sylvester,
        AdditiveCoupling,
        AffineCoupling,
        SplineCoupling,
        ConvolutionCoupling,
        InverseAutoregressive,
        MaskedAutoregressive,
        SplineAutoregressive,
    ],
)
def test_every_option_shows_in_the_text(cls):
    names = list(inspect.signature(cls).parameters)[1:]
    hidden = {"hidden": (8, 8, 8)} if "hidden" in names else {}
    for name in names:
        given = hidden | PAIRED.get((cls, name), PAIRED.get(name, {}))
        other = (3, 4) if name == "shape" else KINDS.get((cls, name)) or OTHERS[name]
        assert repr(cls(12, **given | {name: other})) != repr(cls(12, **given)), name


# Factories.

FACTORIES = {
    "NICE": (NICE(4, 2), lambda: [AdditiveCoupling(4, 2, mix="perm")]),
    "NICE with all options": (
        NICE(4, 1, "ortho", True, (5,), "tanh", 3),
        lambda: [AdditiveCoupling(4, 1, 3, (5,), "tanh", mix="ortho"), Affine(4, context_dim=3)],
    ),
    "NSF": (NSF(4, 2), lambda: [SplineCoupling(4, bound=5.0), Permutation(4)] * 2),
    "NSF with all options": (
        NSF(4, 1, "autoregressive", "plu", (5, 5, 5), "tanh", 4, 2.0, residual=True, context_dim=3),
        lambda: [SplineAutoregressive(4, 1, 3, (5, 5, 5), "tanh", 4, 2.0, residual=True), PLU(4)],
    ),
    "CIF": (
        CIF(4, 2),
        lambda: [ContinuouslyIndexed(SplineAutoregressive(4, bound=5.0), form="before"), Permutation(4)] * 2,
    ),
    "CIF with all options": (
        CIF(
            4,
            1,
            2,
            (7,),
            "after",
            "ortho",
            (5, 5, 5),
            "tanh",
            bins=4,
            bound=2.0,
            residual=True,
            context_dim=3,
        ),
        lambda: [
            ContinuouslyIndexed(
                SplineAutoregressive(4, 1, 3, (5, 5, 5), "tanh", 4, 2.0, residual=True),
                2,
                (7,),
                form="after",
                context_dim=3,
            ),
            Orthogonal(4),
        ],
    ),
    "CIF, context for r alone": (
        CIF(4, 1, context_dim=3, conditional=False),
        lambda: [
            ContinuouslyIndexed(SplineAutoregressive(4, bound=5.0), form="before", context_dim=3),
            Permutation(4),
        ],
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_chain_what_they_say(name):
    made, layers = FACTORIES[name]
    assert [repr(part) for part in made.transforms] == [repr(layer) for layer in layers()]


def test_factories_of_one_stack_pass_their_options_on():
    assert repr(RealNVP(6, 2, (5,), "tanh", 3, "checkerboard", (3, 2), 2.0)) == repr(
        AffineCoupling(6, 2, 3, (5,), "tanh", mask="checkerboard", shape=(3, 2), max_log_scale=2.0)
    )
    assert repr(MAF(4, 2, (5,), "tanh", 3, 2.0)) == repr(
        MaskedAutoregressive(4, 2, 3, (5,), "tanh", max_log_scale=2.0)
    )
    assert repr(IAF(4, 2, (5,), "tanh", 3, "plain")) == repr(
        InverseAutoregressive(4, 2, 3, (5,), "tanh", form="plain")
    )
    for make, word in (
        (lambda: NSF(4, 1, residual=True), "residual"),
        (lambda: NSF(4, 1, kind="linear"), "kind"),
        (lambda: NICE(4, 1, mix="lu"), "mix"),
        (lambda: CIF(4, 0), "length"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
