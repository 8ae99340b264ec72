"""The recurrence as array operations, step after step: in NumPy, in torch on the CPU, or in CuPy.
The plan's backend names the library. NumPy has the least overhead per call; torch has the faster large products and, in
`addmm`, a product and a sum in one. Rows are packed: step t owns the sizes[t] rows that follow those of step t - 1."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from operator import setitem
from typing import Any

from .cells import Cell
from .plan import Plan, Rows
from .trace import Value, trace

Array = Any


def _record(function: Callable[..., Any], inputs: Sequence[Sequence[str]], outputs: Sequence[Sequence[str]],
           operations: Mapping[str, Callable[..., Any]], skip: str = "") -> tuple[Callable[..., None], int, bool]:
    """`function`, of and to tuples of values, as `run(*inputs, *outputs, *temporaries)` on arrays; the number of those
    temporaries; and whether the output `skip` is the constant 0 and has no array. Inputs and outputs go by names, a
    letter, not t, and a number; an input without a name is the constant 0, outputs without names are left out."""
    lines, results = trace(function, inputs, operations)
    skipped, parameters = False, [name for group in inputs for name in group if name]
    for name, value in [pair for group in zip(outputs, results) for pair in zip(*group)]:
        if name == skip and not isinstance(value, Value):
            skipped = True
            continue
        if not isinstance(value, Value) or value.name[0] != "t":  # a constant, an input, or an output already
            lines.append(("copy", (value,), Value(lines, "t")))
            value = lines[-1][2]
        value.name = name
        parameters.append(name)
    temporaries = [result.name for *_, result in lines if result.name[0] == "t"]
    text = "\n ".join(f"{name}({', '.join(map(repr, given))}, out={result})" for name, given, result in lines)
    scope = dict(operations)
    # Straight-line Python, because a loop over the operations would cost as much as they do at small sizes.
    exec(f"def run({', '.join(parameters + temporaries)}):\n {text}", scope)
    return scope["run"], len(temporaries), skipped


@lru_cache
def _program(backend: str, cell: Cell, adjoint: bool, save: bool = True) -> tuple[Any, Callable[..., None], int, bool]:
    """The array library, and the cell's forward or backward in it."""
    library = import_module(backend)
    operations: Any = {name: getattr(library, name) for name in ("add", "subtract", "multiply", "divide", "tanh")}
    operations |= dict(copy=lambda value, out: setitem(out, ..., value), relu=partial(library.maximum, 0),
                       relu_grad=lambda d, y, out: setitem(out, ..., library.where(y <= 0, 0, d)))
    if backend == "torch":
        operations |= dict(relu=partial(library.clamp_min, min=0), sigmoid=library.sigmoid)
    G, S, A = cell.gates, cell.states, cell.saved
    x, r, s, n, a, d, p = ([f"{c}{k}" for k in range(count)] for c, count in zip("xrsnadp", (G, G, S, S, A, S, S)))
    if adjoint:
        return library, *_record(cell.backward, (a, s, n, d), (x if cell.split else (), r, p), operations, "p0")
    return library, *_record(cell.forward, (x if cell.split else [""] * G, r, s), (n, a if save else ()), operations)


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

    def came(self, states: Sequence[Any], first: Array, adjoint: bool) -> Iterable[Sequence[Array]]:
        """The states that come into each step, made when they are asked for."""
        if self.even:
            came: list[Any] = [tuple(z[: self.sizes[0]] for z in first), *states[:: -1 if self.reverse else 1][:-1]]
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
    """x [R, N*G*H] input pre-activations, overwritten, with b_hh in them unless cell.split; w_hh [N*G*H, H];
    b_hh [N*G*H]; s0 [N*S, B, H]. Returns y [R, N*H], with keep >= 1 the other states of every step [S-1, R, N*H], the
    last states [N*S, B, H], and with keep >= 2 the activations for the adjoint [A, R, N*H]; None for what is not."""
    (library, run, pool, _), sizes = _program(plan.backend, cell, False, keep > 1), rows.sizes
    N, S, G, R, (_, B, H) = len(rows.reverse), cell.states, cell.gates, len(x), s0.shape
    empty = getattr(x, "new_empty", partial(library.empty, dtype=x.dtype))
    y = empty((R, N * H)) if G > 1 or cell.split else x  # fresh memory costs as much as a step's arithmetic
    last, r, temporaries = empty((N * S, B, H)), empty((B, G * H)), empty((pool, B, H))
    states = empty((S - 1, R, N * H)) if S > 1 and keep else None
    saved = empty((cell.saved, R, N * H)) if cell.saved and keep > 1 else None
    last[:] = s0
    in_place = y is x and plan.backend == "torch" and S == 1 and not cell.saved  # r in x, when nothing reads it after y
    for n in range(N):
        sweep = _Sweep(library, rows, n)
        out = sweep.views(_part(y, n, H), *(() if states is None else (_part(c, n, H) for c in states)))
        if S > 1 and not keep:
            pair = empty((2, S - 1, B, H))
            out = [(*h, *pair[t % 2, :, :size]) for t, (h, size) in enumerate(zip(out, sizes))]
        acts = sweep.views(*(() if saved is None else (_part(a, n, H) for a in saved)))
        gates = sweep.views(*(_part(x, n * G + g, H) for g in range(G) if cell.split))
        sums = sweep.views(_part(x, n, G * H))
        if cell.split:
            sums = [(b_hh if b_hh is None else b_hh[n * G * H : (n + 1) * G * H],)] * len(sizes)
        w, rt = w_hh[n * G * H : (n + 1) * G * H].T, None
        for t, s in zip(sweep.order, sweep.came(out, s0[n * S : (n + 1) * S], False)):
            if rt is None or len(rt) != sizes[t]:
                rt = r[: sizes[t]]
                rg, work = [_part(rt, g, H) for g in range(G)], [a[: sizes[t]] for a in temporaries]
            if in_place:
                rt, rg = sums[t][0], [*sums[t]]
            sweep.affine(sums[t][0], s[0], w, rt)
            run(*gates[t], *rg, *s, *out[t], *acts[t], *work)
            if t in sweep.ends:
                for array, value in zip(last[n * S :], out[t]):
                    array[sweep.ends[t]] = value[sweep.ends[t]]
    return y, states, last, saved


def backward(cell: Cell, plan: Plan, rows: Rows, w_hh: Array, s0: Array, y: Array, states: Array | None,
             saved: Array | None, dy: Array, dstates: Array | None,
             dlast: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """The adjoint of `forward`: the gradients of x, of the recurrent pre-activations [R, N*G*H] (the same array unless
    cell.split) and of s0; and the h that came into each row [R, N*H], unless that is just the h of B rows away."""
    (library, run, pool, skipped), sizes = _program(plan.backend, cell, True), rows.sizes
    N, S, G, R, (_, B, H) = len(rows.reverse), cell.states, cell.gates, len(y), s0.shape
    empty = getattr(y, "new_empty", partial(library.empty, dtype=y.dtype))
    dr, ds, passed, temporaries = empty((R, N * G * H)), empty((N * S, B, H)), empty((S, B, H)), empty((pool, B, H))
    dx = empty((R, N * G * H)) if cell.split else dr
    came = None if rows.resets is None and sizes[-1] == B else empty((R, N * H))
    ds[:] = 0 if dlast is None else dlast
    for n in range(N):
        sweep = _Sweep(library, rows, n)
        out = sweep.views(_part(y, n, H), *(() if states is None else (_part(c, n, H) for c in states)))
        given = sweep.views(_part(dy, n, H), *(() if dstates is None else (_part(c, n, H) for c in dstates)))
        acts = sweep.views(*(() if saved is None else (_part(a, n, H) for a in saved)))
        grads = sweep.views(*(_part(d, n * G + g, H) for d in ((dx, dr) if cell.split else (dr,)) for g in range(G)))
        sums = sweep.views(_part(dr, n, G * H))
        inputs = sweep.views(*(() if came is None else (_part(came, n, H),)))
        w, d = w_hh[n * G * H : (n + 1) * G * H], None
        for t, s in zip(reversed(sweep.order), sweep.came(out, s0[n * S : (n + 1) * S], True)):
            if d is None or len(d[0]) != sizes[t]:
                d, p = [a[: sizes[t]] for a in ds[n * S : (n + 1) * S]], [a[: sizes[t]] for a in passed]
                work = [a[: sizes[t]] for a in temporaries]
            for array, value in zip(d, given[t]):
                library.add(array, value, out=array)
            for array in inputs[t]:
                array[:] = s[0]
            run(*acts[t], *s, *out[t], *d, *grads[t], *p[skipped:], *work)
            for array, value in zip(d[1:], p[1:]):
                array[:] = value
            sweep.affine(None if skipped else p[0], sums[t][0], w, d[0])
            if t in sweep.cuts:
                for array in d:
                    array[: len(sweep.cuts[t])][sweep.cuts[t]] = 0
    return dx, dr, ds, came
