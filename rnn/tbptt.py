"""Truncated backpropagation through time: a long sequence in windows, with the states carried from
one to the next without their graphs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checks import as_tensor, check_masks
from .layer_types import Masks
from .stack import Stack


class Window(NamedTuple):
    """The output of the layer for some steps, the last states without a graph, in the layout of the
    layer's, and which steps these are."""

    output: Tensor
    state: Any
    steps: slice


class _Sequences(NamedTuple):
    """The arguments of `tbptt`, checked; the dimension of time in x and resets."""

    x: Tensor
    lengths: Tensor | None
    resets: Tensor | None
    time: int


def tbptt(
    layer: nn.RNNBase,
    x: Tensor,
    window: int,
    state: Any = None,
    lengths: Tensor | Sequence[int] | int | None = None,
    resets: Tensor | Sequence[Any] | None = None,
) -> Iterator[Window]:
    """Run a layer over sequences in windows of `window` steps; gradients end at the windows'
    borders.

    Each window is computed when it is asked for, with the parameters as they are then, so that a
    loss may go backward and an optimizer may step in between: only the graph of one window is in
    memory.

    Args:
        layer: one of ours in one direction; or of torch.nn, without lengths and resets.
        x: [T, B, I] ([B, T, I] if the layer is batch_first), or [T, I]; of the layer's dtype.
        window: how many steps, 1 or more; the last window has what is left.
        state: the states before the first step, like the layer's hx, zeros if None. The last
            window's state of the batch before continues its sequences. Gradients flow into it from
            the first window.
        lengths, resets: as of the layer's forward, for the whole of x. Past the end of a sequence
            its output is 0 and its state stays.

    Returns an iterator of (output, state, steps): the output like x of these steps, the last states
    detached, and the slice of the steps.
    Source: Williams and Peng, An Efficient Gradient-Based Algorithm for On-Line Training of
    Recurrent Network Trajectories, 1990, https://doi.org/10.1162/neco.1990.2.4.490.
    Raises TypeError for arguments of the wrong kind, packed sequences among them, ValueError for a
    window below 1, a bidirectional layer and x that has neither 2 nor 3 dimensions, RuntimeError
    for lengths or resets of another shape or range, all of them when it is called; and with the
    first window what the layer raises."""
    if not isinstance(layer, nn.RNNBase):
        raise TypeError(
            f"Expected a layer of rnn or torch.nn, got {type(layer).__module__}."
            f"{type(layer).__qualname__}"
        )
    if layer.bidirectional:
        raise ValueError(
            "Expected a layer in one direction: backward in time the first window begins with the "
            "state after the last one"
        )
    if not isinstance(layer, Stack) and not (lengths is None and resets is None):
        raise TypeError(
            "Expected a layer of rnn for lengths and resets, got "
            f"{type(layer).__module__}.{type(layer).__qualname__}"
        )
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"Expected window to be an integer, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"Expected window to be 1 or more, got {window}")
    return _windows(layer, _sequences(layer, x, lengths, resets), window, state)


def _sequences(layer: nn.RNNBase, x: Any, lengths: Any, resets: Any) -> _Sequences:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Expected x to be a Tensor, padded and with lengths=, got {type(x).__name__}"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"Expected x to be 2D or 3D, got {x.dim()}D")
    time = 1 if layer.batch_first and x.dim() == 3 else 0
    lengths = as_tensor("lengths", lengths)
    resets = as_tensor("resets", resets, x.device)
    B = x.shape[1 - time] if x.dim() == 3 else 1
    of_all = None if lengths is None else lengths.reshape(-1)
    rows = resets
    if resets is not None and x.dim() == 2:
        rows = resets.unsqueeze(-1)
    elif resets is not None and time and resets.dim() == 2:
        rows = resets.T
    check_masks(x, Masks(of_all, None, rows), x.shape[time], B)
    return _Sequences(x, lengths, resets, time)


def _windows(layer: nn.RNNBase, sequences: _Sequences, window: int, state: Any) -> Iterator[Window]:
    x, lengths, resets, time = sequences
    for first in range(0, x.shape[time], window):
        size = min(window, x.shape[time] - first)
        masks = {}
        if lengths is not None:
            masks["lengths"] = (lengths - first).clamp(0, size)
        if resets is not None:
            masks["resets"] = resets.narrow(time, first, size)
        output, last = layer(x.narrow(time, first, size), state, **masks)
        state = tuple(s.detach() for s in last) if isinstance(last, tuple) else last.detach()
        yield Window(output, state, slice(first, first + size))
