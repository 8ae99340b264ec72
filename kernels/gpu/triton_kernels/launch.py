"""Launches of the Triton kernels: one for all steps, one a step, or a CUDA graph of steps."""

from collections.abc import Callable
from functools import partial
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...cells import Cell
from ...plan import STEP_SCOPES, Plan, Slice, power_of_2, slices
from ...types import Layout
from ..faults import faults_of
from ..tensors import BackwardTensors, ForwardTensors, each_of, set_to_zero
from .cuda_graph import can_replay, step_graph
from .kernels import backward_kernel, forward_kernel, jit_cell
from .library import OPERANDS, clear_operand, fill_operands, multiply, with_operands


class Kind(NamedTuple):
    """All that a compiled kernel and its constants depend on."""

    kernel: Any
    cell: Cell
    plan: Plan
    reverse: tuple[int, ...]
    # the kernel's sizes but for B and R: I (of the forward alone) and H
    sizes: tuple[int, ...]
    # whether R fits 32 bits
    small: bool
    # whether programs wait for each other inside the kernel
    barrier: bool
    device: torch.device
    # dtype and 16-byte alignment of each tensor
    tensors: tuple[tuple[torch.dtype, bool] | None, ...]


# By kind and whether there is a graph's table: the compiled kernel and its constants' values.
# Triton's own dispatch takes longer than all else in a launch.
_compiled: dict[tuple[Kind, bool], tuple[Any, list[Any]]] = {}


def _constants(
    cell: Cell, plan: Plan, layout: Layout, tensors: ForwardTensors | BackwardTensors
) -> dict[str, Any]:
    """The values of the kernel's constexpr parameters."""
    H = tensors.w_hh.shape[1]
    forward, backward = jit_cell(cell, H) if cell.whole_rows else jit_cell(cell)
    depth_tiles = -(-H // plan.depth)
    constants: dict[str, Any] = dict(
        CELL=forward if isinstance(tensors, ForwardTensors) else backward,
        G=cell.gates,
        S=cell.states,
        CARRIED=cell.carried,
        A=cell.saved,
        WHOLE_ROWS=cell.whole_rows,
        N=len(layout.reverse),
        REVERSE=layout.reverses,
        BB=plan.sequences,
        BN=plan.units,
        BK=plan.depth,
        KT=0 if plan.scope in STEP_SCOPES else depth_tiles,
        SCOPE=plan.scope,
        PRECISION=plan.precision,
    )
    if isinstance(tensors, ForwardTensors):
        fused = tensors.w_ih is not None
        constants |= dict(
            BI=power_of_2(tensors.x.shape[1], 16) if fused else 16,
            XN=1 if fused else cell.gates,
            SEPARATE_RECURRENT_GRAD=cell.split,
        )
    else:
        constants |= dict(ONE_STEP=plan.scope in STEP_SCOPES)
    return constants


def _barrier_counter(
    plan: Plan, grid: tuple[int, int, int], tiles: int, device: torch.device
) -> Tensor | None:
    """What the barrier inside a kernel counts in, for each of the batch's tiles; None where
    programs cannot wait for each other.

    They can only if all of a launch run at once: on a multiprocessor each, and not in the
    interpreter."""
    if plan.scope != "grid" or triton.knobs.runtime.interpret:
        return None
    if prod(grid) > torch.cuda.get_device_properties(device).multi_processor_count:
        return None
    return torch.empty(tiles * grid[2], dtype=torch.int32, device=device)


def _with_exchanged(
    cell: Cell, plan: Plan, layout: Layout, tensors: Any, B: int, launched_once: bool
) -> Any:
    """With those through which programs, launches and a library exchange states and gradients.
    Nothing is read of them before it is written."""
    w_hh = tensors.w_hh
    size = len(layout.reverse), B, w_hh.shape[1]
    if not launched_once:
        carried = w_hh.new_empty((cell.states, *size), dtype=torch.float32)
        tensors = tensors._replace(carried=carried)
    if isinstance(tensors, ForwardTensors) and plan.scope != "block":
        tensors = tensors._replace(hidden=w_hh.new_empty(2, *size))
    return with_operands(cell, tensors, size) if plan.scope == "library" else tensors


def launch(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    tensors: ForwardTensors | BackwardTensors,
    B: int,
) -> None:
    """Run the forward or the backward kernel over all steps of B sequences."""
    steps = layout.steps
    if isinstance(tensors, BackwardTensors):
        # the last one adds W_hh^T dr of the first step in time
        steps += 1
    launch_steps(cell, plan, layout, steps, tensors, B)


def _launch_once(
    kind: Kind,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants_of: Callable[[], dict[str, Any]],
) -> None:
    """Launch a kernel, compiled if it was not yet."""
    key = kind, arguments[0] is None
    compiled, values = _compiled.get(key, (None, ()))
    with faults_of(kind.plan, kind.device):
        if compiled is not None:
            compiled[grid](*arguments, *values)
            return
        constants = constants_of()
        made = kind.kernel[grid](
            *arguments,
            **constants,
            num_warps=kind.plan.warps,
            num_stages=1,
            launch_cooperative_grid=kind.barrier,
            # Without it, which is Triton's default from 3.10 on, time loops take 8 to 16 % longer.
            enable_fp_fusion=True,
        )
    if made is not None:
        names = kind.kernel.arg_names[len(arguments) :]
        _compiled[key] = made, [constants[name] for name in names]


def _kinds(tensors: ForwardTensors | BackwardTensors) -> tuple[Any, ...]:
    """What a kernel is compiled for of each tensor: its dtype, and whether it is aligned."""
    return tuple(
        [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in each_of(tensors)]
    )


def launch_steps(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    steps: int,
    tensors: ForwardTensors | BackwardTensors,
    B: int,
) -> None:
    """Run a kernel over its first `steps` steps: one launch for each slice of the batch, or for
    each step where the host or a graph is the barrier."""
    H = tensors.w_hh.shape[1]
    R = len(tensors.y)
    kernel = backward_kernel
    sizes = [H]
    if isinstance(tensors, ForwardTensors):
        kernel = forward_kernel
        sizes = [tensors.x.shape[1], H]
    library = plan.scope == "library"
    tiles = -(-B // plan.sequences)
    whole = Slice(0, tiles)
    parts = slices(plan, B)
    if not parts:
        return

    def grid_of(part: Slice) -> tuple[int, int, int]:
        return -(-H // plan.units), part.tiles, len(layout.reverse)

    device = tensors.w_hh.device
    counter = _barrier_counter(plan, grid_of(parts[0]), tiles, device)
    set_to_zero(tensors, counter)
    barrier = counter is not None
    launched_once = plan.scope == "block" or barrier
    tensors = _with_exchanged(cell, plan, layout, tensors, B, launched_once)
    reverse = tuple(layout.reverse)
    kinds = _kinds(tensors)
    kind = Kind(kernel, cell, plan, reverse, tuple(sizes), R < 2**31, barrier, device, kinds)
    constants = partial(_constants, cell, plan, layout, tensors)

    def run(table: Any, u: int, tensors: Any, count: int = 1, part: Slice = whole) -> None:
        # without a step there is nothing yet that a product could read
        if library and count:
            multiply(tensors, u, plan.precision)
        steps_of_launch = part.first, u, u + count, layout.steps
        arguments = table, tensors, counter, *steps_of_launch, B, R, *sizes
        _launch_once(kind, grid_of(part), arguments, constants)

    with torch.cuda.device_of(tensors.w_hh):
        if not launched_once and can_replay(steps, each_of(tensors), library):
            stream = torch.cuda.current_stream().cuda_stream
            graph = step_graph(kind, B, stream)
            if graph.graph is None:
                # No step, but it loads the kernel that a user's capture will launch: nothing can be
                # loaded then.
                run(None, 0, tensors, 0)
            fixed = [name for name in OPERANDS if library and hasattr(tensors, name)]
            return graph.run(run, steps, (layout.steps, R), device, tensors, fixed, fill_operands)
        if library:
            clear_operand(tensors)
            fill_operands(tensors, tensors)
        at_once = steps if launched_once else 1
        # without a step the last states are still the first ones
        for part, u in product(parts, range(0, max(steps, 1), max(at_once, 1))):
            run(None, u, tensors, min(at_once, steps), part)
