"""The recurrence as array operations, step after step: in NumPy, in torch on the CPU, or in CuPy.

The plan's backend names the library. NumPy has the least overhead per call; torch has the faster large products and, in
`addmm`, a product and a sum in one. Rows are packed: step t owns the sizes[t] rows that follow those of step t - 1.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

from .cells import Cell
from .plan import Plan, Rows
from .trace import Program, record

Array = Any


@lru_cache
def _program(library: Any, cell: Cell, adjoint: bool, save: bool = True) -> Program:
    def copy(value: Any, out: Array) -> None:
        out[...] = value

    operations = {name: getattr(library, name) for name in ("add", "subtract", "multiply", "tanh")} | {"copy": copy}
    if library.__name__ == "torch":
        operations |= {"relu": partial(library.clamp_min, min=0), "positive": partial(library.gt, other=0),
                       "sigmoid": library.sigmoid}
    else:
        operations |= {"relu": partial(library.maximum, 0), "positive": partial(library.less, 0)}
    G, S, A = cell.gates, cell.states, cell.saved
    x, r, s, n, a, d, p = ([f"{c}{k}" for k in range(count)] for c, count in zip("xrsnadp", (G, G, S, S, A, S, S)))
    if adjoint:
        return record(cell.backward, (a, s, n, d), (x if cell.split else (), r, p), operations, skip="p0")
    return record(cell.forward, (x if cell.split else [None] * G, r, s), (n, a if save else ()), operations)


class _Sweep:
    """One direction through time."""

    def __init__(self, library: Any, rows: Rows, n: int) -> None:
        sizes, resets, reverse = rows.sizes, rows.resets, rows.reverse[n]
        self.library, self.sizes, self.reverse = library, sizes, reverse
        self.addmm = getattr(library, "addmm", None)
        self.order = range(len(sizes))[:: -1 if reverse else 1]
        self.bounds = list(pairwise(accumulate(sizes, initial=0)))
        self.even = resets is None and sizes[0] == sizes[-1]
        # Of a step after which sequences end: which. Of one that sequences enter from a reset: a mask of the first.
        self.ends, self.cuts = {self.order[-1]: slice(0, sizes[self.order[-1]])}, dict[int, Array]()
        if not reverse and not self.even:
            self.ends |= {t: slice(later, size) for t, (size, later) in enumerate(pairwise(sizes)) if later < size}
        if resets is not None:
            masks = ((t, resets[t + reverse, :size]) for t, size in enumerate(sizes[reverse:]))
            self.cuts = {t: mask for t, mask in masks if mask.any()}

    def views(self, *arrays: Array) -> list[tuple[Array, ...]]:
        """The rows of each step, in every array."""
        if not arrays:
            return [()] * len(self.sizes)
        if self.addmm:
            return list(zip(*(a.split(self.sizes) for a in arrays)))
        return list(zip(*([a[i:j] for i, j in self.bounds] for a in arrays)))

    def came(self, states: Sequence[tuple[Array, ...]], first: Array, adjoint: bool) -> Iterable[Sequence[Array]]:
        """The states that come into each step, made when they are asked for."""
        if self.even:
            came = [tuple(z[: self.sizes[0]] for z in first), *states[:: -1 if self.reverse else 1][:-1]]
            yield from reversed(came) if adjoint else came
            return
        for t in reversed(self.order) if adjoint else self.order:
            size, before = self.sizes[t], t + 1 if self.reverse else t - 1
            ran = states[before] if 0 <= before < len(states) else [z[:0] for z in first]
            came = [self.library.concatenate((s[:size], z[len(s) : size])) for s, z in zip(ran, first)]
            for s in came if t in self.cuts else ():
                s[: len(self.cuts[t])][self.cuts[t]] = 0
            yield came

    def affine(self, c: Array | None, a: Array, w: Array, out: Array, scratch: Array) -> None:
        """out = c + a w, where no c means 0, and `out` may be c or `scratch`."""
        if c is None:
            self.library.matmul(a, w, out=out)
        elif self.addmm:
            self.addmm(c, a, w, out=out)
        else:
            self.library.matmul(a, w, out=scratch)
            self.library.add(scratch, c, out=out)


def _part(array: Array, k: int, width: int) -> Array:
    return array[:, k * width : (k + 1) * width]


def forward(cell: Cell, plan: Plan, rows: Rows, x: Array, w_hh: Array, b_hh: Array | None, s0: Array,
            keep: int) -> tuple[Array, Array, Array, Array]:
    """x [R, N*G*H] input pre-activations, with b_hh in them unless cell.split; w_hh [N*G*H, H]; b_hh [N*G*H];
    s0 [N*S, B, H].

    Returns y [R, N*H], the other states of every step [S-1, R, N*H] (no rows unless keep >= 1), the last states
    [N*S, B, H] and the activations for the adjoint [A, R, N*H] (no rows unless keep >= 2)."""
    library, sizes = import_module(plan.backend), rows.sizes
    N, S, G, R, (_, B, H) = len(rows.reverse), cell.states, cell.gates, len(x), s0.shape
    run, pool, _ = _program(library, cell, False, keep > 1)
    empty = partial(library.empty, dtype=x.dtype)
    y, states, last = empty((R, N * H)), empty((S - 1, R if keep else 0, N * H)), empty((N * S, B, H))
    saved, scratch = empty((cell.saved, R if keep > 1 else 0, N * H)), empty((2, S - 1, B, H))
    r, temporaries = empty((B, G * H)), empty((pool, B, H))
    last[:] = s0
    for n in range(N):
        sweep = _Sweep(library, rows, n)
        out = sweep.views(_part(y, n, H), *(_part(c, n, H) for c in states if keep))
        if not keep and S > 1:
            out = [(*h, *scratch[t % 2, :, :size]) for t, (h, size) in enumerate(zip(out, sizes))]
        acts = sweep.views(*(_part(a, n, H) for a in saved if keep > 1))
        gates = sweep.views(*(_part(x, n * G + g, H) for g in range(G) if cell.split))
        sums = sweep.views(_part(x, n, G * H))
        if cell.split:
            sums = [(b_hh if b_hh is None else b_hh[n * G * H : (n + 1) * G * H],)] * len(sizes)
        w, width = w_hh[n * G * H : (n + 1) * G * H].T, -1
        for t, s in zip(sweep.order, sweep.came(out, s0[n * S : (n + 1) * S], False)):
            if sizes[t] != width:
                width, rt = sizes[t], r[: sizes[t]]
                rg, work = [_part(rt, g, H) for g in range(G)], [a[:width] for a in temporaries]
            sweep.affine(sums[t][0], s[0], w, rt, rt)
            run(*gates[t], *rg, *s, *out[t], *acts[t], *work)
            if t in sweep.ends:
                for a, o in zip(last[n * S :], out[t]):
                    a[sweep.ends[t]] = o[sweep.ends[t]]
    return y, states, last, saved


def backward(cell: Cell, plan: Plan, rows: Rows, w_hh: Array, s0: Array, y: Array, states: Array, saved: Array,
             dy: Array, dstates: Array | None, dlast: Array) -> tuple[Array, Array, Array, Array | None]:
    """The adjoint of `forward`, from what it kept and the gradients of its outputs.

    Returns the gradients of the input and of the recurrent pre-activations [R, N*G*H] (one array unless cell.split)
    and of s0; and the h that came into each row [R, N*H], unless that is just the h of B rows before (or after)."""
    library, sizes = import_module(plan.backend), rows.sizes
    N, S, G, R, (_, B, H) = len(rows.reverse), cell.states, cell.gates, len(y), s0.shape
    run, pool, skipped = _program(library, cell, True)
    empty = partial(library.empty, dtype=y.dtype)
    dr, ds, spare, temporaries = empty((R, N * G * H)), empty((N * S, B, H)), empty((S, B, H)), empty((pool, B, H))
    dx = empty((R, N * G * H)) if cell.split else dr
    came = None if rows.resets is None and sizes[-1] == B else empty((R, N * H))
    ds[:] = dlast
    for n in range(N):
        sweep = _Sweep(library, rows, n)
        out = sweep.views(_part(y, n, H), *(_part(c, n, H) for c in states))
        given = sweep.views(_part(dy, n, H), *(_part(c, n, H) for c in (() if dstates is None else dstates)))
        acts = sweep.views(*(_part(a, n, H) for a in saved))
        grads = sweep.views(*(_part(d, n * G + g, H) for d in ((dx, dr) if cell.split else (dr,)) for g in range(G)))
        sums = sweep.views(_part(dr, n, G * H))
        inputs = sweep.views(*(() if came is None else (_part(came, n, H),)))
        w, width, now, then = w_hh[n * G * H : (n + 1) * G * H], -1, ds[n * S : (n + 1) * S], spare
        then[:] = now
        for t, s in zip(reversed(sweep.order), sweep.came(out, s0[n * S : (n + 1) * S], True)):
            if sizes[t] != width:
                if width > 0:
                    then[:, :width] = now[:, :width]
                width, work = sizes[t], [a[: sizes[t]] for a in temporaries]
                d, p = [a[:width] for a in now], [a[:width] for a in then]
            for a, g in zip(d, given[t]):
                library.add(a, g, out=a)
            for a in inputs[t]:
                a[:] = s[0]
            run(*acts[t], *s, *out[t], *d, *grads[t], *p[skipped:], *work)
            sweep.affine(None if skipped else p[0], sums[t][0], w, p[0], d[0])
            if t in sweep.cuts:
                for a in p:
                    a[: len(sweep.cuts[t])][sweep.cuts[t]] = 0
            d, p, now, then = p, d, then, now
        ds[n * S : (n + 1) * S] = now
    return dx, dr, ds, came
