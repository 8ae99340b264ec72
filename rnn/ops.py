"""The operator: one layer, all its directions, the whole sequence; its gradients, and what PyTorch sees of it.

`recurrence` takes one of three routes. Under torch.func's transforms and forward-mode AD, and where there is no kernel
for the device or dtype: the formula, in differentiable torch operations. While compiling, exporting, tracing or under a
dispatch mode: custom operators that PyTorch does not look into (forward-mode AD must not come there: it would silently
give 0), or ONNX's nodes. Else: an autograd.Function. Its backward is the formula's where a graph of it is asked for, to
be differentiated again, or where a transform is at work."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import compute, flops, onnx
from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import BACKENDS, Plan
from .kernels.states import join_states, join_weights, part_states, part_weights

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_batched = torch._C._functorch.is_legacy_batchedtensor


def _traced(*tensors: Tensor) -> bool:
    for t in tensors:
        if type(t) is not Tensor and type(t) is not Parameter:
            return True
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None)


def _depth() -> int:
    """How many transforms of functions are at work, one in another."""
    return torch._C._functorch.get_dynamic_layer_stack_depth()


# As torch.compiler.assume_constant_result does, which imports all of Dynamo. torch 2.10 and 2.11 have no other way to
# compile this. Their guards see to it that the depth is the one that was compiled for.
vars(_depth)["_dynamo_marked_constant"] = True


def _watched() -> bool:
    """Whether a dispatch mode sees what is computed now."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> Any:
    """The innermost transform of functions that is at work, if any."""
    if forward_ad._current_level >= 0:
        return TransformType.Jvp
    depth = _depth()
    return depth and (depth if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack().key())


def _named_run(cell: str, plan: str, reverse: Sequence[int], tensors: Sequence[Any]) -> compute.Run:
    """From what the custom operators take, names and JSON."""
    chosen = Plan(*json.loads(plan)) if plan else None
    return compute.Run(getattr(cells, cell), chosen, tensors[0], tensors[2], tensors[6:9], reverse)


def _as_it_ran(device: torch.device) -> Any:
    """What ran in one precision stays in it going backward."""
    return torch.autocast(device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


def _composite(cell: Cell, x: Tensor, weights: Sequence[Any], states: Sequence[Any] | None, masks: Sequence[Any],
               reverse: Sequence[int], keep: int, batch_first: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """As `run_layer`, in differentiable torch operations."""
    rows = x.transpose(0, 1) if batch_first else x
    s0 = compute.first_states(rows, weights[1], states, masks[1], len(reverse), cell.states)
    y, others, last = compute.formula(cell, (rows, *join_weights(weights), s0), masks, reverse, keep)
    return y.transpose(0, 1) if batch_first else y, others, part_states(last, cell.states)


def _differentiate(outputs: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any],
                   needs: Sequence[bool], again: bool = True) -> list[Tensor | None]:
    """Gradients of `inputs`, those that are needed; if they are to be differentiated `again`, with
    a graph of their own."""
    used = [k for k, grad in enumerate(grads) if grad is not None]
    wanted = [t for t, need in zip(inputs, needs) if need]
    found: Any = torch.autograd.grad([outputs[k] for k in used], wanted, [grads[k] for k in used], retain_graph=True,
                                     create_graph=again, allow_unused=True)
    rest = iter(found)
    return [next(rest) if need else None for need in needs]


def _again(grads: Sequence[Any]) -> bool:
    """Whether a backward pass has to be differentiable itself, or runs under a transform."""
    return bool(torch.is_grad_enabled() or _transformed() or any(t is not None and _batched(t) for t in grads))


def _aliases(tensors: Sequence[Any]) -> list[Any]:
    """So that an input which was computed from another one counts for itself alone."""
    return [t if t is None else t.view_as(t) for t in tensors]


class _Layer(torch.autograd.Function):
    """lengths to resets, x, weights, which are w_ih to b_hh of all recurrences or of one after the other, and the
    states to y, the other states, the activations and the last states."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:  # a separate setup_context would cost 60 us more
        run, keep, count, lengths, batch_sizes, resets, x, *rest = inputs
        weights, states = rest[:count], rest[count:]
        if count > 4:
            compute.alive(weights)
        joined = join_weights(weights)
        y, others, saved, last = compute.forward(run, (x, *joined), states, keep)
        # An ordinary backward pass reads no biases: as those of torch.nn's RNN and GRU they may change before it.
        ctx.run = run
        ctx.biases = [t for k, t in enumerate(weights) if k % 4 > 1]
        ctx.versions = _versions(ctx.biases)
        ctx.count = count
        kept = () if count == 4 else joined[:2]
        ctx.save_for_backward(lengths, batch_sizes, resets, y, others, saved, x,
                              *(t for k, t in enumerate(weights) if k % 4 < 2), *states, *kept)
        if saved is not None:
            ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return y, others, saved, *last

    @staticmethod
    def backward(ctx: Any, dy: Any, dothers: Any, _: Any, *last_grads: Any) -> tuple[Any, ...]:
        lengths, batch_sizes, resets, y, others, saved, x, *rest = ctx.saved_tensors
        run: compute.Run = ctx.run
        count, needs = ctx.count, ctx.needs_input_grad
        dlast: Sequence[Any] = last_grads
        came = [dy, dothers, *dlast]
        for grad in came:
            if grad is not None and grad.layout is not torch.strided:
                dy, dothers, *dlast = came = [*map(_dense, came)]
                break
        again = _again(came)
        recompute = run.cell.saved and saved is None
        if again or recompute:
            _check_versions(ctx.biases, ctx.versions)
        matrices, states = rest[: count // 2], rest[count // 2 :]
        kept = matrices
        if count > 4:
            states, kept = states[:-2], states[-2:]
        first: Sequence[Tensor | None] | None
        weights: Sequence[Tensor | None] = [*matrices, None, None]
        if again or recompute or count > 4:
            weights = [t for k in range(0, count // 2, 2) for t in (*matrices[k : k + 2], *ctx.biases[k : k + 2])]
        with _as_it_ran(x.device):
            if again:
                with torch.enable_grad():
                    alias = _aliases((x, *weights, *states))
                    y, others, last = _composite(run.cell, alias[0], alias[1 : 1 + count], alias[1 + count :] or None,
                                                 (lengths, batch_sizes, resets), run.reverse, 1, run.batch_first)
                found = _differentiate((y, others, *last), (dy, dothers, *dlast), alias, needs[6:])
                return None, None, None, None, None, None, *found
            wanted: Sequence[bool] = needs[6:11]
            if count > 4:
                weights = [*kept, *(join_weights(weights)[2:] if recompute else (None, None))]
                wanted = [needs[6], *(True in needs[7 + k : 7 + count : 4] for k in range(4))]
            wanted = *wanted, True in needs[7 + count :]
            given = x, *weights
            counted: Any = nullcontext()
            if _watched():
                s0 = x.new_empty((0, run.rows.sequences, 0))
                shapes = *given, s0, lengths, batch_sizes, resets, y, others, saved
                counted = flops.of_backward(run.cell, run.reverse, wanted, shapes)
            with counted:
                grads, first = compute.backward(run, given, states, (y, others, saved), (dy, dothers), dlast, wanted)
            if count > 4:
                grads = [grads[0], *part_weights(grads[1:], count // 4)]
                grads = [grad if need else None for grad, need in zip(grads, needs[6:])]
            if first is None:
                first = [None] * len(states)
            elif not all(needs[7 + count :]):
                first = [grad if need else None for grad, need in zip(first, needs[7 + count :])]
        return None, None, None, None, None, None, *grads, *first


class _TorchLSTM(torch.autograd.Function):
    """torch's own LSTM. Its backward pass in oneDNN has no derivative: the composite's has.

    `run` and `composite` compute the same outputs from the tensors `inputs`."""

    @staticmethod
    def forward(ctx: Any, run: Any, composite: Any, *inputs: Any) -> tuple[Any, ...]:
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad():
            outputs = run(*leaves)
        ctx.composite = composite
        ctx.leaves = leaves
        ctx.outputs = outputs
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        grads = tuple(map(_dense, grads))
        with _as_it_ran(inputs[0].device):
            if not _again(grads):
                found = _differentiate(ctx.outputs, grads, ctx.leaves, needs, again=False)
                return None, None, *found
            with torch.enable_grad():
                alias = _aliases(inputs)
                outputs = ctx.composite(*alias)
            return None, None, *_differentiate(outputs, grads, alias, needs)


def _by_torch(operator: Any, cell: Cell, x: Tensor, weights: Sequence[Any],
              states: Sequence[Tensor] | None, reverse: Sequence[int],
              batch_first: bool) -> tuple[Tensor, None, list[Tensor]]:
    """As `run_layer`, in torch's own operator."""
    count = len(weights)
    masks = None, None, None

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        y, _, last = compute.by_torch(operator, cell, x, rest[:count], rest[count:], len(reverse),
                                      batch_first)
        return y, *last

    def composite(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        y, _, last = _composite(cell, x, rest[:count], rest[count:] or None, masks, reverse, 0,
                                batch_first)
        return y, *last

    given = x, *weights, *(states or ())
    if cell is cells.lstm and x.dtype == torch.float32 and _train(given):
        y, *last = _TorchLSTM.apply(run, composite, *given)
    else:
        y, *last = run(*given)
    return y, None, last


class _OwnGradient(torch.autograd.Function):
    """The same numbers, whose gradient is a contiguous tensor of its own, and no part of a larger one."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.clone(memory_format=torch.contiguous_format)


def own_gradient(t: Tensor) -> Tensor:
    """As torch.nn has it where we put tensors together. Compilers and transforms lay their gradients out themselves."""
    if not torch.is_grad_enabled() or not t.requires_grad or _traced(t) or _transformed():
        return t
    found: Tensor = _OwnGradient.apply(t)
    return found


def _dense(grad: Any) -> Any:
    """A gradient that comes in, which may be sparse, with all its numbers."""
    return grad if grad is None or grad.layout is torch.strided else grad.to_dense()


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def _check_versions(biases: Sequence[Tensor | None], versions: Sequence[int | None]) -> None:
    """Of biases that were not saved for backward, and now are read after all."""
    if _versions(biases) != versions:
        raise RuntimeError("one of the variables needed for gradient computation has been modified by an inplace "
                           "operation: a bias of a recurrent layer")


# Function.apply without its preparations for transforms, of which there is none here: they would cost 6 us.
_apply: Any = super(torch.autograd.Function, _Layer).apply


def _parted(s0: Tensor | None, S: int) -> list[Tensor] | None:
    """Joined states as S views."""
    if s0 is None or S == 1:
        return None if s0 is None else [s0]
    return [s0[k::S] for k in range(S)]


def _joined_backward(run: compute.Run, given: Sequence[Any], kept: Sequence[Any], d: Sequence[Any],
                     needs: Sequence[bool]) -> list[Tensor | None]:
    """`compute.backward` with joined states."""
    S = run.cell.states
    found, first = compute.backward(run, given[:5], _parted(given[5], S), kept, d[:2], _parted(d[2], S) or [None] * S,
                                    needs)
    return [*found, None if first is None else join_states(first, len(run.reverse))]


def _op_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Any, ...]) -> None:
    (*ctx.choices, _), (y, states, _, saved) = inputs[:4], output
    ctx.save_for_backward(*inputs[4:], y, states, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, *d: Any) -> tuple[Any, ...]:
    """Of the custom operator, which has tensors of one dimension for what is not there."""
    (*tensors,), (cell, plan, reverse) = ctx.saved_tensors, ctx.choices  # once: hooks would unpack them once more
    given, masks, needs = tensors[:6], tensors[6:9], ctx.needs_input_grad[4:10]
    kept: list[Any]
    grads: list[Any]
    kept, grads = ([t if t is not None and t.dim() > 1 else None for t in some] for some in (tensors[9:], d[:3]))
    with _as_it_ran(tensors[0].device):
        if _again(grads):
            with torch.enable_grad():
                alias = _aliases(given)
                outputs = compute.formula(getattr(cells, cell), alias, masks, reverse, 1)
            found = _differentiate(outputs, grads, alias, needs)
        elif _traced(kept[0]):
            if _watched():
                flops.register()
            found = _backward_op(cell, plan, reverse, needs, *given, *masks, *kept, *grads)
        else:
            found = _joined_backward(_named_run(cell, plan, reverse, tensors), given, kept, grads, needs)
    return None, None, None, None, *(g if need else None for g, need in zip(found, needs)), None, None, None


_GIVEN = "Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor s0"
_MASKS = "Tensor? lengths, Tensor? batch_sizes, Tensor? resets"
_KEPT = "Tensor y, Tensor? states, Tensor? saved, Tensor? dy, Tensor? dstates, Tensor? dlast"


@torch.library.custom_op("fused_rnn::forward", mutates_args=(), schema=(
    f"(str cell, str plan, int[] reverse, int keep, {_GIVEN}, {_MASKS}) -> (Tensor, Tensor, Tensor, Tensor)"))
def _forward_op(cell: str, plan: str, reverse: list[int], keep: int, *tensors: Any) -> tuple[Tensor, ...]:
    run = _named_run(cell, plan, reverse, tensors)
    y, others, saved, last = compute.forward(run, tensors[:5], _parted(tensors[5], run.cell.states), keep)
    out = y, others, join_states(last, len(reverse)), saved
    return tuple(tensors[0].new_empty(0) if t is None else t for t in out)


@torch.library.custom_op("fused_rnn::backward", mutates_args=(), schema=(
    f"(str cell, str plan, int[] reverse, bool[] needs, {_GIVEN}, {_MASKS}, {_KEPT}) -> Tensor[]"))
def _backward_op(cell: str, plan: str, reverse: list[int], needs: list[bool], *tensors: Any) -> list[Tensor]:
    given, kept, d = tensors[:6], tensors[9:12], tensors[12:]
    grads = _joined_backward(_named_run(cell, plan, reverse, tensors), given, kept, d, needs)
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


_forward_op.register_autograd(_op_backward, setup_context=_op_setup)


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
               lengths: Tensor | Sequence[int] | None = None, batch_sizes: Tensor | None = None,
               resets: Tensor | Sequence[Any] | None = None, reverse: Sequence[int] = (False,), keep: int = 0,
               plan: Plan | None = None, recompute: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """N recurrences over the same sequences, each in its own direction: one layer.

    Args:
        cell: `rnn.kernels.cells.rnn_tanh`, `rnn_relu`, `lstm`, `gru`, or one of your own.
        x: [T, B, I], or [R, I] with `batch_sizes`. All tensors have its device and floating-point dtype.
        w_ih, w_hh, b_ih, b_hh: [N*G*H, I], [N*G*H, H], and [N*G*H], both or neither.
        s0: [N*S, B, H], the states before the first step, those of each recurrence together.
        lengths: [B] integers in [0, T], on any device, or a list of them. y and states are 0 past an end; a sequence's
            last state is that of its last step (in reverse, of its first), or s0 where it has none.
        batch_sizes: [T] int64 on the CPU, as in torch's PackedSequence, in place of lengths.
        resets: [T, B] bool. resets[t] is a boundary between t - 1 and t: a state that would cross it, in either
            direction, is 0 instead; resets[0] drops s0 going forward. Past an end nothing is reset.
        reverse: of each recurrence, whether it runs from the last step to the first.
        keep: 1 to have `states` returned.
        plan: how to compute it, if not as `make_plan` would.
        recompute: keep no activations for backward but the states, and compute the others once more there.

    Returns y [T, B, N*H] or [R, N*H], state 0 of every step; the others [S-1, R, N*H], if any; the last [N*S, B, H].
    Raises TypeError for an argument of the wrong kind, ValueError for one out of range, and RuntimeError for a shape,
    dtype, device or length that is not as above, before anything is computed."""
    seen = x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, resets
    if has_torch_function_variadic(*seen) and not torch.compiler.is_compiling():
        whole: Any = handle_torch_function(recurrence, seen, cell, *seen, reverse, keep, plan, recompute)
        return whole
    if not isinstance(cell, Cell):
        raise TypeError(f"Expected cell to be a rnn.kernels.cells.Cell, got {type(cell).__name__}")
    tensors = dict(x=x, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, s0=s0, batch_sizes=batch_sizes)
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("b_ih", "b_hh", "batch_sizes")):
            raise TypeError(f"Expected {name} to be a Tensor, got {type(value).__name__}")
    refuse_nested(tensors.items())
    reverse = as_directions(reverse)
    check_plan(plan)
    if not isinstance(keep, int) or keep not in (0, 1):
        raise ValueError(f"Expected keep to be 0 or 1, got {keep!r}")
    if batch_sizes is not None and batch_sizes.dim() != 1:
        raise RuntimeError(f"Expected batch_sizes of one dimension, got {list(batch_sizes.shape)}")
    N, S = len(reverse), cell.states
    if s0.dim() != 3 or s0.layout is not torch.strided or len(s0) != N * S:
        raise RuntimeError(f"Expected hidden (s0) of shape [{N * S}, B, H] for the cell {cell.name} and reverse of "
                           f"{N}, got {list(s0.shape)} and {s0.layout}")
    masks = as_tensor("lengths", lengths), batch_sizes, as_tensor("resets", resets, x.device)
    y, others, last = run_layer(cell, x, (w_ih, w_hh, b_ih, b_hh), _parted(s0, S), masks, reverse, int(keep), plan,
                                bool(recompute))
    return y, others, join_states(last, N)


def refuse_nested(tensors: Iterable[tuple[str, Any]]) -> None:
    """Raises RuntimeError for a nested tensor, by its name: it has no shape that could be checked."""
    for name, t in tensors:
        if isinstance(t, Tensor) and t.is_nested:
            raise RuntimeError(f"Expected {name} to be dense, got a nested tensor")


def as_directions(reverse: Any) -> list[bool]:
    """`reverse`, checked."""
    if isinstance(reverse, str) or not hasattr(reverse, "__iter__") or getattr(reverse, "ndim", 1) == 0:
        raise TypeError(f"Expected reverse to be a sequence of bools, got {reverse!r}")
    directions = [*reverse] if isinstance(reverse, (Sequence, Tensor, np.ndarray)) else []
    if not directions or not all(_is_bool(direction) for direction in directions):
        raise ValueError(f"Expected reverse to have one bool or more, got {reverse!r}")
    return [bool(direction) for direction in directions]


def _is_bool(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.item() in (0, 1)
    return isinstance(value, (bool, int, np.bool_, np.integer)) and value in (0, 1)


def check_plan(plan: Any) -> None:
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise TypeError(f"Expected plan to be a rnn.kernels.plan.Plan or None, got {type(plan).__name__}")
    scopes = BACKENDS.get(plan.backend, ()) if isinstance(plan.backend, str) else ()
    if plan.scope not in scopes:
        raise ValueError(f"Expected plan of a backend and scope among {BACKENDS}, got {plan}")
    sizes = plan.units, plan.sequences, plan.warps, plan.blocks
    if plan.scope != "host" and not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"Expected plan of positive units, sequences, warps and blocks, got {plan}")


def as_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor | None:
    """`lengths` and `resets`, which may also be given as lists, numbers or NumPy's arrays. Raises TypeError."""
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, (list, tuple, int, np.ndarray, np.integer)):
        raise TypeError(f"Expected {name} to be a Tensor or a list, got {type(value).__name__}")
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected {name} to be a Tensor or a list of numbers, got {value!r}") from error


def run_layer(cell: Cell, x: Tensor, weights: Sequence[Any], states: Sequence[Tensor] | None, masks: Sequence[Any],
              reverse: Sequence[int], keep: int = 0, plan: Plan | None = None, recompute: bool = False,
              batch_first: bool = False) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """`recurrence` with `weights` w_ih to b_hh, of all recurrences or of one after the other, `masks` lengths to
    resets, S states [N, B, H], each a tensor of its own coming in and going out, zeros if None; with `batch_first` x is
    [B, T, I] and so is y."""
    seen = x, *weights, *(states or ()), *masks
    if has_torch_function_variadic(*seen) and not torch.compiler.is_compiling():
        whole: Any = handle_torch_function(run_layer, seen, cell, x, weights, states, masks, reverse, keep, plan,
                                           recompute, batch_first)
        return whole
    serves, dtype, why = settle(x, plan)
    autocast = why == "autocast"
    others: Tensor | None
    if not autocast:
        try:
            _check(cell, x, weights, states, masks, len(reverse), batch_first)
        except RuntimeError:
            refuse_nested(zip(len(weights) // 4 * _NAMES, weights))
            raise
    if autocast or dtype != x.dtype:

        if not _traced(x, weights[1]) and not _transformed():
            compute.alive((x, *weights, *(states or ())))

        def cast(t: Any) -> Any:
            return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)

        with torch.autocast(x.device.type, enabled=False):
            found = run_layer(cell, cast(x), [cast(w) for w in weights], states and [cast(s) for s in states],
                              masks, reverse, keep, plan, recompute, batch_first)
        y, others, last = found
        back = y.dtype if autocast else x.dtype
        return y.to(back), others if others is None else others.to(back), [s.to(back) for s in last]
    transform = _transformed()
    traced = _traced(x, weights[1])
    side_by_side = transform == TransformType.Vmap and not torch.compiler.is_compiling()
    exporting = traced and torch.onnx.is_in_onnx_export()
    unknown = exporting or (traced and getattr(cells, cell.name, None) is not cell)
    composite = transform or unknown or (plan is None and not serves)
    if side_by_side or traced or composite:
        rows = x.transpose(0, 1) if batch_first else x
        s0 = compute.first_states(rows, weights[1], states, masks[1], len(reverse), cell.states)
        given = rows, *join_weights(weights), s0
        if side_by_side:
            y, others, ends = _side_by_side(cell, (*given, *masks), reverse, keep, plan, recompute)
        elif exporting and onnx.has_node(cell.name, masks, reverse, keep):
            y, others, ends = onnx.recurrence(cell.name, given, masks[0], reverse)
        elif composite:
            y, others, ends = compute.formula(cell, given, masks, reverse, keep)
        else:
            # One graph, whoever traces.
            train = _train(given) or torch._C._get_tracing_state() is not None
            if _watched():
                flops.register()
            y, others, ends, _ = _forward_op(cell.name, json.dumps(plan) if plan else "", [*map(int, reverse)],
                                             _kept(train, keep, recompute), *given, *masks)
            others = others if others.dim() > 1 else None
        return y.transpose(0, 1) if batch_first else y, others, part_states(ends, cell.states)
    operator = compute.torch_operator(cell, x, masks, reverse, keep, plan, recompute)
    if operator is not None:
        return _by_torch(operator, cell, x, weights, states, reverse, batch_first)
    run = compute.Run(cell, plan, x, weights[1], masks, reverse, batch_first)
    if _train((x, *weights, *(states or ()))):
        y, others, _, *last = _apply(run, _kept(True, keep, recompute), len(weights), *masks, x, *weights,
                                     *(states or ()))
        return y, others if keep else None, last
    if len(weights) > 4:
        compute.alive(weights)
    y, others, _, last = compute.forward(run, (x, *join_weights(weights)), states, keep)
    return y, others, last


def _train(tensors: Sequence[Any]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _kept(train: bool, keep: int, recompute: bool) -> int:
    """What a forward pass has to keep: `keep`, or for backward the states, or its activations too."""
    return (1 if recompute else 2) if train else keep


def expect(name: str, t: Tensor | None, shape: Sequence[int], dtypes: Sequence[torch.dtype],
            device: torch.device | None) -> None:
    if t is not None and (t.layout is not torch.strided or t.shape != shape or t.dtype not in dtypes
                          or not (device is None or t.device == device)):
        raise RuntimeError(f"Expected {name} of shape {list(shape)}, {' or '.join(map(str, dtypes))} and on "
                           f"{device or 'any device'}, got {list(t.shape)}, {t.dtype}, {t.layout} and on {t.device}")


def _check(cell: Cell, x: Tensor, weights: Sequence[Any], states: Sequence[Tensor] | None,
           masks: Sequence[Tensor | None], N: int, batch_first: bool) -> None:
    w_hh, b_ih, b_hh = weights[1:4]
    batch_sizes = masks[1]
    size, device = x.shape, x.device
    if len(size) != (3 if batch_sizes is None else 2) or w_hh.dim() != 2 or (b_ih is None) != (b_hh is None):
        raise RuntimeError("Expected input (x) of 3 dimensions (2 with batch_sizes), weight_hh (w_hh) of 2, both "
                           f"biases or none, got {list(size)} and {list(w_hh.shape)}")
    per = cell.gates * N * 4 // len(weights)
    H = w_hh.shape[1]
    if states:
        H = states[-1].shape[-1] if states[-1].dim() else 0
    elif per and not (per * H == w_hh.shape[0] and weights[0].shape[:1] == w_hh.shape[:1]):
        rows = [w.shape[0] for w in weights if w is not None and w.dim()]
        H = max(rows, key=rows.count) // per  # what most of them say
    strided = x.layout is torch.strided
    floats = (x.dtype,) if (strided and x.dtype.is_floating_point) or x.dtype.is_complex else ()
    B: Any = None
    if batch_sizes is None:
        T, B, I = (size[1], size[0], size[2]) if batch_first else size
    else:
        T, I = len(batch_sizes), size[1]
        if states is not None and states[0].dim() == 3:
            B = states[0].shape[1]
    if not floats:
        expect("input", x, size, floats, device)
    GH = per * H
    shapes = (GH, I), (GH, H), (GH,), (GH,)
    for k, weight in enumerate(weights):
        if weight is None or (weight.shape == shapes[k % 4] and weight.dtype is x.dtype and weight.device == device
                              and weight.layout is torch.strided and floats):
            continue
        expect(_NAMES[k % 4], weight, shapes[k % 4], floats, device)
    if states is not None:
        for k, state in enumerate(states):
            expect("hidden" if len(states) == 1 else f"hidden[{k}]", state, (N, B, H), floats, device)
    check_masks(x, masks, T, B)


def check_masks(x: Tensor, masks: Sequence[Tensor | None], T: int, B: Any) -> None:
    """Raises RuntimeError for lengths, batch_sizes or resets that are not of T steps and B sequences; with batch_sizes
    T is ignored, and B may be None if it is not known otherwise."""
    lengths, batch_sizes, resets = masks
    device = x.device
    if batch_sizes is not None:
        T = len(batch_sizes)
    if T == 0 or (lengths is not None and batch_sizes is not None):
        raise RuntimeError("A packed sequence has its own lengths: `lengths` cannot be given for it" if T else
                           "Expected sequence length to be larger than 0 in RNN")
    if resets is not None:
        expect("resets", resets, (T, int(batch_sizes[0]) if B is None else B), (torch.bool,), device)  # type: ignore[index]
    if lengths is not None:  # on a GPU this does not wait: wrong lengths stop the device with an assertion
        expect("lengths", lengths, (B,), (torch.int64, torch.int32), None)
        if lengths.is_meta and not x.is_meta:
            raise RuntimeError(f"Expected lengths with numbers, got {lengths.device}")
        if not _traced(lengths) and not _transformed():
            compute.alive([lengths])
        while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(lengths):
            lengths = torch._C._functorch.get_unwrapped(lengths)
        torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), "Expected lengths between 0 and those of input")
    if batch_sizes is not None:
        expect("batch_sizes", batch_sizes, (T,), (torch.int64,), None)
        if batch_sizes.is_meta and not x.is_meta:
            raise RuntimeError(f"Expected batch_sizes with numbers, got {batch_sizes.device}")
        wrong = "Expected batch_sizes that begin with B, never rise, and add up to input's rows"
        if _traced(batch_sizes) or _transformed():
            fits = (batch_sizes.sum() == x.shape[0]) & (batch_sizes[-1] > 0)
            fits = fits if B is None else fits & (batch_sizes[0] == B)
            torch._assert_async(fits & (batch_sizes.diff() < 1).all(), wrong)
        else:  # all these operations would take longer than a short sequence
            sizes = batch_sizes.tolist()
            falls = sizes == sorted(sizes, reverse=True)
            if not falls or sum(sizes) != x.shape[0] or B not in (None, sizes[0]) or sizes[-1] < 1:
                raise RuntimeError(wrong)
