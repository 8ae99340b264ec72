"""The recurrence as array operations, one step after another: on NumPy arrays, torch tensors on the CPU, or CuPy arrays.

The plan's backend names the library. NumPy has the least overhead per call; torch has the faster large products and, in
`addmm(out=)`, a product and a sum in one. Rows are packed: step t owns the sizes[t] rows that follow those of step t-1.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

from .cells import Cell
from .plan import Plan, Rows
from .trace import Program, record

Array = Any


def _fill(value: float, out: Array) -> None:
    out[...] = value


@lru_cache
def _operations(library: Any) -> dict[str, Callable[..., Any]]:
    names = {name: getattr(library, name) for name in ("add", "subtract", "multiply", "tanh")}
    if library.__name__ == "torch":
        return names | {"copy": partial(library.mul, other=1), "fill": _fill, "sigmoid": library.sigmoid,
                        "relu": partial(library.clamp_min, min=0), "positive": partial(library.gt, other=0)}
    return names | {"copy": library.positive, "fill": _fill, "relu": partial(library.maximum, 0), "positive": partial(library.less, 0)}


@lru_cache
def _program(library: Any, cell: Cell, adjoint: bool, save: bool = True) -> Program:
    letters = zip("xrsnadp", (cell.gates, cell.gates, cell.states, cell.states, cell.saved, cell.states, cell.states))
    x, r, s, n, a, d, p = ([f"{letter}{k}" for k in range(count)] for letter, count in letters)
    if adjoint:
        return record(cell.backward, (a, s, n, d), (x if cell.split else (), r, p), _operations(library), skip="p0")
    return record(cell.forward, (x if cell.split else [None] * len(x), r, s), (n, a if save else ()), _operations(library))


@lru_cache
def _library(name: str) -> tuple[Any, Callable[[Array | None, Array, Array, Array, Array], None]]:
    """An array library and its function that writes c + a w to `out`: no c means 0, `out` may be c or `scratch`."""
    library = import_module(name)
    matmul, add = library.matmul, library.add

    def affine(c: Array | None, a: Array, w: Array, out: Array, scratch: Array) -> None:
        if c is None:
            matmul(a, w, out=out)
        else:
            matmul(a, w, out=scratch)
            add(scratch, c, out=out)

    def addmm(c: Array | None, a: Array, w: Array, out: Array, scratch: Array) -> None:
        if c is None:
            matmul(a, w, out=out)
        else:
            library.addmm(c, a, w, out=out)

    return library, addmm if name == "torch" else affine


class _Sweep:
    """One direction through time over packed rows."""

    def __init__(self, library: Any, sizes: Sequence[int], resets: Array | None, reverse: bool) -> None:
        self.library, self.sizes, self.reverse = library, sizes, reverse
        self.order = range(len(sizes))[:: -1 if reverse else 1]
        self.bounds = list(pairwise(accumulate(sizes, initial=0)))
        # Of a step after which sequences end: which. Of one that sequences enter from a reset: a mask of the first rows.
        self.ends, self.cuts = {self.order[-1]: slice(0, sizes[self.order[-1]])}, dict[int, Array]()
        self.even = resets is None and sizes[0] == sizes[-1]
        if not reverse and not self.even:
            self.ends |= {t: slice(b, a) for t, (a, b) in enumerate(pairwise(sizes)) if b < a}
        if resets is not None:
            masks = ((t, resets[t + reverse, :size]) for t, size in enumerate(sizes[reverse:]))
            self.cuts = {t: mask for t, mask in masks if mask.any()}

    def views(self, *arrays: Array) -> list[tuple[Array, ...]]:
        """The rows of each step, in every array."""
        if not arrays:
            return [()] * len(self.sizes)
        if self.library.__name__ == "torch":
            return list(zip(*(a.split(self.sizes) for a in arrays)))
        return list(zip(*([a[i:j] for i, j in self.bounds] for a in arrays)))

    def came(self, states: Sequence[tuple[Array, ...]], first: Array, adjoint: bool) -> Iterable[Sequence[Array]]:
        """The states that come into each step, made when they are asked for."""
        if self.even:
            step = -1 if self.reverse else 1
            came = [tuple(first), *states[::step][:-1]]
            return reversed(came) if adjoint else came
        return (self._came(t, states, first) for t in (reversed(self.order) if adjoint else self.order))

    def _came(self, t: int, states: Sequence[tuple[Array, ...]], first: Array) -> Sequence[Array]:
        size, before = self.sizes[t], t + 1 if self.reverse else t - 1
        ran = self.sizes[before] if 0 <= before < len(self.sizes) else 0
        join = self.library.concatenate
        if ran >= size:
            came = [s[:size] for s in states[before]]
        elif ran:
            came = [join((s, z[ran:size])) for s, z in zip(states[before], first)]
        else:
            came = [z[:size] for z in first]
        if t in self.cuts:
            mask = self.cuts[t]
            came = [s + 0 for s in came]
            for s in came:
                s[: len(mask)][mask] = 0
        return came


def _column(array: Array, k: int, width: int) -> Array:
    return array[..., k * width : (k + 1) * width]


def _columns(array: Array, first: int, count: int, width: int) -> list[Array]:
    return [_column(array, first + k, width) for k in range(count)]


def forward(cell: Cell, plan: Plan, x: Array, w_hh: Array, b_hh: Array | None, s0: Array, rows: Rows,
            resets: Array | None, reverse: Sequence[bool], keep: int) -> tuple[Array, Array, Array, Array]:
    """x [R, N*G*H] input pre-activations, with b_hh in them unless cell.split; w_hh [N*G*H, H]; b_hh [N*G*H];
    s0 [N*S, B, H]; resets [T, B] bool.

    Returns y [R, N*H], the other states of every step [S-1, R, N*H] (no rows unless keep >= 1), the last states
    [N*S, B, H] and the activations for the adjoint [A, R, N*H] (no rows unless keep >= 2)."""
    library, affine = _library(plan.backend)
    N, S, B, H = len(reverse), cell.states, *s0.shape[1:]
    G, R, sizes = cell.gates, len(x), rows.sizes
    empty = partial(library.empty, dtype=x.dtype)
    run, pool, _ = _program(library, cell, False, keep > 1)
    y, last = empty((R, N * H)), empty(s0.shape)
    last[:] = s0
    states, saved = empty((S - 1, R if keep else 0, N * H)), empty((cell.saved, R if keep > 1 else 0, N * H))
    r, temporaries, scratch = empty((B, G * H)), empty((pool, B, H)), empty((2, S - 1, B, H))
    for n in range(N):
        sweep = _Sweep(library, sizes, resets, reverse[n])
        out = sweep.views(_column(y, n, H), *(_column(c, n, H) for c in states if keep))
        if not keep and S > 1:
            out = [(*h, *scratch[t % 2, :, :size]) for t, (h, size) in enumerate(zip(out, sizes))]
        acts = sweep.views(*(_column(a, n, H) for a in saved if keep > 1))
        gates = sweep.views(*(_columns(x, n * G, G, H) if cell.split else ()))
        sums = [(b_hh if b_hh is None else _column(b_hh, n, G * H),)] * len(sizes) if cell.split else sweep.views(_column(x, n, G * H))
        w, width = w_hh[n * G * H : (n + 1) * G * H].T, -1
        for t, s in zip(sweep.order, sweep.came(out, s0[n * S : (n + 1) * S], False)):
            if sizes[t] != width:
                width = sizes[t]
                rt, work = r[:width], [a[:width] for a in temporaries]
                rg = _columns(rt, 0, G, H)
            affine(sums[t][0], s[0], w, rt, rt)
            run(*gates[t], *rg, *s, *out[t], *acts[t], *work)
            if t in sweep.ends:
                for a, o in zip(last[n * S :], out[t]):
                    a[sweep.ends[t]] = o[sweep.ends[t]]
    return y, states, last, saved


def backward(cell: Cell, plan: Plan, w_hh: Array, s0: Array, y: Array, states: Array, saved: Array, dy: Array,
             dstates: Array | None, dlast: Array, rows: Rows, resets: Array | None,
             reverse: Sequence[bool]) -> tuple[Array, Array, Array, Array | None]:
    """The adjoint of `forward`, from what it kept and the gradients of its outputs.

    Returns the gradients of the input and of the recurrent pre-activations [R, N*G*H] (one array unless cell.split)
    and of s0; and the h that came into each row [R, N*H], unless that is just the h of B rows before (or after)."""
    library, affine = _library(plan.backend)
    N, S, B, H = len(reverse), cell.states, *s0.shape[1:]
    G, R, sizes, add = cell.gates, len(y), rows.sizes, library.add
    empty = partial(library.empty, dtype=y.dtype)
    run, pool, skipped = _program(library, cell, True)
    dr = empty((R, N * G * H))
    dx = empty((R, N * G * H)) if cell.split else dr
    came = None if resets is None and sizes[-1] == B else empty((R, N * H))
    ds, spare, temporaries = empty(s0.shape), empty((S, B, H)), empty((pool, B, H))
    ds[:] = dlast
    for n in range(N):
        sweep = _Sweep(library, sizes, resets, reverse[n])
        out = sweep.views(_column(y, n, H), *(_column(c, n, H) for c in states))
        given = sweep.views(_column(dy, n, H), *(_column(c, n, H) for c in (() if dstates is None else dstates)))
        acts = sweep.views(*(_column(a, n, H) for a in saved))
        grads = sweep.views(*(_columns(dx, n * G, G, H) if cell.split else ()), *_columns(dr, n * G, G, H))
        sums = sweep.views(_column(dr, n, G * H))
        inputs = sweep.views(*([] if came is None else [_column(came, n, H)]))
        w, width, now, then = w_hh[n * G * H : (n + 1) * G * H], -1, ds[n * S : (n + 1) * S], spare
        then[:] = now
        for t, s in zip(reversed(sweep.order), sweep.came(out, s0[n * S : (n + 1) * S], True)):
            if sizes[t] != width:
                if width > 0:
                    then[:, :width] = now[:, :width]
                width, work = sizes[t], [a[: sizes[t]] for a in temporaries]
                d, p = [a[:width] for a in now], [a[:width] for a in then]
            for a, g in zip(d, given[t]):
                add(a, g, out=a)
            for a in inputs[t]:
                a[:] = s[0]
            run(*acts[t], *s, *out[t], *d, *grads[t], *p[skipped:], *work)
            affine(None if skipped else p[0], sums[t][0], w, p[0], d[0])
            if t in sweep.cuts:
                mask = sweep.cuts[t]
                for a in p:
                    a[: len(mask)][mask] = 0
            d, p, now, then = p, d, then, now
        ds[n * S : (n + 1) * S] = now
    return dx, dr, ds, came
