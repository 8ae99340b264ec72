"""The recurrence as array operations, step after step, in NumPy or CuPy; the plan "torch" has torch do the products of
the steps, with its threads and the faster library, in the same memory."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cells import Cell
from ..plan import ONEDNN_STEP, ONEDNN_WINDOW, WINDOW, Plan, Rows
from ..states import join_states
from . import States, parts
from .program import Program, library, program
from .workspace import scratch

Array = Any
# oneDNN's x w^T + b, of torch's compiler: half the time of MKL's where that does not know a processor's wide vectors.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkl.is_available() else None
_PART, _ROWS = 2**17, (256, 512)  # numbers, and least and most rows, of what it returns at once
Window = tuple[int, int]  # its first step and the one after its last, in the order of the recurrence


class _Borrowed:
    """A tensor for an array library. (`Tensor.numpy` would forbid its storage to be resized, as FSDP has to.)"""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.tensor.get_device()) if self.tensor.is_cuda else (1, 0)


class _Owned:
    """A contiguous tensor of ours for NumPy, to be written. (`Tensor.numpy` would forbid its storage to be resized.)"""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__array_interface__ = dict(version=3, shape=tuple(tensor.shape), typestr=f"=f{tensor.itemsize}",
                                        data=(tensor.data_ptr(), False))


def _writable(tensor: Tensor) -> Array:
    if not tensor.numel():  # NumPy 2.0 does not take a null pointer
        return np.empty(tuple(tensor.shape), f"f{tensor.itemsize}")
    return np.asarray(_Owned(tensor))


class Steps:
    """The steps of a pass, `width` pre-activations in each row: windows of them, and in these, recurrence after
    recurrence, segments whose steps all have the same sequences and within which nothing is reset."""

    def __init__(self, plan: Plan, rows: Rows, H: int, width: int) -> None:
        self.backend, self.rows, self.H, self.library = plan.backend, rows, H, library(plan.backend)
        count, sizes, B = rows.window(width), rows.sizes, rows.sizes[0]
        self.windows: list[Window] = [(s, min(s + count, rows.steps)) for s in range(0, rows.steps, count)]
        even = sizes[-1] == B > 0
        self.starts = range(0, rows.steps * B + 1, B) if even else [*accumulate(sizes, initial=0)]  # of the steps
        self.most = min(self.starts[-1], self.windows[0][1] * B)  # rows of a window
        self.resets = [] if rows.resets is None else rows.resets.any(1).tolist()
        (self.masks,) = self.take(rows.resets)
        ends = () if even and not self.resets else range(1, rows.steps)
        self.edges = [t for t in ends if sizes[t] < sizes[t - 1] or (self.resets and self.resets[t])]

    def times(self, window: Window, n: int) -> Window:
        """Its steps in recurrence n, in the order of time."""
        first, last = window
        return (self.rows.steps - last, self.rows.steps - first) if self.rows.reverse[n] else window

    def span(self, window: Window, n: int) -> Window:
        """Its first row in recurrence n, and how many it has."""
        first, last = self.times(window, n)
        return self.starts[first], self.starts[last] - self.starts[first]

    def take(self, *tensors: Tensor | None, own: bool = False) -> list[Array]:
        """As arrays, to be written if they are our `own`."""
        if own and self.backend != "cupy":
            return [t if t is None else _writable(t) for t in tensors]
        try:
            return [t if t is None else self.library.from_dlpack(_Borrowed(t)) for t in tensors]
        except TypeError as error:  # CuPy's, of a tensor on the CPU
            raise RuntimeError(f'The plan "{self.backend}" cannot take these tensors: {error}') from error

    def tensor(self, array: Array) -> Tensor:
        return torch.from_dlpack(array) if self.backend == "cupy" else torch.from_numpy(array)

    def working(self, like: Tensor, *shapes: Sequence[int]) -> list[Array]:
        """Working memory of these shapes. It is kept for the next call where the first touch of it takes long."""
        ends = [*accumulate(map(math.prod, shapes), initial=0)]
        self.memory = like.new_empty(ends[-1]) if ends[-1] < WINDOW else scratch(like, ends[-1])  # held while in use
        (array,) = self.take(self.memory, own=True)
        return [array[lo:hi].reshape(shape) for (lo, hi), shape in zip(pairwise(ends), shapes)]

    def segments(self, window: Window, n: int) -> list[Window]:
        """Their steps, in the order of time; they themselves in that of the recurrence."""
        lo, hi = self.times(window, n)
        found = [*pairwise((lo, *(t for t in self.edges if lo < t < hi), hi))]
        return found[::-1] if self.rows.reverse[n] else found

    def columns(self, arrays: Iterable[Array], lo: int, hi: int, n: int | None = None, start: int = 0) -> list[Array]:
        """Of each [R, K] from row `start` on, or of recurrence n's units in it, the steps [hi - lo, sizes[lo], K]."""
        i, j = self.starts[lo] - start, self.starts[hi] - start
        found = (array[i:j] if n is None else array[i:j, n * self.H : (n + 1) * self.H] for array in arrays)
        return [array.reshape((hi - lo, self.rows.sizes[lo], array.shape[1])) for array in found]

    def gates(self, array: Array, G: int) -> list[Array]:
        """[..., G*H] by gates."""
        return [array[..., g * self.H : (g + 1) * self.H] for g in range(G)]

    def factor(self, t: Tensor) -> Any:
        """As the products take it."""
        return t if self.backend == "torch" else self.take(t)[0]

    def run(self, loop: Program, table: dict[str, Any], back: int) -> Any:
        """The steps of a segment, in that order of time, with what `table` has by name."""
        if self.backend == "torch":
            table["product"] = _onednns if _wide(table["n0"].shape[1], table["w"], ONEDNN_STEP) else _torchs
        columns = (table[name] if name in table else self.tensor(table[name[:-1]]).unbind(0) for name in loop.columns)
        others = (table[name] if name in table else self.tensor(table[name[:-1]]) for name in loop.others)
        return loop.run(zip(*(column[::-1] if back else column for column in columns)), *others)

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


def _wide(rows: int, w: Tensor, least: tuple[int, int]) -> bool:
    """Whether a product of so many rows and w is no smaller than `least`, and one for oneDNN."""
    K, M = w.shape
    return (least[0] <= rows * K * M and least[1] <= min(K, M) and _LINEAR is not None and w.dtype == torch.float32
            and w.is_cpu and torch._C._get_mkldnn_enabled())


def _torchs(a: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """out = a w + bias, or out += a w."""
    out.addmm_(a, w) if add else torch.mm(a, w, out=out) if bias is None else torch.addmm(bias, a, w, out=out)


def _onednns(a: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    rows = min(_ROWS[1], max(_ROWS[0], _PART // w.shape[1]))
    for part, to in zip(a.split(rows), out.split(rows)):
        (to.add_ if add else to.copy_)(_LINEAR(part, w.t(), bias, "none", [], ""))


def _product(a: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """That of a window."""
    (_onednns if a.stride(1) == 1 and _wide(len(a), w, ONEDNN_WINDOW) else _torchs)(a, w, out, bias, add)


def _turned(a: Tensor, w: Tensor, memory: Tensor) -> Tensor:
    """a^T for a product with w: a copy in `memory` where that makes it one for oneDNN."""
    return memory[: a.numel()].view(a.mT.shape).copy_(a.mT) if _wide(a.shape[1], w, ONEDNN_WINDOW) else a.mT


def forward(cell: Cell, plan: Plan, rows: Rows, inputs: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, first: States, y: Tensor, states: Tensor | None, saved: Tensor | None,
            ends: list[Tensor]) -> None:
    """Fills y, `ends`, the last states, and if given states and saved."""
    N, B, H, G, S = len(rows.reverse), rows.sequences, w_hh.shape[1], cell.gates, cell.states
    by = Steps(plan, rows, H, N * G * H)
    last = inputs.new_zeros((N * S, B, H))
    for k, state in enumerate(first or ()):
        last[k::S] = state
    if b_hh is not None and b_ih is not None and not cell.split:
        b_ih, b_hh = b_ih + b_hh, None
    loop = program(plan.backend, cell, False, saved is not None, b_hh is not None, ())
    s, h, c, a = by.take(last, y, states, saved, own=True)
    # The pre-activations of a window, and of its steps the other states, if they are not kept.
    x, r, pool, others = by.working(y, (0 if loop.in_place else N, by.most, G * H), (B, G * H), (loop.pool, B, H),
                                    (S - 1 if c is None else 0, by.most, H))
    # NumPy's product is up to twice as fast if W^T lies in order, which costs as much as one of some rows.
    ordered = plan.backend == "numpy" and B >= 8
    factors = [(by.factor(w.t().contiguous()) if ordered else by.factor(w).T, b if b is None else by.factor(b))
               for w, b in zip(parts(w_hh, N), parts(b_hh, N))]
    for window in by.windows:
        for n, (weight, bias, (w, b)) in enumerate(zip(parts(w_ih, N), parts(b_ih, N), factors)):
            start, count = by.span(window, n)
            place = h[start : start + count, n * H : (n + 1) * H] if loop.in_place else x[n, :count]
            _product(inputs.narrow(0, start, count), weight.t(), by.tensor(place), bias)
            for lo, hi in by.segments(window, n):
                size = rows.sizes[lo]
                now = [z[:size] for z in s[n * S : (n + 1) * S]]
                by.cut(now, lo, hi, n)
                after = by.columns([h], lo, hi, n)
                xs = after[0] if loop.in_place else by.columns([x[n]], lo, hi, start=start)[0]
                after += by.columns(others, lo, hi, start=start) if c is None else by.columns(c, lo, hi, n)
                arrays = dict(x=by.gates(xs, G), r=by.gates(r[:size], G), s=now, n=after, T=pool[:, :size],
                              a=() if a is None else by.columns(a, lo, hi, n))
                for to, value in zip(now, by.run(loop, _named(arrays, w=w, b=b, x=xs, r=r[:size]), rows.reverse[n])):
                    to[...] = value
    for k, end in enumerate(ends):
        end.copy_(last[k::S])


def backward(cell: Cell, plan: Plan, rows: Rows, x: Tensor, w_ih: Tensor, w_hh: Tensor, states0: States, y: Tensor,
             states: Tensor | None, saved: Tensor | None, dy: Tensor | None, dstates: Tensor | None,
             dlast: Sequence[Tensor | None] | None, dfirst: Sequence[Tensor] | None,
             grads: Sequence[Tensor | None]) -> None:
    """Fills `dfirst`, the gradients of the first states if they are wanted, and those of `grads` that there are, or
    with more than one recurrence adds to the first."""
    N, G, S, H = len(rows.reverse), cell.gates, cell.states, w_hh.shape[1]
    shape = N * S, rows.sequences, H
    s0 = x.new_zeros(shape) if states0 is None else join_states(states0, N)
    ds = x.new_zeros(shape)
    for k, given in enumerate(dlast or ()):
        if given is not None:
            ds[k::S] = given
    by = Steps(plan, rows, H, N * G * H)
    loop = program(plan.backend, cell, True, True, False, (dy is not None, *[dstates is not None] * (S - 1)))
    # For a window: the gradients of x and r, one array unless cell.split, the h and the other states that came into its
    # steps, and temporaries, of which the early ones have room for what `_turned` makes. And those of a step.
    *both, came, others, early, spare, p, pool = by.working(
        y, *[(N, by.most, G * H)] * (1 + cell.split), *((count, by.most, H) for count in (
            N, S - 1, max(loop.early, G), loop.spare)), *((count, rows.sizes[0], H) for count in (S, loop.pool)))
    dx, dr = both[0], both[-1]
    (first, a), (d,) = by.take(s0, saved), by.take(ds, own=True)
    kept, wanted = ([*by.take(h), *by.take(*([None] * (S - 1) if c is None else c))]
                    for h, c in ((y, states), (dy, dstates)))
    own = [*zip(parts(w_ih, N), map(by.factor, parts(w_hh, N)), zip(*(parts(grad, N) for grad in grads[1:])))]
    for window in reversed(by.windows):
        for n, (weight, w, sums) in enumerate(own):
            (start, count), back, units = by.span(window, n), rows.reverse[n], slice(n * H, (n + 1) * H)
            edge, inner, shifted = (-1, slice(-1), slice(1, None)) if back else (0, slice(1, None), slice(-1))
            for lo, hi in reversed(by.segments(window, n)):
                size, before = rows.sizes[lo], hi if back else lo - 1
                ran = min(size, rows.sizes[before]) if 0 <= before < rows.steps else 0
                i = by.starts[before] if ran else 0
                after, enters = by.columns(kept, lo, hi, n), by.columns((came[n], *others), lo, hi, start=start)
                for z, entered, later, s in zip(kept, enters, after, first[n * S :]):
                    entered[inner] = later[shifted]
                    entered[edge, :ran] = z[i : i + ran, units]
                    entered[edge, ran:] = s[ran:size]
                by.cut((z[edge] for z in enters), lo, hi, n)
                h, free, (rs,), (xs,) = (by.columns(z, lo, hi, start=start) for z in (early, spare, [dr[n]], [dx[n]]))
                now = [z[:size] for z in d[n * S : (n + 1) * S]]
                arrays = dict(a=() if a is None else by.columns(a, lo, hi, n), s=enters, n=after, d=now, p=p[:, :size],
                              x=by.gates(xs, G), r=by.gates(rs, G), T=pool[:, :size], h=h, E=free,
                              g=[t if t is None else by.columns([t], lo, hi, n)[0] for t in wanted])
                table = _named(arrays, w=w, dr=rs)
                loop.before(*(table[name] for name in loop.whole))
                for to, value in zip(now, by.run(loop, table, not back)):
                    to[...] = value
                by.cut(now, lo, hi, n)
            more, last, h_rows = window[1] < rows.steps, None, by.tensor(came[n, :count])
            if grads[0] is not None:
                _product(by.tensor(dx[n, :count]), weight, grads[0].narrow(0, start, count), add=N > 1)
            for z, r, dw, db in ((dx, x.narrow(0, start, count), sums[0], sums[2]), (dr, h_rows, sums[1], sums[3])):
                l = by.tensor(z[n, :count])
                if dw is not None:
                    if z is not last:
                        left, last = _turned(l, h_rows, by.tensor(early).view(-1)), z
                    _product(left, r, dw, add=more)
                if db is not None:
                    db.add_(l.sum(0)) if more else torch.sum(l, 0, out=db)
    for k, to in enumerate(dfirst or ()):
        to.copy_(ds[k::S])
