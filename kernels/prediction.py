"""How long a step of a plan takes on a GPU, by a model of what is in it.

Pure arithmetic on the sizes and on the device's `Costs`. It ranks plans; it is not a measurement.
A step is the barrier, the exchange of h (in the adjoint of all gates' gradients), the products and
the cell's algebra. What does not run at once takes that long several times: in waves that the
hardware schedules, or in slices of the batch that are launched one after another."""

from typing import NamedTuple

from .cells import Cell
from .costs import Costs
from .plan import Gpu, Plan, Sizes, k_fragments, stored_fragments


class Prediction(NamedTuple):
    """Microseconds of a step forward and of one of the adjoint, of the whole batch, which takes so
    many waves or slices."""

    forward: float
    adjoint: float
    waves: int
    slices: int

    @property
    def both(self) -> float:
        return self.forward + self.adjoint


def at_once(plan: Plan, gpu: Gpu, H: int, N: int) -> int:
    """Tiles of sequences that run at the same time, a block to a multiprocessor; 0 where the GPU
    cannot run one."""
    if plan.scope == "cluster":
        return gpu.active_clusters(plan.blocks) // N
    return gpu.multiprocessors // (blocks_of_tile(plan, H) * N)


def blocks_of_tile(plan: Plan, H: int) -> int:
    return plan.blocks if plan.backend == "cuda" else -(-H // plan.units)


def predict(cell: Cell, plan: Plan, size: int, sizes: Sizes, gpu: Gpu) -> Prediction:
    """For numbers of `size` bytes and the layer's sizes (B, I, H, N)."""
    B, _, H, N = sizes
    tiles = -(-B // plan.sequences)
    parts = -(-tiles // (plan.slice_tiles or max(1, tiles)))
    blocks = blocks_of_tile(plan, H) * tiles * N
    if plan.scope == "library":
        waves = 1
    elif plan.scope in ("block", "cluster"):
        groups = gpu.active_clusters(plan.blocks) if plan.scope == "cluster" else 0
        waves = -(-tiles * N // (groups or gpu.multiprocessors))
    else:
        waves = -(-blocks // (parts * gpu.multiprocessors))
    step = {"library": _library_step, "launch": _launch_step}.get(plan.scope, _resident_step)
    forward, adjoint = [
        parts * max(1, waves) * step(cell, plan, size, sizes, gpu, backward)
        for backward in (False, True)
    ]
    return Prediction(forward, adjoint, max(1, waves), parts)


def _resident_step(
    cell: Cell, plan: Plan, size: int, sizes: Sizes, gpu: Gpu, adjoint: bool
) -> float:
    B, _, H, N = sizes
    costs = gpu.costs
    G = cell.gates
    triton = plan.backend == "triton"
    # every block gets what all blocks of its tile have; in a grid of sequences that there are
    sequences = min(plan.sequences, B) if plan.scope == "grid" else plan.sequences
    received = blocks_of_tile(plan, H) * plan.units * sequences * size
    received *= G if adjoint else 1
    cycles = costs.overhead
    if plan.scope == "cluster":
        cycles += costs.cluster_latency + received / costs.cluster_bytes
    elif plan.scope == "grid":
        # once, as the warps of a block share the sum
        read = received if triton else received + _signs(cell, plan, size, adjoint)
        tiles = plan.slice_tiles or -(-B // plan.sequences)
        running = max(1, min(gpu.multiprocessors, blocks_of_tile(plan, H) * tiles * N))
        rate = min(costs.l2_bytes, costs.l2_bytes_per_us / running / costs.cycles_per_us)
        cycles += costs.grid_latency + read / rate
    else:
        cycles += costs.triton_barriers if triton else costs.block_barrier
    instructions = costs.adjoint_algebra if adjoint else costs.algebra
    quarters = min(4, plan.warps)
    cycles += plan.units * plan.sequences * G * instructions / 32 / quarters
    return (cycles + _products(cell, plan, size, H, costs, adjoint)) / costs.cycles_per_us


def _signs(cell: Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """Bytes that a block of a grid in CUDA C++ reads beside h: of 8 k-steps of a warp and 8
    sequences what two or four warps send, by sectors of 32 bytes."""
    groups = -(-k_fragments(cell, plan, size, adjoint) // 8)
    return plan.warps * groups * (plan.sequences // 8) * (128 // size)


def _products(cell: Cell, plan: Plan, size: int, H: int, costs: Costs, adjoint: bool) -> float:
    """Cycles: what the matrix units take, or one warp's sums, or reading shared memory."""
    rows = 1 if adjoint else cell.gates
    columns = plan.sequences // 8
    if plan.backend == "cuda":
        depth = k_fragments(cell, plan, size, adjoint)
    else:
        row = -(-H // plan.depth) * plan.depth * size * (cell.gates if adjoint else 1)
        depth = -(-row * plan.units // (512 * plan.warps))
    products = rows * columns * depth
    # tiles of 512 bytes, and h, which every warp reads
    read = plan.warps * plan.sequences * depth * 32
    if plan.backend == "cuda":
        read += plan.warps * columns * 512 * stored_fragments(cell, plan, size, adjoint)
    tiles = rows * columns
    # sums of a warp that do not wait for each other
    sums = tiles * {1: 4, 2: 2, 3: 2}.get(tiles, 1)
    exact = plan.precision == "tf32x3"
    each = costs.product_in_parts if exact else costs.product
    latency = (3 if exact else 1) * costs.product_latency
    return max(
        products * each * plan.warps / min(4, plan.warps),
        products * latency / sums,
        read / costs.shared_bytes,
    )


def _multiplied(cell: Cell, plan: Plan, sizes: Sizes, costs: Costs) -> float:
    """Microseconds of a step's products at the rate of large ones, for 64 sequences at least."""
    B, _, H, N = sizes
    rates = {"ieee": costs.ieee_flops, "tf32": costs.tf32_flops, "tf32x3": costs.fp32_flops}
    return 2 * max(B, 64) * cell.gates * H * H * N / rates[plan.precision]


def _launch_step(cell: Cell, plan: Plan, size: int, sizes: Sizes, gpu: Gpu, adjoint: bool) -> float:
    """A kernel of Triton's, which waits for each part of W_hh that it reads."""
    costs = gpu.costs
    passes = -(-sizes[2] // plan.depth)
    # forward a pass reads h once, in the adjoint every gate's gradient
    reads = cell.gates if adjoint else 1
    waits = passes * (reads * costs.launch_pass_us + cell.gates * costs.launch_gate_us)
    return costs.graph_node_us + max(waits, _multiplied(cell, plan, sizes, costs))


def _library_step(
    cell: Cell, plan: Plan, size: int, sizes: Sizes, gpu: Gpu, adjoint: bool
) -> float:
    """A product of the library's and a kernel for the algebra, nodes of a graph."""
    B, _, H, N = sizes
    costs = gpu.costs
    weights = cell.gates * H * H * size * N
    product = max(_multiplied(cell, plan, sizes, costs), weights / costs.l2_bytes_per_us)
    # x, r and the states, about: read and written
    moved = B * N * H * (3 * cell.gates + 4) * size
    return 2 * costs.graph_node_us + costs.library_us + product + moved / costs.l2_bytes_per_us
