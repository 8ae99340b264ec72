"""Layer norm in the kernels that have a row of hidden units in one place: those of the CPU, and
Triton's whose blocks have all units of their sequences.

W_ih x of all steps and its norm come before the recurrence, in torch's operations. Those of W_hh h
and of an LSTM's c are part of the cell's step, whose constants are their gains."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpoint_of

from . import dispatch, layer_call
from .autograd import trains
from .composite import composite_layer
from .device_copies import on_device
from .functional import record, with_gradients
from .kernels.cells import Cell, is_registered
from .kernels.plan import Plan
from .kernels.types import Weights
from .layer_call import LayerCall
from .layer_types import LayerInputs, LayerOutputs, Options
from .regularisers import (
    Norm,
    clip_limit,
    clip_norm,
    extended_cell,
    given_states,
    norm_of,
    zoned_states,
)
from .transforms import active_transform, any_autocast, autocast_dtype, traced

_WORDS = dict(
    native="C++, compiled for this machine",
    numpy="NumPy",
    triton="Triton, scope block, each block keeps all of W_hh",
)


def _has_rows(plan: Plan, H: int) -> bool:
    """Whether its kernels have all H units of a sequence in one place."""
    if plan.backend == "triton":
        return plan.scope == "block" and plan.units >= H
    return plan.backend in ("native", "numpy")


def why_stepwise(layer: Any, B: int, tensors: Sequence[Tensor | None]) -> str:
    """The options for which a call of a layer for B sequences runs step by step, and for layer norm
    why; "" where kernels run. `tensors`: x and all others of the call."""
    options = []
    if clip_norm(layer) is not None:
        options = ["layer_norm"] if layer.layer_norm else []
        options += ["clip_recurrent_grad by a norm"]
    elif layer.layer_norm:
        problem = _unserved(layer, B, [t for t in tensors if t is not None])
        options = [f"layer_norm {problem}"] if problem else []
    return " and ".join(options)


def _unserved(layer: Any, B: int, tensors: Sequence[Tensor]) -> str:
    """Why layer norm is not in kernels; "" where it is."""
    if active_transform():
        return "under a transform"
    cell = layer_cell(layer)
    if not cell.whole_rows:
        return "of a cell that does not use W_hh h"
    if traced(*tensors):
        known = tensors[0].is_cpu and is_registered(cell)
        served = layer.plan is None or _has_rows(layer.plan, _units(layer))
        return "" if known and served else "where it is compiled"
    found = _decision(layer, tensors[0], B)
    if found.plan is None:
        return f"({found.reason})"
    if not _has_rows(found.plan, _units(layer)):
        return f"by the plan {found.plan.backend!r} of scope {found.plan.scope!r}"
    return ""


def other_dtype(layer: Any, x: Tensor) -> torch.dtype | None:
    """In which dtype all of a call for x is to be computed, if not as it is: that of autocast, or
    that of the kernels for x."""
    autocast = autocast_dtype(x.device.type) if any_autocast() else None
    if autocast is not None:
        return autocast
    dtype = dispatch.support(x, layer.plan).dtype
    return None if dtype == x.dtype else dtype


def layer_norm(layer: Any) -> Norm:
    """What the layer's cell takes for it."""
    return norm_of(layer.layer_cell(), bool(layer.bias))


def _units(layer: Any) -> int:
    """Of a head."""
    units: int = layer.hidden_size // layer.num_heads
    return units


def layer_cell(layer: Any) -> Cell:
    """With all options of the layer, as they are now."""
    dropped = bool(layer.training and layer.recurrent_dropout)
    options = clip_limit(layer), zoned_states(layer), dropped
    return extended_cell(layer.layer_cell(), *options, layer_norm(layer))


def _decision(layer: Any, x: Tensor, B: int) -> dispatch.Decision:
    recurrences = (False,) * (layer.num_heads * (1 + layer.bidirectional))
    return dispatch.decide(layer_cell(layer), x, B, _units(layer), recurrences, layer.plan, False)


def words(layer: Any, x: Tensor) -> str:
    """Of `rnn.explain`."""
    found = _decision(layer, x, 1)
    assert found.plan is not None
    why = f" ({found.reason})" if found.reason else ""
    return (
        f"{_WORDS[found.plan.backend]}, with layer_norm{why}; W_ih x and its norm before it in "
        "torch operations"
    )


def normalized_inputs(
    layer: Any, index: int, inputs: LayerInputs, batch_first: bool
) -> LayerInputs:
    """Those of the layer of that index, with pre-activations [T, B, N*G*H], or packed, in place of
    x, and with the constants of layer norm after its states."""
    x = inputs.x
    w_ih, w_hh, b_ih, b_hh = inputs.weights
    states = given_states(inputs)
    lengths = inputs.masks.lengths
    N, B, H = states[0].shape
    norm = layer_norm(layer)
    suffixes = ("", "_reverse")[: 1 + layer.bidirectional]

    def whole(name: str) -> Tensor:
        """Of all directions."""
        parts = [getattr(layer, f"{name}_l{index}{suffix}") for suffix in suffixes]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(inputs.x.dtype)

    def constants(t: Tensor | None, count: int) -> list[Tensor]:
        if t is None or not count:
            return []
        rows = t.view(N, count, 1, H).expand(-1, -1, B, -1)
        return [*rows.unbind(1)]

    further = [
        *constants(whole("norm_hh"), norm.gains),
        *constants(b_hh, norm.biases),
        *(constants(whole("norm_c"), 1) if norm.states else ()),
    ]
    bias = b_ih
    if bias is not None and b_hh is not None and not norm.biases:
        bias = bias + b_hh
    x = x.transpose(0, 1) if batch_first else x
    if lengths is not None:
        # A NaN in the padding would come back in the gradients of the norm.
        steps = torch.arange(x.shape[0], device=x.device)[:, None]
        x = torch.where((steps < on_device("lengths", lengths, x.device))[..., None], x, 0)
    given = x, w_ih, whole("norm_ih"), bias, N
    if layer.checkpoint and not traced(x) and trains(given[:-1]):
        # Not even W_ih x before its norm is kept
        gates = checkpoint_of(_input_gates, *given, use_reentrant=False, preserve_rng_state=False)
    else:
        gates = _input_gates(*given)
    weights = (None, w_hh, None, None)
    return inputs._replace(x=gates, weights=weights, states=[*states, *further])


def _input_gates(x: Tensor, w_ih: Tensor, gain: Tensor, bias: Tensor | None, N: int) -> Tensor:
    """The norm of W_ih x [..., N*G*H], of each of N recurrences by itself."""
    width = gain.shape[0] // N
    if N == 1:
        return F.layer_norm(F.linear(x, w_ih), (width,), gain, bias)
    biases: Any = [None] * N if bias is None else bias.chunk(N)
    parts = zip(w_ih.chunk(N), gain.chunk(N), biases)
    return torch.cat([F.layer_norm(F.linear(x, w), (width,), g, b) for w, g, b in parts], -1)


def normalized_layer(inputs: LayerInputs, options: Options) -> LayerOutputs:
    """As `functional.run_layer`, for what `normalized_inputs` has made: y alone is in the caller's
    layout."""
    y, several, last = _in_time(inputs, options._replace(batch_first=False))
    return y.transpose(0, 1) if options.batch_first else y, several, last


def _in_time(inputs: LayerInputs, options: Options) -> LayerOutputs:
    """Likewise, with y in order of time."""
    cell, x, weights, _, masks, reverse = inputs
    keep, plan, recompute, _, checkpoint = options
    states = given_states(inputs)
    if traced(x):
        operator = partial(record, plan=plan, recompute=recompute, kernels=True)
        return composite_layer(inputs, options, operator)
    B, H = states[0].shape[1:]
    chosen = plan or dispatch.choose_plan(cell, x, B, H, reverse)
    if checkpoint and len({*reverse}) > 1:
        # Spans of time of one direction alone have pre-activations of no other
        same_plan = options._replace(plan=chosen)
        halves = [_in_time(half, same_plan) for half in _directions(inputs)]
        ys, others, ends = zip(*halves)
        several = None if others[0] is None else torch.cat(others, -1)
        last = [torch.cat(parts) for parts in zip(*ends)]
        return torch.cat(ys, -1), several, last
    call = LayerCall(cell, chosen, x, masks, reverse)
    if trains(inputs.tensors()):
        return with_gradients(call, inputs, options)
    y, several, last, _ = layer_call.forward(call, x, Weights(*weights), states, keep)
    return y, several if keep else None, last


def _directions(inputs: LayerInputs) -> Iterator[LayerInputs]:
    """Those of the recurrences of each direction, those of one after the other."""
    states = given_states(inputs)
    width = inputs.x.shape[-1] // len(inputs.reverse)
    w_hh = inputs.weights[1]
    first = 0
    for _, same in groupby(inputs.reverse):
        way = [*same]
        last = first + len(way)
        rows = slice(first * width, last * width)
        yield inputs._replace(
            x=inputs.x[..., rows],
            weights=(None, w_hh[rows], None, None),
            states=[s[first:last] for s in states],
            reverse=way,
        )
        first = last
