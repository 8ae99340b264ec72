"""Which kernel a layer runs in, chosen from its sizes alone: pure data and a pure function.

The scope of a plan is that of the barrier between two time steps:
host    the CPU does, in array operations, step by step, or in C++ block   the kernel does; one
block owns all of H for its sequences; W_hh stays in registers or shared memory cluster likewise, of
each block of a cluster a slice of H; h goes into each other's shared memory grid    likewise, of
each block of a cooperative launch; h goes through the L2 cache launch  the host does, with one
launch a step; W_hh is read at every step"""

import json
from itertools import product
from typing import Any, NamedTuple

from .cells import Cell
from .types import Layout

# Largest H, rounded up to a power of 2, whose W_hh one block holds with nothing spilled in the time
# loop, whatever the options: by gates (more than 4: none), then by bytes per element (8 is tf32x3,
# which splits float32 in two). (Four gates of 64 < H < 128, not a multiple of 16, spill a few
# words, which costs less than a launch for each step.)
BLOCK_UNITS = {
    1: {2: 256, 4: 128, 8: 128},
    2: {2: 128, 4: 64, 8: 64},
    3: {2: 128, 4: 64, 8: 32},
    4: {2: 128, 4: 64, 8: 32},
}
FUSED_INPUT = 32  # the largest I whose W_ih fits beside that W_hh, where it does
# Of a row of W_hh, all gates: what a program of the grid holds without spilling
GRID_ROW_BYTES = 768
# Microseconds of a step but for its arithmetic, predicted: what blocks tell each other takes that
# long.
STEP_MICROSECONDS = dict(block=0.15, cluster=0.45, grid=0.9, launch=3.0)
FLOPS_PER_MICROSECOND = dict(ieee=4e8, tf32=2e8, tf32x3=6e7)  # of a large product, likewise
# Numbers of the pre-activations of a window of time on the CPU, what the caches hold; but not fewer
# rows than these, for which W is read once more.
WINDOW = 2**18
WINDOW_ROWS = 1024
STEP_PRODUCT = 2**18  # multiplications up to which a single step in C++ stays on one thread


# The backends of a plan, and the scopes that each has.
BACKENDS = dict(
    numpy=("host",),
    cupy=("host",),
    native=("host",),
    triton=("block", "grid", "launch"),
    cuda=("block", "cluster", "grid"),
)


class Gpu(NamedTuple):
    """Compute capability (90 for 9.0), number of multiprocessors, bytes of shared memory that one
    block can have, and whether CUDA C++ can be compiled and launched (by CuPy)."""

    capability: int
    multiprocessors: int
    shared_memory: int
    cuda: bool = False


class Plan(NamedTuple):
    """How one layer is computed. `backend` is "numpy" or "cupy" (the reference), "native" (C++ on
    the CPU), "triton" or "cuda": the rest is for the last two. A block's tile is `units` hidden
    units of every gate by `sequences`. `precision` is that of float32 products: "tf32", or
    "tf32x3", which is as good as float32. In Triton products are over `depth` units at a time, and
    `fused` has W_ih x_t + b computed in the step; in CUDA C++ so many `blocks` share the units of a
    sequence. Nothing is checked here: a layer or `recurrence` that is given the plan raises
    TypeError for what is no Plan, ValueError for a backend, scope or tile that there is not, and
    RuntimeError for tensors that the backend cannot take."""

    backend: str
    scope: str = "host"
    units: int = 0
    sequences: int = 0
    depth: int = 0
    warps: int = 0
    fused: bool = False
    precision: str = "ieee"
    blocks: int = 1


def plan_text(plan: Plan) -> str:
    """By the names of its fields, for what keeps text alone. (Dynamo compiles this.)"""
    return " ".join([f"{name}={value}" for name, value in zip(Plan._fields, plan)])


def plan_of(text: str) -> Plan:
    """The inverse of `plan_text`. Programs that were exported before have a list in JSON."""
    if text.startswith("["):
        return Plan(*json.loads(text))
    fields: dict[str, Any] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        kind = Plan.__annotations__[name]
        fields[name] = value == "True" if kind is bool else kind(value)
    return Plan(**fields)


def window(layout: Layout, width: int, share: int = 1) -> int:
    """Steps of a window of time on the CPU, where a row has `width` pre-activations: enough for
    WINDOW_ROWS / share rows, at least."""
    rows = max(WINDOW // max(1, width), WINDOW_ROWS // share)
    return max(1, rows // max(1, layout.sizes[0]))


def _pieces(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """By 32 bytes, the share of a row of W_hh (W_hh^T in the adjoint) that a warp in CUDA C++
    multiplies with."""
    row = plan.blocks * plan.units * size * (cell.gates if adjoint else 1)
    return -(-row * plan.units // (1024 * plan.warps)) * 2


def shared_bytes(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """Shared memory of a block in CUDA C++, whose numbers have `size` bytes: struct Shared."""
    (rows, vectors) = (1, cell.gates) if adjoint else (cell.gates, 1)
    sequences = plan.sequences
    splits = plan.warps * 16 // plan.units
    inbox = sequences * 16
    if plan.scope != "grid":
        inbox = 2 * sequences * 4 * (8 * splits * _pieces(cell, plan, size, adjoint) + 4)
    outbox = (plan.units if plan.scope == "cluster" else 16) * vectors * sequences * size
    sums = (
        (plan.warps if splits > 1 else 1) * rows * sequences * (128 if plan.scope == "grid" else 64)
    )
    return -(-(inbox + outbox + sums + 16) // 128) * 128


def _spills_not(cell: Cell, plan: Plan, size: int, gpu: Gpu) -> bool:
    """Whether a thread in CUDA C++ has registers for its weights, sums and pairs; found by
    compiling."""
    words = max(
        4 * cell.gates * _pieces(cell, plan, size, False), 4 * _pieces(cell, plan, size, True)
    )
    one_tile = plan.sequences == 8
    gated = cell.gates > 1
    wide = size == 4
    if plan.warps > 8:
        most = 32 if wide and gated else 48 if gpu.capability >= 100 else 64
        return words <= (most if one_tile else 0 if wide and gated else 24)
    if plan.scope == "grid" and wide:
        return one_tile and words <= (72 if gated else 128)
    too_many = wide and gated and plan.sequences > (8 if gpu.capability >= 100 else 16)
    return words <= (96 if gated and (wide or not one_tile) else 128) and not too_many


def _predicted(
    cell: Cell, plan: Plan, size: int, sizes: tuple[int, int, int, int], gpu: Gpu
) -> float:
    """Microseconds of a step in CUDA C++: a model whose constants nobody has measured yet."""
    (B, _, _, N) = sizes
    clock = 1.9e3
    tiles = plan.sequences // 8
    products = plan.warps * cell.gates * _pieces(cell, plan, size, False) * tiles
    products *= 3 if plan.precision == "tf32x3" else 1
    rest = plan.units * plan.sequences * cell.gates * 20 / 32  # instructions around them
    waves = -(-plan.blocks * -(-B // plan.sequences) * N // gpu.multiprocessors)
    return waves * (
        STEP_MICROSECONDS[plan.scope] + (8 * products + rest) / (min(4, plan.warps) * clock)
    )


def cuda_plans(
    cell: Cell, sizes: tuple[int, int, int, int], size: int, precision: str, gpu: Gpu
) -> list[Plan]:
    """The plans for CUDA C++ that fit, the fastest by prediction first."""
    (B, _, H, N) = sizes
    plans = []
    clusters = (2, 4, 8, 16) if 90 <= gpu.capability < 110 else ()
    scopes = [("block", 1), *(("cluster", blocks) for blocks in clusters), ("grid", -(-H // 16))]
    for (scope, blocks), splits, sequences in product(scopes, (1, 2, 4, 8), (8, 16, 32)):
        units = -(-H // (16 * blocks)) * 16
        plan = Plan(
            "cuda", scope, units, sequences, 0, units // 16 * splits, False, precision, blocks
        )
        tiles = -(-B // sequences)
        shared = max(shared_bytes(cell, plan, size, adjoint) for adjoint in (False, True))
        waits = scope == "grid" and blocks * tiles * N > gpu.multiprocessors
        if (
            plan.warps <= 16
            and sequences <= 8 * splits
            and _spills_not(cell, plan, size, gpu)
            and not waits
            and shared <= gpu.shared_memory
            and tiles < 2**16
        ):
            plans.append(plan)
    return sorted(plans, key=lambda plan: _predicted(cell, plan, size, sizes, gpu))


def power_of_2(n: int, at_least: int) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def make_plan(
    cell: Cell,
    sizes: tuple[int, int, int, int],
    dtype: str,
    gpu: Gpu | None,
    tf32: bool = False,
    native: bool = False,
) -> Plan:
    """The plan for `sizes` (B, I, H, N) in `dtype` ("float32"...), on the CPU where there is no
    `gpu` (of capability 80 or more); `tf32` allows that precision for float32; `native` says that
    C++ can be compiled."""
    B, I, H, N = sizes
    G = cell.gates
    units = power_of_2(H, 16)
    if gpu is None:
        return Plan("native" if native and dtype in ("float32", "float64") else "numpy")
    size = 2 if dtype != "float32" else 4 if tf32 else 8
    precision = {2: "ieee", 4: "tf32", 8: "tf32x3"}[size]
    if gpu.cuda:
        best = next(iter(cuda_plans(cell, sizes, min(size, 4), precision, gpu)), None)
        streamed = (
            STEP_MICROSECONDS["launch"] + 2 * B * G * H * H * N / FLOPS_PER_MICROSECOND[precision]
        )
        if best and _predicted(cell, best, min(size, 4), sizes, gpu) < streamed:
            return best
    shared, shared_fused = (
        G * units * K * min(size, 4) + 64 * units for K in (units, units + FUSED_INPUT)
    )
    beside = size == 2 or G == 1 or (size == 4 and G * units < 256)
    fused = I <= FUSED_INPUT and beside and shared_fused <= gpu.shared_memory
    if (
        units <= BLOCK_UNITS.get(G, {}).get(size, 0)
        and shared <= gpu.shared_memory
        and B <= 8 * (2**16 - 1)
    ):
        return Plan(
            "triton",
            "block",
            units,
            8,
            units,
            min(8, units // (16 if G == 1 else 8)),
            fused,
            precision,
        )
    blocks = -(-H // 64)
    if G * blocks * 64 * size <= GRID_ROW_BYTES and blocks * -(-B // 8) * N <= gpu.multiprocessors:
        return Plan("triton", "grid", 64, 8, 64, 4, False, precision)
    tile = (64 if G == 1 else 32, 64) if size < 8 or G == 1 else (16, 16)
    return Plan(
        "triton",
        "launch",
        tile[0],
        min(tile[1], power_of_2(B, 16)),
        128 // size,
        8,
        False,
        precision,
    )
