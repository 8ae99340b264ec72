"""The layer as an autograd.Function, for ordinary calls.

Its backward runs kernels, or the composite where a graph of it is asked for, to be differentiated
again, or where a transform is at work."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import flops, layer_call
from .boundary import alive
from .composite import aliases, composite_layer, differentiate
from .kernels.states import join_weights, part_weights
from .kernels.types import Gradients, OutputGrads, Outputs, Weights
from .layer_call import LayerCall
from .transforms import (
    active_transform,
    needs_composite,
    traced,
    under_dispatch_mode,
    without_autocast,
)


class _Layer(torch.autograd.Function):
    """lengths to resets, x, weights, which are w_ih to b_hh of all recurrences or of one after the
    other, and the states to y, the other states, the activations and the last states."""

    @staticmethod
    # A separate setup_context would cost 60 us more
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        call, save, count, lengths, batch_sizes, resets, x, *rest = inputs
        weights = rest[:count]
        states = rest[count:]
        matrices = weights[:2]
        biases = weights[2:]
        if count > 4:
            alive(weights)
            matrices = [t for k, t in enumerate(weights) if k % 4 < 2]
            biases = [t for k, t in enumerate(weights) if k % 4 > 1]
        joined = join_weights(weights)
        y, others, last, saved = layer_call.forward(call, x, joined, states, save)
        # An ordinary backward pass reads no biases: as those of torch.nn's RNN and GRU they may
        # change before it.
        ctx.call = call
        ctx.biases = biases
        ctx.versions = versions(biases)
        ctx.count = count
        kept = () if count == 4 else joined[:2]
        ctx.save_for_backward(
            lengths,
            batch_sizes,
            resets,
            y,
            others,
            saved,
            x,
            *matrices,
            *states,
            *kept,
        )
        if saved is not None:
            ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return y, others, saved, *last

    @staticmethod
    def backward(ctx: Any, dy: Any, dothers: Any, _: Any, *last_grads: Any) -> tuple[Any, ...]:
        lengths, batch_sizes, resets, y, others, saved, x, *rest = ctx.saved_tensors
        call: LayerCall = ctx.call
        count = ctx.count
        needs = ctx.needs_input_grad
        dlast: Sequence[Any] = last_grads
        came = [dy, dothers, *dlast]
        for grad in came:
            if grad is not None and grad.layout is not torch.strided:
                dy, dothers, *dlast = came = [*map(to_dense, came)]
                break
        again = needs_composite(came)
        recompute = call.cell.saved and saved is None
        if again or recompute:
            check_versions(ctx.biases, ctx.versions)
        matrices = rest[: count // 2]
        states = rest[count // 2 :]
        kept = matrices
        if count > 4:
            states, kept = states[:-2], states[-2:]
        weights: Sequence[Tensor | None] = [*matrices, None, None]
        if again or recompute or count > 4:
            weights = [
                t
                for k in range(0, count // 2, 2)
                for t in (*matrices[k : k + 2], *ctx.biases[k : k + 2])
            ]
        with without_autocast(x.device):
            if again:
                masks = lengths, batch_sizes, resets
                found = _by_composite(call, (x, *weights, *states), masks, count, came, needs[6:])
                return None, None, None, None, None, None, *found
            whole = Weights._make(weights[:4])
            of_rows = needs[6:11]
            if count > 4:
                biases = join_weights(weights)[2:] if recompute else (None, None)
                whole = Weights._make([*kept, *biases])
                of_rows = [needs[6], *(True in needs[7 + k : 7 + count : 4] for k in range(4))]
            wanted: Gradients[bool] = Gradients._make([*of_rows, True in needs[7 + count :]])
            counted: Any = nullcontext()
            if under_dispatch_mode():
                s0 = x.new_empty((0, call.layout.sequences, 0))
                shapes = x, *whole, s0, lengths, batch_sizes, resets, y, others, saved
                counted = flops.of_backward(call.cell, call.reverse, wanted, shapes)
            with counted:
                outputs = Outputs(y, others, None, saved)
                coming = OutputGrads(dy, dothers, dlast)
                made = layer_call.backward(call, x, whole, states, outputs, coming, wanted)
            grads: Sequence[Tensor | None] = made[:5]
            if count > 4:
                grads = [made.x, *part_weights(made.of_weights(), count // 4)]
                grads = [grad if need else None for grad, need in zip(grads, needs[6:])]
            first = [None] * len(states) if made.s0 is None else made.s0
            if made.s0 is not None and not all(needs[7 + count :]):
                first = [grad if need else None for grad, need in zip(first, needs[7 + count :])]
        return None, None, None, None, None, None, *grads, *first


def _by_composite(
    call: LayerCall,
    inputs: Sequence[Any],
    masks: Sequence[Any],
    count: int,
    grads: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `inputs`, x, `count` weights and the states, with a graph of their own."""
    with torch.enable_grad():
        alias = aliases(inputs)
        x, weights, states = alias[0], alias[1 : 1 + count], alias[1 + count :] or None
        y, others, last = composite_layer(
            call.cell, x, weights, states, masks, call.reverse, 1, call.batch_first
        )
    return differentiate((y, others, *last), grads, alias, needs)


class _OwnGradient(torch.autograd.Function):
    """The same numbers, whose gradient is a contiguous tensor of its own, and no part of a larger
    one."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.clone(memory_format=torch.contiguous_format)


def own_gradient(t: Tensor) -> Tensor:
    """As torch.nn has it where we put tensors together. Compilers and transforms lay their
    gradients out themselves."""
    if not torch.is_grad_enabled() or not t.requires_grad or traced(t) or active_transform():
        return t
    found: Tensor = _OwnGradient.apply(t)
    return found


def trains(tensors: Sequence[Any]) -> bool:
    """Whether gradients of any of them may be asked for."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def to_dense(grad: Any) -> Any:
    """A gradient that comes in, which may be sparse, with all its numbers."""
    return grad if grad is None or grad.layout is torch.strided else grad.to_dense()


def versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def check_versions(biases: Sequence[Tensor | None], before: Sequence[int | None]) -> None:
    """Of biases that were not saved for backward, and now are read after all."""
    if versions(biases) != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a bias of a recurrent layer"
        )


# Function.apply without its preparations for transforms, of which there is none here: they would
# cost 6 us.
apply: Any = super(torch.autograd.Function, _Layer).apply
