"""A layer of the CPU's C++ as an autograd.Function that keeps the states of some steps only.

The sequence is cut into the windows that the backward pass of the whole would have, and some of
them make a segment. Forward keeps the states that enter a segment; backward computes a segment once
more, and runs the adjoints of its windows, which add to the same gradients in the same order as in
one call: gradients of one recurrence have the same bits, but where packed sequences are divided
into groups. Those of several differ by rounding, as their products have other tiles. Each
recurrence takes its segments in its own order, beside the others."""

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import by_composite, to_dense
from .boundary import ready
from .kernels import cpu
from .kernels.cpu import native
from .kernels.types import Gradients, Layout, OutputGrads, Outputs, Save, Weights
from .layer_call import LayerCall
from .transforms import needs_composite, without_autocast

# Gradients of the inputs of _Segments before x
_NO_GRADS = (None,) * 7


def segment_windows(call: LayerCall, x: Tensor, w_hh: Tensor, every: int) -> "Segments | None":
    """How to keep about every so many steps' states, about sqrt(T) for True; None where it would
    save nothing, or is not done: by kernels other than the CPU's C++, and with resets."""
    layout = call.layout
    if call.plan.backend != "native" or layout.resets is not None:
        return None
    G = call.cell.gates
    N = len(call.reverse)
    H = w_hh.shape[1]
    rows = x.new_empty(1).expand(sum(layout.sizes), x.shape[-1])
    whole = w_hh.new_empty(1).expand(N * G * H, H)
    begins = native.adjoint_windows(call.cell, layout, rows, whole)
    count = len(begins) - 1
    if every is True:
        every = isqrt(layout.steps)
    length = -(-every * count // layout.steps)
    return Segments(begins, length) if length < count else None


class Segments(NamedTuple):
    """The steps between windows of time, and how many windows are a segment. Windows have the
    numbers w in which the adjoint comes to them: of a recurrence that goes forward, the last is
    0."""

    begins: Sequence[int]
    length: int

    def all(self) -> list[range]:
        """The windows of each segment."""
        count = len(self.begins) - 1
        return [range(w, min(w + self.length, count)) for w in range(0, count, self.length)]

    def steps(self, w: int, reverse: int) -> tuple[int, int]:
        """The first of a window, and the last + 1."""
        j = w if reverse else len(self.begins) - 2 - w
        return self.begins[j], self.begins[j + 1]


class _Rows:
    """The rows of a call and of its spans of time, for one recurrence at a time."""

    def __init__(self, call: LayerCall, x: Tensor, weights: Sequence[Any]) -> None:
        self.call = call
        layout = call.layout
        starts = [0]
        for size in layout.sizes:
            starts.append(starts[-1] + size)
        self.starts = starts
        x, *weights = ready((call.to_rows(x), *weights))
        self.x = x.view(starts[-1], x.shape[-1])
        N = len(call.reverse)
        if len(weights) == 4:
            parts = [[None] * N if t is None else [*t.chunk(N)] for t in weights]
            self.weights = [Weights(*own) for own in zip(*parts)]
        else:
            self.weights = [Weights(*weights[4 * n : 4 * n + 4]) for n in range(N)]

    def rows(self, steps: tuple[int, int]) -> slice:
        return slice(self.starts[steps[0]], self.starts[steps[1]])

    def layout(self, n: int, steps: tuple[int, int]) -> Layout:
        whole = self.call.layout
        first, end = steps
        offsets = whole.offsets
        if offsets is not None:
            offsets = offsets[first:end] - offsets[first]
        sizes = whole.sizes[first:end]
        reverse = self.call.reverse[n : n + 1]
        return Layout(end - first, reverse, sizes, None, offsets, None, whole.sequences)

    def forward(self, n: int, steps: tuple[int, int], states: Any, save: int) -> Outputs:
        """Of recurrence n through these steps, from S states [1, B, H]."""
        x = self.x[self.rows(steps)]
        call = self.call
        layout = self.layout(n, steps)
        return cpu.forward(call.cell, call.plan, layout, x, self.weights[n], states, save)


class _Segments(torch.autograd.Function):
    """One layer. Its inputs, by position:

    call: the LayerCall
    segments: its Segments
    keep: whether to return the other states
    count: how many weights there are
    lengths, batch_sizes, resets, x, *weights, *states: as of `autograd._Layer`

    Its outputs: y; the states of every step but for y, or None; and the S last states."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        call, segments, keep, count, lengths, batch_sizes, resets, x, *rest = inputs
        rows = _Rows(call, x, rest[:count])
        states = call.initial_states(ready(rest[count:]))
        N = len(call.reverse)
        S = call.cell.states
        B = call.layout.sequences
        H = rows.weights[0].w_hh.shape[1]
        R = rows.starts[-1]
        y = x.new_empty(R, N * H)
        others = x.new_empty(S - 1, R, N * H) if keep and S > 1 else None
        every = segments.all()
        kept = x.new_zeros(len(every), N, S, 1, B, H)
        last = [x.new_empty(N, B, H) for _ in range(S)]
        for n, back in enumerate(call.reverse):
            own = slice(n * H, (n + 1) * H)
            now: Any = None if states is None else [s[n : n + 1] for s in states]
            for i in reversed(range(len(every))):
                if now is not None:
                    for k, state in enumerate(now):
                        kept[i, n, k] = state
                for w in reversed(every[i]):
                    steps = segments.steps(w, back)
                    save = Save.STATES if keep else Save.NOTHING
                    found = rows.forward(n, steps, now, save)
                    y[rows.rows(steps), own] = found.y
                    if others is not None:
                        others[:, rows.rows(steps), own] = found.states
                    now = found.last
            for k, state in enumerate(now):
                last[k][n : n + 1] = state
        ctx.call = call
        ctx.segments = segments
        ctx.count = count
        ctx.save_for_backward(lengths, batch_sizes, resets, kept, x, *rest)
        ctx.set_materialize_grads(False)
        y = y.view(x.shape[:-1] + y.shape[-1:]) if call.rows_are_given else call.from_rows(y)
        return y, call.scatter_rows(others), *call.in_callers_order(last)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        lengths, batch_sizes, resets, kept, x, *rest = ctx.saved_tensors
        call: LayerCall = ctx.call
        count = ctx.count
        needs = ctx.needs_input_grad[7:]
        incoming = [to_dense(grad) for grad in grads]
        with without_autocast(x.device):
            if needs_composite(incoming):
                masks = lengths, batch_sizes, resets
                found = by_composite(call, (x, *rest), masks, count, incoming, needs)
                return *_NO_GRADS, *found
            adjoint = _Adjoint(call, ctx.segments, x, rest[:count], incoming, needs)
            adjoint.run(kept)
            return *_NO_GRADS, *adjoint.gradients(len(rest) - count)


class _Adjoint:
    """A backward pass, window by window."""

    def __init__(
        self,
        call: LayerCall,
        segments: Segments,
        x: Tensor,
        weights: Sequence[Any],
        incoming: Sequence[Any],
        needs: Sequence[bool],
    ) -> None:
        self.call = call
        self.segments = segments
        self.needs = needs
        self.count = len(weights)
        rows = _Rows(call, x, weights)
        self.rows = rows
        dy, dothers, *dlast = incoming
        dy = None if dy is None else call.to_rows(dy)
        self.dy, self.dothers, *ends = ready((dy, call.gather_rows(dothers), *dlast), like=x)
        if self.dy is not None:
            self.dy = self.dy.view(rows.starts[-1], self.dy.shape[-1])
        N = len(call.reverse)
        last = call.last_grads(ends)
        # The gradients of the states that leave the window that is next, [1, B, H] each.
        self.states: list[Any] = [None] * N
        if last is not None:
            cut = [[None] * N if t is None else [*t.split(1)] for t in last]
            self.states = [[*own] for own in zip(*cut)]
        self.x = torch.zeros_like(rows.x) if needs[0] else None
        self.weights = [self._weight_grads(n) for n in range(N)]
        self.threads = native.recurrence_threads(N)
        w_ih, w_hh = rows.weights[0][:2]
        size = w_ih.numel() + w_hh.numel() + 2 * len(w_hh)
        self.group_grads = [x.new_empty((self.threads - 1) * size) for _ in range(N)]

    def _weight_grads(self, n: int) -> list[Tensor | None]:
        """Memory for those that are needed; of biases for one where they are the same."""
        own = self.needs[1 + 4 * n : 5 + 4 * n] if self.count > 4 else self.needs[1:5]
        w_ih, w_hh = self.rows.weights[n][:2]
        split = self.call.cell.split
        return [
            torch.empty_like(w_ih) if own[0] else None,
            torch.empty_like(w_hh) if own[1] else None,
            w_hh.new_empty(len(w_hh)) if own[2] and split else None,
            w_hh.new_empty(len(w_hh)) if own[3] or (own[2] and not split) else None,
        ]

    def run(self, kept: Tensor) -> None:
        """From the kept states [segments, N, S, 1, B, H]."""
        N = len(self.call.reverse)
        for i, windows in enumerate(self.segments.all()):
            found = [self._again(n, windows, [*kept[i, n]]) for n in range(N)]
            for w in windows:
                for n in range(N):
                    self._window(n, w, *found[n].pop())

    def _again(self, n: int, windows: range, states: Any) -> list[tuple[Any, Outputs]]:
        """The windows of a segment, the first in time first: the states that enter each, and what
        its adjoint reads."""
        found = []
        for w in reversed(windows):
            steps = self.segments.steps(w, self.call.reverse[n])
            outputs = self.rows.forward(n, steps, states, Save.ACTIVATIONS)
            found.append((states, outputs))
            states = outputs.last
        return found

    def _window(self, n: int, w: int, states: Any, outputs: Outputs) -> None:
        count = len(self.segments.begins) - 1
        steps = self.segments.steps(w, self.call.reverse[n])
        part = native.Part(self.threads, w > 0, w < count - 1, self.group_grads[n])
        ds = [torch.empty_like(s) for s in states]
        dx = None if self.x is None else self.x[self.rows.rows(steps)]
        w_ih, w_hh, b_ih, b_hh = self.weights[n]
        gradients = Gradients(dx, w_ih, w_hh, b_ih, b_hh, ds)
        self._backward(n, steps, states, outputs, gradients, part)
        self.states[n] = ds

    def _backward(
        self,
        n: int,
        steps: tuple[int, int],
        states: Any,
        outputs: Outputs,
        gradients: Gradients[Tensor | None],
        part: native.Part,
    ) -> None:
        rows = self.rows.rows(steps)
        H = self.rows.weights[n].w_hh.shape[1]
        own = slice(n * H, (n + 1) * H)
        dy = None if self.dy is None else self.dy[rows, own].contiguous()
        dothers = None if self.dothers is None else self.dothers[:, rows, own].contiguous()
        native.backward(
            self.call.cell,
            self.call.plan,
            self.rows.layout(n, steps),
            self.rows.x[rows],
            self.rows.weights[n],
            states,
            outputs,
            OutputGrads(dy, dothers, self.states[n]),
            gradients,
            part,
        )

    def gradients(self, states: int) -> Iterator[Tensor | None]:
        """Of x, the weights and so many states, as they were given."""
        call = self.call
        x = self.x
        if x is not None and call.rows_are_given:
            x = x.view(*call.leading, x.shape[-1])
        elif x is not None:
            x = call.from_rows(x)
        yield x
        every = self.weights
        if not call.cell.split:
            for own in every:
                own[2] = own[3]
        if self.count == 4 and len(every) > 1:
            every = [[None if t[0] is None else torch.cat(t) for t in zip(*every)]]
        for i, grad in enumerate(grad for own in every for grad in own):
            if grad is None or not self.needs[1 + i]:
                yield None
            else:
                # One gradient is that of both biases
                yield grad if call.cell.split or i % 4 != 2 else grad.clone()
        found: Any = [torch.cat(s) for s in zip(*self.states)]
        found = call.in_callers_order(found)
        for k in range(states):
            yield found[k] if self.needs[1 + self.count + k] else None


apply: Any = _Segments.apply
