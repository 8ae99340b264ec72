"""The recurrence as array operations, step after step: in NumPy, in torch on the CPU, or in CuPy.
The plan's backend names the library. NumPy has the least overhead per call; torch has the faster large products and, in
`addmm`, a product and a sum in one."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .host import parts, working
from .plan import Plan, Rows
from .trace import Line, Value, trace

Array = Any
Window = tuple[int, int]  # its first step and the one after its last, in the order of the recurrence
_ELEMENTWISE = ("add", "subtract", "multiply", "divide", "tanh", "sigmoid")
# In NumPy (and CuPy) and in torch; {0} and {1} are arguments, {2} is where the result goes.
_NUMPY = dict(copy="{2}[...] = {0}", relu="maximum({0}, 0, out={2})", matmul="matmul({0}, {1}, {2})",
              relu_grad="copyto({2}, 0), copyto({2}, {0}, where=~({1} <= 0))")
_TORCH = dict(copy="{2}[...] = {0}", relu="clamp_min({0}, 0, out={2})", matmul="mm({0}, {1}, out={2})",
              relu_grad="ops.aten.threshold_backward.grad_input({0}, {1}, 0, grad_input={2})")


def _words(backend: str, name: str, given: Sequence[Any], result: Any) -> str:
    text = (_TORCH if backend == "torch" else _NUMPY).get(name)
    out = "out=" if backend == "torch" else ""
    return text.format(*given, *[0] * (2 - len(given)), result) if text else (
        f"{name}({', '.join(map(str, given))}, {out}{result})")


def _pooled(lines: Sequence[Line]) -> int:
    """Give temporaries, t0, t1..., that are not needed at the same time one name: T0, T1... The number of names."""
    last = {id(value): i for i, (_, given, _) in enumerate(lines) for value in given if isinstance(value, Value)}
    free: list[str] = []
    count = 0
    for i, (name, given, result) in enumerate(lines):
        # Operations on elements may write over what they read.
        values = (v for v in given if isinstance(v, Value))
        done = {v.name for v in values if v.name[0] == "T" and last[id(v)] == i}
        free += done if name in _ELEMENTWISE else ()
        if result.name[0] == "t":
            if not free:
                free.append(f"T{count}")
                count += 1
            result.name = free.pop()
        free += done if name not in _ELEMENTWISE else ()
    return count


@lru_cache
def _program(backend: str, cell: Cell, adjoint: bool, save: bool, bias: bool, given: int) -> tuple[Any, int]:
    """The loop over time, run(steps, arrays...), and how many temporaries those end with. Going forward the columns
    of `steps` are x, by gates if cell.split, the states after it and the activations, if they are wanted; the arrays
    W^T, b or None, r, its gates, and the states that it begins with. In the adjoint the columns are the activations,
    the states before and after, the gradients of those that are `given` (bits), dx if cell.split and dr, by gates, and
    dr; the arrays W, the gradients of the states, and their successors. It returns the last states or gradients."""
    library = import_module(backend)
    G, S, A = cell.gates, cell.states, cell.saved
    x, r, s, n, a, d, p = ([f"{c}{k}" for k in range(count)] for c, count in zip("xrsnadp", (G, G, S, S, A, S, S)))
    known = _ELEMENTWISE[: 6 if backend == "torch" else 5]
    if adjoint:
        lines, results = trace(cell.backward, (a, s, n, d), known)
        named = zip((*(x if cell.split else r), *r, *p), chain(*results))
    else:
        lines, results = trace(cell.forward, (x if cell.split else [""] * G, r, s), known)
        named = zip((*n, *(a if save else ())), chain(*results))
    alone = False
    for name, value in named:
        if name == "p0" and not isinstance(value, Value):
            alone = True
        elif not isinstance(value, Value) or (value.name[0] != "t" and value.name != name):
            lines.append(("copy", (value,), Value(lines, name)))
        else:
            value.name = name
    pool = _pooled(lines)
    body = [_words(backend, *line) for line in lines]
    if adjoint:
        columns = [*a, *s, *n, *(f"g{k}" for k in range(S) if given >> k & 1), *(x if cell.split else ()), *r, "dr"]
        body = [_words(backend, "add", (f"d{k}", f"g{k}"), f"d{k}") for k in range(S) if given >> k & 1] + body
        body += [f"d{k}, p{k} = p{k}, d{k}" for k in range(1, S)]
        product, term = ("dr", "w"), None if alone else "p0"
        others, out, names = ["w", *d, *p], "d0", d
    else:
        columns = [*(x if cell.split else ["x"]), *n, *(a if save else ())]
        product, term, out = ("s0", "w"), ("b" if bias else None) if cell.split else "x", "r"
        others, names = ["w", "b", "r", *r, *s], s
        body += [f"s{k} = n{k}" for k in range(S)]
    if term and backend == "torch":
        before = [f"addmm({term}, {', '.join(product)}, out={out})"]
    else:
        before = [_words(backend, "matmul", product, out)]
        before += [_words(backend, "add", (out, term), out)] if term else []
    body = body + before if adjoint else before + body
    others += [f"T{k}" for k in range(pool)]
    text = f"def run(steps, {', '.join(others)}):\n for {', '.join(columns)}, in steps:\n  "
    text += "\n  ".join(body) + f"\n return {', '.join(names)},"
    scope = dict(vars(library))
    exec(text, scope)  # straight-line Python: a loop over operations would cost as much as they do at small sizes
    return scope["run"], pool


class Windows:
    """All windows of a pass, the rows of which have `width` pre-activations, and where these rows are in memory."""

    def __init__(self, rows: Rows, width: int) -> None:
        count = rows.window(width)
        self.all: list[Window] = [(s, min(s + count, rows.steps)) for s in range(0, rows.steps, count)]
        self.steps, self.reverse = rows.steps, rows.reverse
        self.starts = [*accumulate(rows.sizes, initial=0)]

    def times(self, window: Window, n: int) -> Window:
        """Its steps in recurrence n, in the order of time."""
        first, last = window
        return (self.steps - last, self.steps - first) if self.reverse[n] else window

    def rows(self, window: Window, n: int) -> slice:
        first, last = self.times(window, n)
        return slice(self.starts[first], self.starts[last])

    def most(self) -> int:
        """Rows of a window."""
        spans = (self.rows(window, n) for window in self.all for n in range(len(self.reverse)))
        return max(span.stop - span.start for span in spans)


class _Borrowed:
    """A tensor for an array library. (`Tensor.numpy` would forbid its storage to be resized, as FSDP has to.)"""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.tensor.get_device()) if self.tensor.is_cuda else (1, 0)


class _Steps:
    """The steps of windows, recurrence after recurrence, in segments whose steps all have the same sequences and within
    which nothing is reset."""

    def __init__(self, cell: Cell, plan: Plan, rows: Rows, windows: Windows, s0: Tensor) -> None:
        self.backend, self.rows, self.windows, self.library = plan.backend, rows, windows, import_module(plan.backend)
        self.G, (_, self.B, self.H) = cell.gates, s0.shape
        self.resets = [] if rows.resets is None else rows.resets.any(1).tolist()
        (self.masks,) = self.take(rows.resets)
        sizes = rows.sizes
        self.edges = [t for t in range(1, rows.steps) if sizes[t] < sizes[t - 1] or (self.resets and self.resets[t])]

    def take(self, *tensors: Tensor | None, own: bool = False) -> list[Array]:
        """As arrays, to be written if they are our `own`."""
        if self.backend == "torch":
            return [*tensors]
        if own and self.backend == "numpy":
            return [t if t is None else t.numpy() for t in tensors]
        return [t if t is None else self.library.from_dlpack(_Borrowed(t)) for t in tensors]

    def empty(self, like: Array, *shape: int) -> Array:
        return like.new_empty(shape) if self.backend == "torch" else self.library.empty(shape, like.dtype)

    def segments(self, window: Window, n: int) -> list[Window]:
        """Their steps, in the order of time; they themselves in that of the recurrence."""
        lo, hi = self.windows.times(window, n)
        found = [*pairwise((lo, *(t for t in self.edges if lo < t < hi), hi))]
        return found[::-1] if self.rows.reverse[n] else found

    def columns(self, arrays: Iterable[Array], lo: int, hi: int, n: int | None = None, start: int = 0) -> list[Array]:
        """Of each [R, K] from row `start` on, or of recurrence n's units in it, the steps [hi - lo, sizes[lo], K]."""
        i, j = self.windows.starts[lo] - start, self.windows.starts[hi] - start
        parts = (array[i:j] if n is None else array[i:j, n * self.H : (n + 1) * self.H] for array in arrays)
        return [part.reshape((hi - lo, self.rows.sizes[lo], part.shape[1])) for part in parts]

    def gates(self, array: Array) -> list[Array]:
        """[..., G*H] by gates."""
        return [array[..., g * self.H : (g + 1) * self.H] for g in range(self.G)]

    def zipped(self, arrays: Sequence[Array], back: int) -> Any:
        """Step after step, in that order of time."""
        if self.backend == "torch":
            return zip(*(a.unbind(0)[::-1] if back else a.unbind(0) for a in arrays))
        return zip(*(a[::-1] if back else a for a in arrays))

    def cut(self, states: Iterable[Array], lo: int, hi: int, n: int) -> None:
        """Set to 0 what would cross the boundary at which a segment is entered, where that is a reset."""
        t = hi if self.rows.reverse[n] else lo
        if self.resets and t < self.rows.steps and self.resets[t]:
            size = self.rows.sizes[t]
            for s in states:
                s[:size][self.masks[t, :size]] = 0


def _working(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Working memory of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = working(like, sum(sizes))[: sum(sizes)].split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes)]


def forward(cell: Cell, plan: Plan, rows: Rows, inputs: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, s0: Tensor, y: Tensor, states: Tensor | None, saved: Tensor | None,
            last: Tensor) -> None:
    """Fills y, `last`, and if given states and saved."""
    N, (_, B, H), G, S, here = len(rows.reverse), s0.shape, cell.gates, cell.states, cell.gates == 1 and not cell.split
    windows = Windows(rows, N * G * H)
    most = windows.most()
    # The pre-activations of one gate have the place of y; else that of a window.
    gates = y if here else _working(y, (N, most, G * H))[0]
    last.copy_(s0)
    if b_hh is not None and b_ih is not None and not cell.split:
        b_ih, b_hh = b_ih + b_hh, None
    run, pool = _program(plan.backend, cell, False, saved is not None, b_hh is not None, 0)
    by = _Steps(cell, plan, rows, windows, last)
    (w, b), (x, s, h, c, a) = by.take(w_hh, b_hh), by.take(gates, last, y, states, saved, own=True)
    r, temporaries = by.empty(h, B, G * H), by.empty(h, pool, B, H)
    others = by.empty(h, S - 1, most if S > 1 else 0, H) if c is None else c  # of a window, if not kept
    for window in windows.all:
        for n, (weight, bias) in enumerate(zip(w_ih.chunk(N), parts(b_ih, N))):
            span, own = windows.rows(window, n), slice(n * G * H, (n + 1) * G * H)
            out, given = gates[span, n * H : (n + 1) * H] if here else gates[n, : span.stop - span.start], inputs[span]
            torch.mm(given, weight.T, out=out) if bias is None else torch.addmm(bias, given, weight.T, out=out)
            for lo, hi in by.segments(window, n):
                size = rows.sizes[lo]
                now = [z[:size] for z in s[n * S : (n + 1) * S]]
                by.cut(now, lo, hi, n)
                (xs,) = by.columns([x], lo, hi, n) if here else by.columns([x[n]], lo, hi, start=span.start)
                every = [*(by.gates(xs) if cell.split else [xs]), *by.columns([h], lo, hi, n)]
                every += by.columns(others, lo, hi, *((None, span.start) if c is None else (n,)))
                every += [] if a is None else by.columns(a, lo, hi, n)
                found = run(by.zipped(every, rows.reverse[n]), w[own].T, b if b is None else b[own], r[:size],
                            *by.gates(r[:size]), *now, *(z[:size] for z in temporaries))
                for to, value in zip(now, found):
                    to[...] = value


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             dlast: Tensor | None, ds: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Fills ds [N*S, B, H] and those of `grads` that there are, or with more than one recurrence adds to the first."""
    N, G, H = len(rows.reverse), cell.gates, s0.shape[2]
    windows = Windows(rows, N * G * H)
    most = windows.most()
    dr, came, *rest = _working(y, (N, most, G * H), (N, most, H), *([(N, most, G * H)] if cell.split else []))
    dx = rest[0] if rest else dr
    for grad, value in ((ds, dlast), *((grad, None) for grad in grads[1:])):
        if grad is not None:
            grad.zero_() if value is None else grad.copy_(value)
    steps = _adjoint(cell, plan, rows, windows, w_hh, s0, y, states, saved, dy, dstates, ds, dx, dr, came)
    for window in reversed(windows.all):
        for n, (w, *own) in enumerate(zip(parts(w_ih, N), *(parts(g, N) for g in grads[1:]))):
            steps(window, n)
            span = windows.rows(window, n)
            d, e, h = (t[n, : span.stop - span.start] for t in (dx, dr, came))
            if grads[0] is not None:
                torch.mm(d, w, out=grads[0][span]) if N == 1 else grads[0][span].addmm_(d, w)
            for grad, left, right in zip(own, (d, e, d, e), (x[span], h, None, None)):
                if grad is not None:
                    grad.add_(left.sum(0)) if right is None else grad.addmm_(left.T, right)


def _adjoint(cell: Cell, plan: Plan, rows: Rows, windows: Windows, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None, ds: Tensor,
             dx: Tensor, dr: Tensor, came: Tensor) -> Callable[[Window, int], None]:
    """The adjoint of the steps of a window, in recurrence n. dx and dr [N, rows, G*H], one array unless cell.split, and
    came [N, rows, H], the h that came in, are for a window."""
    S, GH = cell.states, cell.gates * s0.shape[2]
    given = (dy is not None) + sum(2 << k for k in range(S - 1) if dstates is not None)
    run, pool = _program(plan.backend, cell, True, True, False, given)
    by = _Steps(cell, plan, rows, windows, ds)
    (w, first, a), (d, dx, dr, came) = by.take(w_hh, s0, saved), by.take(ds, dx, dr, came, own=True)
    kept, grads = ([*by.take(h), *by.take(*(() if c is None else c))] for h, c in ((y, states), (dy, dstates)))
    grads = [z for z in grads if z is not None]
    p, temporaries, others = (by.empty(w, count, size, by.H) for count, size in
                              ((S, by.B), (pool, by.B), (S - 1, came.shape[1])))

    def steps(window: Window, n: int) -> None:
        start, back, own = windows.rows(window, n).start, rows.reverse[n], slice(n * by.H, (n + 1) * by.H)
        edge, inner, shifted = (-1, slice(None, -1), slice(1, None)) if back else (0, slice(1, None), slice(None, -1))
        for lo, hi in reversed(by.segments(window, n)):
            size, before = rows.sizes[lo], hi if back else lo - 1
            ran = min(size, rows.sizes[before]) if 0 <= before < rows.steps else 0
            i = windows.starts[before] if ran else 0
            after, enters = by.columns(kept, lo, hi, n), by.columns((came[n], *others), lo, hi, start=start)
            for z, entered, later, s in zip(kept, enters, after, first[n * S :]):
                entered[inner] = later[shifted]
                entered[edge, :ran] = z[i : i + ran, own]
                entered[edge, ran:] = s[ran:size]
            by.cut((z[edge] for z in enters), lo, hi, n)
            rs, *xs = by.columns((dr[n], *([dx[n]] if cell.split else [])), lo, hi, start=start)
            every = [*([] if a is None else by.columns(a, lo, hi, n)), *enters, *after, *by.columns(grads, lo, hi, n)]
            every += [gate for z in (*xs, rs) for gate in by.gates(z)]
            now = [z[:size] for z in d[n * S : (n + 1) * S]]
            found = run(by.zipped([*every, rs], not back), w[n * GH : (n + 1) * GH], *now,
                        *(z[:size] for z in (*p, *temporaries)))
            for to, value in zip(now[1:], found[1:]):
                to[...] = value
            by.cut(now, lo, hi, n)

    return steps
