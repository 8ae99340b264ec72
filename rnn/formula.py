"""The recurrence in differentiable torch operations: slow, and right wherever torch is."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .kernels.cells import Cell, bind

OPERATIONS = dict(sigmoid=torch.sigmoid, tanh=torch.tanh, relu=torch.relu, zeros_like=torch.zeros_like)


def step(cell: Cell, x: Tensor, r: Tensor, s: Sequence[Tensor]) -> Sequence[Tensor]:
    """The next states [B, H], from the pre-activations x and r [B, G*H] and the states s."""
    return bind(cell.forward, **OPERATIONS)(x.chunk(cell.gates, -1), r.chunk(cell.gates, -1), s)[0]


def formula(cell: Cell, given: Sequence[Any], masks: Sequence[Tensor | None], reverse: Sequence[bool],
            keep: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `ops.recurrence`, with `given` x to s0 and `masks` lengths, batch_sizes and resets."""
    (x, w_ih, w_hh, b_ih, b_hh, s0), (lengths, batch_sizes, resets) = given, masks
    N, S, (_, B, H) = len(reverse), cell.states, s0.shape
    if batch_sizes is not None:
        x, lengths = pad_packed_sequence(PackedSequence(x, batch_sizes))
    T = x.shape[0]
    ends = torch.full((B, 1), T, device=x.device) if lengths is None else lengths.to(x.device)[:, None]
    if lengths is not None:  # a NaN in the padding would come back in the gradients of the choices below
        x = torch.where(torch.arange(T, device=x.device)[:, None, None] < ends, x, 0)
    gates = F.linear(x, w_ih, b_ih).chunk(N, -1)
    weights, biases = w_hh.chunk(N), [None] * N if b_hh is None else b_hh.chunk(N)
    sweeps, last = [], []
    for n, backwards in enumerate(reverse):
        s: Sequence[Any] = s0[n * S : (n + 1) * S].unbind(0)
        out: list[Any] = [None] * T
        for t in reversed(range(T)) if backwards else range(T):
            if resets is not None and t + backwards < T:
                s = [torch.where(resets[t + backwards, :, None] & (t + backwards < ends), 0, v) for v in s]
            out[t] = step(cell, gates[n][t], F.linear(s[0], weights[n], biases[n]), s)
            if lengths is None:
                s = out[t]
            else:
                s = [torch.where(t < ends, new, old) for new, old in zip(out[t], s)]
                out[t] = [torch.where(t < ends, new, 0) for new in out[t]]
        sweeps.append([torch.stack(column) for column in zip(*out)])
        last.extend(s)
    columns = [torch.cat(parts, -1) for parts in zip(*sweeps)]  # S of [T, B, N*H]
    if batch_sizes is not None:
        columns = [pack_padded_sequence(column, lengths).data for column in columns]
    rest = [column.flatten(0, -2) for column in columns[1 : S if keep else 1]]
    return columns[0], torch.stack(rest) if rest else None, torch.stack(last)
