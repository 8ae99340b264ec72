"""The operator: one layer, all its directions, the whole sequence. Only this file knows both the kernels and autograd.

`recurrence` takes one of three routes. Under vmap and forward-mode AD, and on devices and dtypes without a kernel: the
formula, in differentiable torch operations. While compiling, exporting or under a dispatch mode: custom operators, which
PyTorch does not look into (forward-mode AD must not come there: it would silently give 0). Else: an autograd.Function,
whose backward is the formula's where a graph of it is asked for, so that it can be differentiated again.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import compute
from .formula import formula, formula_vjp
from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import Plan

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    cell, plan, x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, resets, reverse, keep = inputs
    y, states, _, saved = output
    ctx.save_for_backward(x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, resets, y, states, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.choices = cell, plan, reverse


def _vjp(ctx: Any, dy: Tensor | None, dstates: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Any, ...]:
    *given, lengths, batch_sizes, resets, y, states, saved = ctx.saved_tensors
    (cell, plan, reverse), needs = ctx.choices, ctx.needs_input_grad[2:8]
    kept, d, rest = (y, states, saved), (dy, dstates, dlast), (lengths, batch_sizes, resets, reverse)
    if isinstance(cell, str) and _traced(y):
        grads = [g if need else None for g, need in zip(_backward_op(cell, plan, *given, *kept, *d, *rest, needs), needs)]
    elif torch.is_grad_enabled():
        grads = formula_vjp(_objects(cell, plan)[0], given, rest, d, needs)
    else:
        grads = compute.backward(*_objects(cell, plan), *given, *kept, *d, *rest, needs)
    return None, None, *grads, None, None, None, None, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:  # with a separate setup_context, apply would cost 60 us more
        output = compute.forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_vjp)


def _objects(cell: Any, plan: Any) -> tuple[Cell, Plan | None]:
    """From what the custom operators take, names and JSON."""
    return (getattr(cells, cell), Plan(*json.loads(plan)) if plan else None) if isinstance(cell, str) else (cell, plan)


_INPUTS = "str cell, str plan, Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor s0"
_ROWS = "Tensor? lengths, Tensor? batch_sizes, Tensor? resets, bool[] reverse"


@torch.library.custom_op("fused_rnn::forward", mutates_args=(), schema=f"({_INPUTS}, {_ROWS}, int keep) -> (Tensor, Tensor, Tensor, Tensor)")
def _forward_op(cell: str, plan: str, *rest: Any) -> Outputs:
    return compute.forward(*_objects(cell, plan), *rest)


@torch.library.custom_op("fused_rnn::backward", mutates_args=(), schema=f"({_INPUTS}, Tensor y, Tensor states, Tensor saved, "
                         f"Tensor? dy, Tensor? dstates, Tensor? dlast, {_ROWS}, bool[] needs) -> Tensor[]")
def _backward_op(cell: str, plan: str, x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(0) if g is None else g for g in compute.backward(*_objects(cell, plan), x, *rest)]


@_forward_op.register_fake
def _(cell: str, plan: str, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, s0: Tensor,
      lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, reverse: Sequence[bool], keep: int) -> Outputs:
    N, S, H = len(reverse), getattr(cells, cell).states, s0.shape[-1]
    rows = math.prod(x.shape[:-1])
    return (x.new_empty(*x.shape[:-1], N * H), x.new_empty(S - 1, rows if keep else 0, N * H), x.new_empty(s0.shape),
            x.new_empty(getattr(cells, cell).saved, rows if keep > 1 else 0, N * H))


@_backward_op.register_fake
def _(cell: str, plan: str, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, s0: Tensor, *rest: Any) -> list[Tensor]:
    shapes = x.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1], w_ih.shape[:1], s0.shape
    return [x.new_empty(shape if need else 0) for shape, need in zip(shapes, rest[-1])]


_forward_op.register_autograd(_vjp, setup_context=_setup)


def _traced(t: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(t) not in (Tensor, Parameter)


def recurrence(cell: Cell, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, s0: Tensor,
               lengths: Tensor | None = None, batch_sizes: Tensor | None = None, resets: Tensor | None = None,
               reverse: Sequence[bool] = (False,), keep: int = 0, plan: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """N recurrences over the same sequences, each in its own direction: one layer of an RNN.

    Args:
        cell: the algebra, `rnn.kernels.cells.rnn_tanh`, `rnn_relu`, `lstm`, `gru` or one of your own.
        x: [T, B, I], or [R, I] with `batch_sizes`. Floating point; all tensors are of its dtype and device.
        w_ih, w_hh: [N*G*H, I] and [N*G*H, H]; b_ih, b_hh: [N*G*H], both or neither.
        s0: [N*S, B, H], the states before the first step, those of each recurrence together.
        lengths: [B] integers in [0, T]. y and states are 0 past an end; a sequence's last state is that of its last
            step, of its first one in reverse, and s0 where it has none.
        batch_sizes: [T] int64 on the CPU, as in torch's PackedSequence, in place of lengths.
        resets: [T, B] bool; resets[t] is a boundary between t - 1 and t: a state that would cross it is 0 instead.
            resets[0] drops s0. In reverse a state crosses it from t to t - 1. Past an end nothing is reset.
        reverse: of each recurrence, whether it runs from the last step to the first.
        keep: 1 to have `states` returned.
        plan: how to compute it, if not as `make_plan` would.

    Returns:
        y [T, B, N*H] or [R, N*H], state 0 of every step; the other states [S-1, R, N*H] (no rows without `keep`); the
        last states [N*S, B, H].

    Raises:
        RuntimeError: a shape, dtype, device or length is not as above.
    """
    tensors = x, w_ih, w_hh, b_ih, b_hh, s0
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        with torch.autocast(x.device.type, enabled=False):
            return recurrence(cell, *cast, lengths, batch_sizes, resets, reverse, keep, plan)
    _check(cell, *tensors, lengths, batch_sizes, resets, len(reverse))
    rest = lengths, batch_sizes, resets, list(reverse)
    if _traced(x) or _traced(w_hh):
        if getattr(cells, cell.name, None) is cell:
            return _forward_op(cell.name, json.dumps(plan) if plan else "", *tensors, *rest, 2)[:3]
        return formula(cell, *tensors, *rest, keep)
    if (torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
            or compute.choose(cell, plan, x, s0, len(reverse)).backend == "formula"):
        return formula(cell, *tensors, *rest, keep)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Layer.apply(cell, plan, *tensors, *rest, 2)[:3]
    return compute.forward(cell, plan, *tensors, *rest, keep)[:3]


def _check(cell: Cell, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, s0: Tensor,
           lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, N: int) -> None:
    B, H, G = s0.shape[-2], s0.shape[-1], cell.gates
    T = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    shapes = (("weight_ih", w_ih, (N * G * H, x.shape[-1])), ("weight_hh", w_hh, (N * G * H, H)),
              ("bias_ih", b_ih, (N * G * H,)), ("bias_hh", b_hh, (N * G * H,)), ("hidden", s0, (N * cell.states, B, H)),
              ("input", x, (T, B, x.shape[-1]) if batch_sizes is None else x.shape[-2:]))
    for name, t, shape in shapes:
        if t is None:
            continue
        if t.device != x.device:
            raise RuntimeError(f"Input and {name} tensors are not at the same device, found input tensor at {x.device} "
                               f"and {name} tensor at {t.device}")
        if t.dtype != x.dtype or not (t.is_floating_point() or t.is_complex()):
            raise RuntimeError(f"Input and {name} tensors must be of the same floating-point dtype, found input tensor "
                               f"of {x.dtype} and {name} tensor of {t.dtype}")
        if t.shape != shape:
            raise RuntimeError(f"Expected {name} of shape {list(shape)}, got {list(t.shape)}")
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError("lengths cannot be given for a packed sequence, which has its own")
        if lengths.dtype not in (torch.int64, torch.int32) or lengths.shape != (B,):
            raise RuntimeError(f"Expected lengths of shape [{B}] and dtype int64, got {list(lengths.shape)} and {lengths.dtype}")
        torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), f"Expected lengths between 0 and {T}, the number of steps")
    if resets is not None and (resets.dtype != torch.bool or resets.shape != (T, B) or resets.device != x.device):
        raise RuntimeError(f"Expected resets of shape [{T}, {B}], dtype bool and on {x.device}, got {list(resets.shape)}, "
                           f"{resets.dtype} and {resets.device}")
