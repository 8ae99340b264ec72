"""A layer as an autograd.Function that keeps the states of some steps only.

The sequence is cut into windows of time, and some of them make a segment. Forward keeps the states
that enter a segment; backward computes a segment once more, and runs the adjoints of its windows,
which add to the same gradients. The recurrences of one direction take their segments together,
those of the other direction at the same time or after them.

With the CPU's C++ the windows are those that the backward pass of the whole would have, and they
add to the gradients in the same order: all results have the same bits, but where docs/numerics.md
says. With other kernels a window is a segment, and gradients of W are sums over other rows, so
results differ by rounding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import by_composite, state_grads, to_dense, wanted, weight_grads
from .boundary import ready
from .kernels.cpu import calls, native
from .kernels.states import join_weights
from .kernels.types import Gradients, OutputGrads, Outputs, Save
from .layer_call import LayerCall
from .layer_types import Masks
from .resets import requested_steps
from .segments import Rows, Segments, Sweep
from .transforms import needs_composite, without_autocast

# Gradients of the inputs of _Segments before x
_NO_GRADS = (None,) * 7


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
        rows = Rows(call, x, rest[:count])
        states = call.initial_states(ready(rest[count:]))
        save = Save.STATES if keep else Save.NOTHING
        with call.context(x):
            if call.plan.backend == "native":
                kept, found = _keep_states(rows, segments, states, save)
            else:
                kept, found = _forward_by_segments(rows, segments, states, save)
        ctx.call = call
        ctx.segments = segments
        ctx.count = count
        ctx.save_for_backward(lengths, batch_sizes, resets, kept, x, *rest)
        ctx.set_materialize_grads(False)
        y = found.y
        y = y.view(x.shape[:-1] + y.shape[-1:]) if call.rows_are_given else call.from_rows(y)
        return y, call.scatter_rows(found.states), *call.in_callers_order(found.last)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        lengths, batch_sizes, resets, kept, x, *rest = ctx.saved_tensors
        call: LayerCall = ctx.call
        count = ctx.count
        needs = ctx.needs_input_grad[7:]
        incoming = [to_dense(grad) for grad in grads]
        with without_autocast(x.device):
            if needs_composite(incoming):
                masks = Masks(lengths, batch_sizes, resets)
                found = by_composite(call, (x, *rest), masks, count, incoming, needs)
                return *_NO_GRADS, *found
            adjoint = _Adjoint(call, ctx.segments, x, rest[:count], incoming, wanted(needs, count))
            with call.context(x):
                gradients = adjoint.run(kept)
            of_weights = weight_grads(gradients, needs, count)
            of_states = state_grads(gradients.s0, needs[1 + count :])
            return *_NO_GRADS, gradients.x, *of_weights, *of_states


def _keep_states(rows: Rows, segments: Segments, states: Any, save: Save) -> tuple[Tensor, Outputs]:
    """The states that enter segments [segments, S, N, B, H], and the outputs, in one call of the
    C++."""
    call = rows.call
    steps = segments.entered()
    kept = rows.new_states(len(segments.all()))
    if states is not None:
        # Of a sequence that is shorter, the states enter segments before its first step, too
        kept[:] = torch.stack(states)
    weights = join_weights(rows.weights)
    found = call.backend().forward(
        call.cell, call.plan, call.layout, rows.x, weights, states, save, native.Kept(kept, steps)
    )
    return kept, found


def _forward_by_segments(
    rows: Rows, segments: Segments, states: Any, save: Save
) -> tuple[Tensor, Outputs]:
    """Likewise, in a call for each segment and direction."""
    call = rows.call
    every = segments.all()
    kept = rows.new_states(len(every))
    S, N, _, H = kept.shape[1:]
    y = rows.x.new_empty(len(rows.x), N * H)
    others = y.new_empty(S - 1, *y.shape) if save and S > 1 else None
    last = [torch.empty_like(s) for s in kept[0]]
    for sweep in rows.sweeps():
        own = sweep.numbers
        now: Any = None if states is None else [s[own] for s in states]
        for i in reversed(range(len(every))):
            steps = segments.steps(every[i], sweep.back)
            if now is not None:
                now = sweep.cut(steps, now)
                kept[i][:, own] = torch.stack(now)
            found = call.backend().forward(
                call.cell,
                call.plan,
                sweep.layout(steps),
                rows.x[rows.of(steps)],
                sweep.weights,
                now,
                save,
            )
            sweep.write_units(y, steps, found.y)
            if others is not None and found.states is not None:
                sweep.write_units(others, steps, found.states)
            now = found.last
        for end, s in zip(last, now):
            end[own] = s
    return kept, Outputs(y, others, last, None)


class _Adjoint:
    """A backward pass, window by window; `needs` of joined weights."""

    def __init__(
        self,
        call: LayerCall,
        segments: Segments,
        x: Tensor,
        weights: Sequence[Any],
        incoming: Sequence[Any],
        needs: Gradients[bool],
    ) -> None:
        self.call = call
        self.segments = segments
        # Between windows they are needed in any case.
        self.needs = needs._replace(s0=True)
        self.of_states = needs.s0
        self.rows = Rows(call, x, weights)
        dy, dothers, *dlast = incoming
        dy = None if dy is None else call.to_rows(dy)
        dy, dothers, *ends = ready((dy, call.gather_rows(dothers), *dlast), like=x)
        self.dy = None if dy is None else dy.view(-1, dy.shape[-1])
        self.dothers = dothers
        self.dlast = call.last_grads(ends)

    def _run(self, adjoint: bool, directions: Sequence[Any]) -> None:
        """The call of the C++ for each direction: other kernels have run already."""
        if self.call.plan.backend == "native":
            native.together(adjoint, self.call.cell, self.call.plan, directions)

    def run(self, kept: Tensor) -> Gradients[Any]:
        """From the kept states [segments, S, N, B, H] to the gradients of x, in the caller's
        layout, of the joined weights and of the states before the first step."""
        call = self.call
        N = len(call.reverse)
        sums: list[list[Tensor | None]] = [[None] * N for _ in range(4)]
        ds: list[list[Any]] = [[None] * N for _ in range(call.cell.states)]
        sweeps = self.rows.sweeps()
        parts = [_SweepAdjoint(self, sweep) for sweep in sweeps]
        for i, windows in enumerate(self.segments.all()):
            for part in parts:
                part.enter(kept[i])
            for w in reversed(windows):
                self._run(False, [part.recompute(w) for part in parts])
            for w in windows:
                self._run(True, [part.add_window(w) for part in parts])
        for sweep, part in zip(sweeps, parts):
            for places, t in zip((*sums, *ds), (*part.gradients(), *part.ds)):
                for n, own in zip(sweep.numbers, [] if t is None else t.chunk(len(sweep.numbers))):
                    places[n] = own
        joined = [
            None if own[0] is None else torch.cat(own)  # type: ignore[arg-type]
            for own in sums
        ]
        x: Any = None
        for part in parts:
            x = part.x if x is None else x.add_(part.x)
        if x is not None:
            x = x.view(*call.leading, x.shape[-1]) if call.rows_are_given else call.from_rows(x)
        s0 = None
        if self.of_states:
            s0 = call.in_callers_order([torch.cat(own) for own in ds])
        return Gradients._make([x, *joined, s0])


class _SweepAdjoint:
    """That of one direction. `sums` are the gradients of its joined weights, `ds` those of the
    states that leave the window that is next, [M, B, H] each."""

    def __init__(self, whole: _Adjoint, sweep: Sweep) -> None:
        self.whole = whole
        self.sweep = sweep
        self.call = sweep.call
        own = sweep.numbers
        last = whole.dlast
        shape = len(own), self.call.layout.sequences, sweep.rows.H
        self.ds: list[Any] = [
            sweep.rows.x.new_zeros(shape) if grad is None else grad[own]
            for grad in last or [None] * self.call.cell.states
        ]
        self.states: Any = None
        # Of the windows of a segment, what was computed again
        self.again: list[tuple[Any, Outputs]] = []
        self.sums: list[Tensor | None] = [None] * 4
        # Of both directions they are added at last. The C++ adds those of several recurrences.
        new = torch.zeros_like if sweep.native and len(own) > 1 else torch.empty_like
        self.x = new(sweep.rows.x) if whole.needs.x else None
        if sweep.native:
            self._take_memory()

    def _take_memory(self) -> None:
        """For the gradients that are needed, which the C++ writes; of biases for one where they are
        the same."""
        needs = self.whole.needs
        w_ih, w_hh = self.sweep.weights[:2]
        split = self.call.cell.split
        b_hh = needs.b_hh or (needs.b_ih and not split)
        b_grad = w_hh.new_empty(len(w_hh)) if b_hh else None
        self.sums = [
            torch.empty_like(w_ih) if needs.w_ih else None,
            torch.empty_like(w_hh) if needs.w_hh else None,
            w_hh.new_empty(len(w_hh)) if needs.b_ih and split else None,
            b_grad,
        ]
        each = calls.recurrence_threads(len(self.call.reverse))
        size = (0 if w_ih is None else w_ih.numel()) + w_hh.numel() + 2 * len(w_hh)
        self.threads = self.sweep.share or native.threads()
        self.group_grads = w_hh.new_empty((each - 1) * size)

    def gradients(self) -> Sequence[Tensor | None]:
        """Of the joined weights."""
        w_ih, w_hh, b_ih, b_hh = self.sums
        if self.sweep.native and not self.call.cell.split and self.whole.needs.b_ih:
            b_ih = b_hh
        return w_ih, w_hh, b_ih, b_hh

    def _steps(self, w: int) -> tuple[int, int]:
        return self.whole.segments.steps(range(w, w + 1), self.sweep.back)

    def enter(self, kept: Tensor) -> None:
        """A segment that begins with these states [S, N, B, H]."""
        self.states = [*kept[:, self.sweep.numbers]]

    def recompute(self, w: int) -> Any:
        """A window of it; or the call of the C++ that does so."""
        sweep = self.sweep
        call = self.call
        steps = self._steps(w)
        states = sweep.cut(steps, self.states)
        layout = sweep.layout(steps)
        x = sweep.rows.x[sweep.rows.of(steps)]
        found: Any = None
        backend = call.backend()
        if sweep.native:
            outputs = backend.new_outputs(call.cell, layout, x, sweep.weights, Save.ACTIVATIONS)
            found = calls.forward_call(
                call.cell, layout, x, sweep.weights, states, outputs, sweep.share
            )
        else:
            outputs = backend.forward(
                call.cell, call.plan, layout, x, sweep.weights, states, Save.ACTIVATIONS
            )
        self.again.append((states, outputs))
        self.states = outputs.last
        return found

    def add_window(self, w: int) -> Any:
        """The adjoint of the window; or the call of the C++ that does so."""
        whole = self.whole
        call = self.call
        sweep = self.sweep
        if w > 0:
            self.ds = sweep.cut(self._steps(w - 1), self.ds)
        states, outputs = self.again.pop()
        steps = self._steps(w)
        rows = sweep.rows.of(steps)
        x = sweep.rows.x[rows]
        layout = sweep.layout(steps)
        dy = sweep.own_units(whole.dy, steps)
        coming = OutputGrads(dy, sweep.own_units(whole.dothers, steps), self.ds)
        outputs = outputs._replace(last=None)
        if layout.resets is not None and call.plan.scope == "host":
            x, states, outputs = requested_steps(call.plan, layout, x, states, outputs, coming)
        dx = None if self.x is None else self.x[rows]
        if not sweep.native:
            needs = whole.needs
            found = call.backend().backward(
                call.cell, call.plan, layout, x, sweep.weights, states, outputs, coming, needs
            )
            self.ds = found.s0
            self._add(dx, found)
            return None
        count = whole.segments.windows
        part = calls.Part(self.threads, w > 0, w < count - 1, self.group_grads)
        self.ds = [torch.empty_like(s) for s in states]
        gradients: Gradients[Any] = Gradients._make([dx, *self.sums, self.ds])
        return calls.backward_call(
            call.cell, layout, x, sweep.weights, states, outputs, coming, gradients, part
        )

    def _add(self, dx: Tensor | None, found: Gradients[Any]) -> None:
        """A window's gradients, of weights in float32 at least."""
        if dx is not None:
            dx.copy_(found.x)
        for k, grad in enumerate(found.of_weights()):
            if grad is None:
                continue
            total = self.sums[k]
            if total is None:
                self.sums[k] = grad.to(torch.promote_types(grad.dtype, torch.float32))
            else:
                total += grad


apply: Any = _Segments.apply
