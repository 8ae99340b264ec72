"""The recurrence in plain NumPy, forward and backward, step after step: to be read first, and what
the other backends can be compared with. The same code runs on CuPy arrays.

Rows are those of `types.Layout`: step t has the sizes[t] rows that follow those of step t - 1, one
for each sequence that still runs, the longest first. A sequence keeps its state past its end.
Tensors are contiguous, of one floating-point dtype and device."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from .cells import Cell, bind
from .plan import Plan
from .types import Gradients, Layout, OutputGrads, Outputs, States, Weights

Array = Any
_TYPES = {torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.bool: "b1"}


class Step(NamedTuple):
    """One step of one recurrence. `before` are the rows of the step before it, in the order of the
    recurrence, for those of its sequences that ran in it; the others begin here, from s0."""

    size: int
    rows: slice
    before: slice
    # [size, 1]: the sequences whose incoming state is reset
    reset: Array | None


def forward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
) -> None:
    """Writes `outputs`, for x [R, I], or without w_ih the pre-activations [R, N*G*H], and s0, S
    tensors [N, B, H], zeros if None."""
    w_ih, w_hh, b_ih, b_hh = weights
    y, others, last, saved = outputs
    xp = _library(plan)
    function = _on_arrays(cell.forward, xp)
    G = cell.gates
    S = cell.states
    H = w_hh.shape[1]
    x, w_ih, w_hh, b_ih, b_hh, y = _arrays(xp, x, w_ih, w_hh, b_ih, b_hh, y)
    states = [y, *_split(xp, others)]
    activations = _split(xp, saved)
    zeros = xp.zeros((layout.sequences, H), x.dtype)
    s0_arrays = _arrays(xp, *(s0 or (None,) * S))
    for n in range(len(layout.reverse)):
        units = slice(n * H, (n + 1) * H)
        gates = slice(n * G * H, (n + 1) * G * H)
        # A copy: products with it are faster than with the view.
        w_t = xp.ascontiguousarray(w_hh[gates].T)
        x_all = x[:, gates] if w_ih is None else x @ w_ih[gates].T
        r_bias = None
        if b_ih is not None:
            x_all += b_ih[gates]
            if cell.split:
                r_bias = b_hh[gates]
            else:
                # The cell takes nothing but x + r.
                x_all += b_hh[gates]
        x_all = _by_gates(x_all, G)
        s = _of_recurrence(n, s0_arrays, zeros)
        for step in _steps(xp, layout, n):
            s_prev = _cut(xp, step, [state[: step.size] for state in s], cell.carried)
            r = s_prev[0] @ w_t
            if r_bias is not None:
                r += r_bias
            s_next, a = function(x_all[:, step.rows], _by_gates(r, G), s_prev)
            _write([state[step.rows, units] for state in states], s_next)
            _write([activation[step.rows, units] for activation in activations], a)
            s = _with_ended(xp, s_next, s)
        _write([state[n] for state in _arrays(xp, *last)], s)


def backward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    grads: OutputGrads,
    gradients: Gradients[Tensor | None],
) -> None:
    """The adjoint of `forward`. Writes those of `gradients` that are not None; with more than one
    recurrence it adds to that of x."""
    y, others, _, saved = outputs
    xp = _library(plan)
    function = _on_arrays(cell.backward, xp)
    G = cell.gates
    H = weights.w_hh.shape[1]
    x, w_ih, w_hh, y, dy = _arrays(xp, x, weights.w_ih, weights.w_hh, y, grads.y)
    dx, *dweights = _arrays(xp, gradients.x, *gradients.of_weights())
    states = [y, *_split(xp, others)]
    activations = _split(xp, saved)
    d_states = [dy, *_split(xp, grads.states)]
    zeros = xp.zeros((layout.sequences, H), x.dtype)
    s0_arrays = _arrays(xp, *(s0 or (None,) * cell.states))
    ds_last = _arrays(xp, *(grads.last or (None,) * cell.states))
    for n in range(len(layout.reverse)):
        units = slice(n * H, (n + 1) * H)
        gates = slice(n * G * H, (n + 1) * G * H)
        s_initial = _of_recurrence(n, s0_arrays, zeros)
        ds = _of_recurrence(n, ds_last, zeros)
        # The h that enters each step, and the gradients of the pre-activations x and r.
        h_all = xp.empty((len(x), H), x.dtype)
        dx_all = xp.empty((len(x), G * H), x.dtype)
        dr_all = xp.empty_like(dx_all) if cell.split else dx_all
        for step in reversed(_steps(xp, layout, n)):
            s_before = [state[step.before, units] for state in states]
            s_prev = _cut(xp, step, _with_begun(xp, step, s_before, s_initial), cell.carried)
            s_next = [state[step.rows, units] for state in states]
            a = [activation[step.rows, units] for activation in activations]
            ds_next = [d[: step.size] for d in ds]
            for k, d in enumerate(d_states):
                if d is not None:
                    ds_next[k] = ds_next[k] + d[step.rows, units]
            dx_step, dr_step, ds_prev = function(a, s_prev, s_next, ds_next)
            h_all[step.rows] = s_prev[0]
            _write(_by_gates(dx_all[step.rows], G), dx_step)
            if cell.split:
                _write(_by_gates(dr_all[step.rows], G), dr_step)
            dh_prev = ds_prev[0] + dr_all[step.rows] @ w_hh[gates]
            ds = _with_ended(xp, _cut(xp, step, [dh_prev, *ds_prev[1:]], cell.carried), ds)
        _write([d[n] for d in _arrays(xp, *(gradients.s0 or ()))], ds)
        if dx is not None:
            _write_input_grad(dx, dx_all, w_ih, gates, alone=len(layout.reverse) == 1)
        # Accumulated in float64 at least: sums over many rows lose digits.
        sums = xp.result_type(x, "f8")
        own = [None if d is None else d[gates] for d in dweights]
        _write_weight_grads(own, x, h_all, dx_all, dr_all, sums)


def _write_input_grad(dx: Any, dx_all: Any, w_ih: Any, gates: slice, alone: bool) -> None:
    """Of one recurrence: adds to that of x, which is the pre-activations' own without `w_ih`."""
    if w_ih is None:
        dx[:, gates] = dx_all
    elif alone:
        dx[...] = dx_all @ w_ih
    else:
        dx += dx_all @ w_ih[gates]


def _write_weight_grads(
    dweights: Sequence[Array | None],
    x: Array,
    h_all: Array,
    dx_all: Array,
    dr_all: Array,
    sums: Any,
) -> None:
    """Of one recurrence: w_ih, w_hh, b_ih, b_hh. Biases are summed in the dtype `sums`."""
    dw_ih, dw_hh, db_ih, db_hh = dweights
    if dw_ih is not None:
        dw_ih[...] = dx_all.T @ x
    if dw_hh is not None:
        dw_hh[...] = dr_all.T @ h_all
    if db_ih is not None:
        db_ih[...] = dx_all.sum(0, dtype=sums)
    if db_hh is not None:
        db_hh[...] = dr_all.sum(0, dtype=sums)


def _write(targets: Sequence[Array], values: Sequence[Array]) -> None:
    """Each value into the view at its place; there may be fewer targets."""
    for target, value in zip(targets, values):
        target[...] = value


def _steps(xp: Any, layout: Layout, n: int) -> list[Step]:
    """The steps of recurrence n, in its order."""
    T = layout.steps
    sizes = layout.sizes
    back = bool(layout.reverse[n])
    first_rows = [*accumulate(sizes, initial=0)]
    has_reset = [] if layout.resets is None else layout.resets.any(1).tolist()
    (resets,) = _arrays(xp, layout.resets)
    steps = []
    for t in reversed(range(T)) if back else range(T):
        t_before = t + 1 if back else t - 1
        ran = min(sizes[t], sizes[t_before]) if 0 <= t_before < T else 0
        row_before = first_rows[t_before] if ran else 0
        before = slice(row_before, row_before + ran)
        # resets[t] lies between t - 1 and t
        boundary = t + back
        reset = None
        if has_reset and boundary < T and has_reset[boundary]:
            # Past a sequence's end nothing is reset.
            running = min(sizes[t], sizes[boundary])
            reset = xp.zeros((sizes[t], 1), bool)
            reset[:running, 0] = resets[boundary, :running]
        steps.append(Step(sizes[t], slice(first_rows[t], first_rows[t + 1]), before, reset))
    return steps


def _cut(xp: Any, step: Step, states: Sequence[Array], carried: int) -> Sequence[Array]:
    """The states that enter a step, or their gradients, cut at the resets, but for constants."""
    if step.reset is None:
        return states
    cut = [xp.where(step.reset, 0, state) for state in states[:carried]]
    return [*cut, *states[carried:]]


def _with_begun(
    xp: Any, step: Step, s_before: Sequence[Array], s_initial: Sequence[Array]
) -> Sequence[Array]:
    """The states after the step before, and the initial ones of the sequences that begin now."""
    ran = len(s_before[0])
    if ran == step.size:
        return s_before
    return [xp.concatenate((s, s0[ran : step.size])) for s, s0 in zip(s_before, s_initial)]


def _with_ended(xp: Any, running: Sequence[Array], every: Sequence[Array]) -> Sequence[Array]:
    """New states of running sequences, old states of ended ones."""
    size = len(running[0])
    if size == len(every[0]):
        return running
    return [xp.concatenate((new, old[size:])) for new, old in zip(running, every)]


def _of_recurrence(n: int, states: Sequence[Array | None], zeros: Array) -> Sequence[Array]:
    """States of recurrence n, or their gradients: [B, H] of [N, B, H]; zeros for None."""
    return [zeros if state is None else state[n] for state in states]


def _by_gates(array: Array, G: int) -> Array:
    """[R, G*H] as a view [G, R, H]."""
    return array.reshape(len(array), G, array.shape[1] // G).swapaxes(0, 1)


@lru_cache
def _on_arrays(function: Callable[..., Any], xp: Any) -> Callable[..., Any]:
    """A cell's forward or backward, on arrays of that library."""
    return bind(
        function,
        tanh=xp.tanh,
        # no overflow, and faster than by exp
        sigmoid=lambda v: xp.tanh(v * 0.5) * 0.5 + 0.5,
        relu=lambda v: xp.maximum(v, 0),
        exp=xp.exp,
        relu_grad=lambda d, y: xp.where(y <= 0, 0, d),
        clamp=lambda v, limit: xp.clip(v, -limit, limit),
        # It cuts the gradient, in the adjoint.
        clip_grad=lambda v, limit: v,
        row_mean=lambda v: v.mean(-1, keepdims=True),
        rsqrt=lambda v: 1 / xp.sqrt(v),
        zeros_like=xp.zeros_like,
    )


class _Borrowed:
    """A tensor as NumPy (the first method) and CuPy (the others) take it, to be read and written.

    `Tensor.numpy` would forbid the tensor's storage to be resized, as FSDP has to."""

    def __init__(self, tensor: Tensor) -> None:
        # It lives as long as the array.
        self.tensor = tensor

    @property
    def __array_interface__(self) -> dict[str, Any]:
        shape = tuple(self.tensor.shape)
        kind = f"={_TYPES[self.tensor.dtype]}"
        return dict(version=3, shape=shape, typestr=kind, data=(self.tensor.data_ptr(), False))

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.tensor.get_device()) if self.tensor.is_cuda else (1, 0)


def _library(plan: Plan) -> Any:
    return import_module("cupy" if plan.backend == "cupy" else "numpy")


def _array(xp: Any, t: Tensor) -> Array:
    """The tensor's memory. Raises RuntimeError where the library cannot have it."""
    refused = f'The plan "{xp.__name__}" cannot take a tensor of {t.dtype} on {t.device}'
    if xp.__name__ == "cupy":
        try:
            return xp.from_dlpack(_Borrowed(t))
        except TypeError as error:
            raise RuntimeError(refused) from error
    if not t.is_cpu or t.dtype not in _TYPES:
        raise RuntimeError(refused)
    if not t.numel():
        # NumPy 2.0 does not take a null pointer.
        return xp.zeros(tuple(t.shape), _TYPES[t.dtype])
    if not t.data_ptr():
        raise RuntimeError("Expected a tensor whose data is allocated")
    return xp.asarray(_Borrowed(t))


def _arrays(xp: Any, *tensors: Any) -> list[Any]:
    return [None if t is None else _array(xp, t) for t in tensors]


def _split(xp: Any, stacked: Tensor | None) -> list[Array]:
    """By the first dimension; none of None."""
    return [] if stacked is None else [*_array(xp, stacked)]
