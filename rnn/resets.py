"""Steps from which, up to the next reset, no gradient is asked for: what they hold must not reach a
gradient. (The kernels of a GPU see to it by themselves.)"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device_copies import on_device
from .kernels.plan import Plan
from .kernels.types import Layout, OutputGrads, Outputs


def requested_steps(
    plan: Plan, layout: Layout, x: Tensor, s0: Any, outputs: Outputs, grads: OutputGrads
) -> tuple[Tensor, Any, Outputs]:
    """x, s0 and what was saved, with 0 in the steps that the loss does not ask for: those from
    which, up to the next reset, no gradient comes. Their own is 0; but 0 times the NaN that one of
    them may hold would be NaN."""
    y, others, _, saved = outputs
    dy, dothers, dlast = grads
    tensors = [t for t in (x, y, others, saved, *(s0 or ())) if t is not None]
    # A GPU, with arrays of CuPy's, would have to be waited for.
    if not x.is_cuda and all(bool(t.sum().isfinite()) for t in tensors):
        return x, s0, outputs
    N = len(layout.reverse)
    T = layout.steps
    R = sum(layout.sizes)
    H = y.shape[-1] // N
    place = _place(layout, x.device)
    # Which rows a gradient comes into from outside, [R, N].
    nonzero = torch.zeros(R, N, dtype=torch.bool, device=x.device)
    for grad in (dy, *(() if dothers is None else dothers)):
        if grad is not None:
            nonzero |= (grad.view(R, N, H) != 0).any(-1)
    row = ((place.starts[:, None] + place.sequence) * place.runs).clamp(max=max(R - 1, 0))
    asks = nonzero[row] & place.runs[..., None]  # [T, B, N]
    for grad in dlast or ():
        if grad is not None:
            last = (grad != 0).any(-1)  # [N, B]
            for n, back in enumerate(layout.reverse):
                end = 0 if back else place.ends
                asks[..., n] |= (place.time == end) & last[n] & place.runs
    asked = _reached(asks, layout.resets, layout.reverse, place.time, T)
    of_row = asked[place.row_time, place.row_sequence]  # [R, N]
    begins = [
        asked[place.ends.clamp(min=0), place.sequence, n] if back else asked[0, :, n]
        for n, back in enumerate(layout.reverse)
    ]
    first = torch.stack(begins)  # [N, B]
    x = torch.where(of_row.any(1).view(*x.shape[:-1], 1), x, 0)
    y = torch.where(of_row[..., None], y.view(R, N, H), 0).view(y.shape)
    if s0 is not None:
        s0 = [torch.where(first[..., None], s, 0) for s in s0]
    if others is not None:
        others = torch.where(of_row[..., None], others.view(-1, R, N, H), 0).view(others.shape)
    if saved is not None and plan.backend == "native":  # whose order that is
        saved = torch.where(of_row[..., None, None], saved.view(R, N, -1, H), 0).view(saved.shape)
    elif saved is not None:
        saved = torch.where(of_row[..., None], saved.view(-1, R, N, H), 0).view(saved.shape)
    return x, s0, Outputs(y, others, None, saved)


class _Place(NamedTuple):
    """Where steps are: `time` [T, 1], `sequence` [B], `starts` [T] the first row of each step,
    `runs` [T, B], `ends` [B] the last step of each sequence, and of every row its step and its
    sequence."""

    time: Tensor
    sequence: Tensor
    starts: Tensor
    runs: Tensor
    ends: Tensor
    row_time: Tensor
    row_sequence: Tensor


def _place(layout: Layout, device: torch.device) -> _Place:
    sizes = on_device("batch_sizes", torch.tensor(layout.sizes, device="cpu"), device)
    starts = sizes.cumsum(0) - sizes
    R = sum(layout.sizes)
    time = torch.arange(layout.steps, device=device)[:, None]
    sequence = torch.arange(layout.sequences, device=device)
    row_time = torch.repeat_interleave(time[:, 0], sizes, output_size=R)
    row_sequence = torch.arange(R, device=device) - starts[row_time]
    runs = sequence < sizes[:, None]
    if layout.lengths is not None:
        runs = runs & (time < layout.lengths)
    return _Place(time, sequence, starts, runs, runs.sum(0) - 1, row_time, row_sequence)


def _reached(asks: Tensor, resets: Tensor, reverse: Sequence[int], time: Tensor, T: int) -> Tensor:
    """Which steps a gradient reaches [T, B, N]: a step is, if one is asked for that comes after it,
    in the order of the recurrence, and before a reset."""
    reached = torch.empty_like(asks)
    for n, back in enumerate(reverse):
        if back:
            nearest = torch.where(asks[..., n], time, -1).cummax(0).values
            reached[..., n] = nearest >= torch.where(resets, time, 0).cummax(0).values
        else:
            nearest = torch.where(asks[..., n], time, T).flip(0).cummin(0).values.flip(0)
            boundary = torch.where(resets, time, T).flip(0).cummin(0).values.flip(0)
            reached[:-1, :, n] = nearest[:-1] < boundary[1:]
            reached[-1, :, n] = nearest[-1] < T
    return reached
