"""The recurrence in Triton: one forward and one backward body for every cell and every scope of the step barrier.
Hidden units are the rows of a tile and sequences its columns, so that 8 sequences already fill the matrix unit. Time
loops are `while`: a `for` sinks the resident W_hh into shared memory and reads it again at every step. State 0 is an
operand of the product: in block scope it stays in registers, else programs pass it on through memory. What is constant
in a kernel stays so in what it calls: kernels alone declare that. They get their tensors, or None, in one tuple."""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from ...cells import Cell, bind


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
def _load(ptr, at, pitch, offsets, mask, start, N):
    """start + N tiles in float32, where no pointer and no start mean 0."""
    out = ()
    for k in tl.static_range(N):
        tile = tl.zeros(offsets.shape, tl.float32) if start is None else start[k]
        if ptr is not None:
            tile += tl.load(ptr + at + k * pitch + offsets, mask=mask, other=0.0).to(tl.float32)
        out = out + (tile,)
    return out


@triton.jit
def _store(ptr, at, pitch, offsets, values, mask, N):
    if ptr is not None:
        for k in tl.static_range(N):
            tl.store(ptr + at + k * pitch + offsets, values[k].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _where(mask, a, b, N):
    """No b means 0."""
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.where(mask, a[k], 0.0 if b is None else b[k]),)
    return out


@triton.jit
def _matrix(ptr, row_pitch, column_pitch, o_row, o_column, m_row, m_column, CACHE):
    offsets = o_row[:, None] * row_pitch + o_column[None, :] * column_pitch
    return tl.load(ptr + offsets, mask=m_row[:, None] & m_column[None, :], other=0.0, cache_modifier=CACHE)


@triton.jit
def _matrices(w, pitch, row_pitch, column_pitch, o_row, k0, m_row, K, BK, KT, G):
    """Tiles of all gates' weights: G times KT of BK columns each, from column k0."""
    out = ()
    for i in tl.static_range(G * KT):
        o_k = k0 + (i % KT) * BK + tl.arange(0, BK)
        out = out + (_matrix(w + (i // KT) * pitch, row_pitch, column_pitch, o_row, o_k, m_row, o_k < K, ""),)
    return out


@triton.jit
def _dots(ws, h, acc, first, step, G, PRECISION):
    """acc[g] + w[g] h for every gate, with w[g] = ws[first + g * step]."""
    out = ()
    for g in tl.static_range(G):
        w = ws[first + g * step]
        out = out + (tl.dot(w, h.to(w.dtype), acc[g], input_precision=PRECISION),)
    return out


@triton.jit
def _product(acc, ws, w, row_pitch, column_pitch, o_n, m_n, ptr, pitch, i_b, m_b, H, IN, OUT, BK, KT, PRECISION):
    """acc + W h of OUT gates, or acc + W^T dr of IN of them. h or dr is in memory; W in `ws`, or is read if KT is 0."""
    for i in tl.static_range(IN * KT):
        o_k = (i % KT) * BK + tl.arange(0, BK)
        h = _matrix(ptr + (i // KT) * H, 1, pitch, o_k, i_b, o_k < H, m_b, ".cg")
        acc = _dots(ws, h, acc, i, KT, OUT, PRECISION)
    if KT == 0:
        k = 0
        while k < H:
            o_k = k + tl.arange(0, BK)
            wk = _matrices(w, H * H, row_pitch, column_pitch, o_n, k, m_n, H, BK, 1, IN * OUT)
            for i in tl.static_range(IN):
                h = _matrix(ptr + i * H, 1, pitch, o_k, i_b, o_k < H, m_b, "")
                acc = _dots(wk, h, acc, i, 1, OUT, PRECISION)
            k += BK
    return acc


@triton.jit
def _settle(products, start, N):
    """start + products. What follows a product, Triton keeps in its layout, and moves all that is loaded there between
    warps, tile by tile. It does not look past a gather, and so moves the products alone."""
    out, o = (), tl.arange(0, products[0].shape[0])[:, None] + tl.zeros(products[0].shape, tl.int32)
    for k in tl.static_range(N):
        out = out + (start[k] + tl.gather(products[k], o, 0),)
    return out


@triton.jit
def _barrier(counter, count):
    """Waits until all programs of a sweep have come here `count` times. A cooperative launch keeps them resident."""
    if counter is not None:
        counter, target = counter + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1), count * tl.num_programs(0)
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
def _place(B, H, REVERSE, N, G, S, BB, BN):
    """This program's recurrence, sequences and units, and their offsets in [R, N, G, H], [R, N, H] and [N, S, B, H]."""
    n, b0, i_b = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * BB, tl.arange(0, BB)
    o_b, o_n, row = b0 + i_b, tl.program_id(0) * BN + tl.arange(0, BN), i_b[None, :]
    o_x, o_y, o_s = row * (N * G * H) + o_n[:, None], row * (N * H) + o_n[:, None], row * H + o_n[:, None]
    x0, y0, s0 = b0 * (N * G * H) + n * G * H, b0 * (N * H) + n * H, (n * S * B + b0) * H
    m = (o_n < H)[:, None] & (o_b < B)[None, :]
    return n, (REVERSE >> n) & 1, b0, i_b, o_b, o_n, o_n < H, m, o_x, o_y, o_s, x0, y0, s0


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
def _steps(table, u0, u1, T, R, END):
    """A launch's steps, T and R: the arguments, or of a graph the one step, before T + END, that its table says."""
    if table is not None:
        slot = u0 % 2
        u, T, R = tl.load(table + slot), tl.load(table + 2).to(tl.int32), tl.load(table + 3)
        tl.store(table + 1 - slot, u + 1)
        u0, u1 = u.to(tl.int32), tl.minimum(u.to(tl.int32) + 1, T + END)
    return u0, u1, T, R


@triton.jit
def _find(table, k, pointer):
    """Of the type of this argument, what the table has in its place."""
    return tl.multiple_of(tl.load(table + 4 + k).to(pointer.dtype), 16)


@triton.jit(do_not_specialize=["u0", "u1", "T", "B", "R"])
def forward_kernel(table, tensors, counter, u0, u1, T, B, R, I, H, CELL: tl.constexpr, G: tl.constexpr,
                   S: tl.constexpr, A: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, BB: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, BI: tl.constexpr, XN: tl.constexpr,
                   SPLIT: tl.constexpr, SCOPE: tl.constexpr, PRECISION: tl.constexpr):
    """Steps u0 <= u < u1 of each sweep. x [R, N, G, H] (XN = G), or with w_ih [R, I] (XN = 1); state [N, S, B, H] in
    float32, in and out; hidden [2, N, B, H]: the h that programs pass on, slot u % 2 comes into step u."""
    u, u1, T, R = _steps(table, u0, u1, T, R, 0)
    if table is not None:
        tensors = [tensors[k] if tensors[k] is None else _find(table, k, tensors[k])
                   for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)]
    x, w_ih, w_hh, b_ih, b_hh, state, hidden, y, states, saved, lengths, offsets, resets = tensors
    n, rev, b0, i_b, o_b, o_n, m_n, m, o_x, o_y, o_s, x0, y0, s0 = _place(B, H, REVERSE, N, G, S, BB, BN)
    plane, slot, h0 = R.to(tl.int64) * (N * H), B.to(tl.int64) * (N * H), (n * B + b0) * H
    w_hh += n * G * H * H
    ws, wi, m_x, pitch = _matrices(w_hh, H * H, H, 1, o_n, 0, m_n, H, BK, KT, G), (), m, N * G * H
    if w_ih is not None:
        wi = _matrices(w_ih + n * G * H * I, H * I, I, 1, o_n, 0, m_n, I, BI, 1, G)
        o_x, m_x, x0, pitch = i_b[None, :] * I + tl.arange(0, BI)[:, None], tl.arange(0, BI)[:, None] < I, b0 * I, I
    o_bias, none = o_n[:, None] + i_b[None, :] * 0, _load(None, 0, 0, o_s, m, None, G)
    bx, br = _load(b_ih, n * G * H, H, o_bias, m, None, G), _load(b_hh, n * G * H, H, o_bias, m, None, G)
    s = _load(state, s0, B.to(tl.int64) * H, o_s, m, None, S)
    row, runs, cut = _at(u, rev == 1, rev, T, B, o_b, lengths, offsets, resets)
    xs = _load(x, row * pitch + x0, H, o_x, m_x & runs[None, :], None, XN)
    while u < u1:
        row_next, runs_next, cut_next = _at(u + 1, rev == 1, rev, T, B, o_b, lengths, offsets, resets)
        wanted = (runs_next & (u + 1 < u1))[None, :]  # x is fetched one step ahead
        xs_next = _load(x, row_next * pitch + x0, H, o_x, m_x & wanted, None, XN)
        s = _where(~cut[None, :], s, None, S)
        r = none
        if w_ih is not None and not SPLIT:
            r, xs = _dots(wi, xs[0], none, 0, 1, G, PRECISION), bx
        if SCOPE == "block":
            r = _dots(ws, s[0], r, 0, 1, G, PRECISION)
        else:
            r = _product(r, ws, w_hh, H, 1, o_n, m_n, hidden + (u % 2) * slot + h0, H, i_b, (o_b < B) & ~cut, H, 1, G,
                         BK, KT, PRECISION)
        r = _settle(r, br, G)
        if w_ih is not None and SPLIT:
            xs = _settle(_dots(wi, xs[0], none, 0, 1, G, PRECISION), bx, G)
        new, a = CELL(xs, r, s)
        # Units past H stay 0: 0 times what an infinity makes of them would be NaN in every sum to come.
        written, at = m & runs[None, :], row * (N * H) + y0
        s = _where(written, new, s, S)
        _store(y, at, 0, o_y, s, written, 1)
        _store(states, at, plane, o_y, s[1:], written, S - 1)
        _store(saved, at, plane, o_y, a, written, A)
        _store(hidden, ((u + 1) % 2) * slot + h0, 0, o_s, s, m, 1)
        u += 1
        _barrier(counter, u - u0)
        row, runs, cut, xs = row_next, runs_next, cut_next, xs_next
    _store(state, s0, B.to(tl.int64) * H, o_s, s, m, S)


@triton.jit(do_not_specialize=["u0", "u1", "T", "B", "R"])
def backward_kernel(table, tensors, counter, u0, u1, T, B, R, H, CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
                    A: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
                    BK: tl.constexpr, KT: tl.constexpr, SCOPE: tl.constexpr, PRECISION: tl.constexpr):
    """Steps u0 <= u < u1 of each sweep's reversal. Step T only adds W_hh^T dr of the last one to ds. state [N, S, B, H]
    came into the first step; ds likewise, float32, in and out; dx (None where dr serves) and dr [R, N, G, H]."""
    u, u1, T, R = _steps(table, u0, u1, T, R, 1)
    if table is not None:
        tensors = [tensors[k] if tensors[k] is None else _find(table, k, tensors[k])
                   for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)]
    w_hh, state, y, states, saved, dy, dstates, ds, dx, dr, came, lengths, offsets, resets = tensors
    n, rev, _, i_b, o_b, o_n, m_n, m, o_x, o_y, o_s, x0, y0, s0 = _place(B, H, REVERSE, N, G, S, BB, BN)
    none, plane, state_pitch = _load(None, 0, 0, o_s, m, None, G), R.to(tl.int64) * (N * H), B.to(tl.int64) * H
    w_hh += n * G * H * H
    ws = _matrices(w_hh, H * H, 1, H, o_n, 0, m_n, H, BK, KT, G)
    d, gr = _load(ds, s0, state_pitch, o_s, m, None, S), none
    row_last, runs_last, cut_last = _at(u - 1, rev == 0, rev, T, B, o_b, lengths, offsets, resets)
    row, runs, cut = _at(u, rev == 0, rev, T, B, o_b, lengths, offsets, resets)
    while u < u1:
        row_next, runs_next, cut_next = _at(u + 1, rev == 0, rev, T, B, o_b, lengths, offsets, resets)
        acc = none[:1]
        if SCOPE == "block":
            for g in tl.static_range(G):
                acc = _dots(ws, tl.where(cut_last[None, :], 0.0, gr[g]), acc, g, 0, 1, PRECISION)
        else:
            acc = _product(acc, ws, w_hh, 1, H, o_n, m_n, dr + row_last * (N * G * H) + x0, N * G * H, i_b,
                           runs_last & ~cut_last, H, G, 1, BK, KT, PRECISION)
        d = _settle(acc, d[:1], 1) + d[1:]
        m_run, at, at_next = m & runs[None, :], row * (N * H) + y0, row_next * (N * H) + y0
        before, first = m_run & (runs_next & ~cut)[None, :], m_run & ~(runs_next | cut)[None, :]
        s_next = _load(y, at, 0, o_y, m_run, None, 1) + _load(states, at, plane, o_y, m_run, None, S - 1)
        s_prev = _load(y, at_next, 0, o_y, before, None, 1) + _load(states, at_next, plane, o_y, before, None, S - 1)
        s_prev = _load(state, s0, state_pitch, o_s, first, s_prev, S)
        given = _load(dy, at, 0, o_y, m_run, d, 1) + _load(dstates, at, plane, o_y, m_run, d[1:], S - 1)
        gx, gr, passed = CELL(_load(saved, at, plane, o_y, m_run, None, A), s_prev, s_next, given)
        d, gr = _where(runs[None, :], _where(~cut[None, :], passed, None, S), d, S), _where(m_run, gr, None, G)
        _store(dx, row * (N * G * H) + x0, H, o_x, gx, m_run, G)
        _store(dr, row * (N * G * H) + x0, H, o_x, gr, m_run, G)
        _store(came, at, 0, o_y, s_prev, m_run, 1)
        u += 1
        _barrier(counter, u - u0)
        row_last, runs_last, cut_last, row, runs, cut = row, runs, cut, row_next, runs_next, cut_next
    _store(ds, s0, state_pitch, o_s, d, m, S)
