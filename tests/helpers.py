"""What several test files share: bugs to plant, drawn layers, and numbers of any number of digits."""

import inspect
import pkgutil
import textwrap

import mpmath
import pytest
import torch
from torch.func import functional_call, vmap

import normflow_vi
from normflow_vi.testing.cases import CASES
from normflow_vi.testing.contract import Case, Direction

MODULES = sorted(module.name for module in pkgutil.walk_packages(normflow_vi.__path__, "normflow_vi."))
CASE = {case.name: case for case in CASES}

scales = pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
many_draws = pytest.mark.parametrize("draws", [2000, pytest.param(100_000, marks=pytest.mark.full)])


def normals(*sizes):
    "Standard normals in double precision."
    return torch.randn(*sizes, dtype=torch.float64)


def plant(monkeypatch, place, found, wrong):
    """Replace the piece `found` of the source of a function by `wrong`, wherever the function is in use.

    `place`: its address under `normflow_vi.transforms`, or under `normflow_vi` if it begins with `numerics`.
    The piece must occur once in it.
    """
    room = "normflow_vi" if place.startswith("numerics.") else "normflow_vi.transforms"
    function = inspect.unwrap(pkgutil.resolve_name(f"{room}.{place}"))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(found) == 1, f"{place}: {found!r} occurs {source.count(found)} times"
    source = source.replace(found, wrong).removeprefix("@patch\n")  # which would change the class itself
    text = "class Planted:\n" + textwrap.indent(source, "    ")  # in a class: `super()` keeps its meaning
    scope = dict(function.__globals__)
    exec(compile(text, "planted", "exec"), scope)
    planted = inspect.unwrap(vars(scope["Planted"])[function.__name__])
    monkeypatch.setattr(function, "__code__", planted.__code__)


def caught(monkeypatch, check, place, found, wrong):
    """Assert that `check` passes as things are, and fails with the piece `found` of `place`
    replaced by `wrong`.
    """
    check()
    plant(monkeypatch, place, found, wrong)
    with pytest.raises(AssertionError):
        check()


def damage(kind, data, rng):
    'Bytes with one bit flipped ("bit"), an end missing ("truncated"), or 4 kB zeroed, as crashes leave them.'
    if kind == "bit":
        place = int(rng.integers(len(data)))
        flipped = data[place] ^ 1 << int(rng.integers(8))
        return data[:place] + bytes([flipped]) + data[place + 1 :]
    if kind == "truncated":
        return data[: int(rng.integers(len(data)))]
    start = int(rng.integers(len(data) - 4096)) // 512 * 512
    return data[:start] + bytes(4096) + data[start + 4096 :]


def moved(transform, scale=1.0, jitter=0.3, dtype=torch.float64):
    "A transform whose parameters are drawn anew, as the kit draws them."
    case = Case("", lambda *sizes: transform, jitter=jitter)
    return case.draw(transform.dim, scale=scale, dtype=dtype)


def emitting(make, draws, scale, dtype, **given):
    """A layer `make(context_dim)` whose head passes on its context, and such a context: a draw of
    its tensors a row, `scale` times standard normals but for those `given`.
    """
    parts = []
    for name, value in make(None).initial().items():
        drawn = scale * torch.randn(draws, *value.shape, dtype=dtype)
        parts.append(given.get(name, drawn).flatten(1))
    context = torch.cat(parts, 1)
    transform = make(context.shape[1]).to(dtype).eval()
    with torch.no_grad():
        transform.source.linear.weight.copy_(torch.eye(context.shape[1]) / transform.head_scale)
        transform.source.linear.bias.zero_()
    return transform, context


def tensors_of(transform, draws, scale, dtype):
    "Draws of all parameters of a transform: `{name: (draws, ...)}`."
    return {
        name: scale * torch.randn(draws, *p.shape, dtype=dtype) for name, p in transform.named_parameters()
    }


def over_draws(transform, tensors, value, name="forward"):
    "The method `name` of a transform under each draw of `tensors`, at its own `value`."

    def call(tensors, value):
        return functional_call(
            Direction(transform, name), {f"transform.{key}": t for key, t in tensors.items()}, (value,)
        )

    return vmap(call, randomness="different")(tensors, value)


def exact(value):
    "A tensor as nested lists of numbers of any number of digits."
    return [exact(v) for v in value] if value.dim() else mpmath.mpf(value.item())


def near(found, expected, tolerance=1e-10):
    """Whether `|found - expected| <= tolerance (1 + |expected|)`, for a tensor and a number, or
    tensors and lists of numbers.
    """
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            near(f, e, tolerance) for f, e in zip(found, expected, strict=True)
        )
    return abs(found.item() - expected) <= tolerance * (1 + abs(expected))
