"""The operator: one layer, all its directions, the whole sequence; its gradients, and what PyTorch
sees of it.

`recurrence` takes one of three routes. Under torch.func's transforms and forward-mode AD, and where
there is no kernel for the device or dtype: the composite. While compiling, exporting, tracing or
under a dispatch mode: custom operators, or ONNX's nodes. Else: an autograd.Function."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import checkpoint as checkpoints
from . import dispatch, flops, layer_call, onnx_export
from .autograd import apply, trains
from .boundary import alive
from .checks import NAMES, as_tensor, check_checkpoint, check_layer, check_operator, refuse_nested
from .composite import composite, composite_layer
from .custom_ops import forward_op
from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import Plan, plan_text
from .kernels.states import join_states, join_weights, part_views
from .kernels.types import Save
from .layer_call import LayerCall
from .layer_types import LayerInputs, LayerOutputs, Masks, Operator, Options
from .segments import segment_windows
from .torch_operators import by_torch
from .transforms import (
    active_transform,
    any_autocast,
    autocast_dtype,
    is_vmap,
    traced,
    tracing_state,
    under_dispatch_mode,
    vmap_rule,
)

__all__ = ["recurrence"]


def recurrence(  # noqa: PLR0913  the public operator
    cell: Cell,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    s0: Tensor,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | Sequence[Any] | None = None,
    reverse: Sequence[int] = (False,),
    keep: int = 0,
    plan: Plan | None = None,
    recompute: bool = False,
    checkpoint: bool | int = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """N recurrences over the same sequences, each in its own direction: one layer.

    Step t of each is s_t = cell(W_ih x_t + b_ih, W_hh h_{t-1} + b_hh, s_{t-1}), with h the first of
    the S states; `cell` has the formula and its source.

    Args:
        cell: `rnn.kernels.cells.rnn_tanh`, `rnn_relu`, `lstm`, `gru`, or one of your own.
        x: [T, B, I], or [R, I] with `batch_sizes`. All tensors have its device and floating-point
            dtype.
        w_ih, w_hh, b_ih, b_hh: [N*G*H, I], [N*G*H, H], and [N*G*H], both or neither.
        s0: [N*S, B, H], the states before the first step, those of each recurrence together.
        lengths: [B] integers in [0, T], on any device, or a list of them. y and states are 0 past
            an end; a sequence's last state is that of its last step (in reverse, of its first), or
            s0 where it has none.
        batch_sizes: [T] int64 on the CPU, as in torch's PackedSequence, in place of lengths.
        resets: [T, B] bool. resets[t] is a boundary between t - 1 and t: a state that would cross
            it, in either direction, is 0 instead; resets[0] drops s0 going forward. Past an end
            nothing is reset.
        reverse: of each recurrence, whether it runs from the last step to the first.
        keep: 1 to have `states` returned.
        plan: how to compute it, if not as `make_plan` would.
        recompute: keep no activations for backward but the states.
        checkpoint: keep for backward only every so many states (True: sqrt(T)); docs/numerics.md.

    Returns y [T, B, N*H] or [R, N*H], state 0 of every step; the others [S-1, R, N*H], if any; the
    last [N*S, B, H].
    Raises TypeError for an argument of the wrong kind, ValueError for one out of range, and
    RuntimeError for a shape, dtype, device or length that is not as above, all before a kernel."""
    seen = x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, resets
    if has_torch_function_variadic(*seen) and not torch.compiler.is_compiling():
        given = cell, *seen, reverse, keep, plan, recompute, checkpoint
        whole: tuple[Tensor, Tensor | None, Tensor] = handle_torch_function(
            recurrence, seen, *given
        )
        return whole
    check_checkpoint(checkpoint)
    tensors = dict(x=x, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, s0=s0, batch_sizes=batch_sizes)
    reverse = check_operator(cell, tensors, reverse, keep, plan)
    masks = Masks(as_tensor("lengths", lengths), batch_sizes, as_tensor("resets", resets, x.device))
    states = part_views(s0, cell.states)
    inputs = LayerInputs(cell, x, (w_ih, w_hh, b_ih, b_hh), states, masks, reverse)
    options = Options(int(keep), plan, bool(recompute), False, checkpoint)
    y, others, last = run_layer(inputs, options)
    return y, others, join_states(last, len(reverse))


def run_layer(inputs: LayerInputs, options: Options) -> LayerOutputs:
    """`recurrence`, each of whose states is a tensor of its own coming in and going out."""
    cell, x, weights, states, masks, reverse = inputs
    tensors = x, *weights, *(states or ())
    if has_torch_function_variadic(*tensors, *masks) and not torch.compiler.is_compiling():
        seen = *tensors, *masks
        overridden: LayerOutputs = handle_torch_function(run_layer, seen, inputs, options)
        return overridden
    # Asked first whether there is any: the type of a device takes as long as a check.
    autocast = autocast_dtype(x.device.type) if any_autocast() else None
    if autocast is not None:
        return run_in(autocast, run_layer, inputs, options)
    try:
        B = check_layer(inputs, options.batch_first)
    except RuntimeError:
        refuse_nested(zip(len(weights) // 4 * NAMES, weights))
        raise
    transform = active_transform()
    if transform or traced(x, weights[1]):
        return _seen_by_pytorch(transform, inputs, options)
    keep, plan, recompute, batch_first, checkpoint = options
    whole_sequences = masks.whole() and not (keep or recompute or checkpoint)
    H = weights[1].shape[1]
    decision = dispatch.decide(cell, x, B, H, reverse, plan, whole_sequences)
    if decision.dtype != x.dtype:
        return run_in(decision.dtype, run_layer, inputs, options)
    if decision.operator is not None:
        return by_torch(decision.operator, inputs, batch_first)
    if decision.plan is None:
        return composite_layer(inputs, options, composite)
    call = LayerCall(cell, decision.plan, x, masks, reverse, batch_first)
    if trains(tensors):
        return with_gradients(call, inputs, options)
    if len(weights) > 4:
        alive(weights)
    y, others, last, _ = layer_call.forward(call, x, join_weights(weights), states, keep)
    return y, others, last


def with_gradients(call: LayerCall, inputs: LayerInputs, options: Options) -> LayerOutputs:
    """As `run_layer`, by a kernel, under autograd."""
    _, x, weights, states, masks, _ = inputs
    keep, _, recompute, _, checkpoint = options
    tensors = len(weights), *masks, x, *weights, *(states or ())
    windows = segment_windows(call, x, weights[1], checkpoint) if checkpoint else None
    if windows is not None:
        y, others, *last = checkpoints.apply(call, windows, keep, *tensors)
        return y, others, last
    y, others, _, *last = apply(call, _kept(True, keep, recompute), *tensors)
    return y, others if keep else None, last


def _seen_by_pytorch(transform: Any, inputs: LayerInputs, options: Options) -> LayerOutputs:
    """As `run_layer`, under a transform or where the call is recorded."""
    plan = options.plan
    recompute = options.recompute
    serves, dtype, _ = dispatch.support(inputs.x, plan)
    if dtype != inputs.x.dtype:
        return run_in(dtype, run_layer, inputs, options)
    operator: Callable[..., Any] = composite
    if is_vmap(transform):
        operator = partial(_vmap, plan=plan, recompute=recompute)
    elif not transform:
        kernels = plan is not None or bool(serves)
        operator = partial(record, plan=plan, recompute=recompute, kernels=kernels)
    return composite_layer(inputs, options, operator)


def run_in(
    dtype: torch.dtype, run: Operator, inputs: LayerInputs, options: Options
) -> LayerOutputs:
    """`run` in another dtype: the results have it under autocast, else that of x."""
    x = inputs.x
    states = inputs.states
    if not traced(x, inputs.weights[1]):
        alive(inputs.tensors())
    autocast = autocast_dtype(x.device.type) is not None

    def cast(t: Any) -> Any:
        return (
            t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        )

    with torch.autocast(x.device.type, enabled=False):
        converted = inputs._replace(
            x=cast(x),
            weights=[cast(w) for w in inputs.weights],
            states=states and [cast(s) for s in states],
        )
        y, others, last = run(converted, options)
    back = y.dtype if autocast else x.dtype
    others = others if others is None else others.to(back)
    return y.to(back), others, [s.to(back) for s in last]


def record(
    cell: Cell,
    given: tuple[Any, ...],
    masks: Masks,
    reverse: Sequence[int],
    keep: int,
    plan: Plan | None,
    recompute: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """How a layer is recorded in a traced graph: as a node of ONNX, an operator of ours, or where
    there is none, the composite."""
    exporting = torch.onnx.is_in_onnx_export()
    known = cells.is_registered(cell)
    if exporting and known and onnx_export.has_node(cell.name, masks, reverse, keep):
        return onnx_export.recurrence(cell.name, given, masks.lengths, reverse)
    if exporting or not kernels or not known:
        return composite(cell, given, masks, reverse, keep)
    train = trains(given) or tracing_state() is not None  # one graph, whoever traces
    if under_dispatch_mode():
        flops.register()
    y, others, ends, _ = forward_op(
        cell.name,
        plan_text(plan) if plan else "",
        [*map(int, reverse)],
        _kept(train, keep, recompute),
        *given,
        *masks,
    )
    # Operators cannot return None: an empty tensor of one dimension stands for it.
    return y, others if others.dim() > 1 else None, ends


def _vmap(
    cell: Cell,
    given: tuple[Any, ...],
    masks: Masks,
    reverse: Sequence[int],
    keep: int,
    plan: Plan | None,
    recompute: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Recurrences side by side, each with tensors of its own."""
    operator: Any = recurrence
    BATCH_SIZES = 7  # its place among them: of all examples alike
    found: Any = vmap_rule(
        (*given, *masks),
        BATCH_SIZES,
        lambda rows: composite(cell, rows[:6], Masks(*rows[6:]), reverse, keep),
        lambda row: operator(cell, *row, reverse, keep, plan, recompute),
    )
    y, others, ends = found
    return y, others, ends


def _kept(train: bool, keep: int, recompute: bool) -> int:
    """What a forward pass has to keep: `keep`, or for backward the states, or its activations
    too."""
    if not train:
        return Save.STATES if keep else Save.NOTHING
    return Save.STATES if recompute else Save.ACTIVATIONS
