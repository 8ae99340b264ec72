"""The recurrence in C++ for the CPU: native.cpp and its headers, compiled for a cell and this machine, and kept on
disk. Threads are those of torch, where the compiler has OpenMP."""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .forks import forked
from .memory import working
from .native_build import compiler as compiler
from .native_build import load_library
from .plan import STEP_PRODUCT, Plan, Rows
from .trace import statements

_FLAGS = ["-O3", "-march=native", "-std=gnu++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]


def program(cell: Cell) -> str:
    """The text of a cell's library."""
    choices = dict(GATES=cell.gates, STATES=cell.states, SAVED=cell.saved, SPLIT=int(cell.split),
                   FORWARD=statements(cell, False), BACKWARD=statements(cell, True))
    files = (Path(__file__).parent / name for name in ("vector.h", "tiles.h", "parts.h", "native.cpp"))
    return "".join((*(f"#define {k} {v}\n" for k, v in choices.items()), *(file.read_text() for file in files)))


@cache
def load(cell: Cell) -> Any:
    """A cell's library, compiled if it is not on disk. Raises RuntimeError if that cannot be."""
    library: Any = load_library(program(cell), _FLAGS, ("needed", "forward", "backward", "step"))
    library.needed.restype = ctypes.c_int64
    library.forward.argtypes = library.backward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return library


def _threads() -> int:
    return 1 if forked() else torch.get_num_threads()


def _call(name: str, cell: Cell, rows: Rows, x: Tensor, s0: Tensor, *given: Tensor | None) -> None:
    """Calls it with struct Given, of which `given` is w_ih to `last` and the gradients, and memory for itself."""
    if s0.dtype != torch.float32 or not s0.is_cpu:
        raise RuntimeError(f"The plan \"native\" is for float32 on the CPU, got {s0.dtype} on {s0.device}")
    (R, I), (_, B, H), N, library = x.shape, s0.shape, len(rows.reverse), load(cell)
    pointed = x, *given[:12], *(given[12:] or [None] * 5), rows.offsets, rows.resets
    addresses = [0 if t is None else t.data_ptr() for t in pointed]
    # Going forward there are no gradients of W to be read once more for a window. With a split cell a row is twice as
    # long in the adjoint: fewer rows then save more memory than they cost time.
    width = N * cell.gates * H
    windows = rows.window(width, 8), rows.window(2 * width, 4) if cell.split else rows.window(width)
    call = struct.pack("30q", *addresses, rows.steps, B, R, I, H, N, rows.reverses, _threads(), *windows)
    memory = working(s0, library.needed(call))  # held while it is in use
    getattr(library, name)(call, memory.data_ptr())


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, s0: Tensor, *out: Tensor | None) -> None:
    """As `cpu.forward`."""
    _call("forward", cell, rows, x, s0, w_ih, w_hh, b_ih, b_hh, s0, None, None, None, *out)


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             dlast: Tensor | None, ds: Tensor, grads: Sequence[Tensor | None]) -> None:
    """As `cpu.backward`."""
    _call("backward", cell, rows, x, s0, w_ih, w_hh, None, None, s0, dy, dstates, dlast, y, states, saved, ds, *grads)


def step(cell: Cell, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
         states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One step of one recurrence, without gradients: x [1, B, I] and states [1, B, H] to h and the states after it. All
    are contiguous and in float32."""
    h = states[0]
    (_, B, H), I, y, found = h.shape, x.shape[2], torch.empty_like(h), [torch.empty_like(h) for _ in states]
    threads = _threads() if B * cell.gates * H * (H + I) > STEP_PRODUCT else 1
    b = (0, 0) if b_ih is None or b_hh is None else (b_ih.data_ptr(), b_hh.data_ptr())
    load(cell).step(struct.pack(
        f"{10 + 2 * cell.states}q", x.data_ptr(), w_ih.data_ptr(), w_hh.data_ptr(), *b, *[s.data_ptr() for s in states],
        y.data_ptr(), *[s.data_ptr() for s in found], B, I, H, threads))
    return y, found
