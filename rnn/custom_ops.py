"""The layer as operators of torch.library, for what PyTorch records (compile, export, dispatch
modes): it does not look into them. Forward-mode AD must not come here: it would silently give 0."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, flops, layer_call
from .composite import aliases, composite, differentiate
from .kernels import cells
from .kernels.plan import plan_of
from .kernels.states import join_states, part_views
from .kernels.types import Gradients, OutputGrads, Outputs, Weights
from .layer_call import LayerCall, batch_size
from .layer_types import Masks
from .transforms import needs_composite, traced, under_dispatch_mode, without_autocast


def _named_call(cell: str, plan: str, reverse: Sequence[int], tensors: Sequence[Any]) -> LayerCall:
    """From what the custom operators take, names and text."""
    operation = cells.registered(cell)
    x, _, w_hh = tensors[:3]
    masks = Masks(*tensors[6:9])
    if plan:
        return LayerCall(operation, plan_of(plan), x, masks, reverse)
    B = batch_size(x, masks.batch_sizes)
    chosen = dispatch.choose_plan(operation, x, B, w_hh.shape[1], reverse)
    return LayerCall(operation, chosen, x, masks, reverse)


def _joined_backward(
    call: LayerCall,
    operands: Sequence[Any],
    results: Sequence[Any],
    incoming: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`layer_call.backward` with joined states."""
    S = call.cell.states
    x, *weights, s0 = operands
    y, others, saved = results
    outputs = Outputs(y, others, None, saved)
    grads = OutputGrads(incoming[0], incoming[1], part_views(incoming[2], S))
    *gradients, first = layer_call.backward(
        call, x, Weights(*weights), part_views(s0, S), outputs, grads, Gradients(*needs)
    )
    return [*gradients, None if first is None else join_states(first, len(call.reverse))]


def _op_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Any, ...]) -> None:
    (*ctx.choices, _) = inputs[:4]
    (y, states, _, saved) = output
    ctx.save_for_backward(*inputs[4:], y, states, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
    """Of the custom operator, which returns tensors of one dimension where there is no result."""
    # Once: hooks would unpack them once more
    (*tensors,) = ctx.saved_tensors
    (cell, plan, reverse) = ctx.choices
    operands = tensors[:6]
    masks = Masks(*tensors[6:9])
    needs = ctx.needs_input_grad[4:10]
    results: list[Any]
    grads: list[Any]
    results, grads = (
        [t if t is not None and t.dim() > 1 else None for t in some]
        for some in (tensors[9:], incoming[:3])
    )
    with without_autocast(tensors[0].device):
        if needs_composite(grads):
            with torch.enable_grad():
                alias = aliases(operands)
                outputs = composite(cells.registered(cell), alias, masks, reverse, 1)
            gradients = differentiate(outputs, grads, alias, needs)
        elif traced(results[0]):
            if under_dispatch_mode():
                flops.register()
            gradients = backward_op(cell, plan, reverse, needs, *operands, *masks, *results, *grads)
        else:
            gradients = _joined_backward(
                _named_call(cell, plan, reverse, tensors), operands, results, grads, needs
            )
    return (
        None,
        None,
        None,
        None,
        *(g if need else None for g, need in zip(gradients, needs)),
        None,
        None,
        None,
    )


_INPUTS_SCHEMA = "Tensor x, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor s0"
_MASKS_SCHEMA = "Tensor? lengths, Tensor? batch_sizes, Tensor? resets"
_RESULTS_SCHEMA = (
    "Tensor y, Tensor? states, Tensor? saved, Tensor? dy, Tensor? dstates, Tensor? dlast"
)


@torch.library.custom_op(
    "fused_rnn::forward",
    mutates_args=(),
    schema=(
        f"(str cell, str plan, int[] reverse, int keep, {_INPUTS_SCHEMA}, {_MASKS_SCHEMA})"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def forward_op(
    cell: str, plan: str, reverse: list[int], keep: int, *tensors: Any
) -> tuple[Tensor, ...]:
    call = _named_call(cell, plan, reverse, tensors)
    x, *weights, s0 = tensors[:6]
    y, others, last, saved = layer_call.forward(
        call, x, Weights(*weights), part_views(s0, call.cell.states), keep
    )
    out = y, others, join_states(last, len(reverse)), saved
    return tuple(tensors[0].new_empty(0) if t is None else t for t in out)


@torch.library.custom_op(
    "fused_rnn::backward",
    mutates_args=(),
    schema=(
        f"(str cell, str plan, int[] reverse, bool[] needs, {_INPUTS_SCHEMA}, {_MASKS_SCHEMA}, "
        f"{_RESULTS_SCHEMA}) -> Tensor[]"
    ),
)
def backward_op(
    cell: str, plan: str, reverse: list[int], needs: list[bool], *tensors: Any
) -> list[Tensor]:
    operands = tensors[:6]
    results = tensors[9:12]
    incoming = tensors[12:]
    grads = _joined_backward(
        _named_call(cell, plan, reverse, tensors), operands, results, incoming, needs
    )
    return [operands[0].new_empty(0) if g is None else g for g in grads]


@forward_op.register_fake
def _(
    cell: str, plan: str, reverse: list[int], keep: int, x: Tensor, *tensors: Any
) -> tuple[Tensor, ...]:
    others = cells.registered(cell).states - 1
    saved = cells.registered(cell).saved
    s0 = tensors[4]
    R = math.prod(x.shape[:-1])
    width = len(reverse) * s0.shape[-1]
    return (
        x.new_empty(*x.shape[:-1], width),
        x.new_empty((others, R, width) if others and keep else 0),
        x.new_empty(s0.shape),
        x.new_empty((saved, R, width) if saved and keep > 1 else 0),
    )


@backward_op.register_fake
def _(cell: str, plan: str, reverse: list[int], needs: list[bool], *tensors: Any) -> list[Tensor]:
    return [tensors[0].new_empty(t.shape if need else 0) for t, need in zip(tensors[:6], needs)]


forward_op.register_autograd(_op_backward, setup_context=_op_setup)
