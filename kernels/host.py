"""What is around the kernels of the CPU, and of CuPy's arrays: the tensors that they write, and windows. The sequence
is cut into windows of time, few enough steps that their pre-activations stay in the caches, and the products with the
input and of the gradients are done window by window. Tensors are contiguous and of one device; step t has the sizes[t]
rows that follow those of step t - 1."""

import math
import threading
from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .plan import WINDOW, WINDOW_ROWS, Plan, Rows

_kept = threading.local()
Window = tuple[int, int]  # its first step and the one after its last, in the order of the recurrence


class Windows:
    """All windows of a pass, the rows of which have `width` pre-activations, and where these rows are in memory."""

    def __init__(self, rows: Rows, width: int) -> None:
        count = max(1, max(WINDOW // max(1, width), WINDOW_ROWS) // max(1, rows.sizes[0]))
        self.all: list[Window] = [(s, min(s + count, rows.steps)) for s in range(0, rows.steps, count)]
        self.steps, self.reverse = rows.steps, rows.reverse
        self.starts = [*accumulate(rows.sizes, initial=0)]

    def times(self, window: Window, n: int) -> Window:
        """Its steps in recurrence n, in the order of time."""
        first, last = window
        return (self.steps - last, self.steps - first) if self.reverse[n] else window

    def rows(self, window: Window, n: int) -> slice:
        first, last = self.times(window, n)
        return slice(self.starts[first], self.starts[last])

    def most(self) -> int:
        """Rows of a window."""
        spans = (self.rows(window, n) for window in self.all for n in range(len(self.reverse)))
        return max(span.stop - span.start for span in spans)


def working(name: str, like: Tensor, *shape: int) -> Tensor:
    """Memory of that shape, with whatever is in it, for one call: this thread's next call gets the same. Fresh memory
    costs as much as the arithmetic of some steps."""
    size, key = math.prod(shape), f"{name} {like.dtype} {like.device}"
    memory = vars(_kept).get(key)
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):  # or it would be of no use outside of it
            memory = vars(_kept)[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return memory[:size].view(shape)


def _kernel(plan: Plan) -> Any:
    return import_module(".native" if plan.backend == "native" else ".cpu", __package__)


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, s0: Tensor, keep: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """x [R, I], w_ih [N*G*H, I], w_hh [N*G*H, H], b_ih and b_hh [N*G*H], s0 [N*S, B, H]. Returns y [R, N*H], with
    keep >= 1 the other states of every step [S-1, R, N*H], the last states [N*S, B, H], and with keep >= 2 the
    activations for the adjoint [A, R, N*H]; None for what is not."""
    N, S, G, A, R, H = len(rows.reverse), cell.states, cell.gates, cell.saved, len(x), s0.shape[2]
    y, last, windows = x.new_empty((R, N * H)), s0.clone(), Windows(rows, N * G * H)
    states = x.new_empty((S - 1, R, N * H)) if S > 1 and keep else None
    saved = x.new_empty((A, R, N * H)) if A and keep > 1 else None
    # The pre-activations of one gate have the place of y; else that of a window.
    gates = y if G == 1 and not cell.split else working("gates", x, N, windows.most(), G * H)
    _kernel(plan).forward(cell, plan, rows, windows, x, w_ih, w_hh, b_ih, b_hh, gates, last, y, states, saved)
    return y, states, last, saved


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             dlast: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
    """The adjoint of `forward`: the gradients of x, w_ih, w_hh, b_ih, b_hh and s0, those that are needed, from those of
    y, states and last, zero where None."""
    N, G, H = len(rows.reverse), cell.gates, s0.shape[2]
    windows = Windows(rows, N * G * H)
    most = windows.most()
    dr, came = working("dr", y, N, most, G * H), working("came", y, N, most, H)
    dx = working("dx", y, *dr.shape) if cell.split else dr
    ds = torch.zeros_like(s0) if dlast is None else dlast.clone()
    # One gradient serves both biases where it is the same.
    wanted = *needs[:3], needs[3] and cell.split, needs[4] or (needs[3] and not cell.split)
    shapes = x.shape, w_ih.shape, w_hh.shape, w_hh.shape[:1], w_hh.shape[:1]
    grads: list[Tensor | None] = [None if not want else y.new_empty(shape) if k == 0 and N == 1 else y.new_zeros(shape)
                                  for k, (shape, want) in enumerate(zip(shapes, wanted))]
    _kernel(plan).backward(cell, plan, rows, windows, x, w_ih, w_hh, s0, y, states, saved, dy, dstates, ds, dx, dr,
                           came, grads)
    if not cell.split and needs[3]:
        grads[3:] = [grads[4], grads[4].clone() if needs[4] and grads[4] is not None else None]
    return [*grads, ds if needs[5] else None]


def parts(t: Tensor | None, N: int) -> Sequence[Tensor | None]:
    """By recurrence."""
    return (t,) * N if t is None or N == 1 else t.chunk(N)
