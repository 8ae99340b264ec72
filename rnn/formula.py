"""The recurrence in differentiable torch operations: slow, and right wherever torch is."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.cells import Cell, bind

TORCH = dict(sigmoid=torch.sigmoid, tanh=torch.tanh, relu=torch.relu, positive=lambda x: (x > 0).to(x.dtype),
             zeros_like=torch.zeros_like)


def formula(cell: Cell, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, s0: Tensor,
            lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None, reverse: Sequence[bool],
            keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.recurrence`, whose docstring has the shapes."""
    N, S, B, H = len(reverse), cell.states, *s0.shape[1:]
    place = None
    if batch_sizes is not None:
        runs = torch.arange(B) < batch_sizes[:, None]  # [T, B]
        place = runs.flatten().nonzero().squeeze(1).to(x.device)
        lengths = runs.sum(0)
        x = x.new_zeros(runs.numel(), x.shape[-1]).index_copy(0, place, x).unflatten(0, runs.shape)
    T = x.shape[0]
    ends = torch.full((B, 1), T, device=x.device) if lengths is None else lengths.to(x.device)[:, None]
    if lengths is not None:  # a NaN in the padding would come back in the gradients of the choices below
        x = torch.where(torch.arange(T, device=x.device)[:, None, None] < ends, x, 0)
    gates = F.linear(x, w_ih, b_ih).unflatten(-1, (N, cell.gates, H))
    weights, biases = w_hh.chunk(N), [None] * N if b_hh is None else b_hh.chunk(N)
    step = bind(cell.forward, **TORCH)
    sweeps, last = [], []
    for n, backwards in enumerate(reverse):
        s: Sequence[Any] = s0[n * S : (n + 1) * S].unbind(0)
        out: list[Any] = [None] * T
        for t in reversed(range(T)) if backwards else range(T):
            edge = t + backwards
            if resets is not None and edge < T:
                s = [torch.where(resets[edge, :, None] & (edge < ends), 0, v) for v in s]
            r = F.linear(s[0], weights[n], biases[n]).unflatten(-1, (cell.gates, H))
            out[t], _ = step(gates[t, :, n].unbind(-2), r.unbind(-2), s)
            if lengths is None:
                s = out[t]
            else:
                s = [torch.where(t < ends, new, old) for new, old in zip(out[t], s)]
                out[t] = [torch.where(t < ends, new, 0) for new in out[t]]
        sweeps.append([torch.stack(column) for column in zip(*out)])
        last.extend(s)
    every = torch.stack([torch.cat(parts, -1) for parts in zip(*sweeps)])  # [S, T, B, N*H]
    if place is not None:
        every = every.flatten(1, 2).index_select(1, place)
    return every[0].clone(), every[1 : S if keep else 1].flatten(1, -2), torch.stack(last)


def formula_vjp(cell: Cell, given: Sequence[Tensor | None], rest: tuple[Any, ...], d: Sequence[Tensor | None],
                 needs: Sequence[bool]) -> list[Tensor | None]:
    """As `compute.backward`, by the formula: differentiable again."""
    with torch.enable_grad():
        # Aliases, so that an input which was computed from another one counts for itself alone.
        alias = [t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in given]
        out = formula(cell, *alias, *rest, 1)
        pairs = [(o, g) for o, g in zip(out, d) if g is not None and g.numel()]
        wanted = [t for t, need in zip(alias, needs) if need]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
