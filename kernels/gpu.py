"""The recurrence in Triton: one forward and one backward body for every cell and every scope of the step barrier.
Hidden units are the rows of a tile and sequences its columns, so that 8 sequences already fill the matrix unit. Time
loops are `while`: a `for` sinks the resident W_hh into shared memory and reads it again at every step. State 0 is an
operand of the product: in block scope it stays in registers, else programs pass it on through memory."""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import Cell, bind
from .plan import Plan, Rows, power_of_2
from .replay import can_replay, replay


@triton.jit
def _tanh(x):
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.06, series, 1 - 2 / (tl.exp(2 * x) + 1))  # the quotient cancels near 0


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu_grad(d, y):
    return tl.where(y <= 0, 0.0, d)


@lru_cache
def functions(cell: Cell) -> tuple[Any, Any]:
    """The cell's forward and backward as Triton functions, which the kernels take as arguments."""
    names = dict(tl=tl, sigmoid=tl.sigmoid, tanh=_tanh, relu=_relu, relu_grad=_relu_grad, zeros_like=tl.zeros_like)
    return triton.jit(bind(cell.forward, **names)), triton.jit(bind(cell.backward, **names))


@triton.jit
def _load(ptr, pitch, offsets, mask, start, N: tl.constexpr):
    """start + N tiles in float32, where no pointer and no start mean 0."""
    out = ()
    for k in tl.static_range(N):
        tile = tl.zeros(offsets.shape, tl.float32) if start is None else start[k]
        if ptr is not None:
            tile += tl.load(ptr + k * pitch + offsets, mask=mask, other=0.0).to(tl.float32)
        out = out + (tile,)
    return out


@triton.jit
def _store(ptr, pitch, offsets, values, mask, N: tl.constexpr):
    for k in tl.static_range(N):
        tl.store(ptr + k * pitch + offsets, values[k].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _where(mask, a, b, N: tl.constexpr):
    """No b means 0."""
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.where(mask, a[k], 0.0 if b is None else b[k]),)
    return out


@triton.jit
def _matrix(ptr, row_pitch, column_pitch, o_row, o_column, m_row, m_column, CACHE: tl.constexpr):
    offsets = o_row[:, None] * row_pitch + o_column[None, :] * column_pitch
    return tl.load(ptr + offsets, mask=m_row[:, None] & m_column[None, :], other=0.0, cache_modifier=CACHE)


@triton.jit
def _matrices(w, pitch, row_pitch, column_pitch, o_row, k0, m_row, K, BK: tl.constexpr, KT: tl.constexpr,
              G: tl.constexpr):
    """Tiles of all gates' weights: G times KT of BK columns each, from column k0."""
    out = ()
    for i in tl.static_range(G * KT):
        o_k = k0 + (i % KT) * BK + tl.arange(0, BK)
        out = out + (_matrix(w + (i // KT) * pitch, row_pitch, column_pitch, o_row, o_k, m_row, o_k < K, ""),)
    return out


@triton.jit
def _dots(ws, h, acc, first: tl.constexpr, step: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr):
    """acc[g] + w[g] h for every gate, with w[g] = ws[first + g * step]."""
    out = ()
    for g in tl.static_range(G):
        w = ws[first + g * step]
        out = out + (tl.dot(w, h.to(w.dtype), acc[g], input_precision=PRECISION),)
    return out


@triton.jit
def _settle(products, start, o, N: tl.constexpr):
    """start + products. What follows a product, Triton keeps in its layout, and moves all that is loaded there between
    warps, tile by tile. It does not look past a gather, and so moves the products alone."""
    out = ()
    for k in tl.static_range(N):
        out = out + (start[k] + tl.gather(products[k], o, 0),)
    return out


@triton.jit
def _barrier(counter, target):
    """Waits until `target` programs have arrived. All of them must be resident: a cooperative launch sees to that."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    seen, polls = target - 1, 0
    while seen < target:
        seen = tl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=tl.int32,
                                         is_pure=False, pack=1)
        polls += 1
        tl.device_assert(polls < 2**24, "a program did not come to the barrier")  # only under TRITON_DEBUG=1
    tl.debug_barrier()


@triton.jit
def _place(B, H, REVERSE: tl.constexpr, N: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BB: tl.constexpr,
           BN: tl.constexpr):
    """This program's recurrence, sequences and units, and their offsets in [R, N, G, H], [R, N, H] and [N, S, B, H]."""
    n, b0 = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * BB
    i_b, o_n = tl.arange(0, BB)[None, :], tl.program_id(0) * BN + tl.arange(0, BN)
    o_x, o_y, o_s = i_b * (N * G * H) + o_n[:, None], i_b * (N * H) + o_n[:, None], i_b * H + o_n[:, None]
    x0, y0, s0 = b0 * (N * G * H) + n * G * H, b0 * (N * H) + n * H, (n * S * B + b0) * H
    return n, (REVERSE >> n) & 1, b0, o_n, o_x, o_y, o_s, x0, y0, s0


@triton.jit
def _at(u, descending, rev, T, B, o_b, lengths, offsets, resets):
    """Step u of a sweep: its first row, which sequences run in it, which of these come in from a reset."""
    inside = (u >= 0) & (u < T)
    t = tl.where(descending, T - 1 - u, u)
    row, end = t.to(tl.int64) * B, tl.where(o_b < B, T, 0)
    if lengths is not None:
        end = tl.load(lengths + o_b, mask=o_b < B, other=0)
    if offsets is not None:
        row = tl.load(offsets + t, mask=inside, other=0)
    runs = inside & (t < end)
    cut = runs & False
    if resets is not None:
        cut = tl.load(resets + (t + rev).to(tl.int64) * B + o_b, mask=runs & (t + rev < end), other=0) != 0
    return row, runs, cut


@triton.jit
def _steps(table, u0, u1, T, R, END: tl.constexpr):
    """A launch's steps, T and R: the arguments, or of a graph the one step, before T + END, that its table says."""
    if table is not None:
        slot = u0 % 2
        u, T, R = tl.load(table + slot), tl.load(table + 2).to(tl.int32), tl.load(table + 3)
        tl.store(table + 1 - slot, u + 1)
        u0 = u.to(tl.int32)
        u1 = tl.minimum(u0 + 1, T + END)
    return u0, u1, T, R


@triton.jit
def _find(table, k: tl.constexpr, pointer):
    """Of the type of this argument, what the table has in its place."""
    return tl.multiple_of(tl.load(table + 4 + k).to(pointer.dtype), 16)


@triton.jit(do_not_specialize=["u0", "u1", "T", "B", "R"])
def forward_kernel(table, x, w_ih, w_hh, b_ih, b_hh, state, hidden, y, states, saved, lengths, offsets, resets, counter,
                   u0, u1, T, B, R, I, H, CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, A: tl.constexpr,
                   N: tl.constexpr, REVERSE: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   KT: tl.constexpr, BI: tl.constexpr, XN: tl.constexpr, SPLIT: tl.constexpr, SCOPE: tl.constexpr,
                   BARRIER: tl.constexpr, PRECISION: tl.constexpr):
    """Steps u0 <= u < u1 of each sweep. x [R, N, G, H] (XN = G), or with w_ih [R, I] (XN = 1); state [N, S, B, H] in
    float32, in and out; hidden [2, N, B, H]: the h that programs pass on, slot u % 2 comes into step u."""
    u, u1, T, R = _steps(table, u0, u1, T, R, 0)
    if table is not None:
        x, w_hh, state = _find(table, 0, x), _find(table, 2, w_hh), _find(table, 5, state)
        hidden, y = _find(table, 6, hidden), _find(table, 7, y)
        w_ih = w_ih if w_ih is None else _find(table, 1, w_ih)
        b_ih = b_ih if b_ih is None else _find(table, 3, b_ih)
        b_hh = b_hh if b_hh is None else _find(table, 4, b_hh)
        states = states if states is None else _find(table, 8, states)
        saved = saved if saved is None else _find(table, 9, saved)
        lengths = lengths if lengths is None else _find(table, 10, lengths)
        offsets = offsets if offsets is None else _find(table, 11, offsets)
        resets = resets if resets is None else _find(table, 12, resets)
    n, rev, b0, o_n, o_x, o_y, o_s, x0, y0, s0 = _place(B, H, REVERSE, N, G, S, BB, BN)
    i_b, o_i, m_n = tl.arange(0, BB), tl.arange(0, BI), o_n < H
    o_b, h0, o_tile = b0 + i_b, (n * B + b0) * H, tl.arange(0, BN)[:, None] + i_b[None, :] * 0
    m = m_n[:, None] & (o_b < B)[None, :]
    plane, slot = R.to(tl.int64) * (N * H), B.to(tl.int64) * (N * H)
    w_hh += n * G * H * H
    ws, wi, m_x, pitch = (), (), m, N * G * H
    if SCOPE != "launch":
        ws = _matrices(w_hh, H * H, H, 1, o_n, 0, m_n, H, BK, KT, G)
    if w_ih is not None:
        wi = _matrices(w_ih + n * G * H * I, H * I, I, 1, o_n, 0, m_n, I, BI, 1, G)
        o_x, m_x, x0, pitch = i_b[None, :] * I + o_i[:, None], (o_i < I)[:, None], b0 * I, I
    o_bias, none = n * G * H + o_n[:, None] + i_b[None, :] * 0, _load(None, 0, o_s, m, None, G)
    bx, br = _load(b_ih, H, o_bias, m, None, G), _load(b_hh, H, o_bias, m, None, G)
    s = _load(state + s0, B.to(tl.int64) * H, o_s, m, None, S)
    row, runs, cut = _at(u, rev == 1, rev, T, B, o_b, lengths, offsets, resets)
    xs = _load(x + row * pitch + x0, H, o_x, m_x & runs[None, :], None, XN)
    while u < u1:
        row_next, runs_next, cut_next = _at(u + 1, rev == 1, rev, T, B, o_b, lengths, offsets, resets)
        wanted = (runs_next & (u + 1 < u1))[None, :]  # x is fetched one step ahead
        xs_next = _load(x + row_next * pitch + x0, H, o_x, m_x & wanted, None, XN)
        s = _where(~cut[None, :], s, None, S)
        r = none
        if w_ih is not None and not SPLIT:
            r, xs = _dots(wi, xs[0], none, 0, 1, G, PRECISION), bx
        if SCOPE == "block":
            r = _dots(ws, s[0], r, 0, 1, G, PRECISION)
        else:
            came, m_b = hidden + (u % 2) * slot + h0, (o_b < B) & ~cut
            if SCOPE == "grid":
                for k in tl.static_range(KT):
                    o_k = k * BK + tl.arange(0, BK)
                    r = _dots(ws, _matrix(came, 1, H, o_k, i_b, o_k < H, m_b, ".cg"), r, k, KT, G, PRECISION)
            else:
                k = 0
                while k < H:
                    o_k = k + tl.arange(0, BK)
                    wk = _matrices(w_hh, H * H, H, 1, o_n, k, m_n, H, BK, 1, G)
                    r = _dots(wk, _matrix(came, 1, H, o_k, i_b, o_k < H, m_b, ""), r, 0, 1, G, PRECISION)
                    k += BK
        r = _settle(r, br, o_tile, G)
        if w_ih is not None and SPLIT:
            xs = _settle(_dots(wi, xs[0], none, 0, 1, G, PRECISION), bx, o_tile, G)
        new, a = CELL(xs, r, s)
        # Units past H stay 0: 0 times what an infinity makes of them would be NaN in every sum to come.
        written, at = m & runs[None, :], row * (N * H) + y0
        s = _where(written, new, s, S)
        _store(y + at, 0, o_y, s, written, 1)
        if states is not None:
            _store(states + at, plane, o_y, s[1:], written, S - 1)
        if saved is not None:
            _store(saved + at, plane, o_y, a, written, A)
        if SCOPE != "block":
            _store(hidden + ((u + 1) % 2) * slot + h0, 0, o_s, s, m, 1)
        u += 1
        if BARRIER:
            _barrier(counter + n * tl.num_programs(1) + tl.program_id(1), (u - u0) * tl.num_programs(0))
        row, runs, cut, xs = row_next, runs_next, cut_next, xs_next
    _store(state + s0, B.to(tl.int64) * H, o_s, s, m, S)


@triton.jit(do_not_specialize=["u0", "u1", "T", "B", "R"])
def backward_kernel(table, w_hh, state, y, states, saved, dy, dstates, ds, dx, dr, came, lengths, offsets, resets,
                    counter, u0, u1, T, B, R, H, CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, A: tl.constexpr,
                    N: tl.constexpr, REVERSE: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    KT: tl.constexpr, SCOPE: tl.constexpr, BARRIER: tl.constexpr, PRECISION: tl.constexpr):
    """Steps u0 <= u < u1 of each sweep's reversal. Step T only adds W_hh^T dr of the last one to ds. state [N, S, B, H]
    came into the first step; ds likewise, float32, in and out; dx (None where dr serves) and dr [R, N, G, H]."""
    u, u1, T, R = _steps(table, u0, u1, T, R, 1)
    if table is not None:
        w_hh, state, y, dy = _find(table, 0, w_hh), _find(table, 1, state), _find(table, 2, y), _find(table, 5, dy)
        ds, dr = _find(table, 7, ds), _find(table, 9, dr)
        states = states if states is None else _find(table, 3, states)
        saved = saved if saved is None else _find(table, 4, saved)
        dstates = dstates if dstates is None else _find(table, 6, dstates)
        dx = dx if dx is None else _find(table, 8, dx)
        came = came if came is None else _find(table, 10, came)
        lengths = lengths if lengths is None else _find(table, 11, lengths)
        offsets = offsets if offsets is None else _find(table, 12, offsets)
        resets = resets if resets is None else _find(table, 13, resets)
    n, rev, b0, o_n, o_x, o_y, o_s, x0, y0, s0 = _place(B, H, REVERSE, N, G, S, BB, BN)
    i_b, m_n = tl.arange(0, BB), o_n < H
    o_tile, none = tl.arange(0, BN)[:, None] + i_b[None, :] * 0, _load(None, 0, o_s, o_s >= 0, None, G)
    o_b, plane = b0 + i_b, R.to(tl.int64) * (N * H)
    m = m_n[:, None] & (o_b < B)[None, :]
    w_hh += n * G * H * H
    ws = ()
    if SCOPE != "launch":
        ws = _matrices(w_hh, H * H, 1, H, o_n, 0, m_n, H, BK, KT, G)
    d, gr = _load(ds + s0, B.to(tl.int64) * H, o_s, m, None, S), none
    row_last, runs_last, cut_last = _at(u - 1, rev == 0, rev, T, B, o_b, lengths, offsets, resets)
    row, runs, cut = _at(u, rev == 0, rev, T, B, o_b, lengths, offsets, resets)
    while u < u1:
        row_next, runs_next, cut_next = _at(u + 1, rev == 0, rev, T, B, o_b, lengths, offsets, resets)
        acc = none[:1]
        if SCOPE == "block":
            for g in tl.static_range(G):
                acc = _dots(ws, tl.where(cut_last[None, :], 0.0, gr[g]), acc, g, 0, 1, PRECISION)
        else:
            last, flows = dr + row_last * (N * G * H) + x0, runs_last & ~cut_last
            if SCOPE == "grid":
                for i in tl.static_range(G * KT):
                    o_k = (i % KT) * BK + tl.arange(0, BK)
                    dk = _matrix(last + (i // KT) * H, 1, N * G * H, o_k, i_b, o_k < H, flows, ".cg")
                    acc = _dots(ws, dk, acc, i, 0, 1, PRECISION)
            else:
                k = 0
                while k < H:
                    o_k = k + tl.arange(0, BK)
                    wk = _matrices(w_hh, H * H, 1, H, o_n, k, m_n, H, BK, 1, G)
                    for g in tl.static_range(G):
                        dk = _matrix(last + g * H, 1, N * G * H, o_k, i_b, o_k < H, flows, "")
                        acc = _dots(wk, dk, acc, g, 0, 1, PRECISION)
                    k += BK
        d = _settle(acc, d[:1], o_tile, 1) + d[1:]
        m_run, at, at_next = m & runs[None, :], row * (N * H) + y0, row_next * (N * H) + y0
        before = m_run & (runs_next & ~cut)[None, :]
        s_next = _load(y + at, 0, o_y, m_run, None, 1)
        s_prev = _load(y + at_next, 0, o_y, before, None, 1)
        if states is not None:
            s_next = s_next + _load(states + at, plane, o_y, m_run, None, S - 1)
            s_prev = s_prev + _load(states + at_next, plane, o_y, before, None, S - 1)
        s_prev = _load(state + s0, B.to(tl.int64) * H, o_s, m_run & ~(runs_next | cut)[None, :], s_prev, S)
        given, a = _load(dy + at, 0, o_y, m_run, d, 1) + d[1:], ()
        if dstates is not None:
            given = given[:1] + _load(dstates + at, plane, o_y, m_run, d[1:], S - 1)
        if saved is not None:
            a = _load(saved + at, plane, o_y, m_run, None, A)
        gx, gr, passed = CELL(a, s_prev, s_next, given)
        d = _where(runs[None, :], _where(~cut[None, :], passed, None, S), d, S)
        gr = _where(m_run, gr, None, G)
        if dx is not None:
            _store(dx + row * (N * G * H) + x0, H, o_x, gx, m_run, G)
        _store(dr + row * (N * G * H) + x0, H, o_x, gr, m_run, G)
        if came is not None:
            _store(came + at, 0, o_y, s_prev, m_run, 1)
        u += 1
        if BARRIER:
            _barrier(counter + n * tl.num_programs(1) + tl.program_id(1), (u - u0) * tl.num_programs(0))
        row_last, runs_last, cut_last = row, runs, cut
        row, runs, cut = row_next, runs_next, cut_next
    _store(ds + s0, B.to(tl.int64) * H, o_s, d, m, S)


# For a kind of call, what Triton made and its constants: to find that out at each launch takes it longer than the rest.
_compiled: dict[Any, tuple[Any, list[Any]]] = {}


def _launch(kernel: Any, function: Any, cell: Cell, plan: Plan, rows: Rows, steps: int, tensors: Sequence[Any], B: int,
            H: int, R: int, *sizes: int, **constants: int) -> None:
    """Run a kernel over its steps: in one launch, or in one launch each where the host or its graph is the barrier."""
    grid = -(-H // plan.units), -(-B // plan.sequences), len(rows.reverse)
    device, given, steps = tensors[0].device, (*tensors, rows.lengths, rows.offsets, rows.resets), steps if B else 0
    # Programs wait for each other only if all can run at once: on a multiprocessor each, and not in the interpreter.
    barrier = (plan.scope == "grid" and not triton.knobs.runtime.interpret
               and prod(grid) <= torch.cuda.get_device_properties(device).multi_processor_count)
    counter = torch.zeros(grid[1] * grid[2], dtype=torch.int32, device=device) if barrier else None
    kind = (kernel, function, plan, H, sizes, R < 2**31, barrier, device, *rows.reverse, grid[2],
            *(t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in given))

    def launch(table: Tensor | None, u: int, count: int = 1) -> None:
        arguments = table, *given, counter, u, u + count, rows.steps, B, R, *sizes, H
        key = table is None, kind
        compiled, values = _compiled.get(key, (None, ()))
        if compiled is not None:
            compiled[grid](*arguments, *values)
            return
        options = dict(CELL=function, G=cell.gates, S=cell.states, A=cell.saved, N=grid[2],
                       REVERSE=sum(r << n for n, r in enumerate(rows.reverse)), BB=plan.sequences, BN=plan.units,
                       BK=plan.depth, KT=-(-H // plan.depth), SCOPE=plan.scope, BARRIER=barrier,
                       PRECISION=plan.precision, **constants)
        cooperative = {"launch_cooperative_grid": True} if barrier else {}
        compiled = kernel[grid](*arguments, **options, num_warps=plan.warps, num_stages=1, **cooperative)
        if compiled is not None:
            _compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(arguments):]]

    with torch.cuda.device_of(tensors[0]):
        if plan.scope == "launch" and can_replay(steps, given):
            replay(kind, B, torch.cuda.current_stream().cuda_stream).run(launch, steps, (rows.steps, R), device, given)
        else:
            at_once = steps if plan.scope == "block" or barrier else 1
            for u in range(0, steps, at_once):
                launch(None, u, at_once)


def sweep(cell: Cell, plan: Plan, rows: Rows, adjoint: bool, tensors: Sequence[Any], s0: Tensor) -> None:
    """Run the forward or the backward kernel on what `device` gives it."""
    (_, B, H), S = s0.shape, cell.states
    if adjoint:
        _launch(backward_kernel, functions(cell)[1], cell, plan, rows, rows.steps + 1, tensors, B, H, len(tensors[2]))
        return
    x, w_ih, I = *tensors[:2], tensors[0].shape[1]
    hidden = None if plan.scope == "block" else torch.stack((s0[::S], s0[::S]))
    _launch(forward_kernel, functions(cell)[0], cell, plan, rows, rows.steps, (*tensors[:6], hidden, *tensors[6:]), B,
            H, len(x), I, BI=16 if w_ih is None else power_of_2(I, 16), XN=cell.gates if w_ih is None else 1,
            SPLIT=cell.split)
