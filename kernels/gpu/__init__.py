"""The forward and the backward pass on a GPU, around the kernels in Triton or in CUDA C++.

Here are the tensors that the kernels write, and the large products before and after them. Each
language is a module with a function `launch` that runs its kernels."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import Cell
from ..plan import Plan, Rows
from .tensors import BackwardTensors, ForwardTensors


def _sweep(plan: Plan) -> Any:
    """The function that runs a plan's kernels through time."""
    # imported late: Triton may be missing, and takes a while
    module = ".triton_kernels.launch" if plan.backend == "triton" else ".cuda.launch"
    return import_module(module, __package__).launch


def forward(
    cell: Cell,
    plan: Plan,
    rows: Rows,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    s0: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As `host.forward`, with joined states."""
    N = len(rows.reverse)
    S = cell.states
    A = cell.saved
    R = len(x)
    H = s0.shape[2]
    # padding after a sequence's end stays 0
    padded = rows.lengths is not None and rows.offsets is None
    new = x.new_zeros if padded else x.new_empty
    state = s0.to(torch.float32, copy=True)
    y = new(R, N * H)
    states = new(S - 1, R, N * H) if S > 1 and keep else None
    saved = new(A, R, N * H) if A and keep > 1 else None
    tensors = ForwardTensors(
        x=x if plan.fused else F.linear(x, w_ih, b_ih),
        w_ih=w_ih if plan.fused else None,
        w_hh=w_hh,
        b_ih=b_ih if plan.fused else None,
        b_hh=b_hh,
        state=state,
        hidden=None,
        y=y,
        states=states,
        saved=saved,
        lengths=rows.lengths,
        offsets=rows.offsets,
        resets=rows.resets,
    )
    _sweep(plan)(cell, plan, rows, tensors, s0)
    return y, states, state.to(x.dtype), saved


def backward(
    cell: Cell,
    plan: Plan,
    rows: Rows,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    s0: Tensor,
    y: Tensor,
    states: Tensor | None,
    saved: Tensor | None,
    dy: Tensor | None,
    dstates: Tensor | None,
    dlast: Tensor | None,
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    """As `host.backward`, with joined states."""
    N = len(rows.reverse)
    padded = rows.lengths is not None and rows.offsets is None
    new = y.new_zeros if padded else y.new_empty
    dr = new(len(y), len(w_hh))
    if dlast is None:
        ds = torch.zeros_like(s0, dtype=torch.float32)
    else:
        ds = dlast.to(torch.float32, copy=True)
    dx = new(dr.shape) if cell.split else None
    h_prev = None if rows.lengths is None and rows.resets is None else new(y.shape)
    tensors = BackwardTensors(
        w_hh=w_hh,
        state=s0,
        y=y,
        states=states,
        saved=saved,
        dy=torch.zeros_like(y) if dy is None else dy,
        dstates=dstates,
        ds=ds,
        dx=dx,
        dr=dr,
        h_prev=h_prev,
        lengths=rows.lengths,
        offsets=rows.offsets,
        resets=rows.resets,
    )
    _sweep(plan)(cell, plan, rows, tensors, s0)
    if dx is None:
        dx = dr
    if padded:
        # 0 times a NaN in the padding is NaN
        ran = torch.arange(rows.steps, device=x.device)[:, None] < rows.lengths
        x = torch.where(ran.view(-1, 1), x, 0)
    grads: list[Tensor | None] = [None] * 5
    if needs[0]:
        grads[0] = torch.mm(dx, w_ih)
    if needs[1]:
        grads[1] = torch.mm(dx.T, x)
    if needs[2]:
        drs = dr.chunk(N, 1)
        if h_prev is not None:
            products = [torch.mm(d.T, h) for d, h in zip(drs, h_prev.chunk(N, 1))]
        else:
            firsts = s0[:: cell.states]
            products = [
                _shifted_product(d, h, first, bool(back))
                for d, h, first, back in zip(drs, y.chunk(N, 1), firsts, rows.reverse)
            ]
        grads[2] = products[0] if N == 1 else torch.cat(products)
    if needs[3]:
        grads[3] = dx.sum(0)
    if needs[4]:
        # a tensor of its own, also where both biases have the same gradient
        shared = None if cell.split else grads[3]
        grads[4] = dr.sum(0) if shared is None else shared.clone()
    return grads, ds.to(y.dtype) if needs[5] else None


def _shifted_product(d: Tensor, h: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The sum over rows of d_t h_{t-1}^T: d [R, K], h [R, H], and the initial h `first` [B, H]."""
    B = len(first)
    if len(h) == B:
        return torch.mm(d.T, first)
    if reverse:
        return torch.addmm(torch.mm(d[:-B].T, h[B:]), d[-B:].T, first)
    return torch.addmm(torch.mm(d[:B].T, first), d[B:].T, h[:-B])
