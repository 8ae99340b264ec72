"""The recurrence in differentiable torch operations: slow, and right wherever torch is (transforms,
forward-mode AD, other devices and dtypes, gradients of gradients)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .device_copies import on_device
from .kernels.cells import Cell
from .kernels.states import join_states, join_weights, part_states
from .layer_types import LayerInputs, LayerOutputs, Masks, Options


def first_states(
    x: Tensor,
    w_hh: Tensor,
    states: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    N: int,
    S: int,
) -> Tensor:
    """`states` joined, or zeros of x [T, B, I] or, with batch_sizes, [R, I]."""
    if states is not None:
        return join_states(states, N)
    B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return x.new_zeros((N * S, B, w_hh.shape[-1]))


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x w^T + b, where all three may have the same leading dimension."""
    if w.dim() == 2:
        return F.linear(x, w, b)
    return x @ w.mT if b is None else torch.baddbmm(b.unsqueeze(-2), x, w.mT)


def _parts(bias: Tensor | None, N: int) -> Sequence[Tensor | None]:
    return [None] * N if bias is None else bias.chunk(N, -1)


def _step_of(
    cell: Cell,
    step: Callable[..., Any] | None,
    weights: Sequence[Tensor],
    input_biases: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> Callable[[int, Tensor, Any], Any]:
    """What takes recurrence n from its input pre-activations and its states to the next states."""
    G = cell.gates

    def by_cell(n: int, x: Tensor, s: Any) -> Any:
        r = _linear(s[0], weights[n], biases[n])
        return cell.forward(x.chunk(G, -1), r.chunk(G, -1), s)[0]

    def by_step(n: int, x: Tensor, s: Any) -> Any:
        assert step is not None
        return step(n, x, _linear(s[0], weights[n], None), s, (input_biases[n], biases[n]))

    return by_cell if step is None else by_step


def _unpacked(x: Tensor, batch_sizes: Tensor, B: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows [R, I] as x [T, B, I], the lengths, and which of the T * B rows are packed."""
    b = torch.arange(B, device="cpu")
    runs = batch_sizes[:, None] > b
    rows = (batch_sizes.cumsum(0) - batch_sizes)[:, None] + b
    taken = on_device("batch_sizes", (rows * runs).flatten(), x.device)
    packed = on_device("batch_sizes", runs.flatten().nonzero().squeeze(1), x.device)
    return x.index_select(-2, taken).unflatten(-2, rows.shape), runs.sum(0), packed


def composite(
    cell: Cell,
    operands: Sequence[Any],
    masks: Masks,
    reverse: Sequence[int],
    keep: int,
    step: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `functional.recurrence`, with `operands` x to s0 and `masks` lengths, batch_sizes and
    resets. But for batch_sizes all may have a leading dimension: so many recurrences side by side,
    each with weights of its own.

    Without w_ih x are pre-activations [T, B, N*G*H]. `step(n, x, r, s, biases)`, in place of the
    cell's, gives recurrence n's new states from W_ih x and W_hh h [B, G*H] and its two biases."""
    (x, w_ih, w_hh, b_ih, b_hh, s0) = operands
    lengths, batch_sizes, resets = masks
    N = len(reverse)
    S = cell.states
    B = s0.shape[-2]
    packed: Any = slice(None)
    if batch_sizes is not None:
        x, lengths, packed = _unpacked(x, batch_sizes, B)
    T = x.shape[-3]
    ends = (
        torch.full((B, 1), T, device=x.device)
        if lengths is None
        else on_device("lengths", lengths, x.device).unsqueeze(-1)
    )
    # A NaN in the padding would come back in the gradients of the choices below
    if lengths is not None:
        x = torch.where(torch.arange(T, device=x.device)[:, None, None] < ends.unsqueeze(-3), x, 0)
    gates = x
    if w_ih is not None:
        gates = _linear(x.flatten(-3, -2), w_ih, b_ih if step is None else None)
        gates = gates.unflatten(-2, (T, B))
    gates = gates.chunk(N, -1)
    new_states = _step_of(cell, step, w_hh.chunk(N, -2), _parts(b_ih, N), _parts(b_hh, N))
    sweeps = []
    for n, backwards in enumerate(reverse):
        first = s0.narrow(-3, n * S, S).unbind(-3)
        steps = gates[n].unbind(-3)
        padded = lengths is not None
        sweeps.append(
            _sweep(cell, partial(new_states, n), steps, first, ends, padded, resets, backwards)
        )
    # S of [T, B, N*H]
    columns = [torch.cat(parts, -1) for parts in zip(*(out for out, _ in sweeps))]
    y = columns[0]
    rest = [column.flatten(-3, -2)[..., packed, :] for column in columns[1 : S if keep else 1]]
    y = y if batch_sizes is None else y.flatten(-3, -2)[..., packed, :]
    return (
        y,
        torch.stack(rest, -3) if rest else None,
        torch.stack([v for _, s in sweeps for v in s], -3),
    )


def _sweep(
    cell: Cell,
    new_states: Callable[..., Sequence[Any]],
    steps: Sequence[Tensor],
    first: Sequence[Any],
    ends: Tensor,
    padded: bool,
    resets: Tensor | None,
    backwards: int,
) -> tuple[list[Tensor], Sequence[Any]]:
    """One recurrence through all `steps` [B, G*H] of its gates: the states of every step, S of
    [T, B, H], and the last ones. `ends` [B, 1] are the lengths; `padded` says that some are
    shorter than T."""
    T = len(steps)
    s = first
    # Only added to: Dynamo of torch 2.10 does not trace an assignment to its entries.
    out: list[Any] = []
    for t in reversed(range(T)) if backwards else range(T):
        if resets is not None and t + backwards < T:
            cut = resets.select(-2, t + backwards).unsqueeze(-1) & (t + backwards < ends)
            s = [*(torch.where(cut, 0, v) for v in s[: cell.carried]), *s[cell.carried :]]
        found = new_states(steps[t], s)
        if padded:
            s = [torch.where(t < ends, new, old) for new, old in zip(found, s)]
            found = [torch.where(t < ends, new, 0) for new in found]
        else:
            s = found
        out.append(found)
    in_time = out[::-1] if backwards else out
    return [torch.stack(column, -3) for column in zip(*in_time)], s


def composite_layer(
    inputs: LayerInputs,
    options: Options,
    operator: Callable[..., tuple[Tensor, Tensor | None, Tensor]] = composite,
) -> LayerOutputs:
    """As `functional.run_layer`, by an operator like `composite`, which takes joined tensors."""
    cell, x, weights, states, masks, reverse = inputs
    batch_first = options.batch_first
    rows = x.transpose(0, 1) if batch_first else x
    s0 = first_states(rows, weights[1], states, masks.batch_sizes, len(reverse), cell.states)
    given = rows, *join_weights(weights), s0
    y, others, last = operator(cell, given, masks, reverse, options.keep)
    y = y.transpose(0, 1) if batch_first else y
    return y, others, part_states(last, cell.states)


def differentiate(
    outputs: Sequence[Any],
    grads: Sequence[Any],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    again: bool = True,
) -> list[Tensor | None]:
    """Gradients of `inputs`, those that are needed; if they are to be differentiated `again`, with
    a graph of their own."""
    used = [k for k, grad in enumerate(grads) if grad is not None]
    wanted = [t for t, need in zip(inputs, needs) if need]
    computed: Any = torch.autograd.grad(
        [outputs[k] for k in used],
        wanted,
        [grads[k] for k in used],
        retain_graph=True,
        create_graph=again,
        allow_unused=True,
    )
    remaining = iter(computed)
    return [next(remaining) if need else None for need in needs]


def aliases(tensors: Sequence[Any]) -> list[Any]:
    """So that an input which was computed from another one counts for itself alone."""
    return [t if t is None else t.view_as(t) for t in tensors]
