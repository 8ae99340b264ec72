"""What the two operators come to for torch.utils.flop_counter, which counts the operations of
matrix products alone. A sequence that is padded counts with its padding."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .kernels import cells
from .kernels.cells import Cell
from .transforms import count_flops, dispatch_modes, without_dispatch_modes


def _products(shapes: Sequence[Any]) -> tuple[int, int, int]:
    """Operations of the product with the input, of that with the states, and of that with the first
    states; `shapes` as the operators take their tensors, x first."""
    (*rows, _), w_ih, w_hh, s0 = (shapes[k] for k in (0, 1, 2, 5))
    steps = 2 * math.prod(rows)
    # without w_ih x are pre-activations
    of_input = 0 if w_ih is None else steps * math.prod(w_ih)
    return of_input, steps * math.prod(w_hh), 2 * s0[1] * math.prod(w_hh)


def forward(
    cell: str, plan: str, reverse: Sequence[int], keep: int, *shapes: Any, out_shape: Any = None
) -> int:
    """Of fused_rnn::forward."""
    of_input, of_states, _ = _products(shapes)
    return of_input + of_states


def backward(
    cell: str,
    plan: str,
    reverse: Sequence[int],
    needs: Sequence[bool],
    *shapes: Any,
    out_shape: Any = None,
) -> int:
    """Of fused_rnn::backward. The first states need no gradient but where one is asked for."""
    of_input, of_states, of_first = _products(shapes)
    x, w_ih, w_hh, _, _, s0 = needs
    total = of_states if s0 else of_states - of_first
    total += of_input * (x + w_ih) + of_states * w_hh
    saved = shapes[11]
    if cells.registered(cell).saved and (saved is None or len(saved) < 2):  # forward runs once more
        total += of_input + of_states
    return total


def _counters() -> list[Any]:
    """Those of torch.utils.flop_counter that are counting."""
    counters = [getattr(mode, "counter", None) for mode in dispatch_modes()]
    return [counter for counter in counters if hasattr(counter, "flop_registry")]


def register() -> None:
    """Tell PyTorch's counter, where it has been imported, and those that count now. (It is not
    imported for this: it would import Triton.)"""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    formulas = {torch.ops.fused_rnn.forward: forward, torch.ops.fused_rnn.backward: backward}
    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)
    for counting in _counters():
        for operator in formulas:
            counting.flop_registry.setdefault(operator, counter.flop_registry[operator])


@contextmanager
def of_backward(
    cell: Cell, reverse: Sequence[int], needs: Sequence[bool], tensors: Sequence[Any]
) -> Iterator[None]:
    """A backward pass that is no operator, as its forward pass ran before a dispatch mode was
    there: counts as that."""
    if not cells.is_registered(cell):
        yield
        return
    register()
    counters = _counters()
    with without_dispatch_modes():
        yield
    for counter in counters:
        arguments = (cell.name, "", reverse, needs, *tensors)
        count_flops(counter, torch.ops.fused_rnn.backward, arguments)
