"""What is around the kernels of the CPU, and of CuPy's arrays: the tensors that they write. Tensors are contiguous and
of one device; step t has the sizes[t] rows that follow those of step t - 1. Kernels go through windows of time, whose
pre-activations stay in the caches, and do the large products window by window."""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor

from ..cells import Cell
from ..plan import Plan, Rows
from .workspace import pooled_empty

Part = TypeVar("Part", Tensor, Tensor | None)
States = list[Tensor] | None  # S of [N, B, H]


@cache
def _kernel(backend: str) -> Any:
    return import_module(".native" if backend == "native" else ".arrays", __package__)


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, first: States, keep: int) -> tuple[Tensor, Tensor | None, States, Tensor | None]:
    """x [R, I] (in C++ [T, B, I] will do, and then y is alike), w_ih [N*G*H, I], w_hh [N*G*H, H], b_ih and b_hh
    [N*G*H], S states [N, B, H], zeros if None. Returns y [R, N*H], with keep >= 1 the other states of every step
    [S-1, R, N*H], the last states, and with keep >= 2 the activations for the adjoint [A, R, N*H], in an order of the
    kernel's own; None for what is not."""
    N, S, A, H = len(rows.reverse), cell.states, cell.saved, w_hh.shape[1]
    *leading, _ = x.shape
    y = x.new_empty((*leading, N * H))  # the caller's: torch's own memory, which can be resized
    last = [x.new_empty((N, rows.sequences, H)) for _ in range(S)]
    states = saved = None
    if keep:
        R = math.prod(leading)
        states = x.new_empty((S - 1, R, N * H)) if S > 1 else None
        saved = pooled_empty(x, A, R, N * H) if A and keep > 1 else None
    _kernel(plan.backend).forward(cell, plan, rows, x, w_ih, w_hh, b_ih, b_hh, first, y, states, saved, last)
    return y, states, last, saved


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, first: States, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None, dlast: States,
             needs: Sequence[bool]) -> tuple[list[Tensor | None], States]:
    """The adjoint of `forward`: the gradients of x, w_ih, w_hh, b_ih and b_hh, and those of the first states, those
    that are needed, from those of y, states and last, zero where None."""
    ds: States = None
    if needs[5]:
        ds = [x.new_empty((len(rows.reverse), rows.sequences, w_hh.shape[1])) for _ in range(cell.states)]
    # One gradient serves both biases where it is the same.
    wanted = *needs[:3], needs[3] and cell.split, needs[4] or (needs[3] and not cell.split)
    shapes = x.shape, w_ih.shape, w_hh.shape, w_hh.shape[:1], w_hh.shape[:1]
    grads: list[Tensor | None] = [x.new_empty(shape) if want else None for shape, want in zip(shapes, wanted)]
    if len(rows.reverse) > 1 and grads[0] is not None:
        grads[0].zero_()
    _kernel(plan.backend).backward(cell, plan, rows, x, w_ih, w_hh, first, y, states, saved, dy, dstates, dlast, ds,
                                   grads)
    if not cell.split and needs[3]:
        grads[3:] = [grads[4], grads[4].clone() if needs[4] and grads[4] is not None else None]
    return grads, ds


def parts(t: Part, N: int) -> Sequence[Part]:
    """By recurrence."""
    return (t,) * N if t is None or N == 1 else t.chunk(N)
