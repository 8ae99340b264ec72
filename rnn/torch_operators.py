"""Layers by torch's own operators, where there is no C++ for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import to_dense, trains
from .boundary import ready
from .composite import aliases, composite_layer, differentiate
from .kernels.cells import lstm
from .layer_types import LayerInputs, LayerOutputs, Options
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


def by_torch(operator: Any, inputs: LayerInputs, batch_first: bool) -> LayerOutputs:
    """As `functional.run_layer`, in torch's own operator."""
    count = len(inputs.weights)

    def parts(x: Tensor, rest: Sequence[Any]) -> LayerInputs:
        return inputs._replace(x=x, weights=rest[:count], states=rest[count:] or None)

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return _run(operator, parts(x, rest), batch_first)

    def composite(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        y, _, last = composite_layer(parts(x, rest), Options(batch_first=batch_first))
        return y, *last

    tensors = inputs.tensors()
    if inputs.cell is lstm and inputs.x.dtype == torch.float32 and trains(tensors):
        y, *last = _TorchLSTM.apply(run, composite, *tensors)
    else:
        y, *last = run(*tensors)
    return y, None, last


def _run(operator: Any, inputs: LayerInputs, batch_first: bool) -> tuple[Tensor, ...]:
    """y and the last states, by an operator that has gradients of its own."""
    cell, x, weights, states, _, reverse = inputs
    N = len(reverse)
    if len(weights) < 4 * N:
        columns = [[None] * N if t is None else t.chunk(N) for t in weights]
        weights = [part for own in zip(*columns) for part in own]
    if not states:
        B = x.shape[0] if batch_first else x.shape[1]
        states = [x.new_zeros((N, B, weights[1].shape[1]))] * cell.states
    x, *rest = ready((x, *states, *weights))
    first = rest[: cell.states]
    parameters = [t for t in rest[cell.states :] if t is not None]
    found: tuple[Tensor, ...] = operator(
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
    return found
