"""Launches of the Triton kernels: one for all steps, one a step, or a CUDA graph of steps."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from ...cells import Cell
from ...plan import Plan, Rows, power_of_2
from .cuda_graph import can_replay, replay
from .kernels import backward_kernel, forward_kernel, functions

# For a kind of call, what Triton made and its constants: to find that out at each launch takes it longer than the rest.
_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def _launch(kernel: Any, function: Any, cell: Cell, plan: Plan, rows: Rows, steps: int, tensors: Sequence[Any], B: int,
            H: int, R: int, *sizes: int, **constants: int) -> None:
    """Run a kernel over its steps: in one launch, or in one launch each where the host or its graph is the barrier."""
    grid = -(-H // plan.units), -(-B // plan.sequences), len(rows.reverse)
    device, given, steps = tensors[0].device, (*tensors, rows.lengths, rows.offsets, rows.resets), steps if B else 0
    # Programs wait for each other only if all can run at once: on a multiprocessor each, and not in the interpreter.
    barrier = (plan.scope == "grid" and not triton.knobs.runtime.interpret
               and prod(grid) <= torch.cuda.get_device_properties(device).multi_processor_count)
    counter = torch.zeros(grid[1] * grid[2], dtype=torch.int32, device=device) if barrier else None
    kind = (kernel, function, plan, H, sizes, R < 2**31, barrier, device, *rows.reverse, grid[2],
            *(t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in given))

    def launch(table: Tensor | None, u: int, count: int = 1) -> None:
        arguments = table, given, counter, u, u + count, rows.steps, B, R, *sizes, H
        key = table is None, kind
        compiled, values = _compiled.get(key, (None, ()))
        if compiled is not None:
            compiled[grid](*arguments, *values)
            return
        options = dict(CELL=function, G=cell.gates, S=cell.states, A=cell.saved, N=grid[2],
                       REVERSE=rows.reverses, BB=plan.sequences, BN=plan.units,
                       BK=plan.depth, KT=0 if plan.scope == "launch" else -(-H // plan.depth), SCOPE=plan.scope,
                       PRECISION=plan.precision, **constants)
        # Without fused multiply-add, Triton's default from 3.10 on, time loops take 8 to 16 % longer.
        made = kernel[grid](*arguments, **options, num_warps=plan.warps, num_stages=1, launch_cooperative_grid=barrier,
                            enable_fp_fusion=True)
        if made is not None:
            _compiled[key] = made, [options[name] for name in kernel.arg_names[len(arguments):]]

    with torch.cuda.device_of(tensors[0]):
        if plan.scope == "launch" and can_replay(steps, given):
            replay(kind, B, torch.cuda.current_stream().cuda_stream).run(launch, steps, (rows.steps, R), device, given)
        else:
            at_once = max(steps, 1) if plan.scope == "block" or barrier else 1
            for u in range(0, steps, at_once):
                launch(None, u, at_once)


def sweep(cell: Cell, plan: Plan, rows: Rows, adjoint: bool, tensors: Sequence[Any], s0: Tensor) -> None:
    """Run the forward or the backward kernel on what `device` gives it."""
    (_, B, H), S = s0.shape, cell.states
    if adjoint:
        _launch(backward_kernel, functions(cell)[1], cell, plan, rows, rows.steps + 1, tensors, B, H, len(tensors[2]))
        return
    x, w_ih, I = *tensors[:2], tensors[0].shape[1]
    hidden = None if plan.scope == "block" else torch.stack((s0[::S], s0[::S]))
    _launch(forward_kernel, functions(cell)[0], cell, plan, rows, rows.steps, (*tensors[:6], hidden, *tensors[6:]), B,
            H, len(x), I, BI=16 if w_ih is None else power_of_2(I, 16), XN=cell.gates if w_ih is None else 1,
            SPLIT=cell.split)
