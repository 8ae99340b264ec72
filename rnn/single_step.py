"""One step of a stack of layers on the CPU, as in streaming and decoding, all layers in one call:
the whole path.

In C++, with gradients and without, in float32 and float64; where that cannot be had, by torch's own
operators, as torch.nn does it. What is not a plain tensor is left to the general path of the
layers. Gradients that are to be differentiated again come from the differentiable formula."""

import math
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from . import dispatch
from .autograd import check_versions, to_dense, trains, versions
from .boundary import PLAIN, ready
from .composite import aliases, composite, differentiate
from .kernels.cells import Cell
from .kernels.cpu import native
from .kernels.cpu.workspace import scratch
from .kernels.plan import STEP_PRODUCT
from .layer_types import NO_MASKS
from .transforms import needs_composite, only_autograd, without_autocast

# A tensor of each dtype of the C++, for what is to be like it.
_LIKE = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in native.NUMBERS}
# What the C++ is told: B, I, H, L, how many parameters a layer has, threads, and the order of sums.
Sizes = tuple[int, int, int, int, int, int, int]


class _Order(threading.local):
    """Whether single steps of this thread have the bits of the same step among others: sums then
    have the order that they have in a sequence of several steps."""

    of_sequences = False


order = _Order()


@lru_cache
def _pack(struct_type: type, states: int, before: int, after: int) -> Callable[..., bytes]:
    """For so many numbers before those of StepSizes, and after them."""
    expected = native.words(struct_type, states) - native.words(native.StepSizes, states)
    if before != expected:
        raise RuntimeError(f"{struct_type.__name__} begins with {expected} pointers, got {before}")
    return struct.Struct(f"{before + len(native.StepSizes._fields) + after}q").pack


class _Step(NamedTuple):
    """What calls of the same sizes have in common: shapes and memory, in bytes, of x, the states,
    and w_ih, w_hh (and b_ih, b_hh) of each layer; sizes for one thread, and whether several are
    worth it; whether y has the shape of a state; the C++, None where it is not compiled, and what
    packs its struct."""

    shapes: list[tuple[int, ...]]
    memory: list[int]
    sizes: Sizes
    large: bool
    y_is_state: bool
    function: Any
    pack: Callable[..., bytes]


@lru_cache(1024)
def _step(
    cell: Cell,
    dtype: torch.dtype,
    x: tuple[int, ...],
    batch: int,
    hidden: int,
    layers: int,
    parameters: int,
    compiled: bool,
) -> _Step:
    inputs = x[2]
    gates = cell.gates * hidden
    shapes = [x, *[(layers, batch, hidden)] * cell.states]
    for layer in range(layers):
        shapes += [
            (gates, hidden if layer else inputs),
            (gates, hidden),
            *[(gates,)] * (parameters - 2),
        ]
    return _Step(
        shapes,
        [dtype.itemsize * math.prod(shape) for shape in shapes],
        (batch, inputs, hidden, layers, parameters, 1, 0),
        batch * gates * (hidden + inputs) >= STEP_PRODUCT,
        layers == 1 and x[0] == 1,
        native.load(cell, dtype).step if compiled else None,
        _pack(native.Step, cell.states, 2 * cell.states + 3, layers * parameters),
    )


def _call(
    function: Any,
    pack: Callable[..., bytes],
    before: Sequence[int],
    after: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Calls it with a struct of native.py: its numbers `before` those of the memory, which it gets
    where it needs some, and `after` them, and the pointers that follow the struct."""
    needed = function(pack(*before, 0, 0, *after))
    if needed:
        memory = scratch(_LIKE[dtype], needed)  # held while it is in use
        function(pack(*before, memory.data_ptr(), needed, *after))


def _addresses(
    given: Sequence[Any],
    shapes: Sequence[tuple[int, ...]],
    memory: Sequence[int],
    dtype: torch.dtype,
) -> tuple[list[int], list[Tensor]] | None:
    """The addresses of tensors, and the contiguous copies that some of these are of. None where a
    tensor is not a plain one of that shape and dtype on the CPU, with all of its memory, in bytes.
    May raise RuntimeError for one that has none."""
    addresses = []
    copies = []
    itemsize = dtype.itemsize
    # A tensor is asked as little as possible: each answer takes as long as a row of a small W
    for t, shape, size in zip(given, shapes, memory):
        # A parametrized weight is None.
        if type(t) not in PLAIN or t.dtype is not dtype or t.shape != shape:
            return None
        if not t.is_cpu or t.is_neg():
            return None
        if not t.is_contiguous():
            t = ready([t])[0]
            copies.append(t)
        address = t.data_ptr()
        start = itemsize * t.storage_offset()
        if t.untyped_storage().nbytes() < start + size:
            return None
        # At 0 or so many bytes from it is a tensor that is empty, or a zero tensor
        if address == start and t._is_zerotensor():
            return None
        addresses.append(address)
    return addresses, copies


def single_step(
    cell: Cell,
    x: Tensor,
    hx: Any,
    weights: Sequence[Any],
    layers: int,
    hidden: int,
    batch_first: bool,
) -> Any:
    """What a layer returns for x [1, B, I], or [B, 1, I] if `batch_first`, from its parameters,
    w_ih, w_hh (and b_ih, b_hh) of each layer. None where the general path has to look at it."""
    if not only_autograd() or has_torch_function_unary(x) or not x.is_cpu:
        return None
    shape = x.size()
    batch = shape[0] if batch_first else shape[1]
    count = cell.states
    states = hx
    if hx is None:
        states = [x.new_zeros(layers, batch, hidden)] * count
    elif count == 1:
        states = [hx]
    elif type(hx) not in (tuple, list) or len(hx) != count:
        return None
    dtype = x.dtype
    parameters = len(weights) // layers
    given = [x, *states, *weights]
    compiled = dispatch.native_available(cell, dtype)
    step = _step(cell, dtype, shape, batch, hidden, layers, parameters, compiled)
    try:
        found = _addresses(given, step.shapes, step.memory, dtype)
    except RuntimeError:  # a sparse tensor, or another that has no memory
        return None
    if found is None:
        return None
    addresses, _copies = found
    if not compiled:
        operator = dispatch.OPERATORS.get(cell)
        if operator is None or (dtype is not torch.float32 and dtype is not torch.float64):
            return None
        first = states if count > 1 else states[0]
        y, *last = operator(
            x, first, weights, parameters > 2, layers, 0.0, False, False, batch_first
        )
        return y, tuple(last) if count > 1 else last[0]
    sizes = step.sizes
    of_sequences = order.of_sequences
    if step.large or of_sequences:
        threads = native.threads()
        own = threads if step.large else 1
        sizes = (*sizes[:5], own, threads if of_sequences else 0)
    if trains(given):
        y, *last = _apply(cell, step, sizes, addresses, *given)
    else:
        y, last, _ = _forward(cell, step, sizes, addresses, x, False)
    return y, tuple(last) if count > 1 else last[0]


def _forward(
    cell: Cell, step: _Step, sizes: Sizes, addresses: list[int], x: Tensor, save: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """y, the last states, and for the adjoint [L, A+S, B, H] the activations and the states once
    more: what is returned may be edited in place. `addresses` are of x, the states and the
    parameters."""
    batch, _, hidden, layers, *_ = sizes
    first = cell.states + 1
    h = x.new_empty(layers, batch, hidden)
    last = [h]
    while len(last) < cell.states:
        last.append(torch.empty_like(h))
    y = torch.empty_like(h) if step.y_is_state else x.new_empty(*x.shape[:2], hidden)
    results = [y.data_ptr()]
    for s in last:
        results.append(s.data_ptr())
    saved = None
    if save:
        saved = x.new_empty(layers, cell.saved + cell.states, batch, hidden)
        results.append(saved.data_ptr())
    else:
        results.append(0)
    before = addresses[:first] + results
    _call(step.function, step.pack, before, (*sizes, *addresses[first:]), x.dtype)
    return y, last, saved


class _SingleStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, step: _Step, sizes: Sizes, addresses: list[int], *given: Any
    ) -> tuple[Tensor, ...]:
        y, last, saved = _forward(cell, step, sizes, addresses, given[0], True)
        first = cell.states + 1
        kept = given
        ctx.biases = []
        if sizes[4] > 2:
            kept = given[:first]
            for k in range(first, len(given), 4):
                kept += given[k : k + 2]
                ctx.biases += given[k + 2 : k + 4]
        ctx.save_for_backward(*kept, saved)
        # An ordinary backward pass reads no biases: as those of torch.nn they may change before it.
        ctx.versions = versions(ctx.biases)
        ctx.choices = cell, sizes, given[0].dtype
        ctx.set_materialize_grads(False)
        return y, *last

    @staticmethod
    def backward(ctx: Any, *d: Any) -> tuple[Any, ...]:
        cell, sizes, dtype = ctx.choices
        d = tuple(map(to_dense, d))
        tensors = ctx.saved_tensors  # once: hooks would unpack them once more
        needs = ctx.needs_input_grad[4:]
        if needs_composite(d) or not all(t is None or type(t) is Tensor for t in d):
            check_versions(ctx.biases, ctx.versions)
            found = _differentiable(cell, sizes, tensors[:-1], ctx.biases, needs, d)
        else:
            found = _backward(cell, sizes, dtype, tensors, needs, d)
        return None, None, None, None, *found


# Function.apply without its handling of transforms: `single_step` has ruled them out before this
# call.
_apply: Any = super(torch.autograd.Function, _SingleStep).apply


def _backward(
    cell: Cell,
    sizes: Sizes,
    dtype: torch.dtype,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    d: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of x, the states and the parameters, those that are needed, from those of y and
    the last states. `tensors` are x, the states, w_ih and w_hh of each layer, and what was
    saved."""
    first = cell.states + 1
    like = _LIKE[dtype]
    *given, saved = ready(tensors, like)
    dy, *dlast = d
    alike = 0
    if (
        dy is not None
        and dy.stride() == (0, 0, 0)
        and dy.data_ptr()
        and not dy.is_neg()
        and not dy._is_zerotensor()
        # That of a sum: one number
        and dy.untyped_storage().nbytes() > dtype.itemsize * dy.storage_offset()
    ):
        alike = dy.data_ptr()
        dlast = ready(dlast, like)
    else:
        dy, *dlast = ready(d, like)
    parameters = sizes[4]
    grads = [torch.empty_like(t) if need else None for t, need in zip(given[:first], needs)]
    for k, need in enumerate(needs[first:]):
        layer, place = divmod(k, parameters)
        if not need:
            grads.append(None)
        elif place > 1:
            grads.append(saved.new_empty(cell.gates * sizes[2]))
        else:
            w = given[first + 2 * layer + place]
            grads.append(torch.empty_like(w))
    before = [t.data_ptr() for t in (*given[:first], saved)]
    before += [0 if alike or dy is None else dy.data_ptr(), alike]
    before += [0 if t is None else t.data_ptr() for t in (*dlast, *grads[:first])]
    after = [0 if t is None else t.data_ptr() for t in (*given[first:], *grads[first:])]
    function = native.load(cell, dtype).step_backward
    pack = _pack(native.StepAdjoint, cell.states, len(before), len(after))
    _call(function, pack, before, (*sizes, *after), dtype)
    return grads


def _differentiable(
    cell: Cell,
    sizes: Sizes,
    tensors: Sequence[Tensor],
    biases: Sequence[Tensor],
    needs: Sequence[bool],
    d: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """As `_backward`, from the formula: whatever d is, and to be differentiated again."""
    batch, inputs, hidden, layers, parameters, _, _ = sizes
    first = cell.states + 1
    given = [*tensors[:first]]
    for k in range(layers):
        given += tensors[first + 2 * k : first + 2 * k + 2]
        given += biases[2 * k : 2 * k + 2]
    with without_autocast(given[0].device), torch.enable_grad():
        alias = aliases(given)
        y = alias[0].reshape(1, batch, inputs)
        ends = []
        for k in range(layers):
            own = alias[first + parameters * k :][:parameters]
            s0 = torch.stack([s[k] for s in alias[1:first]])
            weights = own if parameters > 2 else [*own, None, None]
            y, _, last = composite(cell, (y, *weights, s0), NO_MASKS, (False,), 0)
            ends.append(last)
        columns = [torch.stack(column) for column in zip(*ends)]
        y = y.reshape(*given[0].shape[:2], hidden)
        return differentiate((y, *columns), d, alias, needs)
