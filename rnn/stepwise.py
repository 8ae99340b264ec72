"""What takes a whole row of h where no kernel has it in one place: layer norm, and clipping the
gradient of h by its norm. A step for `composite`, in torch's operations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import cells
from .kernels.notices import warn_once
from .regularisers import clip_limit, clip_norm, extended_step, normalized_output, zoned_states


def stepwise(layer: Any, index: int, dropped: bool) -> Callable[..., Any]:
    """The step of recurrence n, for `composite`: with layer norm (Ba, Kiros and Hinton, 2016,
    https://arxiv.org/abs/1607.06450) of W_ih x, W_hh h and of an LSTM's c, and with the gradient of
    h cut to a norm."""
    cell = layer.layer_cell()
    heads = layer.num_heads
    H = layer.hidden_size // heads
    G = cell.gates
    zoned = zoned_states(layer)
    limit = clip_limit(layer)
    norm_limit = clip_norm(layer)

    def part(name: str, n: int, width: int) -> Tensor:
        """That recurrence's slice of a layer's parameter."""
        direction, head = divmod(n, heads)
        suffix = "_reverse" if direction else ""
        whole: Tensor = getattr(layer, f"{name}_l{index}{suffix}")
        return whole[head * width : (head + 1) * width]

    def normalized(v: Tensor, name: str, n: int) -> Tensor:
        width = G * H
        gain = part(name, n, width)
        normal = F.layer_norm(v[..., :width], (width,), gain)
        return torch.cat((normal, v[..., width:]), -1)

    def run(n: int, x: Tensor, r: Tensor, s: Any, biases: Sequence[Any]) -> Any:
        def base(x: Any, r: Any, s: Any, k: Any) -> Any:
            new = cell.step(x, r, s, k)
            if layer.layer_norm and cell is cells.lstm:
                gain = part("norm_c", n, H)
                h = normalized_output(x, r, new[1], lambda c: F.layer_norm(c, (H,), gain))
                new = (h, new[1])
            if norm_limit is None:
                return new
            h, *others = new
            return (_clip_norm(h, norm_limit), *others)

        if layer.layer_norm:
            x = normalized(x, "norm_ih", n)
            r = normalized(r, "norm_hh", n)
        b_ih, b_hh = biases
        x = x if b_ih is None else x + b_ih
        r = r if b_hh is None else r + b_hh
        step = extended_step(base, cell, limit, zoned, dropped)
        gates = G + len(zoned)
        constants = cell.constants + dropped
        carried = len(s) - constants
        new = step(x.chunk(gates, -1), r.chunk(gates, -1), s[:carried], s[carried:])
        return (*new, *s[carried:])

    return run


class _ClipNorm(cells.ClipGrad):
    """By its norm, for each sequence."""

    @staticmethod
    def backward(ctx: Any, d: Any) -> Any:
        norm = d.norm(dim=-1, keepdim=True)
        return d * (ctx.limit / norm.clamp(min=ctx.limit)), None


_clip_norm = cells.cutting(_ClipNorm)


def say_stepwise(layer: Any, why: str) -> None:
    """Once for a class of layers."""
    if torch.compiler.is_compiling():
        return
    warn_once(
        (say_stepwise, type(layer)),
        f"rnn.{type(layer).__name__}: {why} runs step by step in torch's operations, slower than "
        "the kernels",
    )
