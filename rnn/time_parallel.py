"""A sequence cut into chunks that run as further sequences of the batch, from guesses of the states
that enter them; the states in which the chunks end are the next guesses, until they change no more.

With C chunks the states that enter chunk c + 1 solve e[c+1] = F(e[c]). A pass computes F of all
chunks at once, and moves every guess by

    d[c+1] = F(e[c]) - e[c+1] + D[c] d[c]

with D the product of the step's elementwise derivative over the chunk (the forget gate of an LSTM's
c, the update gate of a GRU; 0 where a step has none): a Newton step with a diagonal Jacobian. (Lim
et al., 2024, https://arxiv.org/abs/2309.12252; Gonzalez et al., 2024,
https://arxiv.org/abs/2407.19115.) The adjoint is solved likewise, from the last chunk to the first;
after as many passes as there are chunks it is exact in any case."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import trains
from .composite import aliases, composite_layer, differentiate
from .gate_products import with_products
from .kernels.cells import Cell
from .kernels.notices import warn_once
from .kernels.states import join_weights
from .layer_types import NO_MASKS, LayerInputs, LayerOutputs, Operator, Options
from .time_options import Report, TimeParallel, check_time_parallel
from .transforms import active_transform, needs_composite, traced

_NOT_WHOLE = "time_parallel takes whole sequences alone: lengths, packed sequences and resets run"
# Changes that are rounding, relative to the largest state
_NOISE = {
    torch.float64: 1e-11,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


class _Group(NamedTuple):
    """N recurrences that all run forward, over C chunks of L steps of B sequences."""

    operator: Operator
    cell: Cell
    N: int
    C: int
    L: int
    B: int
    options: Options
    limits: TimeParallel

    def run(
        self, cell: Cell, x: Tensor, weights: Sequence[Any], states: Sequence[Tensor]
    ) -> LayerOutputs:
        """One pass over x [L, C*B, I] from states [N, C, B, H], which come back like these."""
        reverse = (False,) * self.N
        flat = [s.flatten(1, 2) for s in states]
        inputs = LayerInputs(cell, x, weights, flat, NO_MASKS, reverse)
        y, others, last = self.operator(inputs, self.options)
        return y, others, [s.unflatten(1, (self.C, self.B)) for s in last]

    def to_chunks(self, t: Tensor) -> Tensor:
        """[T, B, K] to [L, C*B, K]."""
        return t.reshape(self.C, self.L, self.B, t.shape[-1]).transpose(0, 1).flatten(1, 2)

    def from_chunks(self, t: Tensor) -> Tensor:
        """The inverse."""
        return t.reshape(self.L, self.C, self.B, t.shape[-1]).transpose(0, 1).flatten(0, 1)

    def rows_to_chunks(self, t: Tensor) -> Tensor:
        """The other states [S-1, T*B, K], likewise."""
        return torch.stack([self.to_chunks(rows).flatten(0, 1) for rows in t])

    def rows_from_chunks(self, t: Tensor) -> Tensor:
        return torch.stack([self.from_chunks(rows).flatten(0, 1) for rows in t])


class _Solution(NamedTuple):
    """The states that enter the chunks, [N, C, B, H] each; the product of the elementwise
    derivatives of each state over a chunk, or None; what the last pass gave, y, the other states
    and the last ones; and how they were found."""

    entering: list[Tensor]
    products: list[Tensor | None]
    outputs: LayerOutputs | None
    passes: int
    residual: float


def parallel_layer(
    layer: Any, operator: Operator, inputs: LayerInputs, options: Options
) -> LayerOutputs:
    """As `operator`, in chunks where that is possible: for whole sequences of two chunks or more,
    outside of transforms and compilers."""
    limits = check_time_parallel(layer.time_parallel) or TimeParallel()
    cell, x, weights, states, masks, reverse = inputs
    batch_first = options.batch_first
    T = x.shape[1 if batch_first else 0]
    whole = masks.whole()
    short = 2 * limits.chunk > T or not x.numel()
    if not whole or short or traced(x, weights[1]) or active_transform():
        if not whole:
            _say(layer, _NOT_WHOLE)
        return operator(inputs, options)
    in_time = options._replace(batch_first=False)
    rows = x.transpose(0, 1) if batch_first else x
    joined = join_weights(weights)
    N = len(reverse)
    H = joined.w_hh.shape[1]
    if states is None:
        states = [rows.new_zeros(N, rows.shape[1], H)] * cell.states
    parts: dict[int, Any] = {}
    for back in sorted({*map(int, reverse)}):
        chosen = [n for n, way in enumerate(reverse) if way == back]
        own = [_of_recurrences(w, chosen, N) for w in joined]
        one_way = LayerInputs(
            cell,
            rows.flip(0) if back else rows,
            own,
            [s[chosen] for s in states],
            masks,
            (False,) * len(chosen),
        )
        result = _one_way(layer, limits, operator, one_way, in_time)
        if result is None:
            _say(layer, "the states of the chunks did not settle: it ran")
            return operator(inputs, options)
        for k, n in enumerate(chosen):
            parts[n] = _part(result, k, len(chosen), bool(back))
    y = torch.cat([parts[n][0] for n in range(N)], -1)
    others = None
    if options.keep and cell.states > 1:
        others = torch.cat([parts[n][1] for n in range(N)], -1)
    last = [torch.stack(column) for column in zip(*(parts[n][2] for n in range(N)))]
    return y.transpose(0, 1) if batch_first else y, others, last


def _of_recurrences(w: Tensor | None, chosen: Sequence[int], N: int) -> Tensor | None:
    if w is None or len(chosen) == N:
        return w
    own: Tensor = w.unflatten(0, (N, -1))[chosen].flatten(0, 1)
    return own


def _part(result: Any, k: int, count: int, back: bool) -> tuple[Tensor, Any, list[Tensor]]:
    """Recurrence k of `count`, in order of time."""
    y, others, last = result
    T, B, _ = y.shape
    own = y.chunk(count, -1)[k]
    rest = None
    if others is not None:
        rest = others.chunk(count, -1)[k]
        if back:
            rest = rest.unflatten(1, (T, B)).flip(1).flatten(1, 2)
    return own.flip(0) if back else own, rest, [s[k] for s in last]


def _one_way(
    layer: Any,
    limits: TimeParallel,
    operator: Operator,
    inputs: LayerInputs,
    options: Options,
) -> Any:
    """y, the other states and the last ones of recurrences that run forward over x [T, B, I]; None
    where the states do not settle. What is less than a chunk comes last, one step after the
    other."""
    cell, x, weights, _, _, reverse = inputs
    states: Any = inputs.states
    T, B, _ = x.shape
    N = len(reverse)
    C = T // limits.chunk
    L = limits.chunk
    group = _Group(operator, cell, N, C, L, B, options, limits)
    body = x[: C * L]
    with torch.no_grad():
        solution = _solve(group, group.to_chunks(body), weights, states)
    report = _report(layer, solution, limits)
    if solution is None:
        return None
    if trains(inputs.tensors()):
        given = group, solution, report, body, *weights, *states
        y, others, *last = _Chunked.apply(*given)  # type: ignore[no-untyped-call]
    else:
        y, others, *last = _in_time(group, solution.outputs)
    if C * L < T:
        rest, rest_others, last = operator(inputs._replace(x=x[C * L :], states=last), options)
        y = torch.cat((y, rest))
        if others is not None and rest_others is not None:
            others = torch.cat((others, rest_others), 1)
    return y, others, last


def _report(layer: Any, solution: _Solution | None, limits: TimeParallel) -> Any:
    """Appends to the layer's report. Returns what sets the passes of backward."""
    reports = layer.last_time_parallel
    if solution is None:
        reports.append(Report(limits.max_passes, float("inf"), False))
    else:
        reports.append(Report(solution.passes, solution.residual, True))
    place = len(reports) - 1

    def backward_passes(count: int) -> None:
        reports[place] = reports[place]._replace(backward_passes=count)

    return backward_passes


def _tolerance(limits: TimeParallel, like: Tensor) -> float:
    return _NOISE[like.dtype] if limits.tol is None else limits.tol


def _solve(
    group: _Group, x: Tensor, weights: Sequence[Any], states: Sequence[Tensor]
) -> _Solution | None:
    """None if the states do not settle."""
    entering = [s.new_zeros(group.N, group.C, group.B, s.shape[-1]) for s in states]
    for e, s in zip(entering, states):
        e[:, 0] = s
    extended, gated = with_products(group.cell)
    ones = [torch.ones_like(entering[k]) for k in gated]
    S = group.cell.states
    tolerance = _tolerance(group.limits, x)
    for count in range(1, group.limits.max_passes + 1):
        y, others, last = group.run(extended, x, weights, [*entering, *ones])
        products: list[Tensor | None] = [None] * S
        for place, k in enumerate(gated):
            products[k] = last[S + place]
        gaps = [end[:, :-1] - e[:, 1:] for end, e in zip(last, entering)]
        residual = _largest(gaps) / max(1.0, _largest(last[:S]))
        if residual <= tolerance:
            own = None if others is None or S == 1 else others[: S - 1]
            outputs = y, own, last[:S]
            return _Solution(entering, products, outputs, count, residual)
        for e, gap, product in zip(entering, gaps, products):
            moves = gap if product is None else _scan(gap, product[:, 1:-1])
            e[:, 1:] += moves
    return None


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value, NaN if there is one."""
    return float(torch.stack([t.abs().max() for t in tensors]).max())


def _scan(gaps: Tensor, products: Tensor) -> Tensor:
    """d[c+1] = gap[c+1] + product[c] d[c], over the chunks in dimension 1."""
    moves = [gaps[:, 0]]
    for c in range(products.shape[1]):
        moves.append(gaps[:, c + 1] + products[:, c] * moves[-1])
    return torch.stack(moves, 1)


class _Chunked(torch.autograd.Function):
    """All chunks from the states that enter them. Inputs by position: the group, its solution, what
    takes the passes of backward, x [T, B, I], four weights, and the S states before the first step.
    Outputs: y, the other states or None, and the S last states."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        group, solution, report, x, *rest = inputs
        needs = ctx.needs_input_grad
        with torch.enable_grad():
            own = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip((x, *rest[:4]), needs[3:])
            ]
            entering = [e.detach().requires_grad_() for e in solution.entering]
            outputs = group.run(group.cell, group.to_chunks(own[0]), own[1:], entering)
        ctx.graph = group, solution._replace(outputs=None), report, own, entering, outputs
        ctx.save_for_backward(x, *rest)
        ctx.set_materialize_grads(False)
        return _in_time(group, outputs)

    @staticmethod
    def backward(ctx: Any, dy: Any, dothers: Any, *dlast: Any) -> tuple[Any, ...]:
        incoming = dy, dothers, *dlast
        if needs_composite(incoming):
            return None, None, None, *_by_composite(ctx, incoming)
        group, solution, report, own, entering, (y, others, last) = ctx.graph
        outputs = [y, *([] if others is None else [others]), *last]
        d_y = torch.zeros_like(y) if dy is None else group.to_chunks(dy)
        d_outputs = [d_y]
        if others is not None:
            none = dothers is None
            d_outputs.append(torch.zeros_like(others) if none else group.rows_to_chunks(dothers))
        ends = [torch.zeros_like(s) for s in last]
        for end, d in zip(ends, dlast):
            if d is not None:
                end[:, -1] = d

        def gradients(inputs: Sequence[Tensor]) -> list[Any]:
            return [
                *torch.autograd.grad(
                    outputs, inputs, [*d_outputs, *ends], retain_graph=True, allow_unused=True
                )
            ]

        passes = _solve_adjoint(group, solution, ends, lambda: gradients(entering))
        report(passes)
        inputs = [t for t in own if t is not None and t.requires_grad]
        found = gradients([*inputs, *entering])
        remaining = iter(found)
        of_own = [next(remaining) if t is not None and t.requires_grad else None for t in own]
        of_states = [None if d is None else d[:, 0].contiguous() for d in remaining]
        return None, None, None, *of_own, *of_states


def _by_composite(ctx: Any, grads: Sequence[Any]) -> list[Tensor | None]:
    """The gradients step by step: they can be differentiated again, and many may come at once, for
    which no common number of passes is known."""
    group = ctx.graph[0]
    inputs = ctx.saved_tensors
    with torch.enable_grad():
        alias = aliases(inputs)
        x, *rest = alias
        reverse = (False,) * group.N
        inputs = LayerInputs(group.cell, x, rest[:4], rest[4:], NO_MASKS, reverse)
        y, others, last = composite_layer(inputs, group.options)
    return differentiate((y, others, *last), grads, alias, ctx.needs_input_grad[3:])


def _in_time(group: _Group, outputs: Any) -> tuple[Any, ...]:
    """The outputs of the chunks as those of the sequence."""
    y, others, last = outputs
    every = None if others is None else group.rows_from_chunks(others.detach())
    ends = [s.detach()[:, -1].contiguous() for s in last]
    return group.from_chunks(y.detach()), every, *ends


def _solve_adjoint(
    group: _Group,
    solution: _Solution,
    ends: Sequence[Tensor],
    gradients: Callable[[], Sequence[Tensor | None]],
) -> int:
    """Writes the gradients of the states in which the chunks end. Returns the passes."""
    tolerance = _tolerance(group.limits, ends[0])
    for count in range(1, group.C + 1):
        found = gradients()
        into = [torch.zeros_like(end) if d is None else d for d, end in zip(found, ends)]
        gaps = [d[:, 1:] - end[:, :-1] for d, end in zip(into, ends)]
        if _largest(gaps) <= tolerance * _largest(into):
            return count
        for end, gap, product in zip(ends, gaps, solution.products):
            moves = gap
            if product is not None:
                moves = _scan(gap.flip(1), product[:, 1:-1].flip(1)).flip(1)
            end[:, :-1] += moves
    return group.C


def _say(layer: Any, why: str) -> None:
    """Once for a class of layers and a reason."""
    if not torch.compiler.is_compiling():
        kind = type(layer)
        text = f"rnn.{kind.__name__}: {why} one step after the other"
        warn_once(("time_parallel", kind, why), text)
