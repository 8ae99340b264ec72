"""What decides how a call is computed, in one table."""

from typing import NamedTuple

import pytest
import torch

from rnn import dispatch
from rnn.kernels import cells
from rnn.kernels.plan import Plan


class Case(NamedTuple):
    """What is asked, and the route: a plan's backend, torch's operator, or the composite."""

    route: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiler: bool = True
    whole_sequences: bool = True
    plan: Plan | None = None
    autocast: bool = False
    reverse: tuple[bool, ...] = (False,)
    own_cell: bool = False


CASES = [
    Case("native"),
    Case("native", whole_sequences=False),
    Case("native", torch.bfloat16),
    Case("native", torch.float16, whole_sequences=False),
    Case("native", autocast=True),
    Case("native", reverse=(True, False, True)),
    Case("native", own_cell=True),
    Case("native", torch.float64),
    Case("native", torch.float64, whole_sequences=False),
    Case("native", torch.float64, own_cell=True),
    Case("lstm", torch.float64, compiler=False),
    Case("lstm", compiler=False),
    Case("lstm", compiler=False, reverse=(False, True)),
    Case("lstm", torch.bfloat16, compiler=False),
    Case("numpy", torch.float64, compiler=False, whole_sequences=False),
    Case("numpy", compiler=False, whole_sequences=False),
    Case("numpy", compiler=False, reverse=(True,)),
    Case("numpy", torch.float64, compiler=False, own_cell=True),
    Case("numpy", plan=Plan("numpy")),
    Case("native", compiler=False, plan=Plan("native")),
    Case("composite", torch.complex64),
    Case("composite", device="meta"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_route(case: Case, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(dispatch, "native_available", lambda cell, dtype: case.compiler)
    cell = cells.lstm
    if case.own_cell:
        cell = cells.Cell("own", cells.lstm.forward, cells.lstm.backward, 4, 2)
    x = torch.empty(5, 3, 4, dtype=case.dtype, device=case.device)
    asked = cell, x, 3, 8, case.reverse, case.plan, case.whole_sequences
    with torch.autocast("cpu", enabled=case.autocast):
        decision = dispatch.decide(*asked)
    route = "composite"
    if decision.operator is not None:
        route = decision.operator.__name__
    elif decision.plan is not None:
        route = decision.plan.backend
    assert route == case.route, decision
    half = case.autocast or case.dtype in (torch.float16, torch.bfloat16)
    assert decision.dtype == (torch.float32 if half and not case.plan else case.dtype)
    assert decision.reason or not half
