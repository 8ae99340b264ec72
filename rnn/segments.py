"""How `checkpoint` cuts a call in time: its segments, the rows of spans of time, and the
recurrences of one direction going through them."""

from collections.abc import Sequence
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .boundary import ready
from .kernels.cpu import calls, native
from .kernels.states import join_weights
from .kernels.types import Layout, Weights
from .layer_call import LayerCall


def segment_windows(call: LayerCall, x: Tensor, w_hh: Tensor, every: int) -> "Segments | None":
    """How to keep about every so many steps' states, about sqrt(T) for True; None where it would
    save nothing."""
    layout = call.layout
    T = layout.steps
    if every is True:
        every = isqrt(T)
    if call.plan.backend != "native":
        return Segments([*range(0, T, every), T], 1) if every < T else None
    G = call.cell.gates
    N = len(call.reverse)
    H = w_hh.shape[1]
    rows = x.new_empty(1).expand(sum(layout.sizes), x.shape[-1])
    whole = w_hh.new_empty(1).expand(N * G * H, H)
    begins = native.adjoint_windows(call.cell, layout, rows, whole)
    count = len(begins) - 1
    length = -(-every * count // T)
    return Segments(begins, length) if length < count else None


class Segments(NamedTuple):
    """The steps between windows of time, and how many windows are a segment. Windows have the
    numbers w in which the adjoint comes to them: of a recurrence that goes forward, the last is
    0."""

    begins: Sequence[int]
    length: int

    @property
    def windows(self) -> int:
        """How many."""
        return len(self.begins) - 1

    def all(self) -> list[range]:
        """The windows of each segment."""
        starts = range(0, self.windows, self.length)
        return [range(w, min(w + self.length, self.windows)) for w in starts]

    def steps(self, windows: range, reverse: bool) -> tuple[int, int]:
        """The first of these windows' steps, and the last + 1."""
        if reverse:
            return self.begins[windows.start], self.begins[windows.stop]
        last = self.windows
        return self.begins[last - windows.stop], self.begins[last - windows.start]

    def entered(self) -> Tensor:
        """The step with which each segment begins, [2, segments]: going forward, and backward, each
        in ascending order."""
        steps = [
            [self.steps(windows, False)[0] for windows in reversed(self.all())],
            [self.steps(windows, True)[1] - 1 for windows in self.all()],
        ]
        return torch.tensor(steps, dtype=torch.int64, device="cpu")


class Rows:
    """The rows of a call, and of its spans of time."""

    def __init__(self, call: LayerCall, x: Tensor, weights: Sequence[Any]) -> None:
        self.call = call
        starts = [0, *accumulate(call.layout.sizes)]
        self.starts = starts
        x, *weights = ready((call.to_rows(x), *weights))
        self.x = x.view(starts[-1], x.shape[-1])
        self.weights = weights
        self.H = weights[1].shape[1]

    def sweeps(self) -> "list[Sweep]":
        """Of each direction that there is."""
        reverse = self.call.reverse
        directions = sorted({*reverse})
        return [
            Sweep(self, bool(back), [n for n, way in enumerate(reverse) if way == back])
            for back in directions
        ]

    def new_states(self, count: int) -> Tensor:
        """Zeros for the states that enter so many segments, [count, S, N, B, H]."""
        call = self.call
        N = len(call.reverse)
        return self.x.new_zeros(count, call.cell.states, N, call.layout.sequences, self.H)

    def of(self, steps: tuple[int, int]) -> slice:
        return slice(self.starts[steps[0]], self.starts[steps[1]])


class Sweep:
    """The recurrences of one direction, by their numbers."""

    def __init__(self, rows: Rows, back: bool, numbers: list[int]) -> None:
        self.rows = rows
        self.call = rows.call
        self.back = back
        N = len(self.call.reverse)
        self.all = len(numbers) == N
        self.numbers = numbers
        first, last = numbers[0], numbers[-1]
        # A slice is not copied
        side_by_side = last - first + 1 == len(numbers)
        self.places: Any = slice(first, last + 1) if side_by_side else numbers
        self.native = self.call.plan.backend == "native"
        # Of the threads of the C++, beside the other direction; 0 for all
        self.share = 0
        if self.native and not self.all:
            self.share = calls.recurrence_threads(N) * len(numbers)
        weights = rows.weights
        if len(weights) > 4:
            own = [weights[4 * n + k] for n in numbers for k in range(4)]
            self.weights = join_weights(own)
        else:
            self.weights = Weights._make([self._of_recurrences(w, N) for w in weights])

    def _of_recurrences(self, w: Tensor | None, N: int) -> Tensor | None:
        if w is None or self.all:
            return w
        own: Tensor = w.unflatten(0, (N, -1))[self.places].flatten(0, 1)
        return own

    def layout(self, steps: tuple[int, int]) -> Layout:
        whole = self.call.layout
        first, end = steps
        lengths = whole.lengths
        if lengths is not None:
            lengths = (lengths - first).clamp(0, end - first)
        offsets = whole.offsets
        if offsets is not None:
            offsets = offsets[first:end] - offsets[first]
        resets = whole.resets
        if resets is not None:
            resets = resets[first:end].contiguous()
        reverse = [int(self.back)] * len(self.numbers)
        sizes = whole.sizes[first:end]
        return Layout(end - first, reverse, sizes, lengths, offsets, resets, whole.sequences)

    def own_units(self, t: Tensor | None, steps: tuple[int, int]) -> Tensor | None:
        """These steps' rows of [..., R, N*H], as [..., R, M*H] of these M recurrences."""
        if t is None:
            return None
        rows = t[..., self.rows.of(steps), :]
        if not self.all:
            rows = rows.unflatten(-1, (-1, self.rows.H))[..., self.places, :].flatten(-2)
        return rows.contiguous()

    def write_units(self, t: Tensor, steps: tuple[int, int], values: Tensor) -> None:
        """The inverse."""
        rows = t[..., self.rows.of(steps), :]
        if self.all:
            rows.copy_(values)
        else:
            heads = values.unflatten(-1, (-1, self.rows.H))
            rows.unflatten(-1, (-1, self.rows.H))[..., self.places, :] = heads

    def cut(self, steps: tuple[int, int], states: Sequence[Tensor]) -> list[Tensor]:
        """States [M, B, H] that enter these steps, or their gradients, with 0 where a reset lies
        between them and the steps: going forward the kernel sees it, as that of the first step."""
        layout = self.call.layout
        end = steps[1]
        if layout.resets is None or not self.back or end == layout.steps:
            return [*states]
        resets = layout.resets[end]
        running = torch.arange(layout.sequences, device=resets.device) < layout.sizes[end]
        if layout.lengths is not None:
            running = running & (layout.lengths > end)
        between = (resets & running)[:, None]
        carried = self.call.cell.carried
        return [*(torch.where(between, 0, s) for s in states[:carried]), *states[carried:]]
