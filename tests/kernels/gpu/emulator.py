"""Runs forward.cu and backward.cu on the CPU.

g++ compiles them after fibers.h, with emulate.h in place of ptx.cuh."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rnn.kernels.cells import Cell
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.plan import Plan

COMPILER = shutil.which("g++")
EMULATION = (Path(__file__).parent / "emulate.h").read_text()
_compilers = ThreadPoolExecutor(2)
_builds: dict[Path, Future[None]] = {}
# Every argument is an address or a whole number of 64 bits, so one signature serves both kernels.
ENTRY = """
extern "C" long emulate_arguments() { return 20 + 3 * STATES; }
extern "C" long emulate_shared() { return sizeof(Shared); }
extern "C" long emulate_exchange() { return 2 * (16 * PACKETS + 4 * SIGNS); }
extern "C" bool emulate_run(const i64* arguments, int tiles, int directions) {
  static const i64* a;
  a = arguments, emulate::tiles = tiles, emulate::directions = directions;
  for (emulate::direction = 0; emulate::direction < directions; ++emulate::direction)
    for (emulate::tile = 0; emulate::tile < tiles; ++emulate::tile)
      if (!emulate::run(BLOCKS, THREADS, sizeof(Shared), [] {
            []<std::size_t... k>(std::index_sequence<k...>) {
              ((void (*)(decltype((void)k, i64())...))recurrence)(a[k]...);
            }(std::make_index_sequence<20 + 3 * STATES>());
          })) return false;
  return true;
}
"""


def _compile(*arguments: str | Path) -> None:
    subprocess.run([COMPILER or "g++", "-O1", "-std=c++20", "-w", "-fPIC", *arguments], check=True)


def _build(path: Path, program: str) -> None:
    path.with_suffix(".cpp").write_text(program)
    _compile("-shared", "-o", path, path.with_suffix(".cpp"))


def _start(folder: Path, fault: tuple[str, str], *choices: Any) -> Path:
    """Has the kernel compiled in the background, if it is not. Returns where it will be."""
    header = folder / "fibers.h"
    if not header.exists():  # compiled once
        shutil.copy(Path(__file__).parent / "fibers.h", header)
        _compile("-x", "c++-header", header)
    program = cuda.program(EMULATION, *choices)
    assert fault[0] in program
    program = '#include "fibers.h"\n' + program.replace(*fault) + ENTRY
    path = folder / f"{hashlib.sha256(program.encode()).hexdigest()}.so"
    if path not in _builds:
        _builds[path] = _compilers.submit(_build, path, program)
    return path


def library(folder: Path, fault: tuple[str, str], *choices: Any) -> ctypes.CDLL:
    """The kernel as a shared library; `fault` replaces a piece of its text."""
    path = _start(folder, fault, *choices)
    _builds[path].result()
    return ctypes.CDLL(str(path))


def loader(folder: Path, fault: tuple[str, str] = ("", "")) -> Callable[..., Callable[..., None]]:
    """What takes the place of `cuda.load`."""

    def load(
        cell: Cell, plan: Plan, dtype: torch.dtype, adjoint: bool, *choices: Any
    ) -> Callable[[tuple[int, int, int], Sequence[int]], None]:
        # After a forward pass comes mostly a backward pass: both compile at once
        for other in (adjoint, True):
            _start(folder, fault, cell, plan, dtype, other, *choices[:-1])
        built = library(folder, fault, cell, plan, dtype, adjoint, *choices[:-1])
        run = built.emulate_run
        run.restype = ctypes.c_bool
        array = ctypes.c_longlong * built.emulate_arguments()

        def launch(grid: tuple[int, int, int], arguments: Sequence[int]) -> None:
            assert grid[0] == plan.blocks
            if not run(array(*arguments), grid[1], grid[2]):
                raise RuntimeError("deadlock")

        return launch

    return load
