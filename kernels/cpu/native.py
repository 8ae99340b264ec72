"""The recurrence in C++ for the CPU: recurrence.cpp and its headers, compiled for a cell and this machine, and kept on
disk. Threads are those of torch, where the compiler has OpenMP."""

import ctypes
import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell
from ..codegen import statements
from ..forks import forked
from ..plan import Plan, Rows
from . import States
from .build import compiler as compiler
from .build import load_library
from .workspace import working

_FLAGS = ["-O3", "-march=native", "-std=gnu++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]


SOURCES = Path(__file__).parent


@cache
def _fingerprint() -> str:
    """Of all that a cell's library includes."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def program(cell: Cell) -> str:
    """The text of a cell's library, which includes files of the folder SOURCES."""
    choices = dict(GATES=cell.gates, STATES=cell.states, SAVED=cell.saved, SPLIT=int(cell.split),
                   FORWARD=statements(cell, False), BACKWARD=statements(cell, True))
    defines = "".join(f"#define {name} {value}\n" for name, value in choices.items())
    return f'// {_fingerprint()}\n{defines}#include "single_step.cpp"\n'


@cache
def load(cell: Cell) -> Any:
    """A cell's library, compiled if it is not on disk. Raises RuntimeError if that cannot be."""
    functions = "needed", "forward", "backward", "step", "step_backward"
    library: Any = load_library(program(cell), _FLAGS, SOURCES, functions)
    library.needed.restype = library.step.restype = library.step_backward.restype = ctypes.c_int64
    library.forward.argtypes = library.backward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return library


def threads() -> int:
    return 1 if forked() else torch.get_num_threads()


def _call(name: str, cell: Cell, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, biases: Sequence[Tensor | None],
          first: States, given: Sequence[Tensor | None], dlast: Sequence[Tensor | None] | None, ends: States,
          grads: Sequence[Tensor | None]) -> None:
    """Calls it with struct Given, of which `given` is dy to saved, and memory for itself."""
    if w_hh.dtype != torch.float32 or not w_hh.is_cpu:
        raise RuntimeError(f"The plan \"native\" is for float32 on the CPU, got {w_hh.dtype} on {w_hh.device}")
    B, I, H, N, library = rows.sequences, x.shape[-1], w_hh.shape[1], len(rows.reverse), load(cell)
    R = rows.steps * B if rows.offsets is None else x.shape[0]
    none = [None] * cell.states
    pointed = [x, w_ih, w_hh, *biases, *given, *grads, rows.offsets, rows.resets, *(first or none), *(dlast or none),
               *(ends or none)]
    addresses = [0 if t is None else t.data_ptr() for t in pointed]
    if 0 in addresses:
        for t, address in zip(pointed, addresses):
            if t is not None and not address and t.numel():
                raise RuntimeError(f"Expected a tensor whose data is allocated, got one of shape {list(t.shape)}")
    windows = _windows(rows.sizes[0], N * cell.gates * H, cell.split)
    sizes = rows.steps, B, R, I, H, N, rows.reverses, threads(), *windows
    call = _pack(len(addresses) + len(sizes))(*addresses, *sizes)
    memory = working(w_hh, library.needed(call))  # held while it is in use
    getattr(library, name)(call, memory.data_ptr())


@cache
def _pack(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"{count}q").pack


@lru_cache(4096)
def _windows(sequences: int, width: int, split: bool) -> tuple[int, int]:
    """Steps of a window, forward and back. Going forward there are no gradients of W to be read once more for a window.
    With a split cell a row is twice as long in the adjoint: fewer rows then save more memory than they cost time."""
    rows = Rows(0, (), (sequences,))
    return rows.window(width, 8), rows.window(2 * width, 4) if split else rows.window(width)


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, first: States, y: Tensor, states: Tensor | None, saved: Tensor | None,
            ends: list[Tensor]) -> None:
    """As `cpu.forward`."""
    _call("forward", cell, rows, x, w_ih, w_hh, (b_ih, b_hh), first, (None, None, y, states, saved), None, ends,
          (None,) * 5)


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, first: States, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             dlast: Sequence[Tensor | None] | None, dfirst: States, grads: Sequence[Tensor | None]) -> None:
    """As `cpu.backward`."""
    _call("backward", cell, rows, x, w_ih, w_hh, (None, None), first, (dy, dstates, y, states, saved), dlast, dfirst,
          grads)
