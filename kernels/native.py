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
from .host import Windows, working
from .plan import STEP_PRODUCT, Plan, Rows
from .trace import statements

_FLAGS = ["-O3", "-march=native", "-std=gnu++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]


def program(cell: Cell) -> str:
    """The text of a cell's library."""
    choices = dict(GATES=cell.gates, STATES=cell.states, SAVED=cell.saved, SPLIT=int(cell.split),
                   FORWARD=statements(cell, False), BACKWARD=statements(cell, True))
    files = (Path(__file__).parent / name for name in ("vector.h", "tiles.h", "native.cpp"))
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
    code = program(cell)
    # What the compiler says of itself and of this machine: other machines may share the disk.
    machine = _run([*compiler(), "-march=native", "-dM", "-E", "-x", "c++", "-"], "")
    key = hashlib.sha256((machine + shlex.join(_FLAGS) + code).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fused_rnn"
    try:
        return ctypes.CDLL(str(kept(folder / f"{key}.so", partial(build, code))))
    except OSError:  # a disk that cannot be written to
        with tempfile.TemporaryDirectory() as temporary:
            build(code, Path(temporary) / "cell.so")
            return ctypes.CDLL(str(Path(temporary) / "cell.so"))


_forked: list[bool] = []  # in a child of fork, in which OpenMP would wait for ever for the parent's threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(_forked.append, True))


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _call(cell: Cell, rows: Rows, windows: Windows, adjoint: bool, tensors: Sequence[Tensor | None],
          shape: tuple[int, int], s0: Tensor, most: int) -> None:
    """Calls it with struct Call: the addresses of `tensors`, x [R, I] = `shape` to came and the gradients, and those of
    memory for itself."""
    if s0.dtype != torch.float32 or not s0.is_cpu:
        raise RuntimeError(f"The plan \"native\" is for float32 on the CPU, got {s0.dtype} on {s0.device}")
    N, (_, B, H), (R, I) = len(rows.reverse), s0.shape, shape
    hidden, inputs, gates = (-(-n // 64) * 64 for n in (H, I, cell.gates * H))  # as it pads them, or more
    panels = (working("input panels", s0, N * (cell.gates * H * inputs if adjoint else gates * I)),
              working("panels", s0, N * cell.gates * H * hidden),
              working("buffer", s0, (2 - adjoint) * N * cell.states * B * hidden))
    columns = [working(name, s0, N * most * width) if adjoint else None
               for name, width in (("inputs", inputs), ("states", hidden))]
    sizes = None if rows.offsets is None else torch.tensor(rows.sizes, device="cpu")
    pointed = *tensors[:19], *panels, *columns, *tensors[19:], sizes, rows.offsets, rows.resets
    addresses = [0 if t is None else t.data_ptr() for t in pointed]
    numbers = rows.steps, B, R, I, H, N, rows.reverses, _threads(), 0, windows.all[0][1], most
    getattr(load(cell), "backward" if adjoint else "forward")(struct.pack("43q", *addresses, *numbers))


def forward(cell: Cell, plan: Plan, rows: Rows, windows: Windows, x: Tensor, w_ih: Tensor, w_hh: Tensor,
            b_ih: Tensor | None, b_hh: Tensor | None, gates: Tensor, last: Tensor, y: Tensor, states: Tensor | None,
            saved: Tensor | None) -> None:
    """As `cpu.forward`."""
    tensors = x, w_ih, w_hh, b_ih, b_hh, *[None] * 6, last, y, states, saved, gates, *[None] * 8
    _call(cell, rows, windows, False, tensors, (len(x), w_ih.shape[1]), last, 0 if gates is y else gates.shape[1])


def backward(cell: Cell, plan: Plan, rows: Rows, windows: Windows, x: Tensor, w_ih: Tensor, w_hh: Tensor, s0: Tensor,
             y: Tensor, states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             ds: Tensor, dx: Tensor, dr: Tensor, came: Tensor, grads: Sequence[Tensor | None]) -> None:
    """As `cpu.backward`."""
    tensors = x, w_ih, w_hh, None, None, s0, y, states, saved, dy, dstates, ds, *[None] * 4, dx, dr, came, *grads
    _call(cell, rows, windows, True, tensors, (len(x), w_ih.shape[1]), s0, dr.shape[1])


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
