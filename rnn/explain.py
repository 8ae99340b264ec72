"""What a call will be computed by, in words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import compute, ops
from .kernels.cells import Cell
from .kernels.plan import Plan
from .layers import _Stack

_WORDS = {"numpy": "NumPy, step by step", "cupy": "CuPy, step by step",
          "native": "C++, compiled for this machine", "block": "each block keeps all of W_hh",
          "cluster": "the blocks of a cluster keep a slice of W_hh each",
          "grid": "all blocks keep a slice of W_hh each", "launch": "one launch a step, which reads W_hh"}


def _words(cell: Cell, x: Tensor, first: tuple[int, int], reverse: Sequence[int], plan: Plan | None,
           masks: Sequence[Any], keep: int, recompute: bool) -> str:
    (serves, dtype, why), (B, H), G, whys = ops.settle(x, plan), first, cell.gates, ["plan="] if plan else []
    if dtype != x.dtype:
        whys.append(f"{x.dtype} is cast: {'autocast' if why == 'autocast' else 'no kernel for it'}")
        serves, dtype, why = ("", dtype, "") if plan else compute.served(x.device, dtype)
        x = x.new_empty((), dtype=dtype).expand(x.shape)
    start = f"{cell.name} B={B} I={x.shape[-1]} H={H} N={len(reverse)} {dtype} on {x.device}: "
    if not plan and not serves:
        return f"{start}the formula in torch operations, slow ({'; '.join([*whys, why])})"
    if serves == "host":
        compiler = compute.compiles(cell)
        why = f"there is {'a' if compiler else 'no'} C++ compiler"
        if compiler and dtype != torch.float32:
            why = "C++ is for float32"
    operator = compute.torch_operator(cell, x, masks, reverse, keep, plan, recompute)
    if operator is not None:
        return f"{start}torch's own operator, {operator.__name__} ({'; '.join([*whys, why])})"
    found = plan or compute.choose(cell, x, first, reverse)
    if found.backend == "numpy" and not plan:
        why += "; torch's own operators are for whole sequences alone, of whose states only the last are asked for"
    if found.scope == "host":
        return f"{start}{_WORDS[found.backend]} ({'; '.join(filter(None, [*whys, why]))})"
    switch = f"torch.backends.cudnn.rnn.fp32_precision is {compute._SWITCH.fp32_precision!r}"
    whys += [switch] if dtype == torch.float32 and not plan else []
    whys += ["the fastest that fits, by prediction"] if found.backend == "cuda" and not plan else []
    kept = 0 if found.scope == "launch" else G * found.units * H * x.element_size() // (128 * found.warps)
    return (f"{start}{found.backend}, scope {found.scope}, {_WORDS[found.scope]}, {kept} registers of a thread; "
            f"{found.units} units of {G} gates by {found.sequences} sequences a block, {-(-H // found.units)} blocks "
            f"to a sequence, {found.warps} warps; W_ih x {'in' if found.fused else 'before'} the steps; products in "
            f"{found.precision} ({'; '.join(filter(None, [*whys, why]))})")


def explain(layer: Any, *args: Any, **kwargs: Any) -> str:
    """What `layer(*args, **kwargs)` will be computed by and why, a line for each of its layers: backend, scope, tiles
    and precision, as an ordinary call would decide now. Nothing is computed.

    Raises what the call raises for bad input, and TypeError for what is none of our layers."""
    if not isinstance(layer, _Stack):
        raise TypeError(f"Expected a layer of rnn, got {type(layer).__module__}.{type(layer).__qualname__}")
    lines: list[str] = []

    def operator(cell: Cell, x: Tensor, weights: Sequence[Any], states: Any, masks: Sequence[Any],
                 reverse: Sequence[int], keep: int, plan: Plan | None, recompute: bool, batch_first: bool) -> Any:
        ops._check(cell, x, weights, states, masks, len(reverse), batch_first)
        B = x.shape[0 if batch_first else 1] if masks[1] is None else int(masks[1][0])
        H, width = weights[1].shape[1], len(reverse) * weights[1].shape[1]
        lines.append(f"layer {len(lines)}: {_words(cell, x, (B, H), reverse, plan, masks, keep, recompute)}")
        y = x.new_zeros(()).expand(*x.shape[:-1], width)
        others = y.reshape(1, -1, width) if keep and cell.states > 1 else None
        return y, others, [x.new_zeros(()).expand(len(reverse), B, H) for _ in range(cell.states)]

    devices = [p.device for p in layer.parameters() if p.is_cuda][:1]
    with torch.no_grad(), torch.random.fork_rng(devices):  # dropout draws
        layer._run(operator, *args, **kwargs)
    return "\n".join(lines)
