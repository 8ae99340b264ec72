"""The arguments and results of one layer's computation, as named types.

What computes a layer is an `Operator`: `functional.run_layer`, or one that does something before
and calls another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .kernels.cells import Cell
from .kernels.plan import Plan


class Masks(NamedTuple):
    """Which steps there are, and where a state begins anew, as in `functional.recurrence`."""

    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None

    def whole(self) -> bool:
        """Whether all sequences have all steps, and none is reset."""
        return self.lengths is self.batch_sizes is self.resets is None


NO_MASKS = Masks()


class LayerInputs(NamedTuple):
    """What N recurrences over the same sequences compute from.

    x is [T, B, I], or [B, T, I] with the option `batch_first`, or packed [R, I]. `weights` are
    w_ih, w_hh, b_ih, b_hh of all recurrences together, or these of one recurrence after the other;
    without w_ih x are pre-activations [..., N*G*H]. `states` are S of [N, B, H], zeros if None."""

    cell: Cell
    x: Tensor
    weights: Sequence[Any]
    states: Sequence[Tensor] | None
    masks: Masks
    reverse: Sequence[int]

    def tensors(self) -> tuple[Any, ...]:
        """Those of floating-point numbers."""
        return self.x, *self.weights, *(self.states or ())


class Options(NamedTuple):
    """How a layer is computed, as in `functional.recurrence`; with `batch_first` x and y are
    [B, T, ...]."""

    keep: int = 0
    plan: Plan | None = None
    recompute: bool = False
    batch_first: bool = False
    checkpoint: bool | int = False


# y in the layout of x; the other states [S-1, R, N*H] of every step, in order of time, where `keep`
# asks for them; and the last ones, S of [N, B, H]. A plain tuple: subclasses of Tensor cannot make
# a named one.
LayerOutputs = tuple[Tensor, Tensor | None, Sequence[Tensor]]
Operator = Callable[[LayerInputs, Options], LayerOutputs]
