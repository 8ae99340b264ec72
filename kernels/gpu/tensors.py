"""The tensors of one pass through time, as both languages' kernels take them. None: absent.

Shapes: R rows (one step of one sequence), N directions, G gates, S states, A saved activations."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ForwardTensors(NamedTuple):
    # [R, I], or with no w_ih the pre-activations [R, N, G, H], without b_ih where that is given
    x: Tensor
    w_ih: Tensor | None
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    # [R, N, H], [S - 1, R, N, H] and [A, R, N, H]
    y: Tensor
    states: Tensor | None
    saved: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    # S of [N, B, H] each: the initial states, None for zeros, and the last ones
    first: tuple[Tensor | None, ...]
    last: tuple[Tensor, ...]
    # [S, N, B, H], float32: the states between two launches
    carried: Tensor | None = None
    # [2, N, B, H]: h that enters even and odd steps (Triton's scopes but block)
    hidden: Tensor | None = None
    # [N, B, G, H]: W_hh h of the step (scope library)
    product: Tensor | None = None


class BackwardTensors(NamedTuple):
    w_hh: Tensor
    y: Tensor
    states: Tensor | None
    saved: Tensor | None
    dy: Tensor | None
    dstates: Tensor | None
    # [R, N, G, H]; dx is None where it equals dr
    dx: Tensor | None
    dr: Tensor
    # [R, N, H]: the h that entered each row, where resets or lengths keep it from being y's
    h_prev: Tensor | None
    # [1, R], as integers: all bits of a row that is a step of its sequence, none of one past its
    # end; with resets [1 + N, R], all bits in rows that a gradient comes to, in any direction and
    # in each, where they are 0 before
    marks: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    # S of [N, B, H] each: the initial states and the gradients of the last ones, None for zeros,
    # and the gradients of the initial ones
    first: tuple[Tensor | None, ...]
    dlast: tuple[Tensor | None, ...]
    dfirst: tuple[Tensor | None, ...]
    # [S, N, B, H], float32: gradients of the states between two launches
    carried: Tensor | None = None
    # [N, B, G, H], dr of the step done before, and [N, B, H], W_hh^T of that (scope library)
    outgoing: Tensor | None = None
    product: Tensor | None = None


def set_to_zero(tensors: ForwardTensors | BackwardTensors, exchanged: Tensor | None) -> None:
    """In one launch, what kernels find at zero: words that blocks exchange, and marks where there
    are resets."""
    found = [exchanged]
    if isinstance(tensors, BackwardTensors) and tensors.resets is not None:
        found.append(tensors.marks)
    # of one dtype: else they take a launch each
    words = [t.view(torch.int16) for t in found if t is not None]
    if words:
        torch._foreach_zero_(words)


def each_of(tensors: Any) -> Iterator[Tensor | None]:
    """Those of a tuple, and of tuples in it, in order."""
    for t in tensors:
        if isinstance(t, tuple):
            yield from each_of(t)
        else:
            yield t
