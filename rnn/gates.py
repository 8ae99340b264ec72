"""Which gates of a cell keep its states, found from the cell's algebra: by saturating one gate
after another, whatever the gates are called and in whichever order they come."""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.cells import Cell

# A pre-activation at which a sigmoid is 1, or 1 less than a rounding of 1, in float64
_FAR = 50.0
_NEAR_ENOUGH = 1e-9
_SAMPLES = 8


class Side(NamedTuple):
    """A gate, and the sign of the pre-activations that are meant."""

    gate: int
    sign: int


class Memory(NamedTuple):
    """A gate that keeps a state where its pre-activations are far to that side, and forgets it on
    the other side. `closed`: the side of the gate that then lets nothing new in, None where the
    first one does that as well (as in a GRU)."""

    keeps: Side
    closed: Side | None


def _step(cell: Cell, sides: list[Side]) -> tuple[list[Tensor], list[Tensor]]:
    """States [samples] of random numbers, and those after a step with these gates saturated."""
    generator = torch.Generator().manual_seed(0)

    def values(count: int) -> list[Tensor]:
        return [
            torch.randn(_SAMPLES, generator=generator, dtype=torch.float64) for _ in range(count)
        ]

    x = values(cell.gates)
    r = values(cell.gates)
    s = [value.requires_grad_() for value in values(cell.states)]
    for gate, sign in sides:
        x[gate] = torch.full_like(x[gate], sign * _FAR)
    return s, [*cell.forward(tuple(x), tuple(r), tuple(s))[0]]


def _keeps(cell: Cell, state: int, sides: list[Side]) -> bool:
    s, after = _step(cell, sides)
    return bool(((after[state] - s[state]).abs() < _NEAR_ENOUGH).all())


def _forgets(cell: Cell, state: int, sides: list[Side]) -> bool:
    s, after = _step(cell, sides)
    if not after[state].requires_grad:
        return True
    (slope,) = torch.autograd.grad(after[state].sum(), s[state], allow_unused=True)
    return slope is None or bool((slope.abs() < _NEAR_ENOUGH).all())


def _find(cell: Cell, state: int) -> Memory | None:
    sides = [Side(gate, sign) for gate, sign in product(range(cell.gates), (1, -1))]
    others: list[Side | None] = [None, *sides]
    for closed, kept in product(others, sides):
        if closed is not None and closed.gate == kept.gate:
            continue
        rest = [] if closed is None else [closed]
        opposite = Side(kept.gate, -kept.sign)
        if _keeps(cell, state, [kept, *rest]) and _forgets(cell, state, [opposite, *rest]):
            return Memory(kept, closed)
    return None


@lru_cache
def memories(cell: Cell) -> list[Memory]:
    """Of the states that one gate keeps, alone or with another one closed. Float64 on the CPU, some
    steps of a few numbers; once for each cell."""
    with torch.enable_grad(), torch.device("cpu"):
        found = [_find(cell, state) for state in range(cell.carried)]
    return [memory for memory in found if memory is not None]
