"""The recurrence in plain NumPy, forward and backward, one step after another: what a newcomer reads first, and what
the other backends can be compared with. CuPy's arrays take the same way.

Rows are those of `plan.Rows`: step t has the sizes[t] rows that follow those of step t - 1, one for each sequence that
still runs, the longest sequences first. A sequence keeps its state past its end. Tensors are contiguous, of one
floating-point dtype and device, and are read and written in place."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import Cell, bind
from .plan import Plan, Rows

Array = Any
_TYPES = {torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.bool: "b1"}


class Step(NamedTuple):
    """One step of one recurrence."""

    size: int  # sequences that run in it
    rows: slice  # their rows
    # The rows of the step before it, in the order of the recurrence, of those that ran then; the others come from s0.
    before: slice
    reset: Array | None  # [size, 1] whose state is 0 when it comes in


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, first: Sequence[Tensor] | None, y: Tensor, others: Tensor | None,
            saved: Tensor | None, last: Sequence[Tensor]) -> None:
    """Writes y [R, N*H], S states `last` [N, B, H], and where they are given the other states [S-1, R, N*H] and the
    activations [A, R, N*H]; the rest as in `cpu.forward`."""
    xp = _library(plan)
    function = _on_arrays(cell.forward, xp)
    G = cell.gates
    H = w_hh.shape[1]
    x, w_ih, w_hh, b_ih, b_hh, y = _arrays(xp, x, w_ih, w_hh, b_ih, b_hh, y)
    kept = [y, *_each(xp, others)]
    activations = _each(xp, saved)
    s0 = _arrays(xp, *(first or [None] * cell.states))
    zeros = xp.zeros((rows.sequences, H), x.dtype)
    for n in range(len(rows.reverse)):
        units = slice(n * H, (n + 1) * H)
        gates = slice(n * G * H, (n + 1) * G * H)
        w_t = xp.ascontiguousarray(w_hh[gates].T)
        x_n = x @ w_ih[gates].T  # pre-activations of all steps
        r_bias = None
        if b_ih is not None:
            x_n += b_ih[gates]
            if cell.split:
                r_bias = b_hh[gates]
            else:  # x and r meet only as x + r
                x_n += b_hh[gates]
        x_n = _by_gates(x_n, G)  # [G, R, H]
        s = _states(s0, n, zeros)
        for step in _steps(xp, rows, n):
            s_prev = _drop(xp, step, [state[: step.size] for state in s])
            r = s_prev[0] @ w_t
            if r_bias is not None:
                r += r_bias
            s_next, a = function(x_n[:, step.rows], _by_gates(r, G), s_prev)
            for to, value in zip((*kept, *activations), (*s_next[: len(kept)], *a)):
                to[step.rows, units] = value
            s = _with_ended(xp, s_next, s)
        for to, value in zip(_arrays(xp, *last), s):
            to[n] = value


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, first: Sequence[Tensor] | None,
             y: Tensor, others: Tensor | None, saved: Tensor | None, dy: Tensor | None, dothers: Tensor | None,
             dlast: Sequence[Tensor | None] | None, dfirst: Sequence[Tensor] | None,
             grads: Sequence[Tensor | None]) -> None:
    """The adjoint of `forward`. Writes `dfirst`, the gradients of the first states, and `grads`, those of x, w_ih, w_hh,
    b_ih and b_hh, where they are not None; with more than one recurrence adds to that of x."""
    xp = _library(plan)
    function = _on_arrays(cell.backward, xp)
    G = cell.gates
    H = w_hh.shape[1]
    x, w_ih, w_hh, y, dy = _arrays(xp, x, w_ih, w_hh, y, dy)
    dx_sum, dw_ih, dw_hh, db_ih, db_hh = _arrays(xp, *grads)
    kept = [y, *_each(xp, others)]
    activations = _each(xp, saved)
    s0 = _arrays(xp, *(first or [None] * cell.states))
    ds_last = _arrays(xp, *(dlast or [None] * cell.states))
    zeros = xp.zeros((rows.sequences, H), x.dtype)
    dkept = [dy, *(_each(xp, dothers) or [None] * (cell.states - 1))]
    for n in range(len(rows.reverse)):
        units = slice(n * H, (n + 1) * H)
        gates = slice(n * G * H, (n + 1) * G * H)
        w = w_hh[gates]
        s_first = _states(s0, n, zeros)
        ds = _states(ds_last, n, zeros)  # of the states after a step
        h_prev = xp.empty((len(x), H), x.dtype)
        dx = xp.empty((len(x), G * H), x.dtype)
        dr = xp.empty_like(dx) if cell.split else dx
        for step in reversed(_steps(xp, rows, n)):
            s_prev = _drop(xp, step, _came_in(xp, step, [state[step.before, units] for state in kept], s_first))
            s_next = [state[step.rows, units] for state in kept]
            a = [activation[step.rows, units] for activation in activations]
            ds_next = [d[: step.size] for d in ds]
            for k, given in enumerate(dkept):
                if given is not None:
                    ds_next[k] = ds_next[k] + given[step.rows, units]
            dx_step, dr_step, ds_prev = function(a, s_prev, s_next, ds_next)
            h_prev[step.rows] = s_prev[0]
            for to, value in zip(_by_gates(dx[step.rows], G), dx_step):
                to[...] = value
            if cell.split:
                for to, value in zip(_by_gates(dr[step.rows], G), dr_step):
                    to[...] = value
            dh_prev = ds_prev[0] + dr[step.rows] @ w
            ds = _with_ended(xp, _drop(xp, step, [dh_prev, *ds_prev[1:]]), ds)
        for to, value in zip(_arrays(xp, *(dfirst or ())), ds):
            to[n] = value
        if dx_sum is not None and len(rows.reverse) > 1:
            dx_sum += dx @ w_ih[gates]
        elif dx_sum is not None:
            dx_sum[...] = dx @ w_ih
        if dw_ih is not None:
            dw_ih[gates] = dx.T @ x
        if dw_hh is not None:
            dw_hh[gates] = dr.T @ h_prev
        if db_ih is not None:
            db_ih[gates] = dx.sum(0)
        if db_hh is not None:
            db_hh[gates] = dr.sum(0)


def _steps(xp: Any, rows: Rows, n: int) -> list[Step]:
    """Those of recurrence n, in its order."""
    T = rows.steps
    back = bool(rows.reverse[n])
    starts = [*accumulate(rows.sizes, initial=0)]
    drops = [] if rows.resets is None else rows.resets.any(1).tolist()
    (resets,) = _arrays(xp, rows.resets)
    steps = []
    for t in reversed(range(T)) if back else range(T):
        size = rows.sizes[t]
        t_before = t + 1 if back else t - 1
        ran = min(size, rows.sizes[t_before]) if 0 <= t_before < T else 0
        before = slice(starts[t_before], starts[t_before] + ran) if ran else slice(0, 0)
        boundary = t + back  # resets[t] is between t - 1 and t
        reset = None
        if drops and boundary < T and drops[boundary]:
            reset = xp.zeros((size, 1), bool)
            running = min(size, rows.sizes[boundary])  # past an end nothing is reset
            reset[:running, 0] = resets[boundary, :running]
        steps.append(Step(size, slice(starts[t], starts[t + 1]), before, reset))
    return steps


def _came_in(xp: Any, step: Step, ran: Sequence[Array], s0: Sequence[Array]) -> Sequence[Array]:
    """The states before a step, of those that ran before it and, from s0, of those that did not."""
    count = len(ran[0])
    if count == step.size:
        return ran
    return [xp.concatenate((state, start[count : step.size])) for state, start in zip(ran, s0)]


def _drop(xp: Any, step: Step, states: Sequence[Array]) -> Sequence[Array]:
    """The states, or their gradients, on the other side of the reset that a step begins with."""
    return states if step.reset is None else [xp.where(step.reset, 0, state) for state in states]


def _with_ended(xp: Any, running: Sequence[Array], every: Sequence[Array]) -> Sequence[Array]:
    """What is new of the sequences that run, and what there was of the others."""
    size = len(running[0])
    if size == len(every[0]):
        return running
    return [xp.concatenate((new, old[size:])) for new, old in zip(running, every)]


def _states(given: Sequence[Any], n: int, zeros: Array) -> list[Array]:
    """Of recurrence n, S states or their gradients [B, H], from [N, B, H]; zeros where they are None."""
    return [zeros if state is None else state[n] for state in given]


def _by_gates(array: Array, G: int) -> Array:
    """[R, G*H] as a view [G, R, H]."""
    return array.reshape(len(array), G, array.shape[1] // G).swapaxes(0, 1)


@lru_cache
def _on_arrays(function: Callable[..., Any], xp: Any) -> Callable[..., Any]:
    """A cell's forward or backward, on arrays of that library."""
    return bind(function, tanh=xp.tanh, sigmoid=lambda x: xp.tanh(x * 0.5) * 0.5 + 0.5, zeros_like=xp.zeros_like,
                relu=lambda x: xp.maximum(x, 0), relu_grad=lambda d, y: xp.where(y <= 0, 0, d))


class _Borrowed:
    """A tensor as an array library takes it. (`Tensor.numpy` would forbid its storage to be resized, as FSDP has to.)"""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # lives as long as the array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        t = self.tensor
        return dict(version=3, shape=tuple(t.shape), typestr=f"={_TYPES[t.dtype]}", data=(t.data_ptr(), False))

    def __dlpack__(self, **_: Any) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.tensor.get_device()) if self.tensor.is_cuda else (1, 0)


def _library(plan: Plan) -> Any:
    return import_module(plan.backend)


def _arrays(xp: Any, *tensors: Tensor | None) -> list[Any]:
    """The same memory as arrays; None stays. Raises RuntimeError for a tensor that the library cannot have."""
    return [None if t is None else _array(xp, t) for t in tensors]


def _each(xp: Any, stacked: Tensor | None) -> list[Array]:
    """The arrays of the first dimension of a tensor, none of None."""
    return [] if stacked is None else [*_array(xp, stacked)]


def _array(xp: Any, t: Tensor) -> Array:
    on_gpu = xp.__name__ == "cupy"
    try:
        if on_gpu:
            return xp.from_dlpack(_Borrowed(t))
        if t.is_cpu and not t.numel():  # NumPy 2.0 does not take a null pointer
            return xp.zeros(tuple(t.shape), _TYPES[t.dtype])
        if t.is_cpu:
            return xp.asarray(_Borrowed(t))
    except (TypeError, KeyError) as error:
        raise RuntimeError(f'The plan "{xp.__name__}" cannot take a tensor of {t.dtype} on {t.device}') from error
    raise RuntimeError(f'The plan "{xp.__name__}" is for tensors on the CPU, got {t.device}')
