"""Launches of the Triton kernels: one for all steps, one a step, or a CUDA graph of steps."""

from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...cells import Cell
from ...plan import Plan, power_of_2
from ...types import Layout
from ..faults import faults_of
from ..tensors import BackwardTensors, ForwardTensors
from .cuda_graph import can_replay, step_graph
from .kernels import backward_kernel, forward_kernel, jit_cell


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
    forward, backward = jit_cell(cell)
    depth_tiles = -(-tensors.w_hh.shape[1] // plan.depth)
    constants: dict[str, Any] = dict(
        CELL=forward if isinstance(tensors, ForwardTensors) else backward,
        G=cell.gates,
        S=cell.states,
        A=cell.saved,
        N=len(layout.reverse),
        REVERSE=layout.reverses,
        BB=plan.sequences,
        BN=plan.units,
        BK=plan.depth,
        KT=0 if plan.scope == "launch" else depth_tiles,
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
    return constants


def _barrier_counter(plan: Plan, grid: tuple[int, int, int], device: torch.device) -> Tensor | None:
    """What the barrier inside a kernel counts in; None where programs cannot wait for each other.

    They can only if all run at once: on a multiprocessor each, and not in the interpreter."""
    if plan.scope != "grid" or triton.knobs.runtime.interpret:
        return None
    if prod(grid) > torch.cuda.get_device_properties(device).multi_processor_count:
        return None
    return torch.zeros(grid[1] * grid[2], dtype=torch.int32, device=device)


def launch(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    tensors: ForwardTensors | BackwardTensors,
    s0: Tensor,
) -> None:
    """Run the forward or the backward kernel over all its steps."""
    steps = layout.steps
    if isinstance(tensors, BackwardTensors):
        # the last one adds W_hh^T dr of the first step in time
        steps += 1
    launch_steps(cell, plan, layout, steps, tensors, s0)


def launch_steps(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    steps: int,
    tensors: ForwardTensors | BackwardTensors,
    s0: Tensor,
) -> None:
    """Run a kernel over its first `steps` steps.

    That takes one launch, or one for each step where the host or a graph is the barrier."""
    _, B, H = s0.shape
    R = len(tensors.y)
    if isinstance(tensors, ForwardTensors):
        kernel = forward_kernel
        sizes = [tensors.x.shape[1], H]
        if plan.scope != "block":
            h0 = s0[:: cell.states]
            tensors = tensors._replace(hidden=torch.stack((h0, h0)))
    else:
        kernel = backward_kernel
        sizes = [H]
    if not B:
        steps = 0
    grid = -(-H // plan.units), -(-B // plan.sequences), len(layout.reverse)
    device = s0.device
    counter = _barrier_counter(plan, grid, device)
    barrier = counter is not None
    kinds = tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
    reverse = tuple(layout.reverse)
    kind = Kind(kernel, cell, plan, reverse, tuple(sizes), R < 2**31, barrier, device, kinds)

    def run(table: Tensor | None, u: int, count: int = 1) -> None:
        arguments = table, tensors, counter, u, u + count, layout.steps, B, R, *sizes
        key = kind, table is None
        compiled, values = _compiled.get(key, (None, ()))
        if compiled is not None:
            with faults_of(plan, device):
                compiled[grid](*arguments, *values)
            return
        constants = _constants(cell, plan, layout, tensors)
        with faults_of(plan, device):
            made = kernel[grid](
                *arguments,
                **constants,
                num_warps=plan.warps,
                num_stages=1,
                launch_cooperative_grid=barrier,
                # Without it, Triton's default from 3.10 on, time loops take 8 to 16 % longer.
                enable_fp_fusion=True,
            )
        if made is not None:
            _compiled[key] = made, [constants[name] for name in kernel.arg_names[len(arguments) :]]

    with torch.cuda.device_of(s0):
        if plan.scope == "launch" and can_replay(steps, tensors):
            stream = torch.cuda.current_stream().cuda_stream
            graph = step_graph(kind, B, stream)
            if graph.graph is None:
                # No step, but it loads the kernel that a user's capture will launch: nothing can be
                # loaded then.
                run(None, 0, 0)
            graph.run(run, steps, (layout.steps, R), device, tensors)
        else:
            at_once = max(steps, 1) if plan.scope == "block" or barrier else 1
            for u in range(0, steps, at_once):
                run(None, u, at_once)
