"""One step of a stack of layers on the CPU, as in streaming and decoding, all layers in one call:
the whole path.

In C++, with gradients and without, in float32 and float64; where that cannot be had, by torch's own
operators, as torch.nn does it. What is not a plain tensor is left to the general path of the
layers. Gradients that are to be differentiated again come from the differentiable formula."""

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from . import dispatch
from .autograd import check_versions, to_dense, versions
from .boundary import PLAIN, ready
from .composite import aliases, composite, differentiate
from .kernels.cells import Cell
from .kernels.cpu import native
from .kernels.cpu.workspace import scratch
from .kernels.plan import STEP_PRODUCT
from .transforms import active_transform, any_autocast, needs_composite, traced, without_autocast

# A tensor of each dtype of the C++, for what is to be like it.
_LIKE = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in native.NUMBERS}
# What the C++ is told: B, I, H, L, how many parameters a layer has, and threads.
Sizes = tuple[int, int, int, int, int, int]


@lru_cache(1024)
def _shapes(
    cell: Cell, x: tuple[int, ...], batch: int, hidden: int, layers: int, parameters: int
) -> list[tuple[int, ...]]:
    """Of x, the states, and w_ih, w_hh (and b_ih, b_hh) of each layer."""
    gates = cell.gates * hidden
    found = [x, *[(layers, batch, hidden)] * cell.states]
    for layer in range(layers):
        found += [
            (gates, hidden if layer else x[2]),
            (gates, hidden),
            *[(gates,)] * (parameters - 2),
        ]
    return found


@lru_cache
def _pack(struct_type: type, states: int, before: int, after: int) -> Callable[..., bytes]:
    """For so many numbers before those of StepSizes, and after them."""
    expected = native.words(struct_type, states) - native.words(native.StepSizes, states)
    if before != expected:
        raise RuntimeError(f"{struct_type.__name__} begins with {expected} pointers, got {before}")
    return struct.Struct(f"{before + len(native.StepSizes._fields) + after}q").pack


def _call(
    function: Any,
    struct_type: type,
    states: int,
    before: list[int],
    sizes: Sizes,
    after: list[int],
    dtype: torch.dtype,
) -> None:
    """Calls it with that struct of native.py, whose pointers are `before`, but for memory, and with
    the pointers `after` it."""
    pack = _pack(struct_type, states, len(before), len(after))
    needed = function(pack(*before, 0, 0, *sizes, *after))
    if needed:
        memory = scratch(_LIKE[dtype], needed)  # held while it is in use
        function(pack(*before, memory.data_ptr(), needed, *sizes, *after))


class _Pointers(NamedTuple):
    """The addresses of tensors, the contiguous copies that some of these are of, and whether a
    gradient is wanted."""

    addresses: list[int]
    copies: list[Tensor]
    train: bool


def _pointers(
    given: Sequence[Any], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> _Pointers | None:
    """None where a tensor is not a plain one of that shape and dtype on the CPU, with all of its
    memory. May raise RuntimeError for one that has none."""
    addresses = []
    copies = []
    grad = torch.is_grad_enabled()
    train = False
    for t, size in zip(given, shapes):
        # A parametrized weight is None.
        if type(t) not in PLAIN or t.dtype is not dtype or t.size() != size:
            return None
        if t.is_neg() or not t.is_cpu:
            return None
        if grad and t.requires_grad:
            train = True
        if not t.is_contiguous():
            t = ready([t])[0]
            copies.append(t)
        offset = t.storage_offset()
        address = t.data_ptr()
        if t.untyped_storage().nbytes() < t.nbytes + t.itemsize * offset:
            return None
        if (offset or not address) and t._is_zerotensor():
            return None
        addresses.append(address)
    return _Pointers(addresses, copies, train)


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
    if active_transform() or traced() or has_torch_function_unary(x) or any_autocast():
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
    shapes = _shapes(cell, shape, batch, hidden, layers, parameters)
    try:
        pointers = _pointers(given, shapes, dtype)
    except RuntimeError:  # a sparse tensor, or another that has no memory
        return None
    if pointers is None:
        return None
    if not dispatch.native_available(cell, dtype):
        operator = dispatch.OPERATORS.get(cell)
        if operator is None or (dtype is not torch.float32 and dtype is not torch.float64):
            return None
        first = states if count > 1 else states[0]
        y, *last = operator(
            x, first, weights, parameters > 2, layers, 0.0, False, False, batch_first
        )
        return y, tuple(last) if count > 1 else last[0]
    large = batch * cell.gates * hidden * (hidden + shape[2]) > STEP_PRODUCT
    sizes = batch, shape[2], hidden, layers, parameters, native.threads() if large else 1
    if pointers.train:
        y, *last = _apply(cell, sizes, pointers.addresses, *given)
    else:
        y, last, _ = _forward(cell, sizes, pointers.addresses, x, False)
    return y, tuple(last) if count > 1 else last[0]


def _forward(
    cell: Cell, sizes: Sizes, addresses: list[int], x: Tensor, save: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """y, the last states, and for the adjoint [L, A+S, B, H] the activations and the states once
    more: what is returned may be edited in place. `addresses` are of x, the states and the
    parameters."""
    batch, _, hidden, layers, _, _ = sizes
    first = cell.states + 1
    h = x.new_empty(layers, batch, hidden)
    last = [h] if first == 2 else [h, *[torch.empty_like(h) for _ in range(first - 2)]]
    shape = x.size()
    if layers == 1 and shape[0] == 1:
        y = torch.empty_like(h)
    else:
        y = x.new_empty(shape[0], shape[1], hidden)
    saved = x.new_empty(layers, cell.saved + cell.states, batch, hidden) if save else None
    results = [
        y.data_ptr(),
        *[s.data_ptr() for s in last],
        0 if saved is None else saved.data_ptr(),
    ]
    before = addresses[:first] + results
    function = native.load(cell, x.dtype).step
    _call(function, native.Step, cell.states, before, sizes, addresses[first:], x.dtype)
    return y, last, saved


class _SingleStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, sizes: Sizes, addresses: list[int], *given: Any
    ) -> tuple[Tensor, ...]:
        y, last, saved = _forward(cell, sizes, addresses, given[0], True)
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
        needs = ctx.needs_input_grad[3:]
        if needs_composite(d) or not all(t is None or type(t) is Tensor for t in d):
            check_versions(ctx.biases, ctx.versions)
            found = _differentiable(cell, sizes, tensors[:-1], ctx.biases, needs, d)
        else:
            found = _backward(cell, sizes, dtype, tensors, needs, d)
        return None, None, None, *found


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
    _call(function, native.StepAdjoint, cell.states, before, sizes, after, dtype)
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
    batch, inputs, hidden, layers, parameters, _ = sizes
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
            y, _, last = composite(cell, (y, *weights, s0), (None, None, None), (False,), 0)
            ends.append(last)
        columns = [torch.stack(column) for column in zip(*ends)]
        y = y.reshape(*given[0].shape[:2], hidden)
        return differentiate((y, *columns), d, alias, needs)
