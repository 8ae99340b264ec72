"""The recurrence as array operations, step after step: in NumPy, in torch on the CPU, or in CuPy.

The plan's backend names the library. NumPy has the least overhead per call; torch has the faster large products and, in
`addmm`, a product and a sum in one. Rows are packed: step t owns the sizes[t] rows that follow those of step t - 1."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

from .cells import Cell, bind
from .plan import Plan, Rows

Array = Any


class _Nothing:
    """What x is where r holds x + r."""

    __array_ufunc__ = None  # NumPy leaves the sum to __radd__

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


@lru_cache
def _functions(backend: str, cell: Cell) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The array library and the cell's forward and backward in it."""
    library = import_module(backend)
    names = dict(tanh=library.tanh, zeros_like=lambda x: 0)
    if backend == "torch":
        names |= dict(sigmoid=library.sigmoid, relu=library.relu)
    else:
        names |= dict(sigmoid=lambda x: library.tanh(x * 0.5) * 0.5 + 0.5, relu=lambda x: library.maximum(x, 0))
    return library, bind(cell.forward, **names), bind(cell.backward, **names)


class _Sweep:
    """One direction through time."""

    def __init__(self, library: Any, rows: Rows, n: int) -> None:
        sizes, resets, reverse = rows.sizes, rows.resets, rows.reverse[n]
        self.library, self.sizes, self.reverse = library, sizes, reverse
        self.torch = library.__name__ == "torch"
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
        parts = [a.split(self.sizes) if self.torch else [a[i:j] for i, j in self.bounds] for a in arrays]
        return list(zip(*parts)) if parts else [()] * len(self.sizes)

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

    def affine(self, c: Array | None, a: Array, w: Array, out: Array) -> None:
        """out = c + a w, where no c means 0."""
        if c is not None and self.torch:
            self.library.addmm(c, a, w, out=out)
        else:
            self.library.matmul(a, w, out=out)
            if c is not None:
                self.library.add(out, c, out=out)


def _part(array: Array, k: int, width: int) -> Array:
    return array[:, k * width : (k + 1) * width]


def forward(cell: Cell, plan: Plan, rows: Rows, x: Array, w_hh: Array, b_hh: Array | None, s0: Array,
            keep: int) -> tuple[Array, Array | None, Array, Array | None]:
    """x [R, N*G*H] input pre-activations, with b_hh in them unless cell.split; w_hh [N*G*H, H]; b_hh [N*G*H];
    s0 [N*S, B, H].

    Returns y [R, N*H], with keep >= 1 the other states of every step [S-1, R, N*H], the last states [N*S, B, H], and
    with keep >= 2 the activations for the adjoint [A, R, N*H]; None for what is not kept or not there."""
    (library, step, _), sizes = _functions(plan.backend, cell), rows.sizes
    N, S, G, R, (_, B, H) = len(rows.reverse), cell.states, cell.gates, len(x), s0.shape
    empty, nothing = partial(library.empty, dtype=x.dtype), [_Nothing()] * G
    y, last, r = empty((R, N * H)), empty((N * S, B, H)), empty((B, G * H))
    states = empty((S - 1, R, N * H)) if S > 1 and keep else None
    saved = empty((cell.saved, R, N * H)) if cell.saved and keep > 1 else None
    last[:] = s0
    for n in range(N):
        sweep = _Sweep(library, rows, n)
        out = sweep.views(_part(y, n, H), *(() if states is None else (_part(c, n, H) for c in states)))
        if S > 1 and not keep:
            scratch = empty((2, S - 1, B, H))
            out = [(*h, *scratch[t % 2, :, :size]) for t, (h, size) in enumerate(zip(out, sizes))]
        acts = sweep.views(*(() if saved is None else (_part(a, n, H) for a in saved)))
        gates = sweep.views(*(_part(x, n * G + g, H) for g in range(G) if cell.split))
        sums = sweep.views(_part(x, n, G * H))
        if cell.split:
            sums = [(b_hh if b_hh is None else b_hh[n * G * H : (n + 1) * G * H],)] * len(sizes)
        w, rt = w_hh[n * G * H : (n + 1) * G * H].T, None
        for t, s in zip(sweep.order, sweep.came(out, s0[n * S : (n + 1) * S], False)):
            if rt is None or len(rt) != sizes[t]:
                rt = r[: sizes[t]]
                rg = [_part(rt, g, H) for g in range(G)]
            sweep.affine(sums[t][0], s[0], w, rt)
            new, a = step(gates[t] or nothing, rg, s)
            for array, value in zip((*out[t], *acts[t]), (*new, *a)):
                array[:] = value
            if t in sweep.ends:
                for array, value in zip(last[n * S :], out[t]):
                    array[sweep.ends[t]] = value[sweep.ends[t]]
    return y, states, last, saved


def backward(cell: Cell, plan: Plan, rows: Rows, w_hh: Array, s0: Array, y: Array, states: Array | None,
             saved: Array | None, dy: Array, dstates: Array | None,
             dlast: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """The adjoint of `forward`, from what it kept and the gradients of its outputs.

    Returns the gradients of the input and of the recurrent pre-activations [R, N*G*H] (one array unless cell.split)
    and of s0; and the h that came into each row [R, N*H], unless that is just the h of B rows before (or after)."""
    (library, _, adjoint), sizes = _functions(plan.backend, cell), rows.sizes
    N, S, G, R, (_, B, H) = len(rows.reverse), cell.states, cell.gates, len(y), s0.shape
    empty = partial(library.empty, dtype=y.dtype)
    dr, ds = empty((R, N * G * H)), empty((N * S, B, H))
    dx = empty((R, N * G * H)) if cell.split else dr
    came = None if rows.resets is None and sizes[-1] == B else empty((R, N * H))
    ds[:] = 0 if dlast is None else dlast
    for n in range(N):
        sweep = _Sweep(library, rows, n)
        out = sweep.views(_part(y, n, H), *(() if states is None else (_part(c, n, H) for c in states)))
        given = sweep.views(_part(dy, n, H), *(() if dstates is None else (_part(c, n, H) for c in dstates)))
        acts = sweep.views(*(() if saved is None else (_part(a, n, H) for a in saved)))
        grads = sweep.views(*(_part(d, n * G + g, H) for d in ((dr, dx) if cell.split else (dr,)) for g in range(G)))
        sums = sweep.views(_part(dr, n, G * H))
        inputs = sweep.views(*(() if came is None else (_part(came, n, H),)))
        w, d = w_hh[n * G * H : (n + 1) * G * H], None
        for t, s in zip(reversed(sweep.order), sweep.came(out, s0[n * S : (n + 1) * S], True)):
            if d is None or len(d[0]) != sizes[t]:
                d = [a[: sizes[t]] for a in ds[n * S : (n + 1) * S]]
            for array, value in zip(d, given[t]):
                library.add(array, value, out=array)
            gx, gr, passed = adjoint(acts[t], s, out[t], d)
            for array, value in zip((*grads[t], *d[1:]), (*gr, *(gx if cell.split else ()), *passed[1:])):
                array[:] = value
            for array in inputs[t]:
                array[:] = s[0]
            sweep.affine(None if isinstance(passed[0], int) else passed[0], sums[t][0], w, d[0])
            if t in sweep.cuts:
                for array in d:
                    array[: len(sweep.cuts[t])][sweep.cuts[t]] = 0
    return dx, dr, ds, came
