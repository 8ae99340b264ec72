"""Layers by torch's own operators, where there is no C++ for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import to_dense, trains
from .boundary import ready
from .composite import aliases, composite_layer, differentiate
from .kernels.cells import Cell, lstm
from .transforms import needs_composite, without_autocast


class _TorchLSTM(torch.autograd.Function):
    """torch's own LSTM. Its backward pass in oneDNN has no derivative: the composite's has.

    `run` and `composite` compute the same outputs from the tensors `inputs`."""

    @staticmethod
    def forward(ctx: Any, run: Any, composite: Any, *inputs: Any) -> tuple[Any, ...]:
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad():
            outputs = run(*leaves)
        ctx.composite = composite
        ctx.leaves = leaves
        ctx.outputs = outputs
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        grads = tuple(map(to_dense, grads))
        with without_autocast(inputs[0].device):
            if not needs_composite(grads):
                gradients = differentiate(ctx.outputs, grads, ctx.leaves, needs, again=False)
                return None, None, *gradients
            with torch.enable_grad():
                alias = aliases(inputs)
                outputs = ctx.composite(*alias)
            return None, None, *differentiate(outputs, grads, alias, needs)


def by_torch(
    operator: Any,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor] | None,
    reverse: Sequence[int],
    batch_first: bool,
) -> tuple[Tensor, None, list[Tensor]]:
    """As `functional.run_layer`, in torch's own operator."""
    count = len(weights)
    masks = None, None, None

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        N = len(reverse)
        y, _, last = _run(operator, cell, x, rest[:count], rest[count:], N, batch_first)
        return y, *last

    def composite(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        operands = x, rest[:count], rest[count:] or None
        y, _, last = composite_layer(cell, *operands, masks, reverse, 0, batch_first)
        return y, *last

    inputs = x, *weights, *(states or ())
    if cell is lstm and x.dtype == torch.float32 and trains(inputs):
        y, *last = _TorchLSTM.apply(run, composite, *inputs)
    else:
        y, *last = run(*inputs)
    return y, None, last


def _run(
    operator: Any,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor] | None,
    N: int,
    batch_first: bool,
) -> tuple[Tensor, None, list[Tensor]]:
    """By an operator that has gradients of its own."""
    if len(weights) < 4 * N:
        columns = [[None] * N if t is None else t.chunk(N) for t in weights]
        weights = [part for own in zip(*columns) for part in own]
    if not states:
        B = x.shape[0] if batch_first else x.shape[1]
        states = [x.new_zeros((N, B, weights[1].shape[1]))] * cell.states
    x, *rest = ready((x, *states, *weights))
    first = rest[: cell.states]
    parameters = [t for t in rest[cell.states :] if t is not None]
    y, *last = operator(
        x,
        first if cell.states > 1 else first[0],
        parameters,
        len(parameters) == 4 * N,
        1,
        0.0,
        torch.is_grad_enabled(),
        N > 1,
        batch_first,
    )
    return y, None, last
