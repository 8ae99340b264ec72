"""The arguments of the C++'s calls: of a forward or a backward pass, or of a part of one."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import Cell
from ..forks import forked
from ..plan import window
from ..types import Gradients, Layout, OutputGrads, Outputs, States, Weights
from .structs import Arguments, Sizes


def threads() -> int:
    return 1 if forked() else torch.get_num_threads()


def recurrence_threads(N: int) -> int:
    """Threads of each of N recurrences: M of them by themselves have the same groups with M times
    as many."""
    return -(-threads() // N)


def sizes_of(cell: Cell, layout: Layout, x: Tensor, w_hh: Tensor, share: int = 0) -> Sizes:
    steps, reverse, sizes, _, offsets, _, B = layout
    rows, H = w_hh.shape
    shape = x.shape
    R = steps * B if offsets is None else shape[0]
    # Of numbers of 4 bytes.
    windows = _windows(sizes[0], rows * w_hh.itemsize // 4, cell.split)
    N = len(reverse)
    parts = threads()
    own = share or parts
    return Sizes(steps, B, R, shape[-1], H, N, layout.reverses, own, parts, 0, 0, 0, windows)


@lru_cache(4096)
def _windows(sequences: int, width: int, split: bool) -> tuple[int, int]:
    """Steps of a window in forward and in backward, for rows of `width` pre-activations.

    Each window reads W once more, and in backward its gradients too: windows have at least
    WINDOW_ROWS rows for that. Forward, which has no gradients, does with an eighth of these rows.
    In backward of a split cell a row is twice as wide, dx and dr: a quarter of the rows then saves
    more memory than it costs time."""
    layout = Layout(0, (), (sequences,))
    forward = window(layout, width, share=8)
    backward = window(layout, 2 * width, share=4) if split else window(layout, width)
    return forward, backward


def forward_call(
    cell: Cell,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    share: int = 0,
) -> Arguments:
    """What writes `outputs`, by so many threads or, for 0, by all."""
    sizes = sizes_of(cell, layout, x, weights.w_hh, share)
    # By position: with names this takes as long as asking each tensor for its address
    return Arguments(
        x,
        weights.w_ih,
        weights.w_hh,
        weights.b_ih,
        weights.b_hh,
        None,  # dy
        None,  # dstates
        outputs.y,
        outputs.states,
        outputs.saved,
        None,  # x_grad
        None,  # w_ih_grad
        None,  # w_hh_grad
        None,  # b_ih_grad
        None,  # b_hh_grad
        None,  # group_grads
        None,  # kept
        layout.offsets,
        None,  # kept_steps
        layout.resets,
        s0,
        None,  # dlast
        outputs.last,
        None,  # s0_grad
        sizes,
    )


class Part(NamedTuple):
    """One call of a backward pass in several, of all recurrences or of some: fields of Sizes and
    Arguments."""

    threads: int
    continues: bool
    continued: bool
    group_grads: Tensor


def backward_call(
    cell: Cell,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    grads: OutputGrads,
    gradients: Gradients[Tensor | None],
    part: Part | None = None,
) -> Arguments:
    """What `backward` calls. A part of the sequence is one window, whose gradients of W are added
    to those that are there."""
    w_hh = weights.w_hh
    sizes = sizes_of(cell, layout, x, w_hh)
    group_grads = None
    if part is not None:
        group_grads = part.group_grads
        sizes = sizes._replace(
            threads=part.threads,
            continues=part.continues,
            continued=part.continued,
            # One window, whatever the sizes of groups
            window=(sizes.window[0], 2 * max(1, layout.steps)),
        )
    return Arguments(
        x,
        weights.w_ih,
        w_hh,
        None,  # b_ih
        None,  # b_hh
        grads.y,
        grads.states,
        outputs.y,
        outputs.states,
        outputs.saved,
        gradients.x,
        gradients.w_ih,
        gradients.w_hh,
        gradients.b_ih,
        gradients.b_hh,
        group_grads,
        None,  # kept
        layout.offsets,
        None,  # kept_steps
        layout.resets,
        s0,
        grads.last,
        None,  # last
        gradients.s0,
        sizes,
    )
