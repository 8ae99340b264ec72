"""How a layer is computed, and what decides it: pure data.

The scope of a plan is that of the barrier between two time steps:
host     the CPU does, in array operations, step by step, or in C++
block    the kernel does; one block owns all of H for its sequences; W_hh stays in registers or
         shared memory
cluster  likewise, of each block of a cluster a slice of H; h goes into each other's shared memory
grid     likewise, of each block of a cooperative launch; h goes through the L2 cache
launch   the host does, with one launch a step; W_hh is read at every step
library  likewise, of a library's product and a kernel for the rest

planner.py chooses a plan from a layer's sizes, the fastest that fits by prediction.py."""

import json
from typing import Any, NamedTuple

from .cells import Cell
from .costs import DEFAULT, Costs, costs_of
from .types import Layout

Sizes = tuple[int, int, int, int]  # B, I, H, N
CLUSTERS = (2, 4, 8, 16)  # blocks

# Numbers of the pre-activations of a window of time on the CPU, what the caches hold; but not fewer
# rows than these, for which W is read once more.
WINDOW = 2**18
WINDOW_ROWS = 1024
STEP_PRODUCT = 2**17  # multiplications below which a single step in C++ stays on one thread

# The backends of a plan, and the scopes that each has.
BACKENDS = dict(
    numpy=("host",),
    cupy=("host",),
    native=("host",),
    triton=("block", "grid", "launch", "library"),
    cuda=("block", "cluster", "grid"),
)
# In which a launch is one step, and sees all that the one before wrote.
STEP_SCOPES = ("launch", "library")


class Gpu(NamedTuple):
    """Compute capability (90 for 9.0), number of multiprocessors, bytes of shared memory that one
    block can have, and whether CUDA C++ can be compiled and launched (by CuPy). Of the clusters of
    2, 4, 8 and 16 blocks, how many run at once, where the driver was asked; 0 where it refuses
    them. The device's name finds its costs."""

    capability: int
    multiprocessors: int
    shared_memory: int
    cuda: bool = False
    clusters: tuple[int, ...] = ()
    device: str = DEFAULT

    @property
    def costs(self) -> Costs:
        return costs_of(self.device)

    def active_clusters(self, blocks: int) -> int:
        """Clusters of so many blocks, each of which fills a multiprocessor, that run at once."""
        if not 90 <= self.capability < 110:
            return 0
        if blocks not in CLUSTERS:
            return self.multiprocessors // blocks
        k = CLUSTERS.index(blocks)
        if self.clusters:
            return self.clusters[k]
        return self.costs.clusters[k] * self.multiprocessors // self.costs.multiprocessors


class Plan(NamedTuple):
    """How one layer is computed. `backend` is "numpy" or "cupy" (the reference), "native" (C++ on
    the CPU), "triton" or "cuda": the rest is for the last two. A block's tile is `units` hidden
    units of every gate by `sequences`. `precision` is that of float32 products: "tf32", or
    "tf32x3", which is as good as float32. In Triton products are over `depth` units at a time, and
    `fused` has W_ih x_t + b computed in the step; in CUDA C++ so many `blocks` share the units of a
    sequence. The batch is done in slices of `slice_tiles` tiles, one after another; 0 is all at
    once. In CUDA C++ W_hh has so many `weight_registers` of a thread, and else shared memory; 0 is
    all of it in registers.

    For "native", which computes in the tensors' dtype, the `precision` "fixed" means that every
    product going forward is summed up in one order: a sequence has the same bits by itself and in a
    batch, in one call and in chunks, on any number of threads.

    Nothing is checked here: a layer or `recurrence` that is given the plan raises
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
    slice_tiles: int = 0
    weight_registers: int = 0


class Slice(NamedTuple):
    """Tiles of sequences that one launch takes through time: so many, from this one on."""

    first: int
    tiles: int


def slices(plan: Plan, B: int) -> list[Slice]:
    """Of a batch of B sequences, one after another."""
    tiles = -(-B // plan.sequences)
    size = plan.slice_tiles or max(1, tiles)
    return [Slice(first, min(size, tiles - first)) for first in range(0, tiles, size)]


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


def k_fragments(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """By 32 bytes, the share of a row of W_hh (W_hh^T in the adjoint) that a warp in CUDA C++
    multiplies with."""
    row = plan.blocks * plan.units * size * (cell.gates if adjoint else 1)
    return -(-row * plan.units // (1024 * plan.warps)) * 2


def stored_fragments(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """By tiles of 16 x 32 bytes, what of a warp's weights is not in its registers."""
    fragments = k_fragments(cell, plan, size, adjoint)
    rows = 1 if adjoint else cell.gates
    held = plan.weight_registers // (8 * rows) * 2 if plan.weight_registers else fragments
    return max(0, fragments - held) * rows


def shared_bytes(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """Shared memory of a block in CUDA C++, whose numbers have `size` bytes: struct Shared."""
    (rows, vectors) = (1, cell.gates) if adjoint else (cell.gates, 1)
    sequences = plan.sequences
    splits = plan.warps * 16 // plan.units
    inbox = sequences * 16
    if plan.scope != "grid":
        inbox = 2 * sequences * 4 * (8 * splits * k_fragments(cell, plan, size, adjoint) + 4)
    outbox = (plan.units if plan.scope == "cluster" else 16) * vectors * sequences * size
    sums = (
        (plan.warps if splits > 1 else 1) * rows * sequences * (128 if plan.scope == "grid" else 64)
    )
    weights = max(16, stored_fragments(cell, plan, size, adjoint) * 512 * plan.warps)
    return -(-(inbox + outbox + sums + 16 + weights) // 128) * 128


def exchange_bytes(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """Memory in which the blocks of a tile of a grid in CUDA C++ exchange h, in two buffers: its
    words, and the signs that their packets have no room for."""
    vectors = cell.gates if adjoint else 1
    groups = -(-k_fragments(cell, plan, size, adjoint) // 8)
    splits = plan.warps * 16 // plan.units
    numbers = vectors * plan.blocks * plan.units * plan.sequences
    return 2 * (numbers * size + splits * groups * plan.sequences * 8)


def power_of_2(n: int, at_least: int) -> int:
    return max(at_least, 1 << (n - 1).bit_length())
