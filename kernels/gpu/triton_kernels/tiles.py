"""What both Triton kernels are made of: a program's tile and its steps, loads and stores, products,
and the barrier between programs.

A tile's rows are hidden units and its columns are sequences: 8 sequences fill the matrix unit.
Several tiles (of the gates, the states, the saved activations) are a tuple of N tiles, whose
addresses are `pitch` apart from `first` on.

- What is constant in a kernel is constant in the functions it calls: only kernels declare it.
- Prefixes: i_ index within the tile, o_ offset, m_ mask."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
    # where the first sequence begins: in a step's [B, N, G, H] and [B, N, H], and in [N, B, H]
    x0: Any
    y0: Any
    s0: Any


class Step(NamedTuple):
    """One step of a tile's sequences."""

    # first row
    row: Any
    # whether there is such a step
    inside: Any
    # [BB] sequences that run in it, and those of them whose incoming state is reset
    runs: Any
    cut: Any


@triton.jit
def hidden_zero(u):
    """0 at every step u >= 0, which the compiler does not know.

    What it is added to is computed at each step. Otherwise the compiler would compute all tensors'
    addresses once, and keep them in registers from step to step, beside W_hh."""
    return tl.multiple_of(tl.minimum(u, 0), 16)


@triton.jit
def tile_of_program(first, zero, B, H, REVERSE, N, G, BB, BN):
    n = tl.program_id(2).to(tl.int64)
    b0 = (first + tl.program_id(1)).to(tl.int64) * BB
    i_b = tl.arange(0, BB) + zero
    o_b = b0 + i_b
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = i_b[None, :]
    o_x = row * (N * G * H) + o_n[:, None]
    o_y = row * (N * H) + o_n[:, None]
    o_s = row * H + o_n[:, None]
    x0 = b0 * (N * G * H) + n * G * H
    y0 = b0 * (N * H) + n * H
    s0 = (n * B + b0) * H
    mask = (o_n < H)[:, None] & (o_b < B)[None, :]
    reverse = (REVERSE >> n) & 1
    return Tile(n, reverse, b0, i_b, o_b, o_n, o_n < H, mask, o_x, o_y, o_s, x0, y0, s0)


@triton.jit
def tile_of_step(u, tile, first, B, H, REVERSE, N, G, BB, BN, WHOLE_ROWS):
    """The tile, with offsets of which nothing stays in registers from step to step. Nor do masks
    for whole rows, whose cells have the most tensors."""
    zero = hidden_zero(u)
    if WHOLE_ROWS:
        tile = tile_of_program(first, zero, B, H, REVERSE, N, G, BB, BN)
    else:
        tile = Tile(
            tile.n,
            tile.reverse,
            tile.b0,
            tile.i_b,
            tile.o_b,
            tile.o_n,
            tile.m_n,
            tile.mask,
            tile.o_x + zero,
            tile.o_y + zero,
            tile.o_s + zero,
            tile.x0,
            tile.y0,
            tile.s0,
        )
    return tile


@triton.jit
def load_ends(tile, T, B, tensors):
    """[BB] the number of steps of each sequence."""
    ends = tl.where(tile.o_b < B, T, 0)
    if tensors.lengths is not None:
        ends = tl.load(tensors.lengths + tile.o_b, mask=tile.o_b < B, other=0).to(tl.int32)
    return ends


@triton.jit
def step_info(u, descending, tile, ends, T, B, tensors):
    """Step u of the T steps, counted down in time if `descending`."""
    inside = (u >= 0) & (u < T)
    t = tl.where(descending, T - 1 - u, u)
    row = t.to(tl.int64) * B
    if tensors.offsets is not None:
        row = tl.load(tensors.offsets + t, mask=inside, other=0)
    runs = inside & (t < ends)
    cut = runs & False
    if tensors.resets is not None:
        # A reset at t lies between t - 1 and t: in reverse it cuts off step t - 1.
        boundary = t + tile.reverse
        o_reset = boundary.to(tl.int64) * B + tile.o_b
        cut = tl.load(tensors.resets + o_reset, mask=runs & (boundary < ends), other=0) != 0
    return Step(row, inside, runs, cut)


@triton.jit
def rows_of(step, tile, tensors, B):
    """[BB] the sequences that have a row of the step, which past their end is 0. (Not carried from
    step to step: as a second mask it would cost two barriers in each.)"""
    rows = step.runs
    if tensors.lengths is not None and tensors.offsets is None:
        rows = step.inside & (tile.o_b < B)
    return rows


@triton.jit
def mark_rows(tensors, step, tile, rows, reached, R):
    """Sets the bits of a step's `rows` that run; with resets of those of which a gradient reaches a
    unit, [BN, BB]."""
    marks = tensors.marks + step.row
    if tensors.resets is None:
        once = tl.program_id(0) + tl.program_id(2) == 0
        tl.store(marks + tile.o_b, tl.where(step.runs, -1, 0), mask=rows & once)
    else:
        # all that store, store the same
        o_marks = tile.o_b[None, :] + 0 * tile.o_n[:, None]
        bits = tl.full(reached.shape, -1, tl.int32)
        tl.store(marks + o_marks, bits, mask=reached)
        tl.store(marks + (1 + tile.n) * R + o_marks, bits, mask=reached)


@triton.jit
def zero_unmarked(tensors, last, tile, R, row_pitch):
    """With resets, sets h_prev to 0 in rows of the step done before, in another launch, that are
    not marked."""
    if tensors.resets is not None:
        marks = tensors.marks + (1 + tile.n) * R + last.row
        marked = tl.load(marks + tile.o_b, mask=last.runs, other=0) != 0
        h_prev = tensors.h_prev + last.row * row_pitch + tile.y0
        m_rows = tile.mask & (last.runs & ~marked)[None, :]
        tl.store(h_prev + tile.o_y, 0.0, mask=m_rows)


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
    """An argument of a kernel, or what entry k of a graph's table has in its place. None for
    None."""
    # Triton 3.6 returns None only where a function ends without a value.
    if pointer is not None:
        if table is not None:
            pointer = tl.multiple_of(tl.load(table + 4 + k).to(pointer.dtype), 16)
        return pointer


@triton.jit
def load_tiles(ptr, first, pitch, offsets, mask, start, N):
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
def store_tiles(ptr, first, pitch, offsets, values, mask, N):
    if ptr is not None:
        for k in tl.static_range(N):
            value = values[k].to(ptr.dtype.element_ty)
            tl.store(ptr + first + k * pitch + offsets, value, mask=mask)


@triton.jit
def store_gates(ptr, first, H, offsets, values, mask, G, WHOLE_ROWS):
    """G tiles, H apart. The compiler takes an even gate's for aligned where H is not, and would
    store them in a layout of their own, for which whole rows leave no registers."""
    if WHOLE_ROWS:
        for g in tl.static_range(G):
            store_tiles(ptr, first, 0, offsets, values[g:], mask, 1)
            first += H
    else:
        store_tiles(ptr, first, H, offsets, values, mask, G)


@triton.jit
def select_tiles(mask, a, b, N):
    """For each of N tiles a where the mask is set, else b. A b of None counts as 0."""
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.where(mask, a[k], 0.0 if b is None else b[k]),)
    return out


@triton.jit
def any_nonzero(gradients, N, mask, WHOLE_ROWS):
    """Where one of N tiles of gradients is not 0; of whole rows, or that of another unit is not."""
    out = gradients[0] != 0.0
    for k in tl.static_range(1, N):
        out = out | (gradients[k] != 0.0)
    out = out & mask
    if WHOLE_ROWS:
        out = (tl.max(out.to(tl.int32), 0, keep_dims=True) > 0) & mask
    return out


@triton.jit
def zero_past_ends(values, runs, tensors, N):
    """The N tiles, 0 where a sequence does not run in a step that it has a row of."""
    if tensors.lengths is not None and tensors.offsets is None:
        values = select_tiles(runs[None, :], values, None, N)
    return values


@triton.jit
def add_given(table, k0, given, first, tile, mask, start, N):
    """start + N tiles of states, given as pointers, from the one of number `first` on (a graph's
    table has number 0 in entry k0); None counts as 0."""
    out = ()
    for k in tl.static_range(N):
        ptr = load_pointer(table, k0 + first + k, given[first + k])
        out = out + load_tiles(ptr, tile.s0, 0, tile.o_s, mask, (start[k],), 1)
    return out


@triton.jit
def load_states(table, k0, given, carried, plane, u, tile, S):
    """S tiles: those that the launch before left in `carried`, and before step 0 the given ones, as
    for `add_given`."""
    mask = tile.mask
    if carried is not None:
        mask = mask & (u == 0)
    left = load_tiles(carried, tile.s0, plane, tile.o_s, tile.mask & (u > 0), None, S)
    return add_given(table, k0, given, 0, tile, mask, left, S)


@triton.jit
def load_constants(table, k0, given, tile, mask, CARRIED, S):
    """The states that stay what they are, of the S given ones, as for `add_given`."""
    nothing = load_tiles(None, 0, 0, tile.o_s, mask, None, S - CARRIED)
    return add_given(table, k0, given, CARRIED, tile, mask, nothing, S - CARRIED)


@triton.jit
def store_states(table, k0, given, carried, plane, is_last, values, tile, S):
    """For the next launch, and after the last step where they were asked for."""
    mask = tile.mask
    if carried is not None:
        mask = mask & is_last
        store_tiles(carried, tile.s0, plane, tile.o_s, values, tile.mask, S)
    for k in tl.static_range(S):
        ptr = load_pointer(table, k0 + k, given[k])
        store_tiles(ptr, tile.s0, 0, tile.o_s, (values[k],), mask, 1)


@triton.jit
def load_matrix(ptr, row_pitch, column_pitch, o_row, o_column, m_row, m_column, CACHE):
    offsets = o_row[:, None] * row_pitch + o_column[None, :] * column_pitch
    mask = m_row[:, None] & m_column[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0, cache_modifier=CACHE)


@triton.jit
def load_matrices(w, pitch, row_pitch, column_pitch, o_row, k0, m_row, K, BK, KT, G):
    """Tiles of all gates' weights: for each of G gates, KT tiles of BK columns, from column k0."""
    out = ()
    for i in tl.static_range(G * KT):
        o_k = k0 + (i % KT) * BK + tl.arange(0, BK)
        gate = w + (i // KT) * pitch
        out = out + (load_matrix(gate, row_pitch, column_pitch, o_row, o_k, m_row, o_k < K, ""),)
    return out


@triton.jit
def dots(ws, h, acc, first, step, G, PRECISION):
    """acc[g] + w[g] h for every gate, with w[g] = ws[first + g * step]."""
    out = ()
    for g in tl.static_range(G):
        w = ws[first + g * step]
        out = out + (tl.dot(w, h.to(w.dtype), acc[g], input_precision=PRECISION),)
    return out


@triton.jit
def product(
    acc, ws, w, row_pitch, column_pitch, tile, ptr, pitch, m_b, H, IN, OUT, BK, KT, PRECISION
):
    """acc + W h for OUT gates (forward, IN = 1), or acc + W^T dr over IN gates (adjoint, OUT = 1).

    h or dr is read from `ptr`. W is resident in `ws`, or is read from `w` if KT is 0."""
    for i in tl.static_range(IN * KT):
        o_k = (i % KT) * BK + tl.arange(0, BK)
        # .cg: past the L1 cache, which does not see what other multiprocessors write
        h = load_matrix(ptr + (i // KT) * H, 1, pitch, o_k, tile.i_b, o_k < H, m_b, ".cg")
        acc = dots(ws, h, acc, i, KT, OUT, PRECISION)
    if KT == 0:
        k = 0
        while k < H:
            o_k = k + tl.arange(0, BK)
            wk = load_matrices(
                w, H * H, row_pitch, column_pitch, tile.o_n, k, tile.m_n, H, BK, 1, IN * OUT
            )
            for i in tl.static_range(IN):
                h = load_matrix(ptr + i * H, 1, pitch, o_k, tile.i_b, o_k < H, m_b, "")
                acc = dots(wk, h, acc, i, 1, OUT, PRECISION)
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
def barrier(counter, tile, tiles, count):
    """Wait until all programs that share this of the batch's `tiles` have arrived `count` times.

    A cooperative launch keeps them resident."""
    if counter is not None:
        counter = counter + tl.program_id(2) * tiles + tile
        target = count * tl.num_programs(0)
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        seen = target - 1
        began = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
        while seen < target:
            # a program that has not come for three minutes is an error
            seen = tl.inline_asm_elementwise(
                """{
                    .reg .u64 waited;
                    .reg .pred too_long;
                    mov.u64 waited, %globaltimer;
                    sub.u64 waited, waited, $2;
                    setp.gt.s64 too_long, waited, 180000000000;
                    @too_long trap;
                    ld.acquire.gpu.global.b32 $0, [$1];
                }""",
                "=r,l,l",
                [counter, began],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.debug_barrier()
