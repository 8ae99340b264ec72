"""Steps from which, up to the next reset, no gradient is asked for: what they hold must not reach a gradient."""

from typing import Any

import torch
from torch import Tensor


def requested_steps(run: Any, x: Tensor, s0: Any, y: Tensor, others: Any, saved: Any, dy: Any, dothers: Any,
              dlast: Any) -> tuple[Tensor, Any, Tensor, Any, Any]:
    """x, s0, y, the other states and the activations with 0 in the steps that the loss does not ask for: those from
    which, up to the next reset, no gradient comes. Their own is 0; but 0 times the NaN that one of them may hold would
    be NaN."""
    before = [] if s0 is None else s0 if run.on_host else [s0]
    tensors = [t for t in (x, y, others, saved, *before) if t is not None]
    if not x.is_cuda and all(bool(t.sum().isfinite()) for t in tensors):  # a GPU would have to be waited for
        return x, s0, y, others, saved
    rows, N, device = run.rows, len(run.reverse), x.device
    T, B, R, H = rows.steps, rows.sequences, sum(rows.sizes), y.shape[-1] // N
    sizes = torch.tensor(rows.sizes, device=device)
    starts = sizes.cumsum(0) - sizes
    time, sequence = torch.arange(T, device=device)[:, None], torch.arange(B, device=device)
    row_time = torch.repeat_interleave(time[:, 0], sizes, output_size=R)
    row_sequence = torch.arange(R, device=device) - starts[row_time]
    runs = sequence < sizes[:, None]  # [T, B]
    if rows.lengths is not None:
        runs = runs & (time < rows.lengths)
    ends = runs.sum(0) - 1
    # Which steps a gradient comes into from outside, [T, B, N].
    given = torch.zeros(R, N, dtype=torch.bool, device=device)
    for grad in (dy, *(() if dothers is None else dothers)):
        if grad is not None:
            given |= (grad.view(R, N, H) != 0).any(-1)
    asks = given[((starts[:, None] + sequence) * runs).clamp(max=max(R - 1, 0))] & runs[..., None]
    for grad in () if dlast is None else dlast if run.on_host else dlast.view(N, -1, B, H).unbind(1):
        if grad is not None:
            last = (grad != 0).any(-1)  # [N, B]
            for n, back in enumerate(run.reverse):
                asks[..., n] |= (time == (0 if back else ends)) & last[n] & runs
    # A step is asked for if one that comes after it, in the order of the recurrence, and before a reset, is.
    asked = torch.empty_like(asks)
    for n, back in enumerate(run.reverse):
        if back:
            nearest = torch.where(asks[..., n], time, -1).cummax(0).values
            asked[..., n] = nearest >= torch.where(rows.resets, time, 0).cummax(0).values
        else:
            nearest = torch.where(asks[..., n], time, T).flip(0).cummin(0).values.flip(0)
            boundary = torch.where(rows.resets, time, T).flip(0).cummin(0).values.flip(0)
            asked[:-1, :, n] = nearest[:-1] < boundary[1:]
            asked[-1, :, n] = nearest[-1] < T
    of_row = asked[row_time, row_sequence]  # [R, N]
    first = torch.stack([asked[ends.clamp(min=0), sequence, n] if back else asked[0, :, n]
                         for n, back in enumerate(run.reverse)])  # [N, B]
    x = torch.where(of_row.any(1).view(*x.shape[:-1], 1), x, 0)
    y = torch.where(of_row[..., None], y.view(R, N, H), 0).view(y.shape)
    if run.on_host and s0 is not None:
        s0 = [torch.where(first[..., None], s, 0) for s in s0]
    elif s0 is not None:
        s0 = torch.where(first[:, None, :, None], s0.view(N, -1, B, H), 0).view(s0.shape)
    if others is not None:
        others = torch.where(of_row[..., None], others.view(-1, R, N, H), 0).view(others.shape)
    if saved is not None and run.plan.backend == "native":  # whose order that is
        saved = torch.where(of_row[..., None, None], saved.view(R, N, -1, H), 0).view(saved.shape)
    elif saved is not None:
        saved = torch.where(of_row[..., None], saved.view(-1, R, N, H), 0).view(saved.shape)
    return x, s0, y, others, saved
