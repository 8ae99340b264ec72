"""The tensors of one pass through time, as both languages' kernels take them. None: absent.

Shapes: R rows (one step of one sequence), N directions, G gates, S states, A saved activations."""

from typing import NamedTuple

from torch import Tensor


class ForwardTensors(NamedTuple):
    # [R, I], or with no w_ih the pre-activations [R, N, G, H]
    x: Tensor
    w_ih: Tensor | None
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    # [N, S, B, H], float32: initial states in, final states out
    state: Tensor
    # [2, N, B, H]: h that enters even and odd steps (Triton's scopes but block)
    hidden: Tensor | None
    # [R, N, H], [S - 1, R, N, H] and [A, R, N, H]
    y: Tensor
    states: Tensor | None
    saved: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    # [N, B, G, H]: W_hh h of the step (scope library)
    product: Tensor | None = None


class BackwardTensors(NamedTuple):
    w_hh: Tensor
    # [N, S, B, H]: the initial states
    state: Tensor
    y: Tensor
    states: Tensor | None
    saved: Tensor | None
    dy: Tensor
    dstates: Tensor | None
    # [N, S, B, H], float32: gradients of the final states in, of the initial states out
    ds: Tensor
    # [R, N, G, H]; dx is None where it equals dr
    dx: Tensor | None
    dr: Tensor
    # [R, N, H]: the h that entered each row, where resets or lengths keep it from being y's
    h_prev: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    # [N, B, G, H], dr of the step done before, and [N, B, H], W_hh^T of that (scope library)
    outgoing: Tensor | None = None
    product: Tensor | None = None
