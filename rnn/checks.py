"""Checks of what a layer or the operator is given, before anything is computed."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import transforms
from .boundary import alive
from .device_copies import on_device
from .kernels.cells import Cell
from .kernels.plan import BACKENDS, Plan
from .layer_types import LayerInputs, Masks

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def refuse_nested(tensors: Iterable[tuple[str, Any]]) -> None:
    """Raises RuntimeError for a nested tensor, by its name: it has no shape that could be
    checked."""
    for name, t in tensors:
        if isinstance(t, Tensor) and t.is_nested:
            raise RuntimeError(f"Expected {name} to be dense, got a nested tensor")


def check_operator(
    cell: Any, tensors: dict[str, Any], reverse: Any, keep: Any, plan: Any
) -> list[bool]:
    """Raises TypeError, ValueError and RuntimeError for what `functional.recurrence` does not take,
    but for shapes, which `check_layer` compares. Returns the directions."""
    if not isinstance(cell, Cell):
        raise TypeError(f"Expected cell to be a rnn.kernels.cells.Cell, got {type(cell).__name__}")
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (
            value is None and name in ("b_ih", "b_hh", "batch_sizes")
        ):
            raise TypeError(f"Expected {name} to be a Tensor, got {type(value).__name__}")
    refuse_nested(tensors.items())
    directions = as_directions(reverse)
    check_plan(plan)
    if not isinstance(keep, int) or keep not in (0, 1):
        raise ValueError(f"Expected keep to be 0 or 1, got {keep!r}")
    batch_sizes = tensors["batch_sizes"]
    s0 = tensors["s0"]
    if batch_sizes is not None and batch_sizes.dim() != 1:
        raise RuntimeError(f"Expected batch_sizes of one dimension, got {list(batch_sizes.shape)}")
    N = len(directions)
    S = cell.states
    if s0.dim() != 3 or s0.layout is not torch.strided or len(s0) != N * S:
        raise RuntimeError(
            f"Expected hidden (s0) of shape [{N * S}, B, H] for the cell {cell.name} and reverse "
            f"of {N}, got {list(s0.shape)} and {s0.layout}"
        )
    return directions


def as_directions(reverse: Any) -> list[bool]:
    """`reverse`, checked."""
    if (
        isinstance(reverse, str)
        or not hasattr(reverse, "__iter__")
        or getattr(reverse, "ndim", 1) == 0
    ):
        raise TypeError(f"Expected reverse to be a sequence of bools, got {reverse!r}")
    directions = [*reverse] if isinstance(reverse, (Sequence, Tensor, np.ndarray)) else []
    if not directions or not all(_is_bool(direction) for direction in directions):
        raise ValueError(f"Expected reverse to have one bool or more, got {reverse!r}")
    return [bool(direction) for direction in directions]


def _is_bool(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.item() in (0, 1)
    return isinstance(value, (bool, int, np.bool_, np.integer)) and value in (0, 1)


def check_checkpoint(checkpoint: Any) -> None:
    """Raises TypeError if it is no bool and no int, ValueError if it is an int below 1."""
    if not isinstance(checkpoint, int):
        kind = type(checkpoint).__name__
        raise TypeError(f"Expected checkpoint to be a bool or an int, got {kind}")
    if checkpoint is not False and checkpoint < 1:
        raise ValueError(f"Expected checkpoint to be at least 1, got {checkpoint}")


def check_plan(plan: Any) -> None:
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise TypeError(
            f"Expected plan to be a rnn.kernels.plan.Plan or None, got {type(plan).__name__}"
        )
    scopes = BACKENDS.get(plan.backend, ()) if isinstance(plan.backend, str) else ()
    if plan.scope not in scopes:
        raise ValueError(f"Expected plan of a backend and scope among {BACKENDS}, got {plan}")
    sizes = plan.units, plan.sequences, plan.warps, plan.blocks
    if plan.scope != "host" and not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"Expected plan of positive units, sequences, warps and blocks, got {plan}"
        )


def as_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor | None:
    """`lengths` and `resets`, which may also be given as lists, numbers or NumPy's arrays. Raises
    TypeError."""
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, (list, tuple, int, np.ndarray, np.integer)):
        raise TypeError(f"Expected {name} to be a Tensor or a list, got {type(value).__name__}")
    try:
        found = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Expected {name} to be a Tensor or a list of numbers, got {value!r}"
        ) from error
    return found if device is None else on_device(name, found, device)


def expect(
    name: str,
    t: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None,
) -> None:
    if t is not None and (
        t.layout is not torch.strided
        or t.shape != shape
        or t.dtype not in dtypes
        or not (device is None or t.device == device)
    ):
        raise RuntimeError(
            f"Expected {name} of shape {list(shape)}, {' or '.join(map(str, dtypes))} and on "
            f"{device or 'any device'}, got {list(t.shape)}, {t.dtype}, {t.layout} and on "
            f"{t.device}"
        )


def _rows_of_most(weights: Sequence[Any]) -> int:
    rows: list[int] = [w.shape[0] for w in weights if w is not None and w.dim()]
    return max(rows, key=rows.count)


def check_layer(inputs: LayerInputs, batch_first: bool) -> int:  # B
    cell, x, weights, states, masks, reverse = inputs
    w_hh, b_ih, b_hh = weights[1:4]
    lengths, batch_sizes, resets = masks
    N = len(reverse)
    size = x.shape
    device = x.device
    if (
        len(size) != (3 if batch_sizes is None else 2)
        or w_hh.dim() != 2
        or (b_ih is None) != (b_hh is None)
    ):
        raise RuntimeError(
            "Expected input (x) of 3 dimensions (2 with batch_sizes), weight_hh (w_hh) of 2, both "
            f"biases or none, got {list(size)} and {list(w_hh.shape)}"
        )
    per = cell.gates * N * 4 // len(weights)
    rows, H = w_hh.shape
    if states:
        H = states[-1].shape[-1] if states[-1].dim() else 0
    elif per and not (per * H == rows and weights[0].shape == (rows, size[-1])):
        H = _rows_of_most(weights) // per
    dtype = x.dtype
    strided = x.layout is torch.strided
    floats = (dtype,) if (strided and dtype.is_floating_point) or dtype.is_complex else ()
    B: Any = None
    if batch_sizes is None:
        T, B, I = (size[1], size[0], size[2]) if batch_first else size
    else:
        T = batch_sizes.shape[0]
        I = size[1]
        if states is not None and states[0].dim() == 3:
            B = states[0].shape[1]
    if not floats:
        expect("input", x, size, floats, device)
    GH = per * H
    shapes = (GH, I), (GH, H), (GH,), (GH,)
    parts = len(weights) // 4
    on_cpu = x.is_cpu
    for weight, shape, name in zip(weights, parts * shapes, parts * NAMES):
        if weight is None or (
            weight.dtype is dtype
            and weight.shape == shape
            and (weight.is_cpu if on_cpu else weight.device == device)
            and weight.layout is torch.strided
            and floats
        ):
            continue
        expect(name, weight, shape, floats, device)
    if states is not None:
        names = ["hidden"] if len(states) == 1 else [f"hidden[{k}]" for k in range(len(states))]
        for name, state in zip(names, states):
            expect(name, state, (N, B, H), floats, device)
    # whole sequences, as most are
    if not T or not lengths is batch_sizes is resets is None:
        B = check_masks(x, masks, T, B)
    # Not int(B): of a traced call it is symbolic.
    sequences: int = B
    return sequences


def _check_range(lengths: Tensor, T: int, plain: bool) -> None:
    """Raises RuntimeError for lengths that are not in [0, T]. On a GPU this does not wait: wrong
    lengths stop the device with an assertion."""
    if plain and lengths.is_cuda:
        # in one launch: an index that is out of range fails there
        if lengths.numel():
            lengths[:1].expand(T + 1).index_select(0, lengths)
        return
    lengths = transforms.unwrapped(lengths)
    transforms.assert_async(
        ((lengths >= 0) & (lengths <= T)).all(), "Expected lengths between 0 and those of input"
    )


def check_masks(x: Tensor, masks: Masks, T: int, B: Any) -> int:
    """Raises RuntimeError for lengths, batch_sizes or resets that are not of T steps and B
    sequences; with batch_sizes T is ignored, and B may be None if it is not known otherwise.
    Returns B, which is 0 for batch_sizes whose numbers are not known yet."""
    lengths, batch_sizes, resets = masks
    device = x.device
    if batch_sizes is not None:
        T = batch_sizes.shape[0]
    if T == 0 or (lengths is not None and batch_sizes is not None):
        raise RuntimeError(
            "A packed sequence has its own lengths: `lengths` cannot be given for it"
            if T
            else "Expected sequence length to be larger than 0 in RNN"
        )
    if resets is not None:
        if B is None and batch_sizes is not None:
            B = int(batch_sizes[0])
        expect("resets", resets, (T, B), (torch.bool,), device)
    if lengths is not None:
        expect("lengths", lengths, (B,), (torch.int64, torch.int32), None)
        if lengths.is_meta and not x.is_meta:
            raise RuntimeError(f"Expected lengths with numbers, got {lengths.device}")
        plain = not transforms.traced(lengths) and not transforms.active_transform()
        if plain:
            alive([lengths])
        _check_range(lengths, T, plain)
    if batch_sizes is not None:
        expect("batch_sizes", batch_sizes, (T,), (torch.int64,), None)
        if batch_sizes.is_meta and not x.is_meta:
            raise RuntimeError(f"Expected batch_sizes with numbers, got {batch_sizes.device}")
        wrong = "Expected batch_sizes that begin with B, never rise, and add up to input's rows"
        if transforms.traced(batch_sizes) or transforms.active_transform():
            fits = (batch_sizes.sum() == x.shape[0]) & (batch_sizes[-1] > 0)
            fits = fits if B is None else fits & (batch_sizes[0] == B)
            transforms.assert_async(fits & (batch_sizes.diff() < 1).all(), wrong)
            return 0
        # All these operations would take longer than a short sequence
        sizes: list[int] = batch_sizes.tolist()
        falls = sizes == sorted(sizes, reverse=True)
        if not falls or sum(sizes) != x.shape[0] or B not in (None, sizes[0]) or sizes[-1] < 1:
            raise RuntimeError(wrong)
        B = sizes[0]
    # Not int(B): of a traced call it is symbolic.
    sequences: int = B
    return sequences
