"""Another plan, where a device refuses the clusters or the cooperative launch of the chosen one.

A virtual GPU, a slice of one, or other processes on it can run less than its name promises. What
was launched before a refusal is done again by the other plan, in new tensors; other faults are
raised."""

from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell
from ..notices import warn
from ..plan import Plan, plan_text
from ..planner import ranked_plans
from ..types import Layout, States, Weights
from .device import describe
from .faults import Refused

# By what was asked for, and by the device what it refused.
_instead: dict[tuple[Cell, Plan, torch.device], Plan] = {}
_refused: defaultdict[torch.device, list[Plan]] = defaultdict(list)


def _may_run(plan: Plan, device: torch.device) -> bool:
    """Not what needs as many blocks at a time as the device refused, or more."""
    for refused in _refused[device]:
        if plan.scope == refused.scope == "grid":
            return False
        if plan.scope == refused.scope == "cluster" and plan.blocks >= refused.blocks:
            return False
    return plan.backend != "triton" or find_spec("triton") is not None


def _next_plan(cell: Cell, plan: Plan, sizes: tuple[int, int, int, int], x: Tensor) -> Plan | None:
    """The fastest by prediction that the device of `x` may run."""
    size = 8 if plan.precision == "tf32x3" else x.element_size()
    gpu = describe(x.device, plan.backend == "cuda")
    ranked = ranked_plans(cell, sizes, size, plan.precision, gpu)
    return next((other for other in ranked if _may_run(other, x.device)), None)


def with_fallback(
    run: Callable[..., Any],
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    *rest: Any,
) -> Any:
    """`run` with these arguments, or with the next plan that its device runs; which is said once
    for each plan.

    Raises Refused, a RuntimeError, where there is none."""
    device = x.device
    # nearly always empty: a quick check
    while _instead and (cell, plan, device) in _instead:
        plan = _instead[cell, plan, device]
    try:
        return run(cell, plan, layout, x, weights, s0, *rest)
    except Refused as error:
        B = layout.sequences if s0 is None else s0[0].shape[1]
        sizes = B, x.shape[1], weights.w_hh.shape[1], len(layout.reverse)
        _refused[device].append(plan)
        other = _next_plan(cell, plan, sizes, x)
        if other is None:
            raise
        _instead[cell, plan, device] = other
        warn(
            f"rnn: {error}. Until this process ends {plan_text(other)} is in its place, slower",
            RuntimeWarning,
        )
    return with_fallback(run, cell, other, layout, x, weights, s0, *rest)
