"""Layers by torch's own operators, where there is no C++ for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .boundary import ready
from .kernels.cells import Cell


def by_torch(
    operator: Any,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor] | None,
    N: int,
    batch_first: bool,
) -> tuple[Tensor, None, list[Tensor]]:
    """As `functional.run_layer`, by an operator that has gradients of its own."""
    if len(weights) < 4 * N:
        columns = [[None] * N if t is None else t.chunk(N) for t in weights]
        weights = [part for own in zip(*columns) for part in own]
    if not states:
        B = x.shape[0] if batch_first else x.shape[1]
        states = [x.new_zeros((N, B, weights[1].shape[1]))] * cell.states
    x, *given = ready((x, *states, *weights))
    first = given[: cell.states]
    parameters = [t for t in given[cell.states :] if t is not None]
    y, *last = operator(
        x,
        first if cell.states > 1 else first[0],
        parameters,
        len(parameters) == 4 * N,
        1,
        0.0,
        torch.is_grad_enabled(),
        N > 1,
        batch_first,
    )
    return y, None, last
