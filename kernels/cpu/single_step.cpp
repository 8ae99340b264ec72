// One step of a stack of layers in one direction, and its adjoint: all layers in one call. Each W
// is used once, so it is read in place if few rows are multiplied with it. If not, it is packed a
// tile at a time, just before the tile is used.
#include "recurrence.cpp"

// Rows of the batch from which packing a tile of W costs less than it saves, forward and back.
constexpr i64 MIN_PACKED_FORWARD = 12;
constexpr i64 MIN_PACKED_BACKWARD = ACCUMULATORS / VECTORS_PER_TILE + 1;
// Vectors of a tile of one row.
constexpr int VECTORS_OF_ONE_ROW = ACCUMULATORS >= 24 ? 16 : 8;
// Numbers of memory that are on the stack.
constexpr i64 STACK_NUMBERS = 4096;
// Rows of the batch up to which the gradients of W are computed without panels.
constexpr i64 MAX_UNPACKED_GRADIENT = 4;
// What is saved of each unit: the activations, and the states after the step.
constexpr int SAVED_ALL = SAVED + STATES;

// Tensors are as rnn/single_step.py has them: states and their gradients [L, B, H], saved
// [L, SAVED_ALL, B, H]. `memory` has `size` numbers, none in the first call. After the struct Step
// come pointers, `parameters` of each layer: w_ih, w_hh, and with biases b_ih, b_hh. After the
// struct StepAdjoint come w_ih and w_hh of all layers, then the gradients of the parameters of all.
// What is not wanted is null. If all of dy are the same number, dy_alike has it.

static inline i64 thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int lanes_of_units(i64 u, i64 H) {
  return static_cast<int>(std::min<i64>(LANES, H - u));
}

// Sums across each of N vectors: out[i] is that of v[i]. Every level adds the halves of segments of
// WIDTH numbers, of two vectors at once.
template <int N, int WIDTH = LANES> static inline void sum_lanes(const Vector* v, Number* out) {
#ifdef __clang__  // it has no __builtin_shuffle
  for (int i = 0; i < N; ++i) {
    Number sum = 0.f;
    for (int lane = 0; lane < LANES; ++lane) sum += v[i][lane];
    out[i] = sum;
  }
#else
  if constexpr (WIDTH == 1) {
    UNROLLED(i, N) store(out + i * LANES, v[i], LANES);
  } else {
    constexpr int HALF = WIDTH / 2;
    constexpr int PAIRS = (N + 1) / 2;
    IntegerVector low, high;
    for (int lane = 0; lane < LANES; ++lane) {
      const int own = lane % (LANES / 2);
      low[lane] = lane / (LANES / 2) * LANES + own / HALF * WIDTH + own % HALF;
      high[lane] = low[lane] + HALF;
    }
    Vector next[PAIRS];
    UNROLLED(i, PAIRS) {
      const Vector a = v[2 * i];
      const Vector b = v[std::min(2 * i + 1, N - 1)];
      next[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    sum_lanes<PAIRS, HALF>(next, out);
  }
#endif
}

// Rows of K numbers, and the matrix with whose rows they are multiplied.
struct Factors {
  const Number* a;
  const Number* w;
  i64 K;
};

// sums[i * COLUMNS + m] += a[i] . w[m], one sum for each lane. Past `count` rows of w the last one
// is read again.
template <int ROWS, int COLUMNS>
static inline void add_dots(Vector (&sums)[ROWS * COLUMNS], const Factors& f, i64 count) {
  auto add = [&](i64 k, int lanes) {
    Vector v[COLUMNS];
    UNROLLED(m, COLUMNS) v[m] = load(f.w + std::min<i64>(m, count - 1) * f.K + k, lanes);
    UNROLLED(i, ROWS) {
      const Vector x = load(f.a + i * f.K + k, lanes);
      UNROLLED(m, COLUMNS) sums[i * COLUMNS + m] += x * v[m];
    }
  };
  i64 k = 0;
  for (; k + LANES <= f.K; k += LANES) add(k, LANES);
  if (k < f.K) add(k, static_cast<int>(f.K - k));
}

// to[i, m] = row i times row m of w, summed over all factors, for `count` rows of w from `first` on
// and all B rows. A row of `to` has GATES * LANES numbers. Few rows of w at a time are multiplied
// with all others, so that they stay in the first-level cache.
template <int COUNT>
static inline void dots(Number* to, i64 B, const Factors (&factors)[COUNT], i64 first, i64 count) {
  constexpr int MAX_ROWS = ACCUMULATORS >= 24 ? 4 : 3;
  auto tile = [&](auto rows, auto columns, i64 b, i64 j) {
    constexpr int ROWS = decltype(rows)::value;
    constexpr int COLUMNS = decltype(columns)::value;
    Vector sums[ROWS * COLUMNS] = {};
    for (const Factors& f : factors)
      add_dots<ROWS, COLUMNS>(sums, {f.a + b * f.K, f.w + (first + j) * f.K, f.K}, count - j);
    alignas(VECTOR_BYTES) Number out[(ROWS * COLUMNS + LANES - 1) / LANES * LANES];
    sum_lanes<ROWS * COLUMNS>(sums, out);
    UNROLLED(i, ROWS)
      std::memcpy(to + (b + i) * GATES * LANES + j, out + i * COLUMNS, NUMBER_BYTES * COLUMNS);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, std::min(4, LANES)> four;
  constexpr std::integral_constant<int, std::min(8, LANES)> eight;
  if (B == 1) {
    for (i64 j = 0; j < count; j += eight) tile(one, eight, 0, j);
  } else {
    for (i64 j = 0; j < count; j += four)
      for_row_tiles<MAX_ROWS>(B, 0, [&](auto rows, i64 b) { tile(rows, four, b, j); });
  }
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

  StepLayer(const Step& call, i64 l) : B(call.B), I(l ? call.H : call.I), H(call.H) {
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
  // A vector of units from u on of sequence b, from the products with x and h. If only their sum is
  // needed, that is `r`.
  void finish(i64 b, i64 u, int lanes, const Vector* x, const Vector* r) const {
    Vector gates[GATES], sums[GATES], s_prev[STATES], s_next[STATES], a[SAVED + 1];
    UNROLLED(g, GATES) {
      gates[g] = SEPARATE_RECURRENT_GRAD ? x[g] : Vector{};
      sums[g] = r[g];
      if (b_ih) {
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
  // A tile of units from u on of all rows, with W packed into `panel`.
  void packed(i64 u, Number* panel) const {
    constexpr int WIDTH = GATES * FORWARD_VECTORS;
    constexpr int MAX_ROWS = std::max(1, ACCUMULATORS / WIDTH);
    Number* const hidden = panel + I * WIDTH * LANES;
    pack_tile(panel, w_ih, I, u);
    pack_tile(hidden, w_hh, H, u);
    for_row_tiles<MAX_ROWS>(B, 0, [&](auto count, i64 b) {
      constexpr int ROWS = decltype(count)::value;
      Vector from_x[ROWS][WIDTH] = {};
      Vector from_h[ROWS][WIDTH] = {};
      multiply(SEPARATE_RECURRENT_GRAD ? from_x : from_h, x + b * I, I, 1, panel, I);
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
    });
  }
};

// Returns 0; or, having done nothing, how many numbers of memory it needs if it has fewer.
extern "C" i64 step(const Step& call) {
  const bool in_place = call.B < MIN_PACKED_FORWARD;
  const i64 tile = in_place ? LANES : FORWARD_VECTORS * LANES;
  const i64 tiles = (call.H + tile - 1) / tile;
  const i64 width = GATES * tile;
  const i64 panel = in_place ? 0 : padded_to((std::max(call.I, call.H) + call.H) * width, 16);
  if (panel * call.threads > call.size) return panel * call.threads;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  for (i64 l = 0; l < call.layers; ++l) {
    const StepLayer layer(call, l);
    Number* const own_panel = call.memory + panel * thread_number();
#pragma omp for
    for (i64 i = 0; i < tiles; ++i)
      if (in_place) layer.in_place(i * tile);
      else layer.packed(i * tile, own_panel);
  }
  return 0;
}

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
        b[row] = 0.f;
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
    const i64 K = GATES * H;
    const bool unpacked = B <= MAX_UNPACKED_GRADIENT;
    // Rows a power of 2 apart would have the same place in the caches.
    width = padded_to(K, LANES) + (K < 256 ? 0 : LANES);
    panel = B >= MIN_PACKED_BACKWARD ? padded_to(K * PANEL_WIDTH, 16) : 0;
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
    dy_alike = last && call.dy_alike ? *call.dy_alike : 0.f;
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
    const i64 K = GATES * H;
    const i64 width = at.width;
    const i64 blocks = (K + BLOCK - 1) / BLOCK;
    const i64 begin = i * blocks / parts * BLOCK;
    const i64 end = std::min(K, (i + 1) * blocks / parts * BLOCK);
    const bool unpacked = B <= MAX_UNPACKED_GRADIENT;
    const bool biased = call.parameters > 2;
    const Number* const dr = memory + at.dr;
    const Number* const dx = memory + at.dx;
    const Number* const x_rows = unpacked ? x : memory + at.x_panels;
    const Number* const h_rows = unpacked ? h : memory + at.h_panels;
    Number* const h_grad = call.ds[0] ? call.ds[0] + offset : nullptr;
    const StepProduct to_h = {dr, weights[1], width, K, H, h_grad, true};
    const StepProduct to_x = {dx, weights[0], width, K, I, x_grad, false};
    const StepGradient of_ih = {dx, x_rows, width, I, grads[0], biased ? grads[2] : nullptr};
    const StepGradient of_hh = {dr, h_rows, width, H, grads[1], biased ? grads[3] : nullptr};
    if (to_h.out) to_h.part(B, i, parts, panel);
    if (to_x.out) to_x.part(B, i, parts, panel);
    of_ih.rows(B, begin, end);
    of_hh.rows(B, begin, end);
  }
};

// As `step`.
extern "C" i64 step_backward(const StepAdjoint& call) {
  const StepMemory at(call);
  alignas(64) Number stack[STACK_NUMBERS];
  if (at.used > std::max(STACK_NUMBERS, call.size)) return at.used;
  Number* const memory = at.used <= STACK_NUMBERS ? stack : call.memory;
  const bool unpacked = call.B <= MAX_UNPACKED_GRADIENT;
  const i64 tiles = (call.H + LANES - 1) / LANES;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  for (i64 l = call.layers - 1; l >= 0; --l) {
    const StepLayerAdjoint layer(call, at, memory, l);
    const i64 input_tiles = (layer.I + LANES - 1) / LANES;
    Number* const own_panel = memory + at.panels + at.panel * thread_number();
#pragma omp for nowait
    for (i64 i = 0; i < call.B * tiles; ++i) layer.gates(i / tiles, i % tiles * LANES);
    if (!unpacked && layer.grads[0]) {
#pragma omp for nowait
      for (i64 i = 0; i < input_tiles; ++i)
        layer.pack(memory + at.x_panels, layer.x, layer.I, i);
    }
    if (!unpacked && layer.grads[1]) {
#pragma omp for nowait
      for (i64 i = 0; i < tiles; ++i) layer.pack(memory + at.h_panels, layer.h, call.H, i);
    }
#pragma omp barrier
#pragma omp for
    for (i64 i = 0; i < call.threads; ++i) layer.products(i, call.threads, own_panel);
  }
  return 0;
}
