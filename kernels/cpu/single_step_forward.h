// One step of a layer, forward.
#pragma once
#include "cell.h"
#include "dots.h"

// Rows of the batch from which packing a tile of W costs less than it saves.
constexpr i64 MIN_PACKED_FORWARD = 12;
// What is saved of each unit: the activations, and the states after the step.
constexpr int SAVED_ALL = SAVED + STATES;

static inline int lanes_of_units(i64 u, i64 H) {
  return static_cast<int>(std::min<i64>(LANES, H - u));
}

// A layer's step: its tensors; y and saved can be null.
struct StepLayer {
  const Number* x;
  const Number* s[STATES];
  const Number* w_ih;
  const Number* w_hh;
  const Number* b_ih;
  const Number* b_hh;
  Number* y;
  Number* n[STATES];
  Number* saved;
  i64 B;
  i64 I;
  i64 H;
  i64 order;

  StepLayer(const Step& call, i64 l)
      : B(call.B), I(l ? call.H : call.I), H(call.H), order(call.order) {
    const Number* const* const pointers = reinterpret_cast<const Number* const*>(&call + 1);
    const Number* const* const weights = pointers + call.parameters * l;
    const bool biased = call.parameters > 2;
    w_ih = weights[0];
    w_hh = weights[1];
    b_ih = biased ? weights[2] : nullptr;
    b_hh = biased ? weights[3] : nullptr;
    x = l ? call.n[0] + (l - 1) * B * H : call.x;
    UNROLLED(k, STATES) {
      s[k] = call.s[k] + l * B * H;
      n[k] = call.n[k] + l * B * H;
    }
    y = l == call.layers - 1 ? call.y : nullptr;
    saved = call.saved ? call.saved + l * SAVED_ALL * B * H : nullptr;
  }
  // A vector of units from u on of sequence b, from the products with x and h, in which the biases
  // are where the sums have an order. If only their sum is needed, that is `r`.
  void finish(i64 b, i64 u, int lanes, const Vector* x, const Vector* r) const {
    Vector gates[GATES], sums[GATES], s_prev[STATES], s_next[STATES], a[SAVED + 1];
    UNROLLED(g, GATES) {
      gates[g] = SEPARATE_RECURRENT_GRAD ? x[g] : Vector{};
      sums[g] = r[g];
      if (b_ih && !order) {
        (SEPARATE_RECURRENT_GRAD ? gates[g] : sums[g]) += load(b_ih + g * H + u, lanes);
        sums[g] += load(b_hh + g * H + u, lanes);
      }
    }
    const i64 at = b * H + u;
    UNROLLED(k, STATES) s_prev[k] = load(s[k] + at, lanes);
    cell_forward(gates, sums, s_prev, s_next, a);
    if (y) store(y + at, s_next[0], lanes);
    UNROLLED(k, STATES) store(n[k] + at, s_next[k], lanes);
    if (!saved) return;
    UNROLLED(k, SAVED) store(saved + k * B * H + at, a[k], lanes);
    UNROLLED(k, STATES) store(saved + (SAVED + k) * B * H + at, s_next[k], lanes);
  }
  // A vector of units from u on of a few rows, with W in place.
  void in_place(i64 u) const {
    constexpr int PRODUCTS = 1 + SEPARATE_RECURRENT_GRAD;
    const int lanes = lanes_of_units(u, H);
    alignas(VECTOR_BYTES) Number products[PRODUCTS][MIN_PACKED_FORWARD][GATES][LANES];
    const Factors from_x = {x, w_ih, I};
    const Factors from_h = {s[0], w_hh, H};
    UNROLLED(g, GATES) {
      if constexpr (SEPARATE_RECURRENT_GRAD) {
        dots(products[0][0][g], B, {from_x}, g * H + u, lanes);
        dots(products[1][0][g], B, {from_h}, g * H + u, lanes);
      } else {
        dots(products[0][0][g], B, {from_x, from_h}, g * H + u, lanes);
      }
    }
    for (i64 b = 0; b < B; ++b) {
      Vector sums[PRODUCTS][GATES];
      for (int k = 0; k < PRODUCTS; ++k)
        UNROLLED(g, GATES) sums[k][g] = load(products[k][b][g], LANES);
      finish(b, u, lanes, sums[0], sums[PRODUCTS - 1]);
    }
  }
  // A tile of W_ih or W_hh into a panel.
  void pack_tile(Number* to, const Number* w, i64 K, i64 u) const {
    constexpr int WIDTH = GATES * FORWARD_VECTORS;
    UNROLLED(g, GATES) UNROLLED(v, FORWARD_VECTORS) {
      const i64 unit = u + v * LANES;
      const Number* const from = w + (g * H + std::min(H - 1, unit)) * K;
      pack_rows(to + (g * FORWARD_VECTORS + v) * LANES, WIDTH * LANES, from, K, K, H - unit);
    }
  }
  // Sums begin with the biases where they have the order of several steps.
  template <int ROWS, int WIDTH>
  void begin(Vector (&from_x)[ROWS][WIDTH], Vector (&from_h)[ROWS][WIDTH], i64 u) const {
    if (!b_ih) return;
    UNROLLED(j, WIDTH) {
      const i64 unit = u + j % FORWARD_VECTORS * LANES;
      const i64 at = j / FORWARD_VECTORS * H + unit;
      const Vector of_x = load(b_ih + at, lanes_of_units(unit, H));
      const Vector of_h = load(b_hh + at, lanes_of_units(unit, H));
      LOOP(i, ROWS) {
        from_x[i][j] = SEPARATE_RECURRENT_GRAD ? of_x : of_x + of_h;
        from_h[i][j] = of_h;
      }
    }
  }
  // A tile of units from u on of a few rows, with W packed into panels.
  template <int ROWS>
  void packed_rows(i64 u, i64 b, const Number* input, const Number* hidden) const {
    constexpr int WIDTH = GATES * FORWARD_VECTORS;
    Vector from_x[ROWS][WIDTH] = {};
    Vector from_h[ROWS][WIDTH] = {};
    if (order) {
      begin(from_x, from_h, u);
      multiply<ROWS, WIDTH, 1>(from_x, x + b * I, I, 1, input, I);
      if (!SEPARATE_RECURRENT_GRAD) std::memcpy(from_h, from_x, sizeof from_h);
    } else {
      multiply(SEPARATE_RECURRENT_GRAD ? from_x : from_h, x + b * I, I, 1, input, I);
    }
    multiply(from_h, s[0] + b * H, H, 1, hidden, H);
    LOOP(i, ROWS) UNROLLED(v, FORWARD_VECTORS) {
      const i64 unit = u + v * LANES;
      if (unit >= H) continue;
      Vector gates[GATES], sums[GATES];
      UNROLLED(g, GATES) {
        gates[g] = from_x[i][g * FORWARD_VECTORS + v];
        sums[g] = from_h[i][g * FORWARD_VECTORS + v];
      }
      finish(b + i, unit, lanes_of_units(unit, H), gates, sums);
    }
  }
  // Likewise of all rows.
  void packed(i64 u, Number* panel) const {
    constexpr int WIDTH = GATES * FORWARD_VECTORS;
    constexpr int MAX_ROWS = std::max(1, ACCUMULATORS / WIDTH);
    Number* const hidden = panel + I * WIDTH * LANES;
    pack_tile(panel, w_ih, I, u);
    pack_tile(hidden, w_hh, H, u);
    const i64 groups = order ? group_count(order, B, H) : 1;
    for (i64 g = 0; g < groups; ++g) {
      const i64 first = first_of_group(g, groups, B);
      const i64 count = first_of_group(g + 1, groups, B) - first;
      for_row_tiles<MAX_ROWS>(count, first, [&](auto rows, i64 b) {
        packed_rows<decltype(rows)::value>(u, b, panel, hidden);
      });
    }
  }
};
