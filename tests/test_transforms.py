"""Every transform of the library against its contract: the rows of its table, through the exported kit."""
import inspect

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from normflow_vi import Flow, transforms
from normflow_vi.cases import CASES
from normflow_vi.contract import C, CHECKS, Case, Direction, drawn
from normflow_vi.transforms import Affine, Chain, Planar


WALKS = [(case, check, context_dim) for case in CASES for check in CHECKS if case.tolerance(check) is not None for context_dim in (None, C)]


@pytest.mark.parametrize("case, check, context_dim", WALKS, ids=[f"{case.name}-{check}-{'amortised' if width else 'owned'}" for case, check, width in WALKS])
def test_contract(case, check, context_dim): CHECKS[check](case, context_dim)


def test_every_transform_has_a_row():
    "Whatever class the package exports is built by a row of the table, alone or inside another."
    seen = {type(module) for case in CASES for module in case.make(case.dims[-1], 2, None).modules()}
    for name in transforms.__all__:
        if inspect.isclass(cls := getattr(transforms, name)): assert any(issubclass(built, cls) for built in seen), f"no row builds {name}"


def test_names_are_rows_of_their_own(): assert len({case.name for case in CASES}) == len(CASES)


def test_every_exception_has_a_reason():
    for case in CASES:
        for check, (tolerance, reason) in case.exceptions.items(): assert len(reason) > 10 and (tolerance is None or tolerance >= 0), (case.name, check)


def test_flows_are_batched_over_runs_too():
    "Density and draws, the latter with one generator for all runs."
    case = Case("chain", lambda dim, length, context_dim: Chain(Affine(dim), Planar(dim, length)))
    runs = [Flow(drawn(case, 3)).double() for _ in range(3)]
    parameters, buffers = stack_module_state(runs)
    def call(name, p, b, *args, **more):
        renamed = [{f"transform.{k}": v for k, v in tensors.items()} for tensors in (p, b)]
        return functional_call(Direction(runs[0], name), tuple(renamed), args, more)
    x = torch.randn(7, 3, dtype=torch.float64)
    log_q = vmap(lambda p, b: call("log_prob", p, b, x))(parameters, buffers)
    assert all(torch.allclose(log_q[r], run.log_prob(x), atol=1e-10) for r, run in enumerate(runs))
    draw = vmap(lambda p, b: call("rsample_and_log_prob", p, b, (5,), generator=torch.Generator().manual_seed(0)), randomness="different")
    z, log_q = draw(parameters, buffers)
    assert all(torch.allclose(run.log_prob(z[r]), log_q[r], atol=1e-6) for r, run in enumerate(runs)) and not torch.allclose(z[0], z[1])
