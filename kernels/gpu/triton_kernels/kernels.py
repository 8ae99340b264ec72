"""The recurrence in Triton: one forward and one backward body for all cells and barrier scopes.

- Time loops are `while`: a `for` would move the resident W_hh to shared memory and read it again
  at every step.
- State 0 is an operand of the product. In block scope it stays in registers; in the other scopes
  programs exchange it through global memory."""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from ...cells import Cell, bind
from ..tensors import BackwardTensors, ForwardTensors
from .tiles import (
    add_given,
    add_in_own_layout,
    any_nonzero,
    barrier,
    dots,
    hidden_zero,
    load_constants,
    load_ends,
    load_matrices,
    load_pointer,
    load_states,
    load_step,
    load_tiles,
    mark_rows,
    product,
    rows_of,
    select_tiles,
    step_info,
    store_gates,
    store_states,
    store_tiles,
    tile_of_program,
    tile_of_step,
    zero_past_ends,
    zero_unmarked,
)


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


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _clamp(x, limit):
    # NaN stays NaN
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _clip_grad(x, limit):
    # It cuts the gradient, in the adjoint.
    return x


# Of a cell of whole rows: `jit_cell` has the number in its place
ROW_UNITS = tl.constexpr(0)


def _row_mean(x):
    # Of units past H only 0 is known: their distance from the mean is not 0.
    units = tl.arange(0, x.shape[0])[:, None]
    total = tl.sum(tl.where(units < ROW_UNITS, x, 0.0), 0, keep_dims=True)
    return tl.zeros_like(x) + total * (1.0 / ROW_UNITS)


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


@lru_cache
def jit_cell(cell: Cell, H: int = 0) -> tuple[Any, Any]:
    """The cell's forward and backward as Triton functions, which the kernels take as arguments; of
    a cell of whole rows for H units, all of which are in a tile."""
    names = dict(
        tl=tl,
        sigmoid=tl.sigmoid,
        tanh=_tanh,
        relu=_relu,
        exp=_exp,
        relu_grad=_relu_grad,
        clamp=_clamp,
        clip_grad=_clip_grad,
        row_mean=triton.jit(bind(_row_mean, ROW_UNITS=tl.constexpr(H))),
        rsqrt=_rsqrt,
        zeros_like=tl.zeros_like,
    )
    return triton.jit(bind(cell.forward, **names)), triton.jit(bind(cell.backward, **names))


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
    CARRIED: tl.constexpr,
    A: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
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
    scope slot u % 2 of `hidden` holds the h that enters step u, from step 1 on."""
    u, u1, T, R = load_step(table, u0, u1, T, R, 0)
    first_states = tensors.first
    last_states = tensors.last
    if table is not None:
        tensors = ForwardTensors(
            x=load_pointer(table, 0, tensors.x),
            w_ih=load_pointer(table, 1, tensors.w_ih),
            w_hh=load_pointer(table, 2, tensors.w_hh),
            b_ih=load_pointer(table, 3, tensors.b_ih),
            b_hh=load_pointer(table, 4, tensors.b_hh),
            y=load_pointer(table, 5, tensors.y),
            states=load_pointer(table, 6, tensors.states),
            saved=load_pointer(table, 7, tensors.saved),
            lengths=load_pointer(table, 8, tensors.lengths),
            offsets=load_pointer(table, 9, tensors.offsets),
            resets=load_pointer(table, 10, tensors.resets),
            # a tuple with None in it cannot be made here
            first=(),
            last=(),
            carried=load_pointer(table, 11 + 2 * S, tensors.carried),
            hidden=load_pointer(table, 12 + 2 * S, tensors.hidden),
            product=load_pointer(table, 13 + 2 * S, tensors.product),
        )
    tile = tile_of_program(first, 0, B, H, REVERSE, N, G, BB, BN)
    m_b = tile.o_b < B
    y_plane = R.to(tl.int64) * (N * H)
    o_gates = tile.i_b[None, :] * (G * H) + tile.o_n[:, None]
    s_plane = B.to(tl.int64) * (N * H)
    w_hh = tensors.w_hh + tile.n * G * H * H
    ws = load_matrices(w_hh, H * H, H, 1, tile.o_n, 0, tile.m_n, H, BK, KT, G)
    wi = ()
    o_x = tile.o_x
    m_x = tile.mask
    x0 = tile.x0
    x_pitch = N * G * H
    if tensors.w_ih is not None:
        w_ih = tensors.w_ih + tile.n * G * H * I
        wi = load_matrices(w_ih, H * I, I, 1, tile.o_n, 0, tile.m_n, I, BI, 1, G)
        o_x = tile.i_b[None, :] * I + tl.arange(0, BI)[:, None]
        m_x = tl.arange(0, BI)[:, None] < I
        x0 = tile.b0 * I
        x_pitch = I
    o_bias = tile.o_n[:, None] + tile.i_b[None, :] * 0
    zeros = load_tiles(None, 0, 0, tile.o_s, tile.mask, None, G)
    bx = load_tiles(tensors.b_ih, tile.n * G * H, H, o_bias, tile.mask, None, G)
    added = None
    if tensors.w_ih is not None and not SEPARATE_RECURRENT_GRAD:
        # x and r meet only as their sum, so that both biases are one
        added = bx
        bx = zeros
    br = load_tiles(tensors.b_hh, tile.n * G * H, H, o_bias, tile.mask, added, G)
    # what the product came before is added to it
    start = None
    if tensors.w_ih is None and tensors.b_ih is not None:
        start = bx
    h_first = load_pointer(table, 11, first_states[0])
    s = load_states(table, 11, first_states, tensors.carried, s_plane, u, tile, CARRIED)
    ends = load_ends(tile, T, B, tensors)
    descending = tile.reverse == 1
    step = step_info(u, descending, tile, ends, T, B, tensors)
    xs = load_tiles(tensors.x, step.row * x_pitch + x0, H, o_x, m_x & step.runs[None, :], start, XN)
    while u < u1:
        at = tile_of_step(u, tile, first, B, H, REVERSE, N, G, BB, BN, WHOLE_ROWS)
        o_step = at.o_x
        m_step = at.mask
        if tensors.w_ih is not None:
            o_step = o_x + hidden_zero(u)
            m_step = m_x
        # x is fetched one step ahead
        step_next = step_info(u + 1, descending, at, ends, T, B, tensors)
        wanted = (step_next.runs & (u + 1 < u1))[None, :]
        row_x = step_next.row * x_pitch + x0
        xs_next = load_tiles(tensors.x, row_x, H, o_step, m_step & wanted, start, XN)
        s = select_tiles(~step.cut[None, :], s, None, CARRIED)
        r = zeros
        if tensors.w_ih is not None and not SEPARATE_RECURRENT_GRAD:
            r = dots(wi, xs[0], zeros, 0, 1, G, PRECISION)
            xs = bx
        entered = m_b & ~step.cut
        if h_first is None:
            entered = entered & (u > 0)
        if SCOPE == "library":
            kept = at.mask & entered[None, :]
            r = load_tiles(tensors.product, at.s0 * G, H, o_gates, kept, None, G)
        elif SCOPE == "block":
            r = dots(ws, s[0], r, 0, 1, G, PRECISION)
        else:
            h = tensors.hidden + (u % 2) * s_plane + at.s0
            if h_first is not None:
                h = tl.where(u == 0, h_first + at.s0, h)
            r = product(r, ws, w_hh, H, 1, at, h, H, entered, H, 1, G, BK, KT, PRECISION)
        r = add_in_own_layout(r, br, G)
        if tensors.w_ih is not None and SEPARATE_RECURRENT_GRAD:
            xs = add_in_own_layout(dots(wi, xs[0], zeros, 0, 1, G, PRECISION), bx, G)
        constants = load_constants(table, 11, first_states, at, at.mask, CARRIED, S)
        s_next, a = CELL(xs, r, s + constants)
        # Units past H stay 0: an infinity there would make NaN of every later sum (0 * infinity).
        written = at.mask & step.runs[None, :]
        row = step.row * (N * H) + at.y0
        s = select_tiles(written, s_next, s, CARRIED)
        m_rows = at.mask & rows_of(step, at, tensors, B)[None, :]
        found = zero_past_ends(s + constants, step.runs, tensors, S)
        a = zero_past_ends(a, step.runs, tensors, A)
        store_tiles(tensors.y, row, 0, at.o_y, found, m_rows, 1)
        store_tiles(tensors.states, row, y_plane, at.o_y, found[1:], m_rows, S - 1)
        store_tiles(tensors.saved, row, y_plane, at.o_y, a, m_rows, A)
        store_tiles(tensors.hidden, (u + 1) % 2 * s_plane + at.s0, 0, at.o_s, s, at.mask, 1)
        u += 1
        barrier(counter, first + tl.program_id(1), tl.cdiv(B, BB), u - u0)
        step = step_next
        xs = xs_next
    s = s + load_constants(table, 11, first_states, tile, tile.mask, CARRIED, S)
    store_states(table, 11 + S, last_states, tensors.carried, s_plane, u1 >= T, s, tile, S)


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
    CARRIED: tl.constexpr,
    A: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    ONE_STEP: tl.constexpr,
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

    Step T only adds W_hh^T dr of the last one to the gradient of h."""
    u, u1, T, R = load_step(table, u0, u1, T, R, 1)
    first_states = tensors.first
    dlast = tensors.dlast
    dfirst = tensors.dfirst
    if table is not None:
        tensors = BackwardTensors(
            w_hh=load_pointer(table, 0, tensors.w_hh),
            y=load_pointer(table, 1, tensors.y),
            states=load_pointer(table, 2, tensors.states),
            saved=load_pointer(table, 3, tensors.saved),
            dy=load_pointer(table, 4, tensors.dy),
            dstates=load_pointer(table, 5, tensors.dstates),
            dx=load_pointer(table, 6, tensors.dx),
            dr=load_pointer(table, 7, tensors.dr),
            h_prev=load_pointer(table, 8, tensors.h_prev),
            marks=load_pointer(table, 9, tensors.marks),
            lengths=load_pointer(table, 10, tensors.lengths),
            offsets=load_pointer(table, 11, tensors.offsets),
            resets=load_pointer(table, 12, tensors.resets),
            first=(),
            dlast=(),
            dfirst=(),
            carried=load_pointer(table, 13 + 3 * S, tensors.carried),
            outgoing=load_pointer(table, 14 + 3 * S, tensors.outgoing),
            product=load_pointer(table, 15 + 3 * S, tensors.product),
        )
    tile = tile_of_program(first, 0, B, H, REVERSE, N, G, BB, BN)
    o_gates = tile.i_b[None, :] * (G * H) + tile.o_n[:, None]
    zeros = load_tiles(None, 0, 0, tile.o_s, tile.mask, None, G)
    y_plane = R.to(tl.int64) * (N * H)
    s_plane = B.to(tl.int64) * (N * H)
    w_hh = tensors.w_hh + tile.n * G * H * H
    ws = load_matrices(w_hh, H * H, 1, H, tile.o_n, 0, tile.m_n, H, BK, KT, G)
    d = load_states(table, 13 + S, dlast, tensors.carried, s_plane, u, tile, S)
    gr = zeros
    ends = load_ends(tile, T, B, tensors)
    descending = tile.reverse == 0
    # `last` is the step done before, `step_next` the one done after: the reverse of their time.
    last = step_info(u - 1, descending, tile, ends, T, B, tensors)
    step = step_info(u, descending, tile, ends, T, B, tensors)
    while u < u1:
        at = tile_of_step(u, tile, first, B, H, REVERSE, N, G, BB, BN, WHOLE_ROWS)
        step_next = step_info(u + 1, descending, at, ends, T, B, tensors)
        acc = zeros[:1]
        flowed = last.runs & ~last.cut
        if SCOPE == "library":
            acc = load_tiles(tensors.product, at.s0, 0, at.o_s, at.mask & flowed[None, :], None, 1)
        elif SCOPE == "block":
            for g in tl.static_range(G):
                dr = tl.where(last.cut[None, :], 0.0, gr[g])
                acc = dots(ws, dr, acc, g, 0, 1, PRECISION)
        else:
            dr = tensors.dr + last.row * (N * G * H) + at.x0
            pitch = N * G * H
            acc = product(acc, ws, w_hh, 1, H, at, dr, pitch, flowed, H, G, 1, BK, KT, PRECISION)
        d = add_in_own_layout(acc, d[:1], 1) + d[1:]
        m_run = at.mask & step.runs[None, :]
        row = step.row * (N * H) + at.y0
        row_prev = step_next.row * (N * H) + at.y0
        # The state that entered: of the step before in time, the initial one, or 0 after a reset.
        m_before = m_run & step_next.runs[None, :] & ~step.cut[None, :]
        m_first = m_run & ~step_next.runs[None, :] & ~step.cut[None, :]
        h_next = load_tiles(tensors.y, row, 0, at.o_y, m_run, None, 1)
        # Constants are read where they were given: their addresses stay, for the L1 cache.
        constants = load_constants(table, 13, first_states, at, m_run, CARRIED, S)
        others = load_tiles(tensors.states, row, y_plane, at.o_y, m_run, None, CARRIED - 1)
        s_next = h_next + others + constants
        h_prev = load_tiles(tensors.y, row_prev, 0, at.o_y, m_before, None, 1)
        others = load_tiles(tensors.states, row_prev, y_plane, at.o_y, m_before, None, CARRIED - 1)
        s_prev = h_prev + others
        s_prev = add_given(table, 13, first_states, 0, at, m_first, s_prev, CARRIED) + constants
        dh = load_tiles(tensors.dy, row, 0, at.o_y, m_run, d, 1)
        ds = dh + load_tiles(tensors.dstates, row, y_plane, at.o_y, m_run, d[1:], S - 1)
        a = load_tiles(tensors.saved, row, y_plane, at.o_y, m_run, None, A)
        gx, gr, ds_prev = CELL(a, s_prev, s_next, ds)
        reached = m_run
        if tensors.resets is not None:
            # Elsewhere 0 times the NaN that a step may hold would be NaN.
            reached = any_nonzero(ds, CARRIED, m_run, WHOLE_ROWS)
            gx = select_tiles(reached, gx, None, G)
            gr = select_tiles(reached, gr, None, G)
            ds_prev = select_tiles(reached, ds_prev, ds, S)
        ds_prev = select_tiles(~step.cut[None, :], ds_prev, None, CARRIED) + ds_prev[CARRIED:]
        d = select_tiles(step.runs[None, :], ds_prev, d, S)
        gr = select_tiles(m_run, gr, None, G)
        gx = zero_past_ends(gx, step.runs, tensors, G)
        rows = rows_of(step, at, tensors, B)
        m_rows = at.mask & rows[None, :]
        row_x = step.row * (N * G * H) + at.x0
        store_gates(tensors.dx, row_x, H, at.o_x, gx, m_rows, G, WHOLE_ROWS)
        store_gates(tensors.dr, row_x, H, at.o_x, gr, m_rows, G, WHOLE_ROWS)
        store_tiles(tensors.outgoing, at.s0 * G, H, o_gates, gr, at.mask, G)
        store_tiles(tensors.h_prev, row, 0, at.o_y, s_prev, m_rows, 1)
        if tensors.marks is not None:
            mark_rows(tensors, step, at, rows, reached, R)
            if ONE_STEP:
                zero_unmarked(tensors, last, at, R, N * H)
        u += 1
        barrier(counter, first + tl.program_id(1), tl.cdiv(B, BB), u - u0)
        last = step
        step = step_next
    store_states(table, 13 + 2 * S, dfirst, tensors.carried, s_plane, u1 > T, d, tile, S)
