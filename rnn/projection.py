"""proj_size of an LSTM: W_hh h = (W_hh W_hr) m of a layer whose state is m = o tanh(c), and h =
W_hr m."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import expect, refuse_nested
from .device_copies import on_device
from .layer_types import Masks


def first_steps(x: Tensor, h0: Tensor, masks: Masks, reverse: Sequence[int]) -> Tensor:
    """Like x but of width N*P: h0 [N, B, P] in the rows of the step that each sweep begins with,
    and else 0."""
    (lengths, batch_sizes, resets) = masks
    (N, B, P) = h0.shape
    T = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    b = torch.arange(B, device=x.device)
    t = b * 0 + T - 1
    starts = torch.arange(T, device=x.device) * B
    if lengths is not None:
        t = (on_device("lengths", lengths, x.device) - 1).clamp(min=0)
    if batch_sizes is not None:
        sizes = on_device("batch_sizes", batch_sizes, x.device)
        t = (sizes[:, None] > b).sum(0) - 1
        starts = sizes.cumsum(0) - sizes
    columns = []
    for h, backwards in zip(h0, reverse):
        if resets is not None and not backwards:
            h = torch.where(resets[0, :, None], 0, h)
        columns.append(
            h.new_zeros(math.prod(x.shape[:-1]), P).index_add(
                0, starts[t] + b if backwards else b, h
            )
        )
    return torch.cat(columns, -1).view(*x.shape[:-1], N * P)


def check_projected(layer: Any, weights: Sequence[Sequence[Any]]) -> None:
    """Raises RuntimeError for weights that cannot be put together as their products are
    computed."""
    D = 2 if layer.bidirectional else 1
    P = layer.proj_size
    H = layer.hidden_size
    GH = 4 * H
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
    w_ih = weights[0][0]
    for k, some in enumerate(weights):
        inputs = D * P if k >= D else layer.input_size
        shapes = (GH, inputs), (GH, P), (GH,), (GH,), (P, H)
        for name, t, shape in zip(names, some, shapes):
            if t is not None:
                refuse_nested([(name, t)])
                expect(name, t, shape, (w_ih.dtype,), w_ih.device)
