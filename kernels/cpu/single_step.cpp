// One step of a stack of layers in one direction, and its adjoint: all layers in one call. Each W is used once, so it is
// read where it lies if few rows meet it; else it is packed a tile at a time, just before the tile is used.
#include "recurrence.cpp"

// Rows of the batch from which packing a tile of W costs less than it saves, forward and back.
constexpr i64 PACKED_FORWARD = 12, PACKED_BACKWARD = ACCUMULATORS / TWO + 1;
constexpr int ONE = ACCUMULATORS >= 24 ? 16 : 8;  // vectors of columns of a tile of one row
constexpr i64 SMALL = 4096;  // numbers of memory that are on the stack
constexpr i64 FEW_ROWS = 4;  // up to which the gradients of W are made without panels
constexpr int SAVED_ALL = SAVED + STATES;  // what is saved of each unit: the activations, and the states after the step

// Tensors are as rnn/single_step.py has them: states and their gradients [L, B, H], saved [L, SAVED_ALL, B, H]. `memory`
// has `size` numbers, or none are given at first. After struct Step come pointers, `parameters` of each layer: w_ih,
// w_hh, and with biases b_ih, b_hh. After StepAdjoint come w_ih and w_hh of all layers, then the gradients of the
// parameters of all. What is not wanted is null; if all of dy are the same number, dy_alike has it.

static inline i64 padded_to(i64 n, i64 tile) { return (n + tile - 1) / tile * tile; }

static inline i64 thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Sums across each of N vectors: out[i] is that of v[i]. Every level adds the halves of segments of WIDTH numbers, of
// two vectors at once.
template <int N, int WIDTH = LANES> static inline void sum_lanes(const V* v, float* out) {
#ifdef __clang__  // which has other words for a shuffle
  for (int i = 0; i < N; ++i) {
    float sum = 0.f;
    for (int lane = 0; lane < LANES; ++lane) sum += v[i][lane];
    out[i] = sum;
  }
#else
  if constexpr (WIDTH == 1) {
    EACH(i, N) store(out + i * LANES, v[i], LANES);
  } else {
    constexpr int HALF = WIDTH / 2, PAIRS = (N + 1) / 2;
    Bits low, high;
    for (int lane = 0; lane < LANES; ++lane) {
      const int own = lane % (LANES / 2);
      low[lane] = lane / (LANES / 2) * LANES + own / HALF * WIDTH + own % HALF;
      high[lane] = low[lane] + HALF;
    }
    V next[PAIRS];
    EACH(i, PAIRS) {
      const V a = v[2 * i], b = v[std::min(2 * i + 1, N - 1)];
      next[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    sum_lanes<PAIRS, HALF>(next, out);
  }
#endif
}

// Rows of K numbers, and the matrix whose rows they are to be multiplied with.
struct Factors {
  const float *a, *w;
  i64 K;
};

// sums[i * M + m] += a[i] . w[m], still by lanes; past `count` rows of w the last one again.
template <int R, int M>
static inline void add_dots(V (&sums)[R * M], const Factors& f, i64 count) {
  auto add = [&](i64 k, int n) {
    V v[M];
    EACH(m, M) v[m] = load(f.w + std::min<i64>(m, count - 1) * f.K + k, n);
    EACH(i, R) {
      const V x = load(f.a + i * f.K + k, n);
      EACH(m, M) sums[i * M + m] += x * v[m];
    }
  };
  i64 k = 0;
  for (; k + LANES <= f.K; k += LANES) add(k, LANES);
  if (k < f.K) add(k, static_cast<int>(f.K - k));
}

// to[i, m] = row i times row m of w, summed over all factors, for `count` rows of w from `first` on and all B rows. A
// row of `to` has GATES * LANES numbers. Few rows of w at a time meet all others, and stay in the nearest cache.
template <int COUNT>
static inline void dots(float* to, i64 B, const Factors (&factors)[COUNT], i64 first, i64 count) {
  constexpr int MOST = ACCUMULATORS >= 24 ? 4 : 3;
  auto tile = [&](auto rows, auto many, i64 b, i64 j) {
    constexpr int R = decltype(rows)::value, M = decltype(many)::value;
    V sums[R * M] = {};
    for (const Factors& f : factors)
      add_dots<R, M>(sums, {f.a + b * f.K, f.w + (first + j) * f.K, f.K}, count - j);
    alignas(BYTES) float out[(R * M + LANES - 1) / LANES * LANES];
    sum_lanes<R * M>(sums, out);
    EACH(i, R) std::memcpy(to + (b + i) * GATES * LANES + j, out + i * M, 4 * M);
  };
  constexpr std::integral_constant<int, std::min(8, LANES)> eight;
  constexpr std::integral_constant<int, 4> four;
  if (B == 1)
    for (i64 j = 0; j < count; j += eight) tile(std::integral_constant<int, 1>(), eight, 0, j);
  else
    for (i64 j = 0; j < count; j += four)
      by_rows<MOST>(B, 0, [&](auto rows, i64 b) { tile(rows, four, b, j); });
}

// A layer's step: what comes in, and where its results go. y and saved can be null.
struct StepLayer {
  const float *x, *s[STATES], *w_ih, *w_hh, *b_ih, *b_hh;
  float *y, *n[STATES], *saved;
  i64 B, I, H;

  StepLayer(const Step& c, i64 l) : B(c.B), I(l ? c.H : c.I), H(c.H) {
    const float* const* const weights = reinterpret_cast<const float* const*>(&c + 1) + c.parameters * l;
    const bool biased = c.parameters > 2;
    w_ih = weights[0], w_hh = weights[1], b_ih = biased ? weights[2] : nullptr, b_hh = biased ? weights[3] : nullptr;
    x = l ? c.n[0] + (l - 1) * B * H : c.x;
    EACH(k, STATES) s[k] = c.s[k] + l * B * H, n[k] = c.n[k] + l * B * H;
    y = l == c.layers - 1 ? c.y : nullptr;
    saved = c.saved ? c.saved + l * SAVED_ALL * B * H : nullptr;
  }
  // Of sequence b a vector of units from u on, `left` of them: from the products with x and h. If these meet only as
  // their sum, that is `r`.
  void finish(i64 b, i64 u, int left, const V* x, const V* r) const {
    V gates[GATES], sums[GATES], o[STATES], after[STATES], a[SAVED + 1];
    EACH(g, GATES) {
      gates[g] = SPLIT ? x[g] : V{}, sums[g] = r[g];
      if (b_ih) {
        (SPLIT ? gates[g] : sums[g]) += load(b_ih + g * H + u, left);
        sums[g] += load(b_hh + g * H + u, left);
      }
    }
    const i64 at = b * H + u;
    EACH(k, STATES) o[k] = load(s[k] + at, left);
    cell_forward(gates, sums, o, after, a);
    if (y) store(y + at, after[0], left);
    EACH(k, STATES) store(n[k] + at, after[k], left);
    if (!saved) return;
    EACH(k, SAVED) store(saved + k * B * H + at, a[k], left);
    EACH(k, STATES) store(saved + (SAVED + k) * B * H + at, after[k], left);
  }
  // Units from u on of a few rows, with W as it lies.
  void in_place(i64 u) const {
    constexpr int SUMS = 1 + SPLIT;
    const int left = static_cast<int>(std::min<i64>(LANES, H - u));
    alignas(BYTES) float found[SUMS][PACKED_FORWARD][GATES][LANES];
    const Factors from_x = {x, w_ih, I}, from_h = {s[0], w_hh, H};
    EACH(g, GATES) {
      if constexpr (SPLIT) {
        dots(found[0][0][g], B, {from_x}, g * H + u, left);
        dots(found[1][0][g], B, {from_h}, g * H + u, left);
      } else {
        dots(found[0][0][g], B, {from_x, from_h}, g * H + u, left);
      }
    }
    for (i64 b = 0; b < B; ++b) {
      V sums[SUMS][GATES];
      for (int k = 0; k < SUMS; ++k) EACH(g, GATES) sums[k][g] = load(found[k][b][g], LANES);
      finish(b, u, left, sums[0], sums[SUMS - 1]);
    }
  }
  // A tile of units from u on of all rows, with W packed into `panel`.
  void packed(i64 u, float* panel) const {
    constexpr int WIDTH = GATES * WIDE, MOST = std::max(1, ACCUMULATORS / WIDTH);
    auto pack_rows = [&](float* to, const float* w, i64 K) {
      EACH(g, GATES) EACH(v, WIDE)
        pack(to + (g * WIDE + v) * LANES, WIDTH * LANES, w + (g * H + std::min(H - 1, u + v * LANES)) * K, K, K,
             H - u - v * LANES, false);
    };
    float* const hidden = panel + I * WIDTH * LANES;
    pack_rows(panel, w_ih, I), pack_rows(hidden, w_hh, H);
    by_rows<MOST>(B, 0, [&](auto count, i64 b) {
      constexpr int ROWS = decltype(count)::value;
      V from_x[ROWS][WIDTH] = {}, from_h[ROWS][WIDTH] = {};
      multiply(SPLIT ? from_x : from_h, x + b * I, I, 1, panel, I);
      multiply(from_h, s[0] + b * H, H, 1, hidden, H);
      ROW(i, ROWS) EACH(v, WIDE) {
        const i64 unit = u + v * LANES;
        if (unit >= H) continue;
        V gates[GATES], sums[GATES];
        EACH(g, GATES) gates[g] = from_x[i][g * WIDE + v], sums[g] = from_h[i][g * WIDE + v];
        finish(b + i, unit, static_cast<int>(std::min<i64>(LANES, H - unit)), gates, sums);
      }
    });
  }
};

// Returns 0; or, having done nothing, how many numbers of memory it needs if it has fewer.
extern "C" i64 step(const Step& c) {
  const bool in_place = c.B < PACKED_FORWARD;
  const i64 tile = in_place ? LANES : WIDE * LANES, tiles = (c.H + tile - 1) / tile;
  const i64 panel = in_place ? 0 : padded_to((std::max(c.I, c.H) + c.H) * GATES * tile, 16);
  if (panel * c.threads > c.size) return panel * c.threads;
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
  for (i64 l = 0; l < c.layers; ++l) {
    const StepLayer layer(c, l);
    float* const own = c.memory + panel * thread_number();
#pragma omp for
    for (i64 i = 0; i < tiles; ++i)
      if (in_place) layer.in_place(i * tile);
      else layer.packed(i * tile, own);
  }
  return 0;
}

// Rows of a matrix [rows, columns] that are multiplied with a [B, rows], and their sum, or what is there plus their sum.
struct StepProduct {
  const float *a, *w;
  i64 stride, rows, columns;
  float* out;
  bool add;

  // Columns from u on, NV vectors.
  template <int NV, typename Left>
  void tile(i64 B, i64 u, Left left, const float* panel) const {
    by_rows<ACCUMULATORS / NV>(B, 0, [&](auto count, i64 b) {
      constexpr int ROWS = decltype(count)::value;
      V sums[ROWS][NV];
      float* const to = out + b * columns + u;
      EACH(i, ROWS) EACH(v, NV) sums[i][v] = add ? load(to + i * columns + v * LANES, left(v)) : V{};
      if (panel) multiply(sums, a + b * stride, stride, 1, panel, rows);
      else
        for (i64 k = 0; k < rows; ++k) {
          V row[NV];
          EACH(v, NV) row[v] = held(load(w + k * columns + u + v * LANES, left(v)));
          EACH(i, ROWS) EACH(v, NV) sums[i][v] += a[(b + i) * stride + k] * row[v];
        }
      EACH(i, ROWS) EACH(v, NV) store(to + i * columns + v * LANES, sums[i][v], left(v));
    });
  }
  // Those of part `i` of so many. The fewer rows, the more columns at once, so that W is read in longer runs.
  void part(i64 B, i64 i, i64 parts, float* panel) const {
    const i64 tiles = (columns + PADDING - 1) / PADDING;
    const i64 begin = i * tiles / parts * PADDING, end = std::min(columns, (i + 1) * tiles / parts * PADDING);
    if (B >= PACKED_BACKWARD)
      by_units<PADDING>(begin, end, [&](i64 u, auto left) {
        EACH(v, TWO)
          pack(panel + v * LANES, PADDING, w + std::min(columns - 1, u + v * LANES), columns, rows,
               columns - u - v * LANES, true);
        tile<TWO>(B, u, left, panel);
      });
    else if (B == 1)
      by_units<ONE * LANES>(begin, end, [&](i64 u, auto left) { tile<ONE>(B, u, left, nullptr); });
    else if (B <= 3)
      by_units<4 * PADDING>(begin, end, [&](i64 u, auto left) { tile<4 * TWO>(B, u, left, nullptr); });
    else if (B <= 6)
      by_units<2 * PADDING>(begin, end, [&](i64 u, auto left) { tile<2 * TWO>(B, u, left, nullptr); });
    else by_units<PADDING>(begin, end, [&](i64 u, auto left) { tile<TWO>(B, u, left, nullptr); });
  }
};

// The gradient of a matrix, d [B, stride] transposed times rows `from`, in panels if they are more than FEW_ROWS; and of
// a bias.
struct StepGradient {
  const float *d, *from;
  i64 stride, columns;
  float *w, *b;

  // Its rows from `begin` to `end`.
  void rows(i64 B, i64 begin, i64 end) const {
    if (B <= FEW_ROWS) {
      in_place(B, begin, end);
      return;
    }
    by_rows<ACCUMULATORS / TWO>(end - begin, begin, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      if (w)
        by_units<PADDING>(0, columns, [&](i64 u, auto left) {
          V sums[ROWS][TWO] = {};
          multiply(sums, d + first, 1, stride, from + u * B, B);
          float* const to = w + first * columns + u;
          EACH(i, ROWS) EACH(v, TWO) store(to + i * columns + v * LANES, sums[i][v], left(v));
        });
      if (b) {
        float sums[ROWS] = {};
        for (i64 k = 0; k < B; ++k)
          for (int i = 0; i < ROWS; ++i) sums[i] += d[k * stride + first + i];
        std::memcpy(b + first, sums, sizeof sums);
      }
    });
  }
  // Likewise: writing takes longer than the products.
  void in_place(i64 B, i64 begin, i64 end) const {
    for (i64 row = begin; row < end; ++row) {
      if (w)
        by_units<4 * LANES>(0, columns, [&](i64 u, auto left) {
          V sums[4] = {};
          for (i64 k = 0; k < B; ++k)
            EACH(v, 4) sums[v] += d[k * stride + row] * load(from + k * columns + u + v * LANES, left(v));
          EACH(v, 4) store(w + row * columns + u + v * LANES, sums[v], left(v));
        });
      if (b) {
        b[row] = 0.f;
        for (i64 k = 0; k < B; ++k) b[row] += d[k * stride + row];
      }
    }
  }
};

// As `step`.
extern "C" i64 step_backward(const StepAdjoint& c) {
  const i64 B = c.B, H = c.H, K = GATES * H, widest = std::max(c.I, H), last = c.layers - 1;
  // Rows a power of 2 apart would have the same place in the caches.
  const i64 width = padded_to(K, LANES) + (K < 256 ? 0 : LANES);
  alignas(64) float small[SMALL];
  i64 used = 0;
  auto take = [&](i64 numbers) { return std::exchange(used, used + padded_to(numbers, 16)); };
  const bool few = B <= FEW_ROWS;
  const i64 panel = B >= PACKED_BACKWARD ? padded_to(K * PADDING, 16) : 0;
  const i64 at_dr = take(B * width), at_dx = SPLIT ? take(B * width) : at_dr, at_below = take(last ? B * H : 0);
  const i64 at_x = take(few ? 0 : B * padded_to(widest, PADDING)), at_h = take(few ? 0 : B * padded_to(H, PADDING));
  const i64 at_panels = take(panel * c.threads);
  if (used > std::max(SMALL, c.size)) return used;
  float* const memory = used <= SMALL ? small : c.memory;
  float *const dr = memory + at_dr, *const dx = memory + at_dx, *const below = memory + at_below;
  float *const x_panels = memory + at_x, *const h_panels = memory + at_h, *const panels = memory + at_panels;
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
  for (i64 l = last; l >= 0; --l) {
    const i64 I = l ? H : c.I, layer = l * B * H, tiles = (H + LANES - 1) / LANES, I_tiles = (I + LANES - 1) / LANES;
    float* const* const pointers = reinterpret_cast<float* const*>(&c + 1);
    float *const *const weights = pointers + 2 * l, *const *const grads = pointers + 2 * c.layers + c.parameters * l;
    const bool biased = c.parameters > 2;
    const float* const saved = c.saved + SAVED_ALL * layer;
    const float* const x = l ? saved - STATES * B * H : c.x;  // the first state of the layer below
    const float *const h = c.s[0] + layer, *const dy = l == last ? c.dy : below;
    const V alike = number(l == last && c.dy_alike ? *c.dy_alike : 0.f);
    float *const own = panels + panel * thread_number(), *const x_grad = l ? below : c.dx;
#pragma omp for nowait
    for (i64 i = 0; i < B * tiles; ++i) {
      const i64 b = i / tiles, u = i % tiles * LANES, at = b * H + u;
      const int left = static_cast<int>(std::min<i64>(LANES, H - u));
      V a[SAVED + 1], o[STATES], n[STATES], d[STATES], gates[GATES], r[GATES], p[STATES];
      EACH(k, SAVED) a[k] = load(saved + k * B * H + at, left);
      EACH(k, STATES) {
        o[k] = load(c.s[k] + layer + at, left), n[k] = load(saved + (SAVED + k) * B * H + at, left);
        d[k] = k ? V{} : dy ? load(dy + at, left) : alike;
        if (c.dn[k]) d[k] += load(c.dn[k] + layer + at, left);
      }
      cell_backward(a, o, n, d, gates, r, p);
      EACH(g, GATES) {
        store(dr + b * width + g * H + u, r[g], left);
        if (SPLIT) store(dx + b * width + g * H + u, gates[g], left);
      }
      EACH(k, STATES) if (c.ds[k]) store(c.ds[k] + layer + at, p[k], left);
    }
    // Columns of rows of `width` numbers into panels.
    auto pack_columns = [&](float* to, const float* from, i64 columns, i64 i) {
      const i64 u = i * LANES;
      pack(to + u / PADDING * PADDING * B + u % PADDING, PADDING, from + u, columns, B, columns - u, true);
    };
    if (!few && grads[0]) {
#pragma omp for nowait
      for (i64 i = 0; i < I_tiles; ++i) pack_columns(x_panels, x, I, i);
    }
    if (!few && grads[1]) {
#pragma omp for nowait
      for (i64 i = 0; i < tiles; ++i) pack_columns(h_panels, h, H, i);
    }
#pragma omp barrier
    const StepProduct to_h = {dr, weights[1], width, K, H, c.ds[0] ? c.ds[0] + layer : nullptr, true};
    const StepProduct to_x = {dx, weights[0], width, K, I, x_grad, false};
    const StepGradient of_ih = {dx, few ? x : x_panels, width, I, grads[0], biased ? grads[2] : nullptr};
    const StepGradient of_hh = {dr, few ? h : h_panels, width, H, grads[1], biased ? grads[3] : nullptr};
    const i64 parts = c.threads, each = ACCUMULATORS / TWO, blocks = (K + each - 1) / each;
#pragma omp for
    for (i64 i = 0; i < parts; ++i) {
      if (to_h.out) to_h.part(B, i, parts, own);
      if (to_x.out) to_x.part(B, i, parts, own);
      const i64 begin = i * blocks / parts * each, end = std::min(K, (i + 1) * blocks / parts * each);
      of_ih.rows(B, begin, end), of_hh.rows(B, begin, end);
    }
  }
  return 0;
}
