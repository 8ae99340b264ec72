"""The recurrence as array operations, step after step, in NumPy or CuPy; the plan "torch" has torch do the products of
the steps, with its threads and the faster library, in the same memory."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import Cell
from .host import parts, working
from .plan import Plan, Rows
from .trace import Line, Value, trace

Array = Any
Window = tuple[int, int]  # its first step and the one after its last, in the order of the recurrence
_ELEMENTWISE = ("add", "subtract", "multiply", "divide", "tanh")
# {0} and {1} are arguments, {2} is where the result goes.
_WORDS = dict(copy="{2}[...] = {0}", relu="maximum({0}, 0, out={2})",
              relu_grad="copyto({2}, 0), copyto({2}, {0}, where=~({1} <= 0))")


def _words(line: Line) -> str:
    name, given, result = line
    word = _WORDS.get(name, f"{name}({', '.join(map(str, given))}, {{2}})")
    return word.format(*given, *[0] * (2 - len(given)), result)


def _pooled(lines: Sequence[Line], letter: str) -> int:
    """Give temporaries, t0, t1..., that are not needed at the same time one name: T0, T1... The number of names."""
    last = {id(value): i for i, (_, given, _) in enumerate(lines) for value in given if isinstance(value, Value)}
    free: list[str] = []
    count = 0
    for i, (name, given, result) in enumerate(lines):
        # Operations on elements may write over what they read.
        values = (v for v in given if isinstance(v, Value))
        done = {v.name for v in values if v.name[0] == letter and last[id(v)] == i}
        free += done if name in _ELEMENTWISE else ()
        if result.name[0] == "t":
            if not free:
                free.append(f"{letter}{count}")
                count += 1
            result.name = free.pop()
        free += done if name not in _ELEMENTWISE else ()
    return count


class _Program(NamedTuple):
    """`before` is done for all steps of a segment at once, `run` step after step; and the names of what they are given,
    `run` of the columns of steps, and of what is the same at all steps. NAME_ is a tensor that shares NAME's memory.
    Going forward x and r are pre-activations, n and s the states after and before, a the activations, b and w bias and
    W^T. In the adjoint w is W, d the gradient of n, p that of s, g what is given of d, x and r gradients, h what does
    not depend on d. `run` returns the last states or gradients."""

    before: Any
    whole: Sequence[str]
    run: Any
    columns: Sequence[str]
    others: Sequence[str]
    early: int  # how many h, E, which are temporaries of `before`, and T, those of `run`
    spare: int
    pool: int


def _function(library: Any, heading: str, body: Sequence[str], last: str = "") -> Any:
    """Straight-line Python: a loop over operations would cost as much as they do at small sizes."""
    scope = dict(vars(library), mm=torch.mm, addmm=torch.addmm)
    exec("\n  ".join((heading, *body, "pass")) + last, scope)
    return scope["run"]


@lru_cache
def _program(backend: str, cell: Cell, adjoint: bool, save: bool, bias: bool, given: int) -> _Program:
    twin, G, S, A = "_" if backend == "torch" else "", cell.gates, cell.states, cell.saved
    x, r, s, n, a, d, p = ([f"{c}{k}" for k in range(count)] for c, count in zip("xrsnadp", (G, G, S, S, A, S, S)))
    if adjoint:
        lines, results = trace(cell.backward, (a, s, n, d), _ELEMENTWISE)
        named = [*zip((*(x if cell.split else r), *r, *p), chain(*results))]
    else:
        lines, results = trace(cell.forward, (x if cell.split else [""] * G, r, s), _ELEMENTWISE)
        named = [*zip((*n, *(a if save else ())), chain(*results))]
    late: set[int] = set()  # what has to wait for the step
    for _, arguments, result in lines:
        if not adjoint or any(isinstance(v, Value) and (v.name in d or id(v) in late) for v in arguments):
            late.add(id(result))
    alone = False
    for name, value in named:
        if name == "p0" and not isinstance(value, Value):
            alone = True
        elif not isinstance(value, Value) or id(value) not in late or (value.name[0] != "t" and value.name != name):
            lines.append(("copy", (value,), Value(lines, name)))
            late.add(id(lines[-1][2]))
        else:
            value.name = name
    early, lines = ([line for line in lines if (id(line[2]) in late) == which] for which in (False, True))
    used = {id(v): v for _, arguments, _ in lines for v in arguments if isinstance(v, Value)}
    h = [v for v in (result for _, _, result in early) if id(v) in used]
    for k, value in enumerate(h):
        value.name = f"h{k}"
    read = sorted({v.name for v in used.values() if v.name[0] in "asn"} if adjoint else ())
    pools = _pooled(early, "E"), _pooled(lines, "T")
    body, temporaries = [*map(_words, lines)], [f"T{k}" for k in range(pools[1])]
    if adjoint:
        g = [f"g{k}" for k in range(S) if given >> k & 1]
        columns = [*read, *(v.name for v in h), *g, *(x if cell.split else ()), *r, "dr" + twin]
        body = [f"add(d{v[1:]}, {v}, d{v[1:]})" for v in g] + body
        body += [f"d{k}, p{k} = p{k}, d{k}" for k in range(1, S)]
        product, term, out = f"dr{twin}, w", "" if alone else "p0", "d0"
        others, names = ["w", *d, *p, *temporaries, *(v + twin for v in ("d0", "p0") if twin)], d
    else:
        columns = [*(x if cell.split else ["x"]), *n, *(a if save else ()), *(("n0_",) if twin else ())]
        columns += ["x_"] if twin and not cell.split else []
        product, term, out = f"s0{twin}, w", ("b" if bias else "") if cell.split else "x", "r"
        others, names = ["w", "b", "r", *r, *s, *temporaries, *(("r_", "s0_") if twin else ())], s
        body += [f"s{k} = n{k}" for k in range(S)] + (["s0_ = n0_"] if twin else [])
    if twin:
        term += "_" if term not in ("", "b") else ""
        before = [f"addmm({term}, {product}, out={out}_)" if term else f"mm({product}, out={out}_)"]
    else:
        before = [f"matmul({product}, {out})", *([f"add({out}, {term}, {out})"] if term else [])]
    body = body + before if adjoint else before + body
    library = import_module("cupy" if backend == "cupy" else "numpy")
    run = _function(library, f"def run(steps, {', '.join(others)}):\n for {', '.join(columns)}, in steps:", body,
                    f"\n return {', '.join(names)},")
    whole = [*a, *s, *n, *(v.name for v in h), *(f"E{k}" for k in range(pools[0]))] if adjoint else []
    ahead = _function(library, f"def run({', '.join(whole)}):", [*map(_words, early)])
    return _Program(ahead, whole, run, columns, others, len(h), *pools)


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

    def __init__(self, plan: Plan, rows: Rows, windows: Windows, H: int) -> None:
        self.backend, self.rows, self.windows, self.H = plan.backend, rows, windows, H
        self.library = import_module("cupy" if plan.backend == "cupy" else "numpy")
        self.resets = [] if rows.resets is None else rows.resets.any(1).tolist()
        (self.masks,) = self.take(rows.resets)
        sizes = rows.sizes
        self.edges = [t for t in range(1, rows.steps) if sizes[t] < sizes[t - 1] or (self.resets and self.resets[t])]

    def take(self, *tensors: Tensor | None, own: bool = False) -> list[Array]:
        """As arrays, to be written if they are our `own`."""
        if own and self.backend != "cupy":
            return [t if t is None else t.numpy() for t in tensors]
        return [t if t is None else self.library.from_dlpack(_Borrowed(t)) for t in tensors]

    def empty(self, like: Array, *shape: int) -> Array:
        return self.library.empty(shape, like.dtype)

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

    def gates(self, array: Array, G: int) -> list[Array]:
        """[..., G*H] by gates."""
        return [array[..., g * self.H : (g + 1) * self.H] for g in range(G)]

    def factor(self, t: Tensor) -> Any:
        """As the products take it."""
        return t if self.backend == "torch" else self.take(t)[0]

    def run(self, program: _Program, table: dict[str, Any], back: int) -> Any:
        """The steps of a segment, in that order of time, with what `table` has by name."""
        columns = (table[name] if name in table else torch.from_numpy(table[name[:-1]]).unbind(0)
                   for name in program.columns)
        others = (table[name] if name in table else torch.from_numpy(table[name[:-1]]) for name in program.others)
        return program.run(zip(*(column[::-1] if back else column for column in columns)), *others)

    def cut(self, states: Iterable[Array], lo: int, hi: int, n: int) -> None:
        """Set to 0 what would cross the boundary at which a segment is entered, where that is a reset."""
        t = hi if self.rows.reverse[n] else lo
        if self.resets and t < self.rows.steps and self.resets[t]:
            size = self.rows.sizes[t]
            for s in states:
                s[:size][self.masks[t, :size]] = 0


def _named(groups: dict[str, Sequence[Array]], **others: Any) -> dict[str, Any]:
    """`others`, and the members of each group with their number."""
    return others | {f"{name}{k}": array for name, group in groups.items() for k, array in enumerate(group)}


def _working(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Working memory of these shapes."""
    ends = [*accumulate(map(math.prod, shapes), initial=0)]
    memory = working(like, ends[-1])
    return [memory.narrow(0, lo, hi - lo).view(shape) for (lo, hi), shape in zip(pairwise(ends), shapes)]


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
    program = _program(plan.backend, cell, False, saved is not None, b_hh is not None, 0)
    by = _Steps(plan, rows, windows, H)
    x, s, h, c, a = by.take(gates, last, y, states, saved, own=True)
    # NumPy's product is up to twice as fast if W^T lies in order, which costs as much as one of some rows.
    ordered = plan.backend == "numpy" and B >= 8
    factors = [(by.factor(w.t().contiguous() if ordered else w.t()), b if b is None else by.factor(b))
               for w, b in zip(parts(w_hh, N), parts(b_hh, N))]
    r, pool = by.empty(h, B, G * H), by.empty(h, program.pool, B, H)
    others = by.empty(h, S - 1, most if S > 1 else 0, H) if c is None else c  # of a window, if not kept
    for window in windows.all:
        for n, (weight, bias, (w, b)) in enumerate(zip(parts(w_ih, N), parts(b_ih, N), factors)):
            span = windows.rows(window, n)
            first, count = span.start, span.stop - span.start
            out = gates.narrow(0, first, count).narrow(1, n * H, H) if here else gates[n].narrow(0, 0, count)
            product = inputs.narrow(0, first, count), weight.t()
            torch.mm(*product, out=out) if bias is None else torch.addmm(bias, *product, out=out)
            for lo, hi in by.segments(window, n):
                size = rows.sizes[lo]
                now = [z[:size] for z in s[n * S : (n + 1) * S]]
                by.cut(now, lo, hi, n)
                (xs,) = by.columns([x], lo, hi, n) if here else by.columns([x[n]], lo, hi, start=first)
                after = by.columns([h], lo, hi, n)
                after += by.columns(others, lo, hi, *((None, first) if c is None else (n,)))
                arrays = dict(x=by.gates(xs, G), r=by.gates(r[:size], G), s=now, n=after, T=pool[:, :size],
                              a=() if a is None else by.columns(a, lo, hi, n))
                found = by.run(program, _named(arrays, w=w, b=b, x=xs, r=r[:size]), rows.reverse[n])
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
    ds.zero_() if dlast is None else ds.copy_(dlast)
    steps = _adjoint(cell, plan, rows, windows, w_hh, s0, y, states, saved, dy, dstates, ds, dx, dr, came)
    for window in reversed(windows.all):
        for n, (w, *own) in enumerate(zip(parts(w_ih, N), *(parts(g, N) for g in grads[1:]))):
            steps(window, n)
            span, more = windows.rows(window, n), window[1] < rows.steps
            place = 0, span.start, span.stop - span.start
            d, e, h = (t[n].narrow(0, 0, place[2]) for t in (dx, dr, came))
            if grads[0] is not None:
                out = grads[0].narrow(*place)
                torch.mm(d, w, out=out) if N == 1 else out.addmm_(d, w)
            for grad, left, right in zip(own, (d, e, d, e), (x.narrow(*place), h, None, None)):
                if grad is not None and right is not None:
                    grad.addmm_(left.t(), right) if more else torch.mm(left.t(), right, out=grad)
                elif grad is not None:
                    grad.add_(left.sum(0)) if more else torch.sum(left, 0, out=grad)


def _adjoint(cell: Cell, plan: Plan, rows: Rows, windows: Windows, w_hh: Tensor, s0: Tensor, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None, ds: Tensor,
             dx: Tensor, dr: Tensor, came: Tensor) -> Callable[[Window, int], None]:
    """The adjoint of the steps of a window, in recurrence n. dx and dr [N, rows, G*H], one array unless cell.split, and
    came [N, rows, H], the h that came in, are for a window."""
    S, G, H = cell.states, cell.gates, s0.shape[2]
    given = [dy is not None, *[dstates is not None] * (S - 1)]
    program = _program(plan.backend, cell, True, True, False, sum(there << k for k, there in enumerate(given)))
    by = _Steps(plan, rows, windows, H)
    w = [by.factor(part) for part in parts(w_hh, len(dr))]
    (first, a), (d, dx, dr, came) = by.take(s0, saved), by.take(ds, dx, dr, came, own=True)
    kept, grads = ([*by.take(h), *by.take(*([None] * (S - 1) if c is None else c))]
                   for h, c in ((y, states), (dy, dstates)))
    p, pool = (by.empty(d, count, rows.sizes[0], H) for count in (S, program.pool))
    others, early, spare = (by.empty(d, count, came.shape[1], H) for count in (S - 1, program.early, program.spare))

    def steps(window: Window, n: int) -> None:
        start, back, own = windows.rows(window, n).start, rows.reverse[n], slice(n * H, (n + 1) * H)
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
            rs, xs = by.columns((dr[n], dx[n]), lo, hi, start=start)
            now = [z[:size] for z in d[n * S : (n + 1) * S]]
            arrays = dict(a=() if a is None else by.columns(a, lo, hi, n), s=enters, n=after, d=now, p=p[:, :size],
                          x=by.gates(xs, G), r=by.gates(rs, G), T=pool[:, :size],
                          h=by.columns(early, lo, hi, start=start), E=by.columns(spare, lo, hi, start=start),
                          g=[t if t is None else by.columns([t], lo, hi, n)[0] for t in grads])
            table = _named(arrays, w=w[n], dr=rs)
            program.before(*(table[name] for name in program.whole))
            found = by.run(program, table, not back)
            for to, value in zip(now[1:], found[1:]):
                to[...] = value
            by.cut(now, lo, hi, n)

    return steps
