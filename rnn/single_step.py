"""One step of a stack of layers on the CPU, as in streaming and decoding, all layers in one call: the whole path.

In C++, with gradients and without; where that cannot be had, by torch's own operators, as torch.nn does it. What is not
a plain tensor is left to the general path of the layers. Gradients that are to be differentiated again come from the
differentiable formula."""

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import compute, ops
from .kernels import native
from .kernels.cells import Cell
from .kernels.memory import working
from .kernels.plan import STEP_PRODUCT

_TORCHS: Any = torch._VF
_FREED = "A tensor that the gradient needs has a storage that was freed, or that is smaller than its shape says"
_EDITED = "A bias, which gradients that are to be differentiated again need, has been modified by an inplace operation"


class _Sizes(NamedTuple):
    """What the C++ is told, in its order."""

    batch: int
    inputs: int
    hidden: int
    layers: int
    threads: int


@lru_cache
def _shapes(cell: Cell, inputs: int, hidden: int, layers: int, biased: bool) -> list[tuple[int, ...]]:
    """Of the weights: w_ih, w_hh (and b_ih, b_hh) of each layer."""
    gates = cell.gates * hidden
    biases = [(gates,)] * 2 if biased else []
    found: list[tuple[int, ...]] = []
    for layer in range(layers):
        found += [(gates, hidden if layer else inputs), (gates, hidden), *biases]
    return found


def _missing(t: Tensor) -> bool:
    """Whether a contiguous tensor lies in less memory than its shape says."""
    return t.untyped_storage().nbytes() < t.element_size() * (t.storage_offset() + t.numel())


def single_step(cell: Cell, x: Tensor, hx: Any, weights: Sequence[Any], layers: int, hidden: int,
                batch_first: bool) -> Any:
    """What a layer returns for x [1, B, I], or [B, 1, I] if `batch_first`, from its parameters, w_ih, w_hh (and b_ih,
    b_hh) of each layer. None where the general path has to look at it."""
    if ops._transformed() or ops._traced() or torch._C._is_any_autocast_enabled():
        return None
    shape = x.shape
    inputs = shape[2]
    batch = shape[0] if batch_first else shape[1]
    biased = len(weights) > 2 * layers
    before = layers, batch, hidden
    if hx is None:
        states = [x.new_zeros(before)] * cell.states
    elif cell.states == 1:
        states = [hx]
    else:
        states = hx
    if not isinstance(states, (list, tuple)) or len(states) != cell.states:
        return None
    expected = [shape, *[before] * cell.states, *_shapes(cell, inputs, hidden, layers, biased)]
    dtype = x.dtype
    given = [x, *states, *weights]
    ready = []
    train = False
    for t, size in zip(given, expected):
        kind = type(t)  # a parametrized weight is None
        if (
            (kind is not Tensor and kind is not Parameter)
            or t.dtype is not dtype
            or not t.is_cpu
            or t.layout is not torch.strided
            or t.is_neg()
            or t.shape != size
        ):
            return None
        train = train or t.requires_grad
        ready.append(t if t.is_contiguous() else t.contiguous())
    train = train and torch.is_grad_enabled()
    if dtype is not torch.float32 or not compute.compiles(cell):
        if dtype is not torch.float32 and dtype is not torch.float64:
            return None
        after = states if cell.states > 1 else states[0]
        return getattr(_TORCHS, cell.name)(x, after, weights, biased, layers, 0.0, False, False, batch_first)
    if any(map(_missing, ready)) or not batch:
        return None
    products = batch * cell.gates * hidden * (hidden + inputs)
    sizes = _Sizes(batch, inputs, hidden, layers, native.threads() if products > STEP_PRODUCT else 1)
    if train:
        y, *last = _apply(cell, sizes, biased, ready, *given)
    else:
        y, last, _ = _forward(cell, sizes, biased, ready, False)
    return y, tuple(last) if cell.states > 1 else last[0]


def _call(function: Any, like: Tensor, before: Sequence[int], after: Sequence[int]) -> None:
    """Calls it with a struct of single_step.cpp, `before` and `after` being what is around its memory."""
    memory = working(like, 1)
    layout = f"{len(before) + len(after) + 2}q"
    needed = function(struct.pack(layout, *before, memory.data_ptr(), memory.numel(), *after))
    if needed:
        memory = working(like, needed)
        function(struct.pack(layout, *before, memory.data_ptr(), memory.numel(), *after))


def _forward(cell: Cell, sizes: _Sizes, biased: bool, ready: Sequence[Tensor],
             save: bool) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """y, the last states, and for the adjoint [L, A+S, B, H] the activations and the states once more: what is returned
    may be edited in place."""
    x, *rest = ready
    states = rest[: cell.states]
    y = x.new_empty((*x.shape[:2], sizes.hidden))
    last = [torch.empty_like(s) for s in states]
    saved = None
    if save:
        saved = x.new_empty((sizes.layers, cell.saved + cell.states, sizes.batch, sizes.hidden))
    addresses = [t.data_ptr() for t in ready]
    first = cell.states + 1
    weights = addresses[first:]
    if not biased:
        pairs = zip(weights[::2], weights[1::2])
        weights = [address for pair in pairs for address in (*pair, 0, 0)]
    results = [y.data_ptr(), *[s.data_ptr() for s in last], 0 if saved is None else saved.data_ptr()]
    _call(native.load(cell).step, x, [*addresses[:first], *results], [*sizes, *weights])
    return y, last, saved


class _SingleStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        cell, sizes, biased, ready, *given = inputs
        y, last, saved = _forward(cell, sizes, biased, ready, True)
        first = cell.states + 1
        weights = given[first:]
        biases = []
        if biased:
            biases = [b for k in (2, 3) for b in weights[k::4]]
            weights = [w for pair in zip(weights[::4], weights[1::4]) for w in pair]
        ctx.save_for_backward(*given[:first], *weights, saved)
        # The adjoint is without biases: they may be edited, unless it is to be differentiated itself.
        ctx.biases = [(b, None if b.is_inference() else b._version) for b in biases]
        ctx.choices = cell, sizes
        ctx.set_materialize_grads(False)
        return y, *last

    @staticmethod
    def backward(ctx: Any, *d: Any) -> tuple[Any, ...]:
        cell, sizes = ctx.choices
        *given, saved = ctx.saved_tensors  # once: hooks would unpack them once more
        needs = ctx.needs_input_grad[4:]
        again = torch.is_grad_enabled() or ops._transformed()
        if again or any(t is not None and (type(t) is not Tensor or ops._batched(t)) for t in d):
            found = _differentiable(cell, sizes, given, ctx.biases, needs, d)
        else:
            found = _backward(cell, sizes, [_ready(t) for t in given], _ready(saved), needs, d)
        return None, None, None, None, *found


# Function.apply without its preparations for transforms, of which there is none here.
_apply: Any = super(torch.autograd.Function, _SingleStep).apply


def _ready(t: Tensor) -> Tensor:
    """As the C++ takes it."""
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    if t.is_neg() or not t.is_contiguous():
        t = t.resolve_neg().contiguous()
    if _missing(t):
        raise RuntimeError(_FREED)
    return t


def _by_layer(cell: Cell, sizes: _Sizes, given: Sequence[Any]) -> list[Any]:
    """What follows x and the states, by layers."""
    weights = given[cell.states + 1 :]
    each = len(weights) // sizes.layers
    return [weights[k : k + each] for k in range(0, len(weights), each)]


def _backward(cell: Cell, sizes: _Sizes, given: Sequence[Tensor], saved: Tensor, needs: Sequence[bool],
              d: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of x, the states and the weights, those that are needed, from those of y and the last states.
    `given` is without biases."""
    x = given[0]
    first = cell.states + 1
    wanted = [None if t is None else _ready(t) for t in d]
    grads: list[Tensor | None] = [torch.empty_like(t) if need else None for t, need in zip(given[:first], needs)]
    pointers = []
    for (w_ih, w_hh), own in zip(_by_layer(cell, sizes, given), _by_layer(cell, sizes, needs)):
        bias = w_hh.shape[:1]
        found = [torch.empty_like(w) if need else None for w, need in zip((w_ih, w_hh), own)]
        found += [x.new_empty(bias) if need else None for need in own[2:]]
        grads += found
        pointers += [w_ih, w_hh, *found, *[None] * (4 - len(found))]
    before = [*given[:first], saved, *wanted, *grads[:first]]
    _call(native.load(cell).step_backward, x, _addresses(before), [*sizes, *_addresses(pointers)])
    return grads


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _differentiable(cell: Cell, sizes: _Sizes, given: Sequence[Tensor], biases: Sequence[tuple[Tensor, int | None]],
                    needs: Sequence[bool], d: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As `_backward`, from the formula: whatever d is, and to be differentiated again."""
    if any(version is not None and b._version != version for b, version in biases):
        raise RuntimeError(_EDITED)
    first = cell.states + 1
    every: list[Any] = [*given[:first]]
    b_ih = biases[: sizes.layers]
    b_hh = biases[sizes.layers :]
    for k, weights in enumerate(_by_layer(cell, sizes, given)):
        every += weights
        if biases:
            every += [b_ih[k][0], b_hh[k][0]]
    autocast = torch._C._is_any_autocast_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        # Aliases, so that an input which was computed from another one counts for itself alone.
        alias = [t.view_as(t) for t in every]
        y = alias[0].reshape(1, sizes.batch, sizes.inputs)
        ends = []
        for k, own in enumerate(_by_layer(cell, sizes, alias)):
            w_ih, w_hh, b_ih, b_hh = own if biases else (*own, None, None)
            s0 = torch.stack([s[k] for s in alias[1:first]])
            y, _, last = compute.formula(cell, (y, w_ih, w_hh, b_ih, b_hh, s0), (None, None, None), (False,), 0)
            ends.append(last)
        columns = [torch.stack(column) for column in zip(*ends)]
        outputs = [y.reshape(*given[0].shape[:2], sizes.hidden), *columns]
        pairs = [(t, grad) for t, grad in zip(outputs, d) if grad is not None]
        wanted = [t for t, need in zip(alias, needs) if need]
        found = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [grad for _, grad in pairs],
                                         create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
