"""The arguments and results of the backends, as named types.

kernels/cpu and kernels/gpu have `forward(cell, plan, layout, x, weights, s0, save) -> Outputs` and
`backward(cell, plan, layout, x, weights, s0, outputs, grads, needs) -> Gradients`. For the former,
kernels/cpu/native.py and kernels/reference.py write into Outputs and Gradients that it allocates.
T, B, I, H, G, S, A, N and R are those of the docstring of kernels/__init__.py."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

Value = TypeVar("Value")
# S tensors [N, B, H].
States = Any


class Save(IntEnum):
    """What a forward pass saves of every step."""

    NOTHING = 0
    STATES = 1
    ACTIVATIONS = 2  # and the states


class Layout(NamedTuple):
    """Where `steps` steps of B sequences stand in memory, as rows, and which way the N recurrences
    go through them. Sequence b has lengths[b] steps, or all. Packed, the rows of step t begin at
    offsets[t] and are those of the first sizes[t] sequences, which run; else they are all B.
    `resets` [T, B] as in `rnn.functional.recurrence`. `sequences` is B, including sequences of
    length 0."""

    steps: int
    reverse: Sequence[int]
    sizes: Sequence[int] = ()
    lengths: Any = None
    offsets: Any = None
    resets: Any = None
    sequences: int = 0

    @property
    def reverses(self) -> int:
        """Which recurrences run backwards, as bits."""
        bits = 0
        for n, back in enumerate(self.reverse):
            bits |= back << n
        return bits


class Weights(NamedTuple):
    """Of N recurrences one after the other: w_ih [N*G*H, I], w_hh [N*G*H, H], biases [N*G*H]."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Outputs(NamedTuple):
    """y [R, N*H], state 0 of every step; the other states [S-1, R, N*H]; the last states; and the
    activations for the adjoint [A, R, N*H], in an order of the backend's own. None where absent or
    not saved."""

    y: Tensor
    states: Tensor | None
    last: States
    saved: Tensor | None


class OutputGrads(NamedTuple):
    """The gradients of y, of the other states and of the last ones; None for zero."""

    y: Tensor | None
    states: Tensor | None
    last: States


class Gradients(NamedTuple, Generic[Value]):
    """Of all inputs: the gradients, None where not needed; or, as bools, which are needed."""

    x: Value
    w_ih: Value
    w_hh: Value
    b_ih: Value
    b_hh: Value
    s0: Any

    def of_weights(self) -> Sequence[Value]:
        return self[1:5]
