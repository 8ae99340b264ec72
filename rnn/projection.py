"""proj_size of an LSTM: W_hh h = (W_hh W_hr) m of a layer whose state is m = o tanh(c), and h =
W_hr m."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import own_gradient
from .boundary import alive
from .checks import check_masks, expect, refuse_nested
from .device_copies import on_device
from .layer_types import LayerInputs, LayerOutputs, Masks, Operator, Options


def _first_steps(x: Tensor, h0: Tensor, masks: Masks, reverse: Sequence[int]) -> Tensor:
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


def projected_layer(operator: Operator, inputs: LayerInputs, options: Options) -> LayerOutputs:
    """As `operator`, for weights with w_hr, those of both directions joined. x is in order of time.

    Only the first h is of no m: it comes in as further input of the first step."""
    _, x, weights, states, masks, reverse = inputs
    check_masks(x, masks, x.shape[0], x.shape[1] if masks.batch_sizes is None else None)
    alive((x, *(states or ())))
    N = len(reverse)
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    down = w_hr.chunk(N)
    inner = w_hh.chunk(N)
    w_hh = torch.cat([w @ part for w, part in zip(inner, down)])
    h0 = None
    if states is not None:
        h0 = own_gradient(states[0])
        x = torch.cat((own_gradient(x), _first_steps(x, h0, masks, reverse)), -1)
        w_ih = torch.cat((own_gradient(w_ih), torch.block_diag(*inner)), 1)
        states = [torch.zeros_like(states[1]), *states[1:]]
    inner_inputs = inputs._replace(x=x, weights=(w_ih, w_hh, b_ih, b_hh), states=states)
    y, others, (m_n, *last) = operator(inner_inputs, options)
    y = torch.cat([m @ part.T for m, part in zip(y.chunk(N, -1), down)], -1)
    h_n = torch.stack([m @ part.T for m, part in zip(m_n, down)])
    if masks.lengths is not None:
        none = (on_device("lengths", masks.lengths, x.device) == 0)[:, None]
        h_n = torch.where(none, 0 if h0 is None else h0.contiguous(), h_n)
    return y, others, [h_n, *last]


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
