// The adjoint of one step of a layer.
#pragma once
#include "single_step_forward.h"

// Rows of the batch from which packing a tile of W costs less than it saves.
constexpr i64 MIN_PACKED_BACKWARD = ACCUMULATORS / VECTORS_PER_TILE + 1;
// Vectors of a tile of one row.
constexpr int VECTORS_OF_ONE_ROW = ACCUMULATORS >= 24 ? 16 : 8;
// Rows of the batch up to which the gradients of W are computed without panels.
constexpr i64 MAX_UNPACKED_GRADIENT = 4;

// A matrix w [rows, columns], and a [B, rows], `stride` apart: their product, or what is in `out`
// plus their product.
struct StepProduct {
  const Number* a;
  const Number* w;
  i64 stride;
  i64 rows;
  i64 columns;
  Number* out;
  bool add;

  // Columns from u on, of so many vectors. If `panel` is null, W is read in place.
  template <int VECTORS, typename ValidLanes>
  void tile(i64 B, i64 u, ValidLanes valid_lanes, const Number* panel) const {
    for_row_tiles<ACCUMULATORS / VECTORS>(B, 0, [&](auto count, i64 b) {
      constexpr int ROWS = decltype(count)::value;
      Vector sums[ROWS][VECTORS];
      Number* const to = out + b * columns + u;
      UNROLLED(i, ROWS) UNROLLED(v, VECTORS)
        sums[i][v] = add ? load(to + i * columns + v * LANES, valid_lanes(v)) : Vector{};
      if (panel) {
        multiply(sums, a + b * stride, stride, 1, panel, rows);
      } else {
        for (i64 k = 0; k < rows; ++k) {
          Vector row[VECTORS];
          UNROLLED(v, VECTORS)
            row[v] = pin_register(load(w + k * columns + u + v * LANES, valid_lanes(v)));
          UNROLLED(i, ROWS) UNROLLED(v, VECTORS)
            sums[i][v] += a[(b + i) * stride + k] * row[v];
        }
      }
      UNROLLED(i, ROWS) UNROLLED(v, VECTORS)
        store(to + i * columns + v * LANES, sums[i][v], valid_lanes(v));
    });
  }
  // Columns `begin` to `end`, by tiles of so many vectors, with W in place.
  template <int VECTORS> void in_place(i64 B, i64 begin, i64 end) const {
    for_unit_tiles<VECTORS * LANES>(begin, end, [&](i64 u, auto valid_lanes) {
      tile<VECTORS>(B, u, valid_lanes, nullptr);
    });
  }
  void packed(i64 B, i64 begin, i64 end, Number* panel) const {
    for_unit_tiles<PANEL_WIDTH>(begin, end, [&](i64 u, auto valid_lanes) {
      UNROLLED(v, VECTORS_PER_TILE) {
        const i64 column = u + v * LANES;
        const Number* const from = w + std::min(columns - 1, column);
        pack_columns(panel + v * LANES, PANEL_WIDTH, from, columns, rows, columns - column);
      }
      tile<VECTORS_PER_TILE>(B, u, valid_lanes, panel);
    });
  }
  // Part i of so many. The fewer rows, the more columns at once, so that W is read in longer runs.
  void part(i64 B, i64 i, i64 parts, Number* panel) const {
    const i64 tiles = (columns + PANEL_WIDTH - 1) / PANEL_WIDTH;
    const i64 begin = i * tiles / parts * PANEL_WIDTH;
    const i64 end = std::min(columns, (i + 1) * tiles / parts * PANEL_WIDTH);
    if (B >= MIN_PACKED_BACKWARD) packed(B, begin, end, panel);
    else if (B == 1) in_place<VECTORS_OF_ONE_ROW>(B, begin, end);
    else if (B <= 3) in_place<4 * VECTORS_PER_TILE>(B, begin, end);
    else if (B <= 6) in_place<2 * VECTORS_PER_TILE>(B, begin, end);
    else in_place<VECTORS_PER_TILE>(B, begin, end);
  }
};

// The gradient w of a matrix, d [B, stride] transposed times the rows `from`, which are in panels
// if they are more than MAX_UNPACKED_GRADIENT; and the gradient b of a bias.
struct StepGradient {
  const Number* d;
  const Number* from;
  i64 stride;
  i64 columns;
  Number* w;
  Number* b;

  // Rows `begin` to `end` of it.
  void rows(i64 B, i64 begin, i64 end) const {
    if (B <= MAX_UNPACKED_GRADIENT) in_place(B, begin, end);
    else packed(B, begin, end);
  }
  void packed(i64 B, i64 begin, i64 end) const {
    constexpr int MAX_ROWS = ACCUMULATORS / VECTORS_PER_TILE;
    for_row_tiles<MAX_ROWS>(end - begin, begin, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      if (w)
        for_unit_tiles<PANEL_WIDTH>(0, columns, [&](i64 u, auto valid_lanes) {
          Vector sums[ROWS][VECTORS_PER_TILE] = {};
          multiply(sums, d + first, 1, stride, from + u * B, B);
          Number* const to = w + first * columns + u;
          UNROLLED(i, ROWS) UNROLLED(v, VECTORS_PER_TILE)
            store(to + i * columns + v * LANES, sums[i][v], valid_lanes(v));
        });
      if (b) {
        Number sums[ROWS] = {};
        for (i64 k = 0; k < B; ++k)
          for (int i = 0; i < ROWS; ++i) sums[i] += d[k * stride + first + i];
        std::memcpy(b + first, sums, sizeof sums);
      }
    });
  }
  // Row by row, as writing takes longer than the products.
  void in_place(i64 B, i64 begin, i64 end) const {
    constexpr int VECTORS = 4;
    for (i64 row = begin; row < end; ++row) {
      if (w)
        for_unit_tiles<VECTORS * LANES>(0, columns, [&](i64 u, auto valid_lanes) {
          Vector sums[VECTORS] = {};
          for (i64 k = 0; k < B; ++k)
            UNROLLED(v, VECTORS)
              sums[v] += d[k * stride + row] *
                         load(from + k * columns + u + v * LANES, valid_lanes(v));
          UNROLLED(v, VECTORS)
            store(w + row * columns + u + v * LANES, sums[v], valid_lanes(v));
        });
      if (b) {
        b[row] = 0;
        for (i64 k = 0; k < B; ++k) b[row] += d[k * stride + row];
      }
    }
  }
};

// Where the memory of step_backward has what, in numbers.
struct StepMemory {
  i64 used = 0;
  // Of rows of dr and dx.
  i64 width;
  // Numbers of a thread's panel.
  i64 panel;
  i64 dr;
  i64 dx;
  i64 dy_below;
  i64 x_panels;
  i64 h_panels;
  i64 panels;

  explicit StepMemory(const StepAdjoint& call) {
    auto take = [&](i64 numbers) { return std::exchange(used, used + padded_to(numbers, 16)); };
    const i64 B = call.B;
    const i64 H = call.H;
    const i64 gate_rows = GATES * H;
    const bool unpacked = B <= MAX_UNPACKED_GRADIENT;
    // Rows a power of 2 apart would have the same place in the caches.
    width = padded_to(gate_rows, LANES) + (gate_rows < 256 ? 0 : LANES);
    panel = B >= MIN_PACKED_BACKWARD ? padded_to(gate_rows * PANEL_WIDTH, 16) : 0;
    dr = take(B * width);
    dx = SEPARATE_RECURRENT_GRAD ? take(B * width) : dr;
    dy_below = take(call.layers > 1 ? B * H : 0);
    x_panels = take(unpacked ? 0 : B * padded_to(std::max(call.I, H), PANEL_WIDTH));
    h_panels = take(unpacked ? 0 : B * padded_to(H, PANEL_WIDTH));
    panels = take(panel * call.threads);
  }
};

// A layer's adjoint.
struct StepLayerAdjoint {
  const StepAdjoint& call;
  const StepMemory& at;
  Number* memory;
  i64 B;
  i64 H;
  i64 I;
  // Of the layer in states.
  i64 offset;
  const Number* const* weights;
  Number* const* grads;
  const Number* saved;
  const Number* x;
  const Number* h;
  const Number* dy;
  Number dy_alike;
  Number* x_grad;

  StepLayerAdjoint(const StepAdjoint& call, const StepMemory& at, Number* memory, i64 l)
      : call(call), at(at), memory(memory), B(call.B), H(call.H), I(l ? call.H : call.I) {
    const bool last = l == call.layers - 1;
    Number* const* const pointers = reinterpret_cast<Number* const*>(&call + 1);
    Number* const dy_below = memory + at.dy_below;
    offset = l * B * H;
    weights = pointers + 2 * l;
    grads = pointers + 2 * call.layers + call.parameters * l;
    saved = call.saved + SAVED_ALL * offset;
    // The first state of the layer below.
    x = l ? saved - STATES * B * H : call.x;
    h = call.s[0] + offset;
    dy = last ? call.dy : dy_below;
    dy_alike = last && call.dy_alike ? *call.dy_alike : 0;
    x_grad = l ? dy_below : call.dx;
  }
  // The gradients of the pre-activations, and those of the states but for what flows through W_hh:
  // a vector of units from u on of sequence b.
  void gates(i64 b, i64 u) const {
    const i64 unit = b * H + u;
    const int lanes = lanes_of_units(u, H);
    Number* const dr = memory + at.dr + b * at.width + u;
    Number* const dx = memory + at.dx + b * at.width + u;
    Vector a[SAVED + 1], s[STATES], n[STATES], d[STATES], x_gates[GATES], r[GATES], p[STATES];
    UNROLLED(k, SAVED) a[k] = load(saved + k * B * H + unit, lanes);
    UNROLLED(k, STATES) {
      s[k] = load(call.s[k] + offset + unit, lanes);
      n[k] = load(saved + (SAVED + k) * B * H + unit, lanes);
      d[k] = k ? Vector{} : number(dy_alike);
      if (dy && !k) d[k] = load(dy + unit, lanes);
      if (call.dn[k]) d[k] += load(call.dn[k] + offset + unit, lanes);
    }
    cell_backward(a, s, n, d, x_gates, r, p);
    UNROLLED(g, GATES) {
      store(dr + g * H, r[g], lanes);
      if (SEPARATE_RECURRENT_GRAD) store(dx + g * H, x_gates[g], lanes);
    }
    UNROLLED(k, STATES) if (call.ds[k]) store(call.ds[k] + offset + unit, p[k], lanes);
  }
  // Vector i of the columns of rows of x or h, into panels.
  void pack(Number* panels, const Number* from, i64 columns, i64 i) const {
    const i64 u = i * LANES;
    Number* const to = panels + u / PANEL_WIDTH * PANEL_WIDTH * B + u % PANEL_WIDTH;
    pack_columns(to, PANEL_WIDTH, from + u, columns, B, columns - u);
  }
  // Part i of so many of the gradients of h, x and the parameters.
  void products(i64 i, i64 parts, Number* panel) const {
    constexpr i64 BLOCK = ACCUMULATORS / VECTORS_PER_TILE;
    const i64 gate_rows = GATES * H;
    const i64 width = at.width;
    const i64 blocks = (gate_rows + BLOCK - 1) / BLOCK;
    const i64 begin = i * blocks / parts * BLOCK;
    const i64 end = std::min(gate_rows, (i + 1) * blocks / parts * BLOCK);
    const bool unpacked = B <= MAX_UNPACKED_GRADIENT;
    const bool biased = call.parameters > 2;
    const Number* const dr = memory + at.dr;
    const Number* const dx = memory + at.dx;
    const Number* const x_rows = unpacked ? x : memory + at.x_panels;
    const Number* const h_rows = unpacked ? h : memory + at.h_panels;
    Number* const h_grad = call.ds[0] ? call.ds[0] + offset : nullptr;
    const StepProduct to_h = {dr, weights[1], width, gate_rows, H, h_grad, true};
    const StepProduct to_x = {dx, weights[0], width, gate_rows, I, x_grad, false};
    const StepGradient of_ih = {dx, x_rows, width, I, grads[0], biased ? grads[2] : nullptr};
    const StepGradient of_hh = {dr, h_rows, width, H, grads[1], biased ? grads[3] : nullptr};
    if (to_h.out) to_h.part(B, i, parts, panel);
    if (to_x.out) to_x.part(B, i, parts, panel);
    of_ih.rows(B, begin, end);
    of_hh.rows(B, begin, end);
  }
};
