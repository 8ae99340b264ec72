"""A layer as an autograd.Function, for ordinary calls.

Its backward runs kernels; or the composite, where its result is to be differentiated again or a
transform is active."""

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
from .layer_types import LayerInputs, Masks, Options
from .transforms import (
    active_transform,
    needs_composite,
    traced,
    under_dispatch_mode,
    without_autocast,
)

# Gradients of the inputs of _Layer before x
_NO_GRADS = (None,) * 6


class _Layer(torch.autograd.Function):
    """One layer. Its inputs, by position:

    call: the LayerCall
    save: what to keep for backward, a Save
    count: how many weights there are
    lengths, batch_sizes, resets: as in `functional.recurrence`
    x: in the caller's layout
    *weights: w_ih, w_hh, b_ih, b_hh, either joined (count is 4) or one recurrence after the other
    *states: the S states before the first step, [N, B, H] each; nothing for zeros

    Its outputs: y; the states of every step but for y, or None; the activations saved for the
    adjoint, or None; and the S last states."""

    @staticmethod
    # A separate setup_context costs 60 us more
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
        joined_matrices = () if count == 4 else joined[:2]
        ctx.save_for_backward(
            lengths,
            batch_sizes,
            resets,
            y,
            others,
            saved,
            x,
            *matrices,
            *joined_matrices,
            *states,
        )
        if saved is not None:
            ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return y, others, saved, *last

    @staticmethod
    def backward(ctx: Any, dy: Any, dothers: Any, _: Any, *dlast: Any) -> tuple[Any, ...]:
        lengths, batch_sizes, resets, y, others, saved, x, *rest = ctx.saved_tensors
        call: LayerCall = ctx.call
        count = ctx.count
        matrices = rest[: count // 2]
        joined_matrices = matrices
        states = rest[count // 2 :]
        if count > 4:
            joined_matrices = states[:2]
            states = states[2:]
        needs = ctx.needs_input_grad[6:]
        incoming_grads = _all_dense([dy, dothers, *dlast])
        needs_graph = needs_composite(incoming_grads)
        recompute = call.cell.saved and saved is None
        if needs_graph or recompute:
            check_versions(ctx.biases, ctx.versions)
        with without_autocast(x.device):
            if needs_graph:
                inputs = x, *_interleaved(matrices, ctx.biases), *states
                masks = Masks(lengths, batch_sizes, resets)
                grads = by_composite(call, inputs, masks, count, incoming_grads, needs)
                return *_NO_GRADS, *grads
            weights = _joined_weights(joined_matrices, ctx.biases if recompute else None)
            needed = wanted(needs, count)
            counting: Any = nullcontext()
            if under_dispatch_mode():
                s0 = x.new_empty((0, call.layout.sequences, 0))
                shapes = x, *weights, s0, lengths, batch_sizes, resets, y, others, saved
                counting = flops.of_backward(call.cell, call.reverse, needed, shapes)
            with counting:
                outputs = Outputs(y, others, None, saved)
                output_grads = OutputGrads(incoming_grads[0], incoming_grads[1], incoming_grads[2:])
                gradients = layer_call.backward(
                    call, x, weights, states, outputs, output_grads, needed
                )
            of_weights = weight_grads(gradients, needs, count)
            of_states = state_grads(gradients.s0, needs[1 + count :])
        return *_NO_GRADS, gradients.x, *of_weights, *of_states


def _all_dense(grads: list[Any]) -> list[Any]:
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            return [*map(to_dense, grads)]
    return grads


def _interleaved(matrices: Sequence[Any], biases: Sequence[Any]) -> list[Any]:
    """w_ih, w_hh, b_ih, b_hh of one recurrence after the other."""
    weights: list[Any] = []
    for k in range(0, len(matrices), 2):
        weights += matrices[k : k + 2]
        weights += biases[k : k + 2]
    return weights


def _joined_weights(matrices: Sequence[Tensor], biases: Sequence[Any] | None) -> Weights:
    """Of joined matrices, and of biases b_ih, b_hh, joined or one recurrence after the other."""
    w_ih, w_hh = matrices
    if biases is None:
        return Weights(w_ih, w_hh, None, None)
    if len(biases) == 2:
        return Weights(w_ih, w_hh, biases[0], biases[1])
    b_ih, b_hh = (None if biases[k] is None else torch.cat([*biases[k::2]]) for k in range(2))
    return Weights(w_ih, w_hh, b_ih, b_hh)


def wanted(needs: Sequence[bool], count: int) -> Gradients[bool]:
    """Which gradients a backend has to compute. `needs`: of x, `count` weights and the states."""
    of_states = True in needs[1 + count :]
    if count == 4:
        return Gradients(needs[0], needs[1], needs[2], needs[3], needs[4], of_states)
    # A joined tensor's gradient, if that of any part is needed
    of_weights = [True in needs[1 + k : 1 + count : 4] for k in range(4)]
    return Gradients._make([needs[0], *of_weights, of_states])


def weight_grads(
    gradients: Gradients[Tensor | None], needs: Sequence[bool], count: int
) -> Sequence[Tensor | None]:
    """As _Layer takes the weights."""
    if count == 4:
        return gradients.of_weights()
    parts = part_weights(gradients.of_weights(), count // 4)
    return [grad if need else None for grad, need in zip(parts, needs[1:])]


def state_grads(
    grads: Sequence[Tensor | None] | None, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Of the states before the first step, those that are needed."""
    if grads is None:
        return [None] * len(needs)
    if all(needs):
        return grads
    return [grad if need else None for grad, need in zip(grads, needs)]


def by_composite(
    call: LayerCall,
    inputs: Sequence[Any],
    masks: Masks,
    count: int,
    grads: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `inputs`, x, `count` weights and the states, with a graph of their own."""
    with torch.enable_grad():
        alias = aliases(inputs)
        x, *rest = alias
        weights = rest[:count]
        states = rest[count:] or None
        again = LayerInputs(call.cell, x, weights, states, masks, call.reverse)
        options = Options(keep=1, batch_first=call.batch_first)
        y, others, last = composite_layer(again, options)
    return differentiate((y, others, *last), grads, alias, needs)


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a contiguous tensor of its own, not a view of a larger
    one."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.clone(memory_format=torch.contiguous_format)


def own_gradient(t: Tensor) -> Tensor:
    """`t` for `torch.cat`, with a gradient that is no view, as torch.nn's. Compilers and transforms
    lay out gradients themselves."""
    if not torch.is_grad_enabled() or not t.requires_grad or traced(t) or active_transform():
        return t
    identity: Tensor = _OwnGradient.apply(t)
    return identity


def trains(tensors: Sequence[Any]) -> bool:
    """Whether any of them may need a gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def to_dense(grad: Any) -> Any:
    """An incoming gradient, which may be sparse or None, as a dense tensor."""
    return grad if grad is None or grad.layout is torch.strided else grad.to_dense()


def versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    try:
        return [None if t is None else t._version for t in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [None if t is None or t.is_inference() else t._version for t in tensors]


def check_versions(biases: Sequence[Tensor | None], before: Sequence[int | None]) -> None:
    """Raises RuntimeError if biases, not saved for backward but read there, have changed since."""
    if versions(biases) != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a bias of a recurrent layer"
        )


# Function.apply without its handling of transforms, which costs 6 us: `run_layer` has ruled
# transforms out before this call.
apply: Any = super(torch.autograd.Function, _Layer).apply
