"""Times two layers of the same parameters in turns, so that what else the machine does falls on
both."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_ROUNDS = 5


class Times(NamedTuple):
    """Medians of the seconds of a call, and how many calls of each there were."""

    theirs: float
    ours: float
    rounds: int


def forward(layer: Any, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def train(layer: Any, x: Tensor) -> None:
    """Forward and backward, of the weights and the input."""
    leaf = x.detach().requires_grad_()
    layer(leaf)[0].sum().backward()
    layer.zero_grad()


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _seconds(call: Callable[[Any, Tensor], None], layer: Any, x: Tensor) -> float:
    _wait(x)
    begin = time.perf_counter()
    call(layer, x)
    _wait(x)
    return time.perf_counter() - begin


def compare(
    call: Callable[[Any, Tensor], None], theirs: Any, ours: Any, x: Tensor, seconds: float
) -> Times:
    """In turns, for about so many seconds, after two calls of each that compile and warm up."""
    for layer in (theirs, ours) * 2:
        call(layer, x)
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(taken[0]) < LEAST_ROUNDS or time.perf_counter() < end:
        # Each is the first as often as the other
        order = (0, 1) if len(taken[0]) % 2 else (1, 0)
        for which in order:
            taken[which].append(_seconds(call, (theirs, ours)[which], x))
    return Times(statistics.median(taken[0]), statistics.median(taken[1]), len(taken[0]))
