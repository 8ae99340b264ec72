"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

from typing import Any

import pytest
import torch
from cases import CASES, Case, check, check_recurrence
from conftest import GPU
from small import LAYERS, B, H, I, T

import rnn
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


def scopes_of_cases() -> list[Any]:
    """Every case in every scope. In the interpreter, which is slow, `make test` has each in one scope, by turns."""
    params = []
    for k, case in enumerate(case for case in CASES if case.dtype != torch.float64):
        scopes = SCOPES if case.H <= 128 else ["launch"]
        for j, scope in enumerate(scopes):
            quick = GPU or (k + j) % len(scopes) == 0
            params.append(pytest.param(case, scope, id=f"{case}-{scope}", marks=[] if quick else pytest.mark.slow))
    return params


@pytest.mark.parametrize(("case", "scope"), scopes_of_cases())
def test_cases(case: Case, scope: str) -> None:
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


@pytest.mark.gpu
@LAYERS
def test_cuda_graph(name: str) -> None:
    layer, x = getattr(rnn, name)(I, H, device="cuda"), torch.randn(T, B, I, device="cuda")
    graphed = torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
    new = torch.randn(T, B, I, device="cuda", requires_grad=True)
    torch.testing.assert_close(graphed(new), layer(new))
