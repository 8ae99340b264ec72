"""The arguments of a layer's forward, checked as torch.nn does, with messages in the layout of the
caller."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .autograd import own_gradient
from .boundary import alive
from .checks import as_tensor, refuse_nested
from .layer_types import NO_MASKS, Masks
from .transforms import any_autocast


class Batch(NamedTuple):
    """The arguments of a call, checked: x in the layout of the caller, but with a batch; the states
    in the order of that batch, [L*D, B, H] each, or None for zeros; and the masks for it."""

    x: Tensor
    states: Sequence[Tensor] | None
    masks: Masks
    order: Tensor | None
    restore: Tensor | None
    unbatched: bool


def batch_of(
    layer: Any, states_count: int, input: Any, hx: Any, lengths: Any, resets: Any, weight: Tensor
) -> Batch:
    """The arguments of `forward`, checked as torch.nn does, for a cell of `states_count` states.
    Messages have the shapes of the caller's layout."""
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(
            f"Expected input to be a Tensor or a PackedSequence, got {type(input).__name__}"
        )
    states = _states_of(states_count, hx)
    if lengths is not None:
        lengths = as_tensor("lengths", lengths)
    batch_sizes = order = restore = None
    unbatched = False
    fit = states is None
    if isinstance(input, PackedSequence):
        _check_packed(input)
        input, batch_sizes, order, restore = input
    else:
        if input.is_nested:
            refuse_nested([("input", input)])
        unbatched = input.dim() == 2
        if input.dim() not in (2, 3):
            name = layer.mode.partition("_")[0]
            tensor = "D tensor" if name == "RNN" else "D"
            raise ValueError(
                f"{name}: Expected input to be 2D or 3D, got {input.dim()}{tensor} instead"
            )
        fit = fit or (not unbatched and _fit(layer, input, states))
        if not fit and any(s.dim() != input.dim() for s in states or ()):
            raise RuntimeError(_other_dimensions(input, states or ()))
    if not fit:
        refuse_nested(("hx", s) for s in states or ())
    if input.layout is not torch.strided:
        raise NotImplementedError(f"Expected input to be dense, got {input.layout}")
    if input.dtype != weight.dtype and not any_autocast():
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.shape[-1] != layer.input_size:
        sizes = f"{layer.input_size}, got {input.shape[-1]}"
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {sizes}")
    if resets is not None:
        resets = as_tensor("resets", resets, input.device)
        resets = _resets(layer, resets, input, batch_sizes, order)
    if unbatched:
        input = own_gradient(input).unsqueeze(0 if layer.batch_first else 1)
        states = states and [own_gradient(_dense(s)).unsqueeze(1) for s in states]
        lengths = lengths if lengths is None or lengths.dim() else lengths.unsqueeze(0)
    if states is not None and not fit:
        states = _initial(layer, input, states, batch_sizes, order)
    masks = NO_MASKS
    if not lengths is batch_sizes is resets is None:
        masks = Masks(lengths, batch_sizes, resets)
    return Batch(input, states, masks, order, restore, unbatched)


def _states_of(states_count: int, hx: Any) -> Sequence[Tensor] | None:
    """`hx` as a sequence of tensors. Raises TypeError and RuntimeError."""
    if hx is None:
        return None
    if states_count == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"Expected hx to be a Tensor, got {type(hx).__name__}")
        return (hx,)
    if not isinstance(hx, (tuple, list)) or not all(isinstance(s, Tensor) for s in hx):
        names = "two tensors, h_0 and c_0" if states_count == 2 else f"{states_count} tensors"
        raise TypeError(f"Expected hx to be a tuple of {names}, got {type(hx).__name__}")
    if len(hx) != states_count:
        message = f"Expected hx to be {states_count} tensors, got {len(hx)}"
        raise RuntimeError("lstm expects two hidden states" if states_count == 2 else message)
    return hx


def _fit(layer: Any, x: Tensor, states: Any) -> bool:
    """Whether states fit x [T, B, I], or [B, T, I] if batch_first: a quick check, which nearly
    always passes. Where it fails, `_initial` finds out why."""
    count = 2 * layer.num_layers if layer.bidirectional else layer.num_layers
    size = count, x.shape[0 if layer.batch_first else 1], layer.hidden_size
    for s in states:
        if (
            s.is_nested
            or s.layout is not torch.strided
            or s.dtype is not x.dtype
            or s.device != x.device
        ):
            return False
        if s.shape != size:
            return False
    return True


def _initial(
    layer: Any, x: Tensor, states: Sequence[Any], batch_sizes: Tensor | None, order: Tensor | None
) -> list[Tensor]:
    """The states before the first step, [L*D, B, H] each, checked and in the order of the
    batch."""
    expected = [layer.get_expected_hidden_size(x, batch_sizes)]
    # A projection makes only h narrower
    expected += [(*expected[0][:2], layer.hidden_size)] * (len(states) - 1)
    checked: list[Tensor] = []
    for k, state in enumerate(map(_dense, states)):
        name = "hidden" if len(expected) == 1 else f"hidden[{k}]"
        if order is not None:
            if state.dim() != 3 or state.shape[1] != order.shape[0]:
                raise RuntimeError(f"Expected {name} size {expected[k]}, got {list(state.shape)}")
            alive([state])
            state = state.index_select(1, order)
        layer.check_hidden_size(state, expected[k], f"Expected {name} size {{}}, got {{}}")
        if state.dtype != x.dtype and not any_autocast():
            raise RuntimeError(
                f"Input and {name} tensors are not the same dtype, found input tensor with "
                f"{x.dtype} and {name} tensor with {state.dtype}"
            )
        if state.device != x.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at "
                f"{x.device} and {name} tensor at {state.device}"
            )
        checked.append(state)
    return checked


def _resets(
    layer: Any, resets: Tensor, input: Tensor, batch_sizes: Tensor | None, order: Tensor | None
) -> Tensor:
    """`resets` [T, B], in the order of the batch."""
    unbatched = batch_sizes is None and input.dim() == 2
    turned = layer.batch_first and not unbatched
    if batch_sizes is None:
        expected = [*input.shape[:-1]]
    else:
        expected = [batch_sizes.shape[0], int(batch_sizes[0])]
        expected = expected[::-1] if turned else expected
    strided = resets.layout is torch.strided
    if (
        resets.dtype != torch.bool
        or not strided
        or resets.device != input.device
        or [*resets.shape] != expected
    ):
        names = "[T]" if unbatched else "[B, T]" if turned else "[T, B]"
        names += "" if batch_sizes is None else " by batch_sizes"
        raise RuntimeError(
            f"Expected resets of shape {expected} ({names}), torch.bool and on {input.device}, "
            f"got {[*resets.shape]}, {resets.dtype}, {resets.layout} and on {resets.device}"
        )
    if unbatched:
        return resets.unsqueeze(1)
    alive([resets])
    resets = resets.T if turned else resets
    return resets if order is None else resets.index_select(1, order)


def _other_dimensions(input: Tensor, states: Sequence[Tensor]) -> str:
    """torch.nn's words for states of another number of dimensions than the input."""
    batched = "unbatched" if input.dim() == 2 else "batched"
    names = "hx and cx" if len(states) == 2 else "hx"
    found = ", ".join(f"{state.dim()}-D" for state in states)
    got = f"({found}) tensors" if len(states) == 2 else f"{found} tensor"
    return (
        f"For {batched} {input.dim()}-D input, {names} should also be {input.dim()}-D but got {got}"
    )


def _dense(state: Tensor) -> Tensor:
    if state.layout is not torch.strided:
        raise RuntimeError(f"Expected hx to be dense, got {state.layout}")
    return state


def _is_right(data: Any, batch_sizes: Any, order: Any, restore: Any) -> bool:
    """Whether nothing is wrong with the parts of a packed sequence, but perhaps the memory of its
    indices: a quick check, which nearly always passes."""
    return (
        type(data) is Tensor
        and type(batch_sizes) is Tensor
        and not data.is_nested
        and len(data.shape) == 2
        and len(batch_sizes.shape) == 1
        and batch_sizes.dtype is torch.int64
        and batch_sizes.is_cpu
        and (order is restore is None or _are_indices(order, restore))
    )


def _are_indices(order: Any, restore: Any) -> bool:
    return (
        type(order) is Tensor
        and type(restore) is Tensor
        and len(order.shape) == 1
        and order.shape == restore.shape
        and order.dtype is restore.dtype is torch.int64
        and not order.is_meta
        and not restore.is_meta
    )


def _check_packed(input: PackedSequence) -> None:
    """Raises TypeError and RuntimeError for parts that the operator would not see, or not name."""
    if _is_right(*input):
        alive(input[2:])
        return
    for name, part in zip(input._fields, input):
        if not isinstance(part, Tensor) and not (part is None and name.endswith("indices")):
            raise TypeError(
                f"Expected input, a PackedSequence, to have a Tensor as {name}, got "
                f"{type(part).__name__}"
            )
    data, batch_sizes, order, restore = input
    refuse_nested([("input", data)])
    if data.dim() != 2:
        raise RuntimeError(
            f"Expected input, a PackedSequence, to have data of 2 dimensions, got "
            f"{list(data.shape)}"
        )
    parts = ("batch_sizes", batch_sizes), ("sorted_indices", order), ("unsorted_indices", restore)
    for name, t in parts:
        if t is None:
            continue
        dtypes = (torch.int64,) if t is batch_sizes else (torch.int64, torch.int32)
        if t.dim() != 1 or t.dtype not in dtypes or (t.is_meta and not data.is_meta):
            raise RuntimeError(
                f"Expected input, a PackedSequence, to have {name} of one dimension and "
                f"{dtypes[0]}, got {list(t.shape)}, {t.dtype} and on {t.device}"
            )
    alive([order, restore])
    if order is not None and restore is not None and order.shape != restore.shape:
        raise RuntimeError(
            "Expected input, a PackedSequence, to have as many sorted_indices as unsorted_indices, "
            "got "
            f"{len(order)} and {len(restore)}"
        )
