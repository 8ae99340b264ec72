"""Layers and operators of one small size, for the tests of everything but the numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn.kernels import cells
from tests.cases import LAYER_NAMES

T = 5
B = 4
I = 3
H = 6
LAYERS = pytest.mark.parametrize("name", LAYER_NAMES)


def data(name: str, N: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    cell = getattr(cells, name)
    GH = N * cell.gates * H
    shapes = ((T, B, I), (GH, I), (GH, H), (GH,), (GH,), (N * cell.states, B, H))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def outputs(*found: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in found if t is not None)


def pair(
    name: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, Any]:
    """Torch's layer and ours, with the same parameters."""
    theirs = getattr(nn, name)(*(sizes or (I, H)), **options).to(dtype)
    ours = getattr(rnn, name)(*(sizes or (I, H)), **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(layer: Any, x: Tensor) -> list[Tensor]:
    y, h = layer(x)
    loss = y.sin().sum() + sum(s.pow(2).sum() for s in (h if isinstance(h, tuple) else [h]))
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def check_scaled_step(layer: Any, x: Tensor, kind: str, dtype: torch.dtype) -> None:
    """A step under autocast, with its scaled loss, moves the weights and leaves them finite."""
    scaler = torch.amp.GradScaler(kind)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight_hh_l0.detach().clone()
    with torch.autocast(kind, dtype):
        loss = layer(x)[0].float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.weight_hh_l0.isfinite().all() and not torch.equal(layer.weight_hh_l0, before)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)
