"""The recurrence in Triton: one forward and one backward body for all cells and barrier scopes.

A tile's rows are hidden units and its columns are sequences: 8 sequences fill the matrix unit.

- Time loops are `while`: a `for` would move the resident W_hh to shared memory and read it again
  at every step.
- State 0 is an operand of the product. In block scope it stays in registers; in the other scopes
  programs exchange it through global memory.
- What is constant in a kernel is constant in the functions it calls: only kernels declare it.
- Prefixes: i_ index within the tile, o_ offset, m_ mask."""

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells import Cell, bind
from ..tensors import BackwardTensors, ForwardTensors


class Tile(NamedTuple):
    """A program's part of the work: one direction, BN hidden units, BB sequences."""

    # direction, and 1 where it runs backward in time
    n: Any
    reverse: Any
    # first sequence
    b0: Any
    # [BB] within the tile and [BB] in the batch; [BN] hidden units and which of them exist
    i_b: Any
    o_b: Any
    o_n: Any
    m_n: Any
    # [BN, BB]: units and sequences that exist
    mask: Any
    # [BN, BB], from the tile's first sequence: in [R, N, G, H], [R, N, H] and one state's [B, H]
    o_x: Any
    o_y: Any
    o_s: Any
    # where the first sequence begins: in a step's [B, N, G, H] and [B, N, H], and in [N, S, B, H]
    x0: Any
    y0: Any
    s0: Any


class Step(NamedTuple):
    """One step of a tile's sequences."""

    # first row
    row: Any
    # [BB] sequences that run in it, and those of them whose incoming state is reset
    runs: Any
    cut: Any


@triton.jit
def _tanh(x):
    square = x * x
    terms = -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    series = x * (1 + square * terms)
    # The quotient cancels near 0.
    return tl.where(square < 0.06, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu_grad(d, y):
    return tl.where(y <= 0, 0.0, d)


@lru_cache
def jit_cell(cell: Cell) -> tuple[Any, Any]:
    """The cell's forward and backward as Triton functions, which the kernels take as arguments."""
    names = dict(
        tl=tl,
        sigmoid=tl.sigmoid,
        tanh=_tanh,
        relu=_relu,
        relu_grad=_relu_grad,
        zeros_like=tl.zeros_like,
    )
    return triton.jit(bind(cell.forward, **names)), triton.jit(bind(cell.backward, **names))


@triton.jit
def _load(ptr, first, pitch, offsets, mask, start, N):
    """start + N tiles in float32. A pointer or a start of None counts as 0."""
    out = ()
    for k in tl.static_range(N):
        tile = tl.zeros(offsets.shape, tl.float32) if start is None else start[k]
        if ptr is not None:
            loaded = tl.load(ptr + first + k * pitch + offsets, mask=mask, other=0.0)
            tile += loaded.to(tl.float32)
        out = out + (tile,)
    return out


@triton.jit
def _store(ptr, first, pitch, offsets, values, mask, N):
    if ptr is not None:
        for k in tl.static_range(N):
            value = values[k].to(ptr.dtype.element_ty)
            tl.store(ptr + first + k * pitch + offsets, value, mask=mask)


@triton.jit
def _where(mask, a, b, N):
    """For each of N tiles a where the mask is set, else b. A b of None counts as 0."""
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.where(mask, a[k], 0.0 if b is None else b[k]),)
    return out


@triton.jit
def _matrix(ptr, row_pitch, column_pitch, o_row, o_column, m_row, m_column, CACHE):
    offsets = o_row[:, None] * row_pitch + o_column[None, :] * column_pitch
    mask = m_row[:, None] & m_column[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0, cache_modifier=CACHE)


@triton.jit
def _matrices(w, pitch, row_pitch, column_pitch, o_row, k0, m_row, K, BK, KT, G):
    """Tiles of all gates' weights: for each of G gates, KT tiles of BK columns, from column k0."""
    out = ()
    for i in tl.static_range(G * KT):
        o_k = k0 + (i % KT) * BK + tl.arange(0, BK)
        gate = w + (i // KT) * pitch
        out = out + (_matrix(gate, row_pitch, column_pitch, o_row, o_k, m_row, o_k < K, ""),)
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
def _product(
    acc, ws, w, row_pitch, column_pitch, tile, ptr, pitch, m_b, H, IN, OUT, BK, KT, PRECISION
):
    """acc + W h for OUT gates (forward, IN = 1), or acc + W^T dr over IN gates (adjoint, OUT = 1).

    h or dr is read from `ptr`. W is resident in `ws`, or is read from `w` if KT is 0."""
    for i in tl.static_range(IN * KT):
        o_k = (i % KT) * BK + tl.arange(0, BK)
        # .cg: past the L1 cache, which does not see what other multiprocessors write
        h = _matrix(ptr + (i // KT) * H, 1, pitch, o_k, tile.i_b, o_k < H, m_b, ".cg")
        acc = _dots(ws, h, acc, i, KT, OUT, PRECISION)
    if KT == 0:
        k = 0
        while k < H:
            o_k = k + tl.arange(0, BK)
            wk = _matrices(
                w, H * H, row_pitch, column_pitch, tile.o_n, k, tile.m_n, H, BK, 1, IN * OUT
            )
            for i in tl.static_range(IN):
                h = _matrix(ptr + i * H, 1, pitch, o_k, tile.i_b, o_k < H, m_b, "")
                acc = _dots(wk, h, acc, i, 1, OUT, PRECISION)
            k += BK
    return acc


@triton.jit
def add_in_own_layout(products, start, N):
    """start + products, in the layout of `start`.

    Triton propagates a product's layout to everything computed from it, and would then move every
    loaded tile between warps. It does not propagate through a gather: only the products move."""
    out = ()
    first = products[0]
    o_row = tl.arange(0, first.shape[0])[:, None] + tl.zeros(first.shape, tl.int32)
    for k in tl.static_range(N):
        out = out + (start[k] + tl.gather(products[k], o_row, 0),)
    return out


@triton.jit
def _barrier(counter, tile, tiles, count):
    """Wait until all programs that share this of the batch's `tiles` have arrived `count` times.

    A cooperative launch keeps them resident."""
    if counter is not None:
        counter = counter + tl.program_id(2) * tiles + tile
        target = count * tl.num_programs(0)
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        seen = target - 1
        polls = 0
        while seen < target:
            seen = tl.inline_asm_elementwise(
                "ld.acquire.gpu.global.b32 $0, [$1];",
                "=r,l",
                [counter],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            polls += 1
            # compiled in only under TRITON_DEBUG=1
            tl.device_assert(polls < 2**24, "a program did not come to the barrier")
        tl.debug_barrier()


@triton.jit
def tile_of_program(first, B, H, REVERSE, N, G, S, BB, BN):
    n = tl.program_id(2).to(tl.int64)
    b0 = (first + tl.program_id(1)).to(tl.int64) * BB
    i_b = tl.arange(0, BB)
    o_b = b0 + i_b
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = i_b[None, :]
    o_x = row * (N * G * H) + o_n[:, None]
    o_y = row * (N * H) + o_n[:, None]
    o_s = row * H + o_n[:, None]
    x0 = b0 * (N * G * H) + n * G * H
    y0 = b0 * (N * H) + n * H
    s0 = (n * S * B + b0) * H
    mask = (o_n < H)[:, None] & (o_b < B)[None, :]
    reverse = (REVERSE >> n) & 1
    return Tile(n, reverse, b0, i_b, o_b, o_n, o_n < H, mask, o_x, o_y, o_s, x0, y0, s0)


@triton.jit
def step_info(u, descending, tile, T, B, tensors):
    """Step u of the T steps, counted down in time if `descending`."""
    inside = (u >= 0) & (u < T)
    t = tl.where(descending, T - 1 - u, u)
    row = t.to(tl.int64) * B
    end = tl.where(tile.o_b < B, T, 0)
    if tensors.lengths is not None:
        end = tl.load(tensors.lengths + tile.o_b, mask=tile.o_b < B, other=0)
    if tensors.offsets is not None:
        row = tl.load(tensors.offsets + t, mask=inside, other=0)
    runs = inside & (t < end)
    cut = runs & False
    if tensors.resets is not None:
        # A reset at t lies between t - 1 and t: in reverse it cuts off step t - 1.
        boundary = t + tile.reverse
        o_reset = boundary.to(tl.int64) * B + tile.o_b
        cut = tl.load(tensors.resets + o_reset, mask=runs & (boundary < end), other=0) != 0
    return Step(row, runs, cut)


@triton.jit
def load_step(table, u0, u1, T, R, EXTRA):
    """The launch's steps u0 <= u < u1, T and R: the arguments, or what a CUDA graph's table holds.

    A graph's launch does one step, none from step T + EXTRA on, and stores the next number."""
    if table is not None:
        slot = u0 % 2
        u = tl.load(table + slot)
        T = tl.load(table + 2).to(tl.int32)
        R = tl.load(table + 3)
        tl.store(table + 1 - slot, u + 1)
        u0 = u.to(tl.int32)
        u1 = tl.minimum(u.to(tl.int32) + 1, T + EXTRA)
    return u0, u1, T, R


@triton.jit
def load_pointer(table, k, pointer):
    """Entry k of a graph's table of pointers, of this argument's type. None for None."""
    # Triton 3.6 returns None only where a function ends without a value.
    if pointer is not None:
        return tl.multiple_of(tl.load(table + 4 + k).to(pointer.dtype), 16)


@triton.jit(do_not_specialize=["first", "u0", "u1", "T", "B", "R"])
def forward_kernel(
    table,
    tensors,
    counter,
    first,
    u0,
    u1,
    T,
    B,
    R,
    I,
    H,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    BI: tl.constexpr,
    XN: tl.constexpr,
    SEPARATE_RECURRENT_GRAD: tl.constexpr,
    SCOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps u0 <= u < u1 of each sequence, from tile `first` of the batch on.

    x holds pre-activations [R, N, G, H] (XN = G), or with w_ih inputs [R, I] (XN = 1). But in block
    scope slot u % 2 of `hidden` holds the h that enters step u."""
    u, u1, T, R = load_step(table, u0, u1, T, R, 0)
    if table is not None:
        tensors = ForwardTensors(
            x=load_pointer(table, 0, tensors.x),
            w_ih=load_pointer(table, 1, tensors.w_ih),
            w_hh=load_pointer(table, 2, tensors.w_hh),
            b_ih=load_pointer(table, 3, tensors.b_ih),
            b_hh=load_pointer(table, 4, tensors.b_hh),
            state=load_pointer(table, 5, tensors.state),
            hidden=load_pointer(table, 6, tensors.hidden),
            y=load_pointer(table, 7, tensors.y),
            states=load_pointer(table, 8, tensors.states),
            saved=load_pointer(table, 9, tensors.saved),
            lengths=load_pointer(table, 10, tensors.lengths),
            offsets=load_pointer(table, 11, tensors.offsets),
            resets=load_pointer(table, 12, tensors.resets),
            product=load_pointer(table, 13, tensors.product),
        )
    tile = tile_of_program(first, B, H, REVERSE, N, G, S, BB, BN)
    m_b = tile.o_b < B
    y_plane = R.to(tl.int64) * (N * H)
    h_slot = B.to(tl.int64) * (N * H)
    h0 = (tile.n * B + tile.b0) * H
    o_gates = tile.i_b[None, :] * (G * H) + tile.o_n[:, None]
    s_plane = B.to(tl.int64) * H
    w_hh = tensors.w_hh + tile.n * G * H * H
    ws = _matrices(w_hh, H * H, H, 1, tile.o_n, 0, tile.m_n, H, BK, KT, G)
    wi = ()
    o_x = tile.o_x
    m_x = tile.mask
    x0 = tile.x0
    x_pitch = N * G * H
    if tensors.w_ih is not None:
        w_ih = tensors.w_ih + tile.n * G * H * I
        wi = _matrices(w_ih, H * I, I, 1, tile.o_n, 0, tile.m_n, I, BI, 1, G)
        o_x = tile.i_b[None, :] * I + tl.arange(0, BI)[:, None]
        m_x = tl.arange(0, BI)[:, None] < I
        x0 = tile.b0 * I
        x_pitch = I
    o_bias = tile.o_n[:, None] + tile.i_b[None, :] * 0
    zeros = _load(None, 0, 0, tile.o_s, tile.mask, None, G)
    bx = _load(tensors.b_ih, tile.n * G * H, H, o_bias, tile.mask, None, G)
    br = _load(tensors.b_hh, tile.n * G * H, H, o_bias, tile.mask, None, G)
    s = _load(tensors.state, tile.s0, s_plane, tile.o_s, tile.mask, None, S)
    descending = tile.reverse == 1
    step = step_info(u, descending, tile, T, B, tensors)
    xs = _load(tensors.x, step.row * x_pitch + x0, H, o_x, m_x & step.runs[None, :], None, XN)
    while u < u1:
        # x is fetched one step ahead
        step_next = step_info(u + 1, descending, tile, T, B, tensors)
        wanted = (step_next.runs & (u + 1 < u1))[None, :]
        xs_next = _load(tensors.x, step_next.row * x_pitch + x0, H, o_x, m_x & wanted, None, XN)
        s = _where(~step.cut[None, :], s, None, S)
        r = zeros
        if tensors.w_ih is not None and not SEPARATE_RECURRENT_GRAD:
            r = _dots(wi, xs[0], zeros, 0, 1, G, PRECISION)
            xs = bx
        if SCOPE == "library":
            kept = tile.mask & ~step.cut[None, :]
            r = _load(tensors.product, h0 * G, H, o_gates, kept, None, G)
        elif SCOPE == "block":
            r = _dots(ws, s[0], r, 0, 1, G, PRECISION)
        else:
            h = tensors.hidden + (u % 2) * h_slot + h0
            r = _product(r, ws, w_hh, H, 1, tile, h, H, m_b & ~step.cut, H, 1, G, BK, KT, PRECISION)
        r = add_in_own_layout(r, br, G)
        if tensors.w_ih is not None and SEPARATE_RECURRENT_GRAD:
            xs = add_in_own_layout(_dots(wi, xs[0], zeros, 0, 1, G, PRECISION), bx, G)
        s_next, a = CELL(xs, r, s)
        # Units past H stay 0: an infinity there would make NaN of every later sum (0 * infinity).
        written = tile.mask & step.runs[None, :]
        row = step.row * (N * H) + tile.y0
        s = _where(written, s_next, s, S)
        _store(tensors.y, row, 0, tile.o_y, s, written, 1)
        _store(tensors.states, row, y_plane, tile.o_y, s[1:], written, S - 1)
        _store(tensors.saved, row, y_plane, tile.o_y, a, written, A)
        _store(tensors.hidden, ((u + 1) % 2) * h_slot + h0, 0, tile.o_s, s, tile.mask, 1)
        u += 1
        _barrier(counter, first + tl.program_id(1), tl.cdiv(B, BB), u - u0)
        step = step_next
        xs = xs_next
    _store(tensors.state, tile.s0, s_plane, tile.o_s, s, tile.mask, S)


@triton.jit(do_not_specialize=["first", "u0", "u1", "T", "B", "R"])
def backward_kernel(
    table,
    tensors,
    counter,
    first,
    u0,
    u1,
    T,
    B,
    R,
    H,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    SCOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps u0 <= u < u1 of each sequence, in the opposite order, from tile `first` on.

    Step T only adds W_hh^T dr of the last one to ds."""
    u, u1, T, R = load_step(table, u0, u1, T, R, 1)
    if table is not None:
        tensors = BackwardTensors(
            w_hh=load_pointer(table, 0, tensors.w_hh),
            state=load_pointer(table, 1, tensors.state),
            y=load_pointer(table, 2, tensors.y),
            states=load_pointer(table, 3, tensors.states),
            saved=load_pointer(table, 4, tensors.saved),
            dy=load_pointer(table, 5, tensors.dy),
            dstates=load_pointer(table, 6, tensors.dstates),
            ds=load_pointer(table, 7, tensors.ds),
            dx=load_pointer(table, 8, tensors.dx),
            dr=load_pointer(table, 9, tensors.dr),
            h_prev=load_pointer(table, 10, tensors.h_prev),
            lengths=load_pointer(table, 11, tensors.lengths),
            offsets=load_pointer(table, 12, tensors.offsets),
            resets=load_pointer(table, 13, tensors.resets),
            outgoing=load_pointer(table, 14, tensors.outgoing),
            product=load_pointer(table, 15, tensors.product),
        )
    tile = tile_of_program(first, B, H, REVERSE, N, G, S, BB, BN)
    o_y = tile.o_y
    h0 = (tile.n * B + tile.b0) * H
    o_gates = tile.i_b[None, :] * (G * H) + tile.o_n[:, None]
    zeros = _load(None, 0, 0, tile.o_s, tile.mask, None, G)
    y_plane = R.to(tl.int64) * (N * H)
    s_plane = B.to(tl.int64) * H
    w_hh = tensors.w_hh + tile.n * G * H * H
    ws = _matrices(w_hh, H * H, 1, H, tile.o_n, 0, tile.m_n, H, BK, KT, G)
    d = _load(tensors.ds, tile.s0, s_plane, tile.o_s, tile.mask, None, S)
    gr = zeros
    descending = tile.reverse == 0
    # `last` is the step done before, `step_next` the one done after: the reverse of their time.
    last = step_info(u - 1, descending, tile, T, B, tensors)
    step = step_info(u, descending, tile, T, B, tensors)
    while u < u1:
        step_next = step_info(u + 1, descending, tile, T, B, tensors)
        acc = zeros[:1]
        flowed = last.runs & ~last.cut
        if SCOPE == "library":
            acc = _load(tensors.product, h0, 0, tile.o_s, tile.mask & flowed[None, :], None, 1)
        elif SCOPE == "block":
            for g in tl.static_range(G):
                dr = tl.where(last.cut[None, :], 0.0, gr[g])
                acc = _dots(ws, dr, acc, g, 0, 1, PRECISION)
        else:
            dr = tensors.dr + last.row * (N * G * H) + tile.x0
            pitch = N * G * H
            acc = _product(acc, ws, w_hh, 1, H, tile, dr, pitch, flowed, H, G, 1, BK, KT, PRECISION)
        d = add_in_own_layout(acc, d[:1], 1) + d[1:]
        m_run = tile.mask & step.runs[None, :]
        row = step.row * (N * H) + tile.y0
        row_prev = step_next.row * (N * H) + tile.y0
        # The state that entered: of the step before in time, the initial one, or 0 after a reset.
        m_before = m_run & (step_next.runs & ~step.cut)[None, :]
        m_first = m_run & ~(step_next.runs | step.cut)[None, :]
        h_next = _load(tensors.y, row, 0, o_y, m_run, None, 1)
        s_next = h_next + _load(tensors.states, row, y_plane, o_y, m_run, None, S - 1)
        h_prev = _load(tensors.y, row_prev, 0, o_y, m_before, None, 1)
        s_prev = h_prev + _load(tensors.states, row_prev, y_plane, o_y, m_before, None, S - 1)
        s_prev = _load(tensors.state, tile.s0, s_plane, tile.o_s, m_first, s_prev, S)
        dh = _load(tensors.dy, row, 0, o_y, m_run, d, 1)
        ds = dh + _load(tensors.dstates, row, y_plane, o_y, m_run, d[1:], S - 1)
        a = _load(tensors.saved, row, y_plane, o_y, m_run, None, A)
        gx, gr, ds_prev = CELL(a, s_prev, s_next, ds)
        ds_prev = _where(~step.cut[None, :], ds_prev, None, S)
        d = _where(step.runs[None, :], ds_prev, d, S)
        gr = _where(m_run, gr, None, G)
        row_x = step.row * (N * G * H) + tile.x0
        _store(tensors.dx, row_x, H, tile.o_x, gx, m_run, G)
        _store(tensors.dr, row_x, H, tile.o_x, gr, m_run, G)
        _store(tensors.outgoing, h0 * G, H, o_gates, gr, tile.mask, G)
        _store(tensors.h_prev, row, 0, o_y, s_prev, m_run, 1)
        u += 1
        _barrier(counter, first + tl.program_id(1), tl.cdiv(B, BB), u - u0)
        last = step
        step = step_next
    _store(tensors.ds, tile.s0, s_plane, tile.o_s, d, tile.mask, S)
