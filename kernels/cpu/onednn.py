"""torch's own LSTM on the CPU, oneDNN's, for whole sequences where there is nothing faster. As `host`, but for `states`
with keep >= 2, which are the last ones, and `saved`, which is oneDNN's workspace [N, bytes]."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell
from ..plan import Plan, Rows

_LSTM = 2  # its number among oneDNN's cells


def _layers(rows: Rows, weights: Sequence[Any], s0: Tensor) -> Iterator[tuple[list[Any], bool]]:
    """Of each recurrence w_ih, w_hh, b_ih, b_hh, h and c before the first step, and its direction."""
    N = len(rows.reverse)
    split, s0 = [[None] * N if t is None else t.detach().chunk(N) for t in weights], s0.detach()
    for n, (back, *own) in enumerate(zip(rows.reverse, *split)):
        zero = own[0].new_zeros(len(own[0])) if own[2] is None else None
        yield [*(zero if t is None else t for t in own), s0[2 * n], s0[2 * n + 1]], bool(back)


def forward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, s0: Tensor, keep: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    steps, H = x.detach().view(rows.steps, -1, x.shape[1]), s0.shape[2]
    with torch.set_grad_enabled(keep > 1):  # or there is no workspace
        found = [torch.ops.aten.mkldnn_rnn_layer(steps, *own, back, [], _LSTM, H, 1, True, False, False, keep > 1)
                 for own, back in _layers(rows, (w_ih, w_hh, b_ih, b_hh), s0)]
    y, h, c, saved = ([*column] for column in zip(*found))
    last = torch.stack([s for pair in zip(h, c) for s in pair])
    return (y[0] if len(y) == 1 else torch.cat(y, -1), last.clone() if keep > 1 else None, last,
            (saved[0].unsqueeze(0) if len(saved) == 1 else torch.stack(saved)) if keep > 1 else None)


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor, saved: Tensor, dy: Tensor | None, dstates: None, dlast: Tensor | None,
             needs: Sequence[bool]) -> tuple[list[Tensor | None], Tensor | None]:
    T, N, H = rows.steps, len(rows.reverse), s0.shape[2]
    steps, given, dy = x.view(T, -1, x.shape[1]), y.view(T, -1, N * H), None if dy is None else dy.view(T, -1, N * H)
    found: list[Any] = []
    for n, (own, back) in enumerate(_layers(rows, (w_ih, w_hh, None, None), s0)):
        units, ends = slice(n * H, (n + 1) * H), slice(2 * n, 2 * n + 2)
        found.append(torch.ops.aten.mkldnn_rnn_layer_backward(
            steps, *own, given[..., units].contiguous(), *states[ends],
            None if dy is None else dy[..., units].contiguous(), *((None, None) if dlast is None else dlast[ends]),
            back, _LSTM, H, 1, True, True, False, [], False, saved[n]))
    dx, *weights, dh, dc = ([*column] for column in zip(*found))
    grads = [torch.stack(dx).sum(0) if N > 1 else dx[0], *(torch.cat(g) if N > 1 else g[0] for g in weights),
             torch.stack([d.view(-1, H) for pair in zip(dh, dc) for d in pair])]
    *found, first = [grad if need else None for grad, need in zip(grads, needs)]
    return found, first
