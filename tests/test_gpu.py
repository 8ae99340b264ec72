"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from cases import CASES, Case, check, check_recurrence
from conftest import GPU

from rnn.kernels.plan import Plan, power_of_2

DEVICE = "cuda" if GPU else "cpu"
SCOPES = ["block", "fused", "grid", "launch"]
HALF = (torch.float16, torch.bfloat16)


def plan_for(scope: str, H: int, dtype: torch.dtype = torch.float32) -> Plan:
    """Tiles so small that a layer needs several, but for a block's, and no more than the interpreter is quick with."""
    precision, tile = "ieee" if dtype in HALF else "tf32x3", 16 if H < 64 else 64
    if scope in ("block", "fused") and H <= 128:
        units = power_of_2(H, 16)
        return Plan("triton", "block", units, 8, units, max(1, units // 16), scope == "fused", precision)
    return Plan("triton", "grid" if scope == "grid" and H <= 128 else "launch", tile, 16, tile, 4, False, precision)


def suits(case: Case) -> bool:
    """Without a GPU fewer of those that test_cells has already: the interpreter is slow."""
    return case.dtype != torch.float64 and (GPU or case.mode == "RNN" or case.form == "lengths")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", [case for case in CASES if suits(case)], ids=str)
def test_cases(case: Case, scope: str) -> None:
    if scope == "launch" or case.H <= 128:
        check(case, plan_for(scope, case.H, case.dtype), DEVICE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("form", "resets"), [("padded", False), ("padded", True), ("lengths", True), ("packed", True)])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_cells(cell: str, form: str, resets: bool, scope: str) -> None:
    check_recurrence(cell, plan_for(scope, 18), (3, 9, 3, 18), (False, True), form, resets, device=DEVICE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_half(cell: str, dtype: torch.dtype, scope: str) -> None:
    check_recurrence(cell, plan_for(scope, 18, dtype), (3, 9, 3, 18), bias=False, dtype=dtype, device=DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("sizes", [(70, 3, 16, 100), (70, 130, 40, 250), (70, 16, 8, 500), (9, 70, 99, 1030)], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_chosen_plans(cell: str, sizes: tuple[int, int, int, int], form: str, dtype: torch.dtype) -> None:
    check_recurrence(cell, None, sizes, (False, True), form, dtype=dtype, device="cuda")
