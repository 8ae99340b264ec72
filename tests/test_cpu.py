"""The recurrence on the CPU: every cell, in NumPy and in torch."""

import pytest
import torch
from cases import check_recurrence

from rnn.kernels.plan import Plan

PLANS = [Plan("numpy"), Plan("torch")]
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True), (True, False, False)], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.backend)
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, plan: Plan, reverse: tuple[bool, ...], form: str, resets: bool) -> None:
    check_recurrence(cell, plan, (5, 6, 3, 9), reverse, form, resets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.backend)
@pytest.mark.parametrize("cell", CELLS)
def test_no_bias(cell: str, plan: Plan, dtype: torch.dtype) -> None:
    check_recurrence(cell, plan, (6, 4, 5, 20), bias=False, dtype=dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_long(cell: str) -> None:
    check_recurrence(cell, Plan("numpy"), (100, 2, 3, 30))
