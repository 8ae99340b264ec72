"""The operator: one layer, all its directions, the whole sequence; its gradients, and what PyTorch sees of it.

`recurrence` takes one of three routes. Under torch.func's transforms and forward-mode AD, and where there is no kernel
for the device or dtype: the formula, in differentiable torch operations. While compiling, exporting, tracing or under a
dispatch mode: custom operators that PyTorch does not look into (forward-mode AD must not come there: it would silently
give 0), or ONNX's nodes. Else: an autograd.Function. Its backward is the formula's where a graph of it is asked for, to
be differentiated again, or where a transform is at work."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import compute, flops, onnx
from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import Plan

_batched = torch._C._functorch.is_legacy_batchedtensor


def _traced(*tensors: Tensor) -> bool:
    for t in tensors:
        if type(t) is not Tensor and type(t) is not Parameter:
            return True
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None)


def _watched() -> bool:
    """Whether a dispatch mode sees what is computed now."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> Any:
    """The innermost transform of functions that is at work, if any."""
    if forward_ad._current_level >= 0:
        return TransformType.Jvp
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    return depth and (depth if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack().key())


def _run(cell: str, plan: str, reverse: Sequence[int], tensors: Sequence[Any]) -> compute.Run:
    """From what the custom operators take, names and JSON."""
    chosen = Plan(*json.loads(plan)) if plan else None
    return compute.Run(getattr(cells, cell), chosen, tensors[:6], tensors[6:9], reverse)


def _setup(ctx: Any, inputs: Sequence[Any], output: tuple[Any, ...]) -> None:
    (*ctx.choices, _), (y, states, _, saved) = inputs[:4], output
    ctx.save_for_backward(*inputs[4:], y, states, saved)
    if saved is not None:
        ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, *d: Any) -> tuple[Any, ...]:
    (*tensors,), (cell, plan, reverse) = ctx.saved_tensors, ctx.choices  # once: hooks would unpack them once more
    autocast = torch._C._is_any_autocast_enabled()  # what ran in one precision stays in it
    with torch.autocast(tensors[0].device.type, enabled=False) if autocast else nullcontext():
        grads = _gradients(tensors, cell, plan, reverse, ctx.needs_input_grad[4:10], d)
    return None, None, None, None, *grads, None, None, None


def _gradients(tensors: Sequence[Any], cell: Any, plan: Any, reverse: Sequence[int], needs: Sequence[bool],
               d: Sequence[Any]) -> list[Tensor | None]:
    """`cell` and `plan` as custom operators take them, or the cell and the `compute.Run` of the call."""
    given, masks, kept, dy, named = tensors[:6], tensors[6:9], tensors[9:], d[:3], isinstance(cell, str)
    if named:  # the custom operators have tensors of one dimension for what is not there
        kept, dy = ([t if t is not None and t.dim() > 1 else None for t in some] for some in (kept, dy))
    if torch.is_grad_enabled() or _transformed() or any(t is not None and _batched(t) for t in dy):
        # Aliases, so that an input which was computed from another one counts for itself alone.
        with torch.enable_grad():
            alias: list[Any] = [t if t is None else t.view_as(t) for t in given]
            out: Any = compute.formula(getattr(cells, cell) if named else cell, alias, masks, reverse, 1)
        used, wanted = [k for k in range(3) if dy[k] is not None], [alias[k] for k in range(6) if needs[k]]
        found: Any = torch.autograd.grad([out[k] for k in used], wanted, [dy[k] for k in used], create_graph=True,
                                         allow_unused=True)
        return [next(rest) if need else None for rest in (iter(found),) for need in needs]
    if named and _traced(kept[0]):
        if _watched():
            flops.register()
        found = _backward_op(cell, plan, reverse, needs, *given, *masks, *kept, *dy)
        return [g if need else None for g, need in zip(found, needs)]
    if not named and _watched() and cell in vars(cells).values():
        with flops.of_backward(cell.name, reverse, needs, tensors):
            return compute.backward(plan, given, kept, dy, needs)
    return compute.backward(_run(cell, plan, reverse, tensors) if named else plan, given, kept, dy, needs)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:  # a separate setup_context would cost 60 us more
        _, run, _, keep, *tensors = inputs
        output = compute.forward(run, tensors[:6], keep)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_vjp)


# Function.apply without its preparations for transforms, of which there is none here: they would cost 6 us.
_apply: Any = super(torch.autograd.Function, _Layer).apply

_GIVEN = "Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor s0"
_MASKS = "Tensor? lengths, Tensor? batch_sizes, Tensor? resets"
_KEPT = "Tensor y, Tensor? states, Tensor? saved, Tensor? dy, Tensor? dstates, Tensor? dlast"


@torch.library.custom_op("fused_rnn::forward", mutates_args=(), schema=(
    f"(str cell, str plan, int[] reverse, int keep, {_GIVEN}, {_MASKS}) -> (Tensor, Tensor, Tensor, Tensor)"))
def _forward_op(cell: str, plan: str, reverse: list[int], keep: int, *tensors: Any) -> tuple[Tensor, ...]:
    out = compute.forward(_run(cell, plan, reverse, tensors), tensors[:6], keep)
    return tuple(tensors[0].new_empty(0) if t is None else t for t in out)


@torch.library.custom_op("fused_rnn::backward", mutates_args=(), schema=(
    f"(str cell, str plan, int[] reverse, bool[] needs, {_GIVEN}, {_MASKS}, {_KEPT}) -> Tensor[]"))
def _backward_op(cell: str, plan: str, reverse: list[int], needs: list[bool], *tensors: Any) -> list[Tensor]:
    given, kept, d = tensors[:6], tensors[9:12], tensors[12:]
    grads = compute.backward(_run(cell, plan, reverse, tensors), given, kept, d, needs)
    return [given[0].new_empty(0) if g is None else g for g in grads]


@_forward_op.register_fake
def _(cell: str, plan: str, reverse: list[int], keep: int, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    others, saved, s0 = getattr(cells, cell).states - 1, getattr(cells, cell).saved, tensors[4]
    R, width = math.prod(x.shape[:-1]), len(reverse) * s0.shape[-1]
    return (x.new_empty(*x.shape[:-1], width), x.new_empty((others, R, width) if others and keep else 0),
            x.new_empty(s0.shape), x.new_empty((saved, R, width) if saved and keep > 1 else 0))


@_backward_op.register_fake
def _(cell: str, plan: str, reverse: list[int], needs: list[bool], *tensors: Any) -> list[Tensor]:
    return [tensors[0].new_empty(t.shape if need else 0) for t, need in zip(tensors[:6], needs)]


_forward_op.register_autograd(_vjp, setup_context=_setup)


def settle(x: Tensor, plan: Plan | None) -> tuple[str, torch.dtype, str]:
    """What serves a call, as of `compute.served`; in which dtype; and why."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return "", torch.get_autocast_dtype(x.device.type), "autocast"
    return ("", x.dtype, "") if plan else compute.served(x.device, x.dtype)


def _side_by_side(cell: Cell, tensors: tuple[Any, ...], reverse: Sequence[int], keep: int, plan: Plan | None,
                  recompute: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Under vmap: on the CPU in one formula, else one after another in their kernels."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    V, level = interpreter.batch_size(), interpreter.level()
    again: Any = recurrence
    plain, dims = unwrap_batched(tensors, level)
    with interpreter.lower():
        rows: Any = [t if t is None or d is not None else t.expand(V, *t.shape) for t, d in zip(plain, dims)]
        rows = [t if d is None else t.movedim(d, 0) for t, d in zip(rows, dims)]
        rows[7] = plain[7]  # batch_sizes are of all
        if plain[0].is_cuda:
            one_by_one = zip(*([t] * V if t is None or t is plain[7] else t for t in rows))
            each = zip(*(again(cell, *row, reverse, keep, plan, recompute) for row in one_by_one))
            found: Any = [None if column[0] is None else torch.stack(column) for column in each]
        else:
            found = compute.formula(cell, rows[:6], rows[6:], reverse, keep)
    result: Any = tuple(t if t is None else torch._C._functorch._add_batch_dim(t, 0, level) for t in found)
    return result


def recurrence(cell: Cell, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, s0: Tensor,
               lengths: Tensor | None = None, batch_sizes: Tensor | None = None, resets: Tensor | None = None,
               reverse: Sequence[int] = (False,), keep: int = 0, plan: Plan | None = None,
               recompute: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """N recurrences over the same sequences, each in its own direction: one layer.

    Args:
        cell: `rnn.kernels.cells.rnn_tanh`, `rnn_relu`, `lstm`, `gru`, or one of your own.
        x: [T, B, I], or [R, I] with `batch_sizes`. All tensors have its device and floating-point dtype.
        w_ih, w_hh, b_ih, b_hh: [N*G*H, I], [N*G*H, H], and [N*G*H], both or neither.
        s0: [N*S, B, H], the states before the first step, those of each recurrence together.
        lengths: [B] integers in [0, T], on any device. y and states are 0 past an end; a sequence's last state is that
            of its last step (in reverse, of its first), or s0 where it has none.
        batch_sizes: [T] int64 on the CPU, as in torch's PackedSequence, in place of lengths.
        resets: [T, B] bool. resets[t] is a boundary between t - 1 and t: a state that would cross it, in either
            direction, is 0 instead; resets[0] drops s0 going forward. Past an end nothing is reset.
        reverse: of each recurrence, whether it runs from the last step to the first.
        keep: 1 to have `states` returned.
        plan: how to compute it, if not as `make_plan` would.
        recompute: keep no activations for backward but the states, and compute the others once more there.

    Returns y [T, B, N*H] or [R, N*H], state 0 of every step; the others [S-1, R, N*H], if any; the last [N*S, B, H].
    Raises RuntimeError for a shape, dtype, device or length that is not as above, before anything is computed."""
    given, masks = (x, w_ih, w_hh, b_ih, b_hh, s0), (lengths, batch_sizes, resets)
    if has_torch_function_variadic(*given, *masks) and not torch.compiler.is_compiling():
        whole: Any = handle_torch_function(recurrence, (*given, *masks), cell, *given, *masks, reverse, keep, plan,
                                           recompute)
        return whole
    serves, dtype, why = settle(x, plan)
    autocast = why == "autocast"
    if not autocast:
        _check(cell, given, masks, len(reverse))
    if autocast or dtype != x.dtype:
        cast: Any = [t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
                     for t in given]
        again: Any = recurrence
        with torch.autocast(x.device.type, enabled=False):
            y, states, last = again(cell, *cast, *masks, reverse, keep, plan, recompute)
        back = y.dtype if autocast else x.dtype
        return y.to(back), states if states is None else states.to(back), last.to(back)
    transform = _transformed()
    if transform == TransformType.Vmap and not torch.compiler.is_compiling():
        return _side_by_side(cell, (*given, *masks), reverse, keep, plan, recompute)
    traced, reverse = _traced(x, w_hh), [*map(int, reverse)]
    exporting = traced and torch.onnx.is_in_onnx_export()
    if exporting and onnx.has_node(cell.name, masks, reverse, keep):
        return onnx.recurrence(cell.name, given, lengths, reverse)
    unknown = exporting or (traced and getattr(cells, cell.name, None) is not cell)
    if transform or unknown or (plan is None and not serves):
        return compute.formula(cell, given, masks, reverse, keep)
    train = torch.is_grad_enabled() and (
        w_hh.requires_grad or w_ih.requires_grad or x.requires_grad or s0.requires_grad
        or (b_ih is not None and b_hh is not None and (b_ih.requires_grad or b_hh.requires_grad)))
    asked = keep
    train |= traced and torch._C._get_tracing_state() is not None  # one graph, whoever traces
    keep = keep if not train else 1 if recompute else 2
    if traced:
        if _watched():
            flops.register()
        y, states, last, _ = _forward_op(cell.name, json.dumps(plan) if plan else "", reverse, keep, *given, *masks)
        return y, states if states.dim() > 1 else None, last
    run = compute.Run(cell, plan, given, masks, reverse, not asked and not recompute)
    found = _apply(cell, run, reverse, keep, *given, *masks) if train else compute.forward(run, given, keep)
    return found[0], found[1] if asked else None, found[2]


def one_step(cell: Cell, x: Tensor, weights: Sequence[Any], states: Sequence[Tensor]) -> Any:
    """One step on the CPU of what asks for no gradients: x [1, B, I], `weights` w_ih to b_hh (or without biases),
    states [1, B, H] each, to y and the next states. None where that cannot be, or `recurrence` has to see it."""
    dtype = x.dtype
    if (_transformed() or _traced() or has_torch_function_unary(x) or torch._C._is_any_autocast_enabled()
            or (dtype is not torch.float32 and dtype is not torch.float64)):
        return None
    for t in (x, *states, *weights):
        kind = type(t)  # a parametrized weight is None
        if ((kind is not Tensor and kind is not Parameter) or t.dtype is not dtype or not t.is_cpu
                or not t.is_contiguous() or t.is_neg()):
            return None
    (w_ih, w_hh, *biases), H = weights, states[0].shape[2]
    G = cell.gates * H
    if w_ih.shape != (G, x.shape[2]) or w_hh.shape != (G, H):
        return None
    for b in biases:
        if b.shape != (G,):
            return None
    return compute.step(cell, x, weights, states)


def _expect(name: str, t: Tensor | None, shape: Sequence[int], dtypes: Sequence[torch.dtype],
            device: torch.device | None) -> None:
    if t is not None and (t.shape != shape or t.dtype not in dtypes or not (device is None or t.device == device)):
        raise RuntimeError(f"Expected {name} of shape {list(shape)}, {' or '.join(map(str, dtypes))} and on "
                           f"{device or 'any device'}, got {list(t.shape)}, {t.dtype} and on {t.device}")


def _check(cell: Cell, given: Sequence[Any], masks: Sequence[Tensor | None], N: int) -> None:
    (x, w_ih, w_hh, b_ih, b_hh, s0), (lengths, batch_sizes, resets) = given, masks
    size, hidden, device = x.shape, s0.shape, x.device
    if len(size) != (3 if batch_sizes is None else 2) or len(hidden) != 3 or (b_ih is None) != (b_hh is None):
        raise RuntimeError("Expected input of 3 dimensions (2 with batch_sizes), hidden of 3, both biases or none")
    (_, B, H), (R, *_, I), T = hidden, size, (x if batch_sizes is None else batch_sizes).shape[0]
    GH, floats = N * cell.gates * H, (x.dtype,) if x.dtype.is_floating_point or x.dtype.is_complex else ()
    if not floats or (batch_sizes is None and size[1] != B):
        _expect("input", x, (T, B, I) if batch_sizes is None else (R, I), floats, device)
    _expect("weight_ih", w_ih, (GH, I), floats, device)
    _expect("weight_hh", w_hh, (GH, H), floats, device)
    _expect("bias_ih", b_ih, (GH,), floats, device)
    _expect("bias_hh", b_hh, (GH,), floats, device)
    _expect("hidden", s0, (N * cell.states, B, H), floats, device)
    if T == 0 or (lengths is not None and batch_sizes is not None):
        raise RuntimeError("A packed sequence has its own lengths: `lengths` cannot be given for it" if T else
                           "Expected sequence length to be larger than 0 in RNN")
    if resets is not None:
        _expect("resets", resets, (T, B), (torch.bool,), device)
    if lengths is not None:  # on a GPU this does not wait: wrong lengths stop the device with an assertion
        _expect("lengths", lengths, (B,), (torch.int64, torch.int32), None)
        while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(lengths):
            lengths = torch._C._functorch.get_unwrapped(lengths)
        torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), "Expected lengths between 0 and those of input")
    if batch_sizes is not None:
        _expect("batch_sizes", batch_sizes, (T,), (torch.int64,), None)
        wrong = "Expected batch_sizes that begin with B, never rise, and add up to input's rows"
        if _traced(batch_sizes) or _transformed():
            fits = (batch_sizes.sum() == R) & (batch_sizes[0] == B) & (batch_sizes[-1] > 0)
            torch._assert_async(fits & (batch_sizes.diff() < 1).all(), wrong)
        else:  # all these operations would take longer than a short sequence
            sizes = batch_sizes.tolist()
            if sum(sizes) != R or sizes[0] != B or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
                raise RuntimeError(wrong)
