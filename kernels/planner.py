"""Which plan a layer gets, from its sizes alone: of those that fit, the fastest by prediction."""

from itertools import product

from .cells import Cell
from .plan import (
    CLUSTERS,
    Gpu,
    Plan,
    Sizes,
    k_fragments,
    power_of_2,
    shared_bytes,
)
from .prediction import at_once, predict

# Largest H, rounded up to a power of 2, whose W_hh one block holds with nothing spilled in the time
# loop, whatever the options: by gates (more than 4: none), then by bytes per element (8 is tf32x3,
# which splits float32 in two). (The fullest, above all of layer norm, spill a few words in some
# versions of Triton, which costs less than a launch for each step.)
BLOCK_UNITS = {
    1: {2: 256, 4: 128, 8: 128},
    2: {2: 128, 4: 64, 8: 64},
    3: {2: 128, 4: 64, 8: 32},
    4: {2: 128, 4: 64, 8: 32},
}
FUSED_INPUT = 32  # the largest I whose W_ih fits beside that W_hh, where it does
# Of a row of W_hh, all gates: what a program of the grid holds without spilling
GRID_ROW_BYTES = 768
MOST_TILES = 2**16 - 1  # of a launch
# Of a thread in CUDA C++, for W_hh, where not all of it fits; found by compiling. Fewer of several
# gates in float32 from capability 10.0 on. In a grid all of W_hh may have no more than
# GRID_REGISTERS from there on, and for 32 sequences FEWER_GRID_REGISTERS; but of several gates more
# in more than 4 warps on capability 9.0, and FEWEST_GRID_REGISTERS in 4 or fewer before that, which
# for 16 sequences have FEWER_GRID_REGISTERS.
WEIGHT_REGISTERS = 64
FEWER_REGISTERS = 32
MOST_REGISTERS = 128
GRID_REGISTERS = 96
FEWER_GRID_REGISTERS = 80
FEWEST_GRID_REGISTERS = 64


class NoPlan(ValueError):
    """No kernel serves a cell of that size."""


def _grid_registers(plan: Plan, gated: bool, gpu: Gpu) -> int:
    few = gated and gpu.capability < 90 and plan.warps <= 4
    if plan.sequences > 16:
        # of a thread with one pair
        if gated and gpu.capability // 10 == 9 and plan.warps > 4:
            return GRID_REGISTERS
        return FEWEST_GRID_REGISTERS if few else FEWER_GRID_REGISTERS
    if few and plan.sequences > 8:
        return FEWER_GRID_REGISTERS
    return GRID_REGISTERS if gpu.capability >= 100 else MOST_REGISTERS


def _fits_registers(cell: Cell, plan: Plan, size: int, gpu: Gpu) -> bool:
    """Whether a thread in CUDA C++ has registers for its weights, sums and pairs; found by
    compiling."""
    words = max(
        4 * cell.gates * k_fragments(cell, plan, size, False),
        4 * k_fragments(cell, plan, size, True),
    )
    one_tile = plan.sequences == 8
    gated = cell.gates > 1
    wide = size == 4
    if plan.warps > 8:
        most = 32 if wide and gated else 48 if gpu.capability >= 100 else 64
        # of several gates four tiles have too many pairs
        too_many = gated and (wide or plan.sequences > 16)
        return words <= (most if one_tile else 0 if too_many else 24)
    if plan.scope == "grid" and words > _grid_registers(plan, gated, gpu):
        return False
    if plan.scope == "grid" and wide:
        return one_tile and words <= (72 if gated else MOST_REGISTERS)
    exact = plan.precision == "tf32x3" and cell.gates > 3
    too_many = wide and gated and plan.sequences > (8 if gpu.capability >= 100 or exact else 16)
    most = 96 if gated and (wide or not one_tile) else MOST_REGISTERS
    # products in three parts take registers, and so does x of the next step
    if gated and plan.scope == "block" and plan.precision == "tf32x3":
        most = 64 if one_tile else 48
    return words <= most and not too_many


def _with_room(cell: Cell, plan: Plan, size: int, gpu: Gpu) -> Plan | None:
    """A plan for CUDA C++ with its weights in registers, or with the rest of them in shared
    memory. None where they do not fit."""
    if not _fits_registers(cell, plan, size, gpu):
        # in three parts a product takes registers too
        spills = plan.precision == "tf32x3" and plan.scope != "grid"
        if plan.warps > 8 or plan.sequences > 8 or spills:
            return None
        few = gpu.capability >= 100 and size == 4 and cell.gates > 1
        plan = plan._replace(weight_registers=FEWER_REGISTERS if few else WEIGHT_REGISTERS)
    shared = max(shared_bytes(cell, plan, size, adjoint) for adjoint in (False, True))
    return plan if shared <= gpu.shared_memory else None


def _in_slices(plan: Plan, sizes: Sizes, gpu: Gpu) -> Plan | None:
    """A plan whose blocks wait for each other, in slices as equal as may be, each of which runs at
    once. None where not even a tile does."""
    B, _, H, N = sizes
    most = at_once(plan, gpu, H, N)
    tiles = -(-B // plan.sequences)
    if not most:
        return None
    if tiles <= most:
        return plan
    count = -(-tiles // most)
    return plan._replace(slice_tiles=-(-tiles // count))


def cuda_plans(cell: Cell, sizes: Sizes, size: int, precision: str, gpu: Gpu) -> list[Plan]:
    """The plans for CUDA C++ that fit, the fastest by prediction first."""
    B, _, H, _ = sizes
    found = []
    clusters = [blocks for blocks in CLUSTERS if gpu.active_clusters(blocks)]
    scopes = [("block", 1), *(("cluster", blocks) for blocks in clusters), ("grid", -(-H // 16))]
    for (scope, blocks), splits, sequences in product(scopes, (1, 2, 4, 8), (8, 16, 32)):
        # in three parts there are no registers to ask which products of a warp there are
        if scope == "grid" and precision == "tf32x3":
            blocks = -(-blocks // splits) * splits
        units = -(-H // (16 * blocks)) * 16
        warps = units // 16 * splits
        if warps > 16 or sequences > 8 * splits:
            continue
        first = Plan("cuda", scope, units, sequences, 0, warps, False, precision, blocks)
        plan = _with_room(cell, first, size, gpu)
        if plan and scope == "grid":
            plan = _in_slices(plan, sizes, gpu)
        if plan and (plan.slice_tiles or -(-B // sequences)) <= MOST_TILES:
            found.append(plan)
    # of equals, one with all weights in registers
    found.sort(key=lambda plan: plan.weight_registers)
    return sorted(found, key=lambda plan: predict(cell, plan, size, sizes, gpu).both)


def triton_plans(cell: Cell, sizes: Sizes, size: int, precision: str, gpu: Gpu) -> list[Plan]:
    """The plans for Triton that fit; `size` is 8 for tf32x3, which splits a number in two."""
    B, I, H, _ = sizes
    G = cell.gates
    units = power_of_2(H, 16)
    found = []
    shared, shared_fused = (
        G * units * K * min(size, 4) + 64 * units for K in (units, units + FUSED_INPUT)
    )
    beside = size == 2 or G == 1 or (size == 4 and G * units < 256)
    fused = I <= FUSED_INPUT and beside and shared_fused <= gpu.shared_memory
    # these take pre-activations
    fused = fused and not cell.whole_rows
    in_block = units <= BLOCK_UNITS.get(G, {}).get(size, 0) and shared <= gpu.shared_memory
    if in_block and B <= 8 * MOST_TILES:
        warps = min(8, units // (16 if G == 1 else 8))
        found.append(Plan("triton", "block", units, 8, units, warps, fused, precision))
    if cell.whole_rows:
        return found
    if G * -(-H // 64) * 64 * size <= GRID_ROW_BYTES:
        grid = _in_slices(Plan("triton", "grid", 64, 8, 64, 4, False, precision), sizes, gpu)
        found += [grid] if grid else []
    narrow = size == 8 and G > 1
    tile_units = 16 if narrow else 64 if G == 1 else 32
    tile_sequences = min(16 if narrow else 64, power_of_2(B, 16))
    launch = tile_units, tile_sequences, 128 // size, 8
    found.append(Plan("triton", "launch", *launch, False, precision))
    if B <= 16 * MOST_TILES:
        found.append(Plan("triton", "library", 32, 16, 16, 4, False, precision))
    return found


def ranked_plans(cell: Cell, sizes: Sizes, size: int, precision: str, gpu: Gpu) -> list[Plan]:
    """All plans that fit, the fastest by prediction first; `size` as for `triton_plans`."""
    found = triton_plans(cell, sizes, size, precision, gpu)
    size = min(size, 4)
    if gpu.cuda and not cell.whole_rows:
        found = cuda_plans(cell, sizes, size, precision, gpu) + found
    return sorted(found, key=lambda plan: predict(cell, plan, size, sizes, gpu).both)


def make_plan(
    cell: Cell,
    sizes: Sizes,
    dtype: str,
    gpu: Gpu | None,
    tf32: bool = False,
    native: bool = False,
) -> Plan:
    """The plan for `sizes` (B, I, H, N) in `dtype` ("float32"...), on the CPU where there is no
    `gpu` (of capability 80 or more); `tf32` allows that precision for float32; `native` says that
    C++ can be compiled.

    Raises NoPlan for a cell of whole rows that are longer than a block of a GPU holds."""
    if gpu is None:
        return Plan("native" if native and dtype in ("float32", "float64") else "numpy")
    size = 2 if dtype != "float32" else 4 if tf32 else 8
    precision = {2: "ieee", 4: "tf32", 8: "tf32x3"}[size]
    ranked = ranked_plans(cell, sizes, size, precision, gpu)
    if not ranked:
        raise NoPlan(f"no kernel has the {sizes[2]} hidden units of {cell.name} in one place")
    return ranked[0]
