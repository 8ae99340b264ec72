"""The forward and the backward pass on a GPU, around the kernels in Triton or in CUDA C++.

Here are the tensors that the kernels write, and the large products before and after them. Each
language is a module with a function `launch` that runs its kernels."""

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import Cell
from ..plan import Plan
from ..types import Gradients, Layout, OutputGrads, Outputs, Save, Weights
from .tensors import BackwardTensors, ForwardTensors


def _launcher(plan: Plan) -> Callable[..., None]:
    """The function that runs a plan's kernels through time."""
    # imported late: Triton may be missing, and takes a while
    module = ".triton_kernels.launch" if plan.backend == "triton" else ".cuda.launch"
    launch: Callable[..., None] = import_module(module, __package__).launch
    return launch


def forward(
    cell: Cell, plan: Plan, layout: Layout, x: Tensor, weights: Weights, s0: Tensor, save: int
) -> Outputs:
    """x [R, I], joined states [N*S, B, H]."""
    w_ih, w_hh, b_ih, b_hh = weights
    N = len(layout.reverse)
    S = cell.states
    A = cell.saved
    R = len(x)
    H = s0.shape[2]
    # padding after a sequence's end stays 0
    padded = layout.lengths is not None and layout.offsets is None
    new = x.new_zeros if padded else x.new_empty
    state = s0.to(torch.float32, copy=True)
    y = new(R, N * H)
    states = new(S - 1, R, N * H) if S > 1 and save else None
    saved = new(A, R, N * H) if A and save == Save.ACTIVATIONS else None
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
        lengths=layout.lengths,
        offsets=layout.offsets,
        resets=layout.resets,
    )
    _launcher(plan)(cell, plan, layout, tensors, s0)
    return Outputs(y, states, state.to(x.dtype), saved)


def backward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: Tensor,
    outputs: Outputs,
    grads: OutputGrads,
    needs: Gradients[bool],
) -> Gradients[Tensor | None]:
    """The adjoint of `forward`."""
    w_ih, w_hh, _, _ = weights
    y, states, _, saved = outputs
    dy, dstates, dlast = grads
    padded = layout.lengths is not None and layout.offsets is None
    new = y.new_zeros if padded else y.new_empty
    dr = new(len(y), len(w_hh))
    if dlast is None:
        ds = torch.zeros_like(s0, dtype=torch.float32)
    else:
        ds = dlast.to(torch.float32, copy=True)
    dx = new(dr.shape) if cell.split else None
    h_prev = None if layout.lengths is None and layout.resets is None else new(y.shape)
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
        lengths=layout.lengths,
        offsets=layout.offsets,
        resets=layout.resets,
    )
    _launcher(plan)(cell, plan, layout, tensors, s0)
    if dx is None:
        dx = dr
    if padded:
        # 0 times a NaN in the padding is NaN
        ran = torch.arange(layout.steps, device=x.device)[:, None] < layout.lengths
        x = torch.where(ran.view(-1, 1), x, 0)
    gradients: list[Tensor | None] = [None] * 5
    if needs.x:
        gradients[0] = torch.mm(dx, w_ih)
    if needs.w_ih:
        gradients[1] = torch.mm(dx.T, x)
    if needs.w_hh:
        gradients[2] = _w_hh_gradient(layout, dr, y, s0[:: cell.states], h_prev)
    if needs.b_ih:
        gradients[3] = dx.sum(0)
    if needs.b_hh:
        # a tensor of its own, also where both biases have the same gradient
        shared = None if cell.split else gradients[3]
        gradients[4] = dr.sum(0) if shared is None else shared.clone()
    return Gradients._make([*gradients, ds.to(y.dtype) if needs.s0 else None])


def _w_hh_gradient(
    layout: Layout, dr: Tensor, y: Tensor, firsts: Tensor, h_prev: Tensor | None
) -> Tensor:
    """[N*G*H, H], from the h that came into each step, which is that of y one step before where
    `h_prev` was not written."""
    N = len(layout.reverse)
    drs = dr.chunk(N, 1)
    if h_prev is not None:
        products = [torch.mm(d.T, h) for d, h in zip(drs, h_prev.chunk(N, 1))]
    else:
        products = [
            _shifted_product(d, h, first, bool(back))
            for d, h, first, back in zip(drs, y.chunk(N, 1), firsts, layout.reverse)
        ]
    return products[0] if N == 1 else torch.cat(products)


def _shifted_product(d: Tensor, h: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The sum over rows of d_t h_{t-1}^T: d [R, K], h [R, H], and the initial h `first` [B, H]."""
    B = len(first)
    if len(h) == B:
        return torch.mm(d.T, first)
    if reverse:
        return torch.addmm(torch.mm(d[:-B].T, h[B:]), d[-B:].T, first)
    return torch.addmm(torch.mm(d[:B].T, first), d[B:].T, h[:-B])
