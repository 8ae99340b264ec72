"""What a call will be computed by, in words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .checks import check_layer
from .kernels.cells import Cell
from .kernels.plan import STEP_SCOPES, Plan
from .kernels.prediction import predict
from .layer_call import batch_size
from .layer_types import LayerInputs, LayerOutputs, Options
from .normalized import why_stepwise
from .normalized import words as normalized_words
from .stack import Stack

_WORDS = {
    "numpy": "NumPy, step by step",
    "cupy": "CuPy, step by step",
    "native": "C++, compiled for this machine",
    "block": "each block keeps all of W_hh",
    "cluster": "the blocks of a cluster keep a slice of W_hh each",
    "grid": "all blocks keep a slice of W_hh each",
    "launch": "one launch a step, which reads W_hh",
    "library": "one product of a library's and one launch a step",
}


def _prediction(
    cell: Cell, x: Tensor, plan: Plan, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> str:
    """What the model says of a plan on a GPU, and where its constants are from."""
    if not x.is_cuda:
        return ""
    gpu = dispatch.gpu(x.device)
    found = predict(cell, plan, dtype.itemsize, sizes, gpu)
    return (
        f"; {found.forward:.2f} us a step forward and {found.adjoint:.2f} back, in "
        f"{found.waves} waves of {found.slices} slices of the batch, by a model whose costs are "
        f"{gpu.costs.source}"
    )


def _compiler_words(cell: Cell, plan: Plan, dtype: torch.dtype) -> str:
    if plan.backend != "native":
        return "there is no C++ compiler"
    if dispatch.module("native").load(cell, dtype).prebuilt:
        return "there is a prebuilt library"
    return "there is a C++ compiler"


def _words(
    cell: Cell,
    x: Tensor,
    batch_and_hidden: tuple[int, int],
    reverse: Sequence[int],
    plan: Plan | None,
    whole_sequences: bool,
) -> str:
    B, H = batch_and_hidden
    G = cell.gates
    chosen, operator, dtype, why = dispatch.decide(cell, x, B, H, reverse, plan, whole_sequences)
    whys = ["plan="] if plan else []
    start = f"{cell.name} B={B} I={x.shape[-1]} H={H} N={len(reverse)} {dtype} on {x.device}: "
    if chosen is None:
        return f"{start}the formula in torch operations, slow ({why})"
    if x.is_cpu and not plan:
        whys.append(_compiler_words(cell, chosen, dtype))
    if operator is not None:
        words = "; ".join(filter(None, [why, *whys]))
        return f"{start}torch's own operator, {operator.__name__} ({words})"
    if chosen.backend == "numpy" and not plan:
        whys.append(
            "torch's own operators are for whole sequences alone, of whose states only the last "
            "are asked for"
        )
    if chosen.scope == "host":
        return f"{start}{_WORDS[chosen.backend]} ({'; '.join(filter(None, [why, *whys]))})"
    switch = f"torch.backends.cudnn.rnn.fp32_precision is {dispatch._SWITCH.fp32_precision!r}"
    if dtype == torch.float32 and not plan:
        whys.append(switch)
    if chosen.backend == "cuda" and not plan:
        whys.append("the fastest that fits, by prediction")
    registers = (
        0
        if chosen.scope in STEP_SCOPES
        else G * chosen.units * H * dtype.itemsize // (128 * chosen.warps)
    )
    return (
        f"{start}{chosen.backend}, scope {chosen.scope}, {_WORDS[chosen.scope]}, "
        f"{registers} registers of a thread; {chosen.units} units of {G} gates by "
        f"{chosen.sequences} sequences a block, {-(-H // chosen.units)} blocks to a sequence, "
        f"{chosen.warps} warps; "
        f"W_ih x {'in' if chosen.fused else 'before'} the steps; products in {chosen.precision}"
        f"{_prediction(cell, x, chosen, dtype, (B, x.shape[-1], H, len(reverse)))} "
        f"({'; '.join(filter(None, [*whys, why]))})"
    )


def explain(layer: Any, *args: Any, **kwargs: Any) -> str:
    """What `layer(*args, **kwargs)` will be computed by and why, a line for each of its layers:
    backend, scope, tiles and precision, as an ordinary call would decide now. Nothing is computed.

    Raises what the call raises for bad input, and TypeError for what is none of our layers."""
    if not isinstance(layer, Stack):
        raise TypeError(
            f"Expected a layer of rnn, got {type(layer).__module__}.{type(layer).__qualname__}"
        )
    lines: list[str] = []

    def operator(inputs: LayerInputs, options: Options) -> LayerOutputs:
        check_layer(inputs, options.batch_first)
        cell, x, weights, _, masks, reverse = inputs
        plain = masks.whole() and not options.keep and not options.recompute
        B = batch_size(x, masks.batch_sizes, options.batch_first)
        H = weights[1].shape[1]
        width = len(reverse) * H
        words = _words(cell, x, (B, H), reverse, options.plan, plain)
        lines.append(f"layer {len(lines)}: {words}")
        zero = x.new_zeros(())
        y = zero.expand(*x.shape[:-1], width)
        several = options.keep and cell.states > 1
        others = y.reshape(1, -1, width).expand(cell.states - 1, -1, -1) if several else None
        last = [zero.expand(len(reverse), B, H) for _ in range(cell.states)]
        return y, others, last

    devices = [p.device for p in layer.parameters() if p.is_cuda][:1]
    with torch.no_grad(), torch.random.fork_rng(devices):  # dropout draws
        layer._run(operator, *args, **kwargs)
    # These do not ask the operator
    given = args[0] if args else kwargs["input"]
    why = why_stepwise(layer, 1, (given.data, *layer.parameters()))
    if why or layer.layer_norm:
        how = f"the formula in torch operations, slow ({why})"
        if not why:
            how = normalized_words(layer, given.data)
        words = f"{layer.layer_cell().name} H={layer.hidden_size}: {how}"
        lines = [f"layer {k}: {words}" for k in range(layer.num_layers)]
    return "\n".join(lines)
