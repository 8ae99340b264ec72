"""Runs recurrence.cu on the CPU: g++ compiles it after emulate.h, in place of ptx.cuh."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rnn.kernels import cuda
from rnn.kernels.cells import Cell
from rnn.kernels.plan import Plan

COMPILER = shutil.which("g++")
# Every argument is an address or a whole number of 64 bits, so one signature serves both kernels.
ENTRY = """
extern "C" long emulate_shared() { return sizeof(Shared); }
extern "C" bool emulate_run(const i64* arguments, int tiles, int directions) {
  static const i64* a;
  a = arguments, emulate::tiles = tiles, emulate::directions = directions;
  for (emulate::direction = 0; emulate::direction < directions; ++emulate::direction)
    for (emulate::tile = 0; emulate::tile < tiles; ++emulate::tile)
      if (!emulate::run(BLOCKS, THREADS, sizeof(Shared), [] {
            using Any = void (*)(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64,
                                 i64, i64);
            ((Any)recurrence)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
                              a[14], a[15], a[16], a[17], a[18], a[19]);
          })) return false;
  return true;
}
"""


def library(folder: Path, fault: tuple[str, str], *choices: Any) -> ctypes.CDLL:
    """The kernel as a shared library; `fault` replaces a piece of its text."""
    recurrence = cuda.text("recurrence.cu")
    assert fault[0] in recurrence
    program = cuda.source(*choices) + (Path(__file__).parent / "emulate.h").read_text()
    program += recurrence.replace(*fault) + ENTRY
    path = folder / f"{hashlib.sha256(program.encode()).hexdigest()}.so"
    if not path.exists():
        path.with_suffix(".cpp").write_text(program)
        subprocess.run([COMPILER or "g++", "-O1", "-std=c++20", "-w", "-shared", "-fPIC", "-o", path,
                        path.with_suffix(".cpp")], check=True)
    return ctypes.CDLL(str(path))


def loader(folder: Path, fault: tuple[str, str] = ("", "")) -> Callable[..., Callable[..., None]]:
    """What takes the place of `cuda.load`."""

    def load(cell: Cell, plan: Plan, *choices: Any) -> Callable[[tuple[int, int, int], Sequence[int]], None]:
        run = library(folder, fault, cell, plan, *choices[:-1]).emulate_run
        run.restype = ctypes.c_bool

        def launch(grid: tuple[int, int, int], arguments: Sequence[int]) -> None:
            assert grid[0] == plan.blocks
            if not run((ctypes.c_longlong * 20)(*arguments), grid[1], grid[2]):
                raise RuntimeError("deadlock")

        return launch

    return load
