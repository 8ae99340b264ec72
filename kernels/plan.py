"""Which kernel a layer runs in, chosen from its sizes alone: pure data and a pure function.

The scope of a plan is that of the barrier between two time steps.

| scope  | who loops over time                                      | W_hh                                   |
|--------|----------------------------------------------------------|----------------------------------------|
| host   | the host, over array operations (NumPy or torch)         | in memory                              |
| block  | the kernel; one block owns all of H for its sequences    | in registers or shared memory          |
| grid   | the kernel, launched cooperatively; h goes through L2    | likewise, a slice of rows per block    |
| launch | the host, one launch a step                              | read at every step                     |
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .cells import Cell


class Gpu(NamedTuple):
    """What a plan needs to know of a device: compute capability (90 for 9.0), multiprocessors, bytes of shared memory
    that one block can have."""

    capability: int
    multiprocessors: int
    shared_memory: int


class Plan(NamedTuple):
    """How one layer is computed.

    `backend` is "numpy", "torch" (array operations on tensors, in place), "triton", or "formula" (differentiable torch
    operations). The rest is for "triton": the tile of one program is `units` hidden units of every gate by `sequences`
    of the batch, its products are over `depth` units at a time; `fused` computes W_ih x_t + b in the step, from x_t;
    `precision` is that of float32 products: "tf32", or "tf32x3", which is as good as float32.
    """

    backend: str
    scope: str = "host"
    units: int = 0
    sequences: int = 0
    depth: int = 0
    warps: int = 0
    fused: bool = False
    precision: str = "ieee"


# Largest H, rounded up to a power of two, whose W_hh one block holds without spilling, forward and backward, with every
# option: by gates (more than 4 never), then by bytes per element (8 stands for tf32x3, which splits float32 in two).
BLOCK_UNITS = {1: {2: 256, 4: 128, 8: 128}, 2: {2: 128, 4: 64, 8: 64}, 3: {2: 128, 4: 64, 8: 32}, 4: {2: 64, 4: 32, 8: 16}}
# The widest input that is worth a product in the step: its W_ih must fit beside W_hh.
FUSED_INPUT = 32
# Bytes of all the gates' W_hh rows, per row, that a program of the grid holds without spilling.
GRID_ROW_BYTES = 768
# Multiplications a step up to which NumPy's BLAS stays on one thread; past it torch's is faster and the two thread
# pools would take turns.
NUMPY_PRODUCT = 2**18


class Rows(NamedTuple):
    """Where the steps of B sequences stand in memory, whose rows (one step of one sequence) are numbered in [0, R).

    On the host, `sizes` has the number of rows of each step, for the first so many sequences; they follow each other.
    On a GPU there are `steps` steps of B rows, of which a sequence b has the first lengths[b] (or all); or, packed, step
    t begins at row offsets[t] and has the rows of the sequences with lengths[b] > t, which come first.
    """

    steps: int
    sizes: Sequence[int] = ()
    lengths: Any = None
    offsets: Any = None


def power_of_2(n: int, at_least: int) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def make_plan(cell: Cell, sizes: tuple[int, int, int, int], dtype: str, gpu: Gpu | None, tf32: bool = False) -> Plan:
    """The plan for `sizes` (sequences B, inputs I, hidden units H, recurrences N) in `dtype` ("float32"...), on the CPU
    where there is no `gpu`; `tf32` allows that precision for float32."""
    B, I, H, N = sizes
    if gpu is None:
        return Plan("numpy" if B * cell.gates * H * H <= NUMPY_PRODUCT else "torch")
    if dtype not in ("float16", "bfloat16", "float32") or gpu.capability < 80:
        return Plan("formula")
    size = 2 if dtype != "float32" else 4 if tf32 else 8
    precision = "tf32" if size == 4 else "tf32x3" if size == 8 else "ieee"
    units, G = power_of_2(H, 16), cell.gates
    fused = I <= FUSED_INPUT and (G == 1 or size < 8)
    shared = G * units * (units + FUSED_INPUT * fused) * min(size, 4) + 64 * units
    if units <= BLOCK_UNITS.get(G, {}).get(size, 0) and shared <= gpu.shared_memory:
        return Plan("triton", "block", units, 8, units, min(8, units // 16), fused, precision)
    if G * -(-H // 64) * 64 * size <= GRID_ROW_BYTES and -(-H // 64) * -(-B // 8) * N <= gpu.multiprocessors:
        return Plan("triton", "grid", 64, 8, 64, 4, False, precision)
    tile = (64 if G == 1 else 32, 64) if size < 8 or G == 1 else (16, 16)
    return Plan("triton", "launch", tile[0], min(tile[1], power_of_2(B, 16)), 128 // size, 8, False, precision)
