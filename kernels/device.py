"""What is around the kernels of a GPU, in Triton or in CUDA C++: the tensors that they write. Each language is a module
with a function `sweep` that launches them."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .plan import Plan, Rows


def _sweep(plan: Plan) -> Any:  # imported late: Triton may be missing, and takes a while
    return import_module(".gpu" if plan.backend == "triton" else ".cuda", __package__).sweep


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_hh: Tensor, b_hh: Tensor | None, s0: Tensor, keep: int,
            w_ih: Tensor | None = None,
            b_ih: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As `cpu.forward`, on contiguous tensors of one device. With w_ih [N*G*H, I] and b_ih, x is the input [R, I]."""
    N, S, A, R, H = len(rows.reverse), cell.states, cell.saved, len(x), s0.shape[2]
    new = x.new_empty if rows.lengths is None or rows.offsets is not None else x.new_zeros  # rows past an end stay 0
    state, y = s0.to(torch.float32, copy=True), new(R, N * H)
    states, saved = new(S - 1, R, N * H) if S > 1 and keep else None, new(A, R, N * H) if A and keep > 1 else None
    _sweep(plan)(cell, plan, rows, False, (x, w_ih, w_hh, b_ih, b_hh, state, y, states, saved), s0)
    return y, states, state.to(x.dtype), saved


def backward(cell: Cell, plan: Plan, rows: Rows, w_hh: Tensor, s0: Tensor, y: Tensor, states: Tensor | None,
             saved: Tensor | None, dy: Tensor, dstates: Tensor | None,
             dlast: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `cpu.backward`."""
    new = y.new_empty if rows.lengths is None or rows.offsets is not None else y.new_zeros
    dr = new(len(y), len(w_hh))
    ds = torch.zeros_like(s0, dtype=torch.float32) if dlast is None else dlast.to(torch.float32, copy=True)
    dx = new(dr.shape) if cell.split else None
    came = None if rows.lengths is None and rows.resets is None else new(y.shape)
    _sweep(plan)(cell, plan, rows, True, (w_hh, s0, y, states, saved, dy, dstates, ds, dx, dr, came), s0)
    return dr if dx is None else dx, dr, ds.to(y.dtype), came
