"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from cases import CASES, Case, check, check_recurrence, random_case
from conftest import GPU

from rnn.kernels import cells
from rnn.kernels.plan import Gpu, Plan, make_plan, power_of_2

DEVICE = "cuda" if GPU else "cpu"
SCOPES = ["block", "fused", "grid", "launch"]
HALF = (torch.float16, torch.bfloat16)


def plan_for(scope: str, H: int, dtype: torch.dtype) -> Plan:
    """Tiles so small that a layer needs several, but for a block's, and no more than the interpreter is quick with."""
    precision, tile = "ieee" if dtype in HALF else "tf32x3", 16 if H < 64 else 64
    if scope in ("block", "fused"):
        units = power_of_2(H, 16)
        return Plan("triton", "block", units, 8, units, max(1, units // 16), scope == "fused", precision)
    return Plan("triton", scope, tile, 8 if scope == "grid" else 16, tile, 4, False, precision)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != torch.float64], ids=str)
def test_cases(case: Case, scope: str) -> None:
    if case.H > 128 and scope != "launch":
        scope = "launch"
    check(case, plan_for(scope, case.H, case.dtype), DEVICE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_cells(cell: str, form: str, resets: bool, scope: str) -> None:
    check_recurrence(cell, plan_for(scope, 18, torch.float32), (4, 9, 3, 18), (False, True), form, resets, device=DEVICE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_half(cell: str, dtype: torch.dtype, scope: str) -> None:
    check_recurrence(cell, plan_for(scope, 18, dtype), (4, 9, 3, 18), bias=False, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("scope", SCOPES)
def test_random_cases(seed: int, scope: str) -> None:
    if seed < 40 and SCOPES[seed % 4] == scope:
        ...
