"""What layers have beyond torch.nn's: heads, regularisers of the recurrence, learned initial
states, and cells with constants. Each turns a layer's call into another one, of the same
operator."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import own_gradient
from .boundary import alive
from .checks import check_layer
from .composite import composite, composite_layer
from .functional import run_in
from .kernels import cells
from .layer_call import batch_size
from .layer_types import LayerInputs, LayerOutputs, Operator, Options
from .normalized import (
    layer_norm,
    normalized_inputs,
    normalized_layer,
    other_dtype,
    why_stepwise,
)
from .regularisers import (
    Norm,
    clip_limit,
    extended_cell,
    with_sequence_mask,
    with_step_masks,
    zoned_states,
    zoneout_masks,
    zoneout_rates,
)
from .stepwise import say_stepwise, stepwise

OPTIONS = (
    "num_heads",
    "recurrent_dropout",
    "zoneout",
    "weight_drop",
    "layer_norm",
    "learned_state",
    "clip_recurrent_grad",
)
# Those that parameters depend on
_STRUCTURE = ("num_heads", "layer_norm", "learned_state")


def check_option(layer: Any, name: str, value: Any) -> None:
    """Raises TypeError, ValueError, and AttributeError for what is set at construction."""
    if name in _STRUCTURE and not layer.__dict__.get("under_construction"):
        raise AttributeError(f"{name} is set when a layer is made: it has parameters for it")
    if name in ("layer_norm", "learned_state"):
        if not isinstance(value, (bool, int)):
            raise TypeError(f"Expected {name} to be a bool, got {type(value).__name__}")
        if value and layer.proj_size:
            raise ValueError(f"{name} and proj_size cannot be combined")
    elif name == "num_heads":
        _check_heads(layer, value)
    elif name == "zoneout":
        states = layer.layer_cell().carried
        rates = value if isinstance(value, (tuple, list)) else (value,)
        if isinstance(value, (tuple, list)) and len(value) != states:
            raise ValueError(
                f"Expected zoneout to be a number, or one for each of {states} states, got {value}"
            )
        for rate in rates:
            _check_rate(name, rate, 1.0)
    elif name == "clip_recurrent_grad":
        _check_clip(value)
    else:
        _check_rate(name, value, 1.0)


def _check_heads(layer: Any, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected num_heads to be an integer, got {type(value).__name__}")
    if value < 1 or layer.hidden_size % value:
        raise ValueError(
            f"Expected num_heads to divide hidden_size, {layer.hidden_size}, got {value}"
        )
    if value > 1 and layer.proj_size:
        raise ValueError("num_heads and proj_size cannot be combined")


def _check_rate(name: str, value: Any, end: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected {name} to be a number, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"Expected {name} to be a probability in [0, 1), got {value}")


def _check_clip(value: Any) -> None:
    limit = value
    if isinstance(value, (tuple, list)):
        if len(value) != 2 or value[0] != "norm":
            raise ValueError(
                f'Expected clip_recurrent_grad to be a number or ("norm", number), got {value!r}'
            )
        limit = value[1]
    if limit is None and limit is value:
        return
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(
            "Expected clip_recurrent_grad to be None, a number or a pair, got "
            f"{type(limit).__name__}"
        )
    if not 0 < limit < float("inf"):
        raise ValueError(f"Expected clip_recurrent_grad to be positive and finite, got {limit}")


def prepare(layer: Any) -> bool:
    """Makes the cells of the layer's options. Returns whether any option is on."""
    zoned = zoned_states(layer)
    norm = layer_norm(layer) if layer.layer_norm else None
    for dropped in {False, bool(layer.recurrent_dropout)}:
        for kind in {None, norm}:
            extended_cell(layer.layer_cell(), clip_limit(layer), zoned, dropped, kind)
    return bool(
        layer.num_heads > 1
        or layer.recurrent_dropout
        or zoned
        or layer.weight_drop
        or layer.layer_norm
        or layer.learned_state
        or layer.clip_recurrent_grad is not None
        or layer.layer_cell().constants
    )


def described(layer: Any) -> str:
    """The options that are on, for a layer's repr."""
    off = type(layer)
    parts = [(name, getattr(layer, name)) for name in OPTIONS]
    return "".join(f", {name}={value}" for name, value in parts if value != getattr(off, name))


def make_parameters(layer: Any) -> None:
    """From nn.RNNBase's, which may be of another number of gates, to those of the layer's cell and
    heads, and its further ones."""
    cell = layer.layer_cell()
    H = layer.hidden_size
    gate_rows = cell.gates * H
    like = layer.weight_ih_l0
    for name, old in [*layer.named_parameters()]:
        if name.startswith("weight_hr"):
            continue
        shape = (gate_rows, *old.shape[1:])
        if name.startswith("weight_hh"):
            shape = (gate_rows, layer.proj_size or H // layer.num_heads)
        setattr(layer, name, nn.Parameter(old.new_empty(shape)))
    D = 2 if layer.bidirectional else 1
    further: dict[str, tuple[int, ...]] = {}
    if cell.constants:
        further["constants"] = (cell.constants, H)
    if layer.learned_state:
        further["initial_states"] = (cell.carried, H)
    if layer.layer_norm:
        further |= dict(norm_ih=(gate_rows,), norm_hh=(gate_rows,))
        if cell is cells.lstm:
            further["norm_c"] = (H,)
    for k in range(layer.num_layers):
        for suffix in ("", "_reverse")[:D]:
            for name, shape in further.items():
                layer.register_parameter(
                    f"{name}_l{k}{suffix}", nn.Parameter(like.new_empty(shape))
                )


def reset_parameters(layer: Any) -> None:
    """Uniform within 1 / sqrt(H) of a head, gains of norms 1, learned states 0."""
    bound = (layer.num_heads / layer.hidden_size) ** 0.5 if layer.hidden_size else 0.0
    for name, weight in layer.named_parameters():
        if name.startswith("norm"):
            nn.init.ones_(weight)
        elif name.startswith("initial"):
            nn.init.zeros_(weight)
        else:
            nn.init.uniform_(weight, -bound, bound)


def extended_layer(
    layer: Any, index: int, operator: Operator, inputs: LayerInputs, options: Options
) -> LayerOutputs:
    """As `operator`, for the layer of that index with all its options. Its states are those of all
    heads together, [D, B, heads * H]."""
    alive((*inputs.tensors(), *layer.parameters()))
    cell, x, weights, states, masks, reverse = inputs
    heads = layer.num_heads
    B = batch_size(x, masks.batch_sizes, options.batch_first)
    given = _states(layer, index, x, B, states, len(reverse))
    of_heads = inputs._replace(
        weights=_joined(weights),
        states=[_split_heads(s, heads) for s in given],
        reverse=tuple(back for back in reverse for _ in range(heads)),
    )
    dropped = bool(layer.training and layer.recurrent_dropout)
    norm = None
    run = operator
    why = why_stepwise(layer, B, (*of_heads.tensors(), *masks))
    dtype = other_dtype(layer, x) if layer.layer_norm and not why else None
    if dtype is not None:
        return run_in(dtype, partial(extended_layer, layer, index, operator), inputs, options)
    if why:
        say_stepwise(layer, why)
        run = partial(_composite, stepwise(layer, index, dropped))
    elif layer.layer_norm:
        check_layer(of_heads, options.batch_first)
        norm = layer_norm(layer)
        of_heads = normalized_inputs(layer, index, of_heads, options.batch_first)
        run = normalized_layer
    regularised = _regularised(layer, of_heads, norm)
    keep = 1 if dropped else options.keep
    y, others, last = run(regularised, options._replace(keep=keep))
    first = 0
    if dropped and others is not None:
        # State 0 is the h that was multiplied: h itself is the next one.
        first = 1
        y = _like_output(others[0], y, options.batch_first)
    S = cell.carried
    own = None
    if others is not None and options.keep and S > 1:
        own = others[first : first + S - 1]
    ends = [_join_heads(s, heads) for s in last[first : first + S]]
    return y, own, ends


def _regularised(layer: Any, inputs: LayerInputs, norm: Norm | None) -> LayerInputs:
    """With masks drawn now, in this order: of W_hh, of the steps, of the sequences."""
    cell = inputs.cell
    if layer.training and layer.weight_drop:
        w_ih, w_hh, *biases = inputs.weights
        w_hh = F.dropout(own_gradient(w_hh), layer.weight_drop)
        inputs = inputs._replace(weights=(w_ih, w_hh, *biases))
    zoned = zoned_states(layer)
    if zoned:
        rates = zoneout_rates(layer)
        masks = zoneout_masks(inputs, [rates[k] for k in zoned], layer.training)
        inputs = with_step_masks(inputs, masks, len(zoned))
    dropped = bool(layer.training and layer.recurrent_dropout)
    if dropped:
        inputs = with_sequence_mask(inputs, layer.recurrent_dropout)
    return inputs._replace(cell=extended_cell(cell, clip_limit(layer), zoned, dropped, norm))


def _composite(step: Callable[..., Any], inputs: LayerInputs, options: Options) -> LayerOutputs:
    """As `functional.run_layer`, by a step of its own in torch's operations."""
    check_layer(inputs, options.batch_first)
    return composite_layer(inputs, options, partial(composite, step=step))


def _joined(weights: Sequence[Any]) -> tuple[Any, ...]:
    """w_ih, w_hh, b_ih, b_hh of all recurrences."""
    if len(weights) == 4:
        return tuple(weights)
    return tuple(
        None if weights[k] is None else torch.cat([own_gradient(w) for w in weights[k::4]])
        for k in range(4)
    )


def _states(
    layer: Any, index: int, x: Tensor, B: int, states: Sequence[Tensor] | None, D: int
) -> list[Tensor]:
    """The states before the first step, and the constants after them: [D, B, heads * H] each."""
    suffixes = ("", "_reverse")[:D]

    def rows(name: str) -> list[Tensor]:
        every = torch.stack([getattr(layer, f"{name}_l{index}{suffix}") for suffix in suffixes])
        return [row[:, None].expand(-1, B, -1).to(x.dtype) for row in every.unbind(1)]

    cell = layer.layer_cell()
    if states is not None:
        found = [*states]
    elif layer.learned_state:
        found = rows("initial_states")
    else:
        zeros = x.new_zeros(D, B, layer.hidden_size)
        found = [zeros] * cell.carried
    return [*found, *(rows("constants") if cell.constants else ())]


def _split_heads(s: Tensor, heads: int) -> Tensor:
    """[D, B, heads * H] to [D * heads, B, H]."""
    if heads == 1:
        return s.contiguous()
    D, B, H = s.shape
    return s.reshape(D, B, heads, H // heads).transpose(1, 2).flatten(0, 1)


def _join_heads(s: Tensor, heads: int) -> Tensor:
    """The inverse."""
    if heads == 1:
        return s
    N, B, H = s.shape
    return s.reshape(N // heads, heads, B, H).transpose(1, 2).flatten(2)


def _like_output(rows: Tensor, y: Tensor, batch_first: bool) -> Tensor:
    """[R, K] in the layout of y."""
    if y.dim() == 2:
        return rows
    if batch_first:
        B, T, _ = y.shape
        return rows.view(T, B, rows.shape[-1]).transpose(0, 1)
    return rows.view(y.shape)
