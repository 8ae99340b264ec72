"""What is around the kernels of a GPU, in Triton or in CUDA C++: the tensors that they write, and the large products
before and after. Each language is a module with a function `sweep` that launches them."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import Cell
from ..plan import Plan, Rows


def _sweep(plan: Plan) -> Any:  # imported late: Triton may be missing, and takes a while
    return import_module(".triton_kernels.launch" if plan.backend == "triton" else ".cuda.launch", __package__).sweep


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, s0: Tensor, keep: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As `host.forward`, with joined states."""
    N, S, A, R, H = len(rows.reverse), cell.states, cell.saved, len(x), s0.shape[2]
    new = x.new_empty if rows.lengths is None or rows.offsets is not None else x.new_zeros  # rows past an end stay 0
    state, y = s0.to(torch.float32, copy=True), new(R, N * H)
    states, saved = new(S - 1, R, N * H) if S > 1 and keep else None, new(A, R, N * H) if A and keep > 1 else None
    given = (x, w_ih, w_hh, b_ih) if plan.fused else (F.linear(x, w_ih, b_ih), None, w_hh, None)
    _sweep(plan)(cell, plan, rows, False, (*given, b_hh, state, y, states, saved), s0)
    return y, states, state.to(x.dtype), saved


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             dlast: Tensor | None, needs: Sequence[bool]) -> tuple[list[Tensor | None], Tensor | None]:
    """As `host.backward`, with joined states."""
    new = y.new_empty if rows.lengths is None or rows.offsets is not None else y.new_zeros
    N, NGH, padded = len(rows.reverse), len(w_hh), rows.lengths is not None and rows.offsets is None
    dr = new(len(y), NGH)
    ds = torch.zeros_like(s0, dtype=torch.float32) if dlast is None else dlast.to(torch.float32, copy=True)
    dx = new(dr.shape) if cell.split else dr
    came = None if rows.lengths is None and rows.resets is None else new(y.shape)
    dy = torch.zeros_like(y) if dy is None else dy
    _sweep(plan)(cell, plan, rows, True,
                 (w_hh, s0, y, states, saved, dy, dstates, ds, dx if cell.split else None, dr, came), s0)
    if padded:  # 0 times a NaN in the padding is NaN
        ran = torch.arange(rows.steps, device=x.device)[:, None] < rows.lengths
        x = torch.where(ran.view(-1, 1), x, 0)
    grads: list[Tensor | None] = [None] * 5
    grads[0] = torch.mm(dx, w_ih) if needs[0] else None
    grads[1] = torch.mm(dx.T, x) if needs[1] else None
    if needs[2]:
        hs, firsts = (y if came is None else came).chunk(N, 1), s0[:: cell.states]
        found = [torch.mm(d.T, h) if came is not None else _product(d, h, first, bool(back))
                 for d, h, first, back in zip(dr.chunk(N, 1), hs, firsts, rows.reverse)]
        grads[2] = found[0] if N == 1 else torch.cat(found)
    grads[3] = dx.sum(0) if needs[3] else None
    grads[4] = (grads[3].clone() if grads[3] is not None and not cell.split else dr.sum(0)) if needs[4] else None
    return grads, ds.to(y.dtype) if needs[5] else None


def _product(d: Tensor, h: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The sum over rows of d_t h_{t-1}^T, d [R, K], of h_t [R, H] and the h that came into the first step [B, H]."""
    if len(h) == len(first):
        return torch.mm(d.T, first)
    early, late = (h[len(first) :], first) if reverse else (first, h[: -len(first)])
    return torch.addmm(torch.mm(d[: len(early)].T, early), d[len(early) :].T, late)
