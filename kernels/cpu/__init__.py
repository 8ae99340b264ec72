"""Allocates the results of the C++ and of the reference (NumPy or CuPy), which write them. Tensors
are contiguous and of one device; step t has the sizes[t] rows that follow those of step t - 1."""

import math
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell
from ..plan import Plan
from ..types import Gradients, Layout, OutputGrads, Outputs, Save, States, Weights

CONTIGUOUS = torch.contiguous_format


@cache
def _kernel(backend: str) -> Any:
    return import_module(".native" if backend == "native" else "..reference", __package__)


def forward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    save: int,
    kept: Any = None,
) -> Outputs:
    """Of x [R, I], or without w_ih of pre-activations [R, N*G*H] (C++ takes [T, B, I] too; y has
    the same leading dimensions), and of s0, S states [N, B, H], zeros if None. C++ also writes to
    `kept`, a native.Kept."""
    outputs = new_outputs(cell, layout, x, weights, save)
    further = () if kept is None else (kept,)
    _kernel(plan.backend).forward(cell, plan, layout, x, weights, s0, outputs, *further)
    return outputs


def new_outputs(cell: Cell, layout: Layout, x: Tensor, weights: Weights, save: int) -> Outputs:
    """Memory for what `forward` gives."""
    N = len(layout.reverse)
    S = cell.states
    H = weights.w_hh.shape[1]
    leading = x.shape[:-1]
    # The caller's: torch's own memory, which can be resized
    y = x.new_empty(*leading, N * H)
    last = [x.new_empty(N, layout.sequences, H)]
    while len(last) < S:
        last.append(torch.empty_like(last[0]))
    states = None
    saved = None
    if save:
        R = math.prod(leading)
        if S > 1:
            states = x.new_empty(S - 1, R, N * H)
        if cell.saved and save == Save.ACTIVATIONS:
            saved = x.new_empty(cell.saved, R, N * H)
    return Outputs(y, states, last, saved)


def backward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    grads: OutputGrads,
    needs: Gradients[bool],
) -> Gradients[Tensor | None]:
    """The adjoint of `forward`."""
    w_ih = weights.w_ih
    w_hh = weights.w_hh
    ds: States = None
    if needs.s0:
        ds = [
            x.new_empty(len(layout.reverse), layout.sequences, w_hh.shape[1])
            for _ in range(cell.states)
        ]
    # One gradient serves both biases where it is the same.
    b_ih = needs.b_ih and cell.split
    b_hh = needs.b_hh or (needs.b_ih and not cell.split)
    rows = w_hh.shape[0]
    gradients: Gradients[Tensor | None] = Gradients(
        torch.empty_like(x, memory_format=CONTIGUOUS) if needs.x else None,
        torch.empty_like(w_ih, memory_format=CONTIGUOUS) if needs.w_ih else None,
        torch.empty_like(w_hh, memory_format=CONTIGUOUS) if needs.w_hh else None,
        x.new_empty(rows) if b_ih else None,
        x.new_empty(rows) if b_hh else None,
        ds,
    )
    if len(layout.reverse) > 1 and gradients.x is not None and w_ih is not None:
        gradients.x.zero_()
    _kernel(plan.backend).backward(cell, plan, layout, x, weights, s0, outputs, grads, gradients)
    if cell.split or not needs.b_ih or gradients.b_hh is None:
        return gradients
    b_hh_grad = gradients.b_hh.clone() if needs.b_hh else None
    return Gradients(gradients.x, gradients.w_ih, gradients.w_hh, gradients.b_hh, b_hh_grad, ds)
