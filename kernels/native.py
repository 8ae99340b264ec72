"""The recurrence in C++ for the CPU: native.cpp and its headers, compiled for a cell and this machine by the machine's
own compiler ($CXX or c++). Libraries are kept on disk. Threads are those of torch, where the compiler has OpenMP."""

import ctypes
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .disk import kept
from .forks import forked
from .memory import working
from .plan import STEP_PRODUCT, Plan, Rows
from .trace import statements

_FLAGS = ["-O3", "-march=native", "-std=gnu++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]


def program(cell: Cell) -> str:
    """The text of a cell's library."""
    choices = dict(GATES=cell.gates, STATES=cell.states, SAVED=cell.saved, SPLIT=int(cell.split),
                   FORWARD=statements(cell, False), BACKWARD=statements(cell, True))
    files = (Path(__file__).parent / name for name in ("vector.h", "tiles.h", "parts.h", "native.cpp"))
    return "".join((*(f"#define {k} {v}\n" for k, v in choices.items()), *(file.read_text() for file in files)))


def _run(command: Sequence[str], text: str) -> str:
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr}")
    return done.stdout


def compiler() -> list[str]:
    """The command of the machine's compiler; none if it has none."""
    found = shlex.split(os.environ.get("CXX", "c++"))
    return found if found and shutil.which(found[0]) else []


def build(code: str, to: Path) -> None:
    try:
        _run([*compiler(), *_FLAGS, "-fopenmp", "-x", "c++", "-", "-o", str(to)], code)
    except RuntimeError:  # Apple's compiler has no OpenMP: one thread
        _run([*compiler(), *_FLAGS, "-x", "c++", "-", "-o", str(to)], code)


@cache
def load(cell: Cell) -> Any:
    """A cell's library, compiled if it is not on disk. Raises RuntimeError or OSError if that cannot be."""
    if not compiler():
        raise RuntimeError("The plan \"native\" needs a C++ compiler: c++, or what $CXX names")
    code = program(cell)
    # What the compiler says of itself and of this machine: other machines may share the disk.
    machine = _run([*compiler(), "-march=native", "-dM", "-E", "-x", "c++", "-"], "")
    key = hashlib.sha256((machine + shlex.join(_FLAGS) + code).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fused_rnn"
    try:
        library = ctypes.CDLL(str(kept(folder / f"{key}.so", partial(build, code))))
    except OSError:  # a disk that cannot be written to
        with tempfile.TemporaryDirectory() as temporary:
            build(code, Path(temporary) / "cell.so")
            library = ctypes.CDLL(str(Path(temporary) / "cell.so"))
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
