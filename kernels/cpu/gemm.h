#pragma once
#include "simd.h"

// Matrix products by tiles, whose sums stay in registers. One factor is in panels: by tile, by k, by vector of columns.
// Every tile but those of a cell's gates has this many vectors.
constexpr int TWO = 2, PADDING = TWO * LANES;

// sums[i][v] += a[i] . panel[v], whose a[i, k] is a[i * stride + k * step]. On its own, so that the sums stay in
// registers.
template <int R, int NV>
__attribute__((noinline)) static void multiply(V (&sums)[R][NV], const float* a, i64 stride, i64 step,
                                               const float* panel, i64 K) {
  constexpr int CHAINS = R * NV <= 4 ? 4 : R * NV <= 8 ? 2 : 1;  // so that no product waits for the one before it
  V chains[CHAINS][R][NV] = {};
  i64 k = 0;
  for (; k + CHAINS <= K; k += CHAINS)
    EACH(c, CHAINS) {
      V w[NV];
      EACH(v, NV) w[v] = held(load(panel + ((k + c) * NV + v) * LANES, LANES));
      EACH(i, R) EACH(v, NV) chains[c][i][v] += a[i * stride + (k + c) * step] * w[v];
    }
  for (; k < K; ++k)
    EACH(i, R) EACH(v, NV) chains[0][i][v] += a[i * stride + k * step] * load(panel + (k * NV + v) * LANES, LANES);
  EACH(c, CHAINS) EACH(i, R) EACH(v, NV) sums[i][v] += chains[c][i][v];
}

// Calls body with how many rows a tile has, as an integral constant, and the first of them: as few tiles of at most
// MOST rows as there can be, as even as they can be.
template <int MOST, int R = MOST, typename Body> static inline void by_rows(i64 rows, i64 first, Body&& body) {
  i64 tiles = (rows + MOST - 1) / MOST;
  for (; tiles && (rows + tiles - 1) / tiles == R; rows -= R, first += R, --tiles)
    body(std::integral_constant<int, R>(), first);
  if constexpr (R > 1) by_rows<MOST, R - 1>(rows, first, body);
}

// Calls body with each tile of units, and how many of its units there are from each of its vectors on: a constant if it
// is whole.
template <int UNITS, typename Body> static inline void by_units(i64 begin, i64 end, Body&& body) {
  i64 u = begin;
  for (; u + UNITS <= end; u += UNITS) body(u, [](int) { return LANES; });
  if (u < end) body(u, [=](int v) { return static_cast<int>(end - u - v * LANES); });
}

#ifndef __clang__
// By halves: each level exchanges with the vector whose number differs in one bit the numbers that differ in it.
static inline void transpose(V (&v)[LANES]) {
  _Pragma("GCC unroll 4") for (int bit = 1; bit < LANES; bit *= 2) {
    V next[LANES];
    Bits low, high;
    for (int lane = 0; lane < LANES; ++lane) {
      low[lane] = lane & bit ? LANES + lane - bit : lane;
      high[lane] = lane & bit ? LANES + lane : lane + bit;
    }
    EACH(i, LANES) next[i] = __builtin_shuffle(v[i & ~bit], v[i | bit], i & bit ? high : low);
    EACH(i, LANES) v[i] = next[i];
  }
}
#endif

// Columns of a matrix as the tiles read them: to[k * stride + lane] = from[lane, k], or from[k, lane] if `across`.
static void pack(float* to, i64 stride, const float* from, i64 width, i64 K, i64 lanes, bool across) {
  if (across) {
    for (i64 k = 0; k < K; ++k) store(to + k * stride, load(from + k * width, lanes), LANES);
    return;
  }
  i64 k0 = 0;
#ifndef __clang__  // which has other words for a shuffle
  for (; lanes >= LANES && k0 + LANES <= K; k0 += LANES) {
    V v[LANES];
    EACH(lane, LANES) v[lane] = load(from + lane * width + k0, LANES);
    transpose(v);
    EACH(k, LANES) store(to + (k0 + k) * stride, v[k], LANES);
  }
#endif
  for (; k0 < K; k0 += 16) {  // few enough to stay in the nearest cache
    const i64 k1 = std::min(K, k0 + 16);
    for (i64 lane = 0; lane < std::min<i64>(LANES, lanes); ++lane)
      for (i64 k = k0; k < k1; ++k) to[k * stride + lane] = from[lane * width + k];
    for (i64 lane = std::max<i64>(0, lanes); lane < LANES; ++lane)
      for (i64 k = k0; k < k1; ++k) to[k * stride + lane] = 0.f;
  }
}

// Rows of a product, one after the other or those of `index`, and its first factor's, one after the other.
struct Rows {
  float* out;
  i64 width;
  const i64* index;
  const float* a;
  i64 count;

  float* operator[](i64 i) const { return out + (index ? index[i] : i) * width; }
};

// Rows of `columns` numbers = rows of K numbers times a matrix in panels, plus two biases, or added to what they are.
template <int W>
static void product(const std::vector<Rows>& runs, i64 stride, const float* panels, i64 K, i64 columns, const float* b,
                    const float* b2, bool add) {
  constexpr int MOST = ACCUMULATORS / W;
  by_units<W * LANES>(0, columns, [&](i64 u, auto left) {
    for (const Rows& rows : runs)
      by_rows<MOST>(rows.count, 0, [&](auto count, i64 first) {
        constexpr int ROWS = decltype(count)::value;
        V sums[ROWS][W];
        float* out[ROWS];
        EACH(i, ROWS) out[i] = rows[first + i] + u;
        EACH(v, W) {
          V bias = b ? load(b + u + v * LANES, left(v)) : V{};
          if (b2) bias += load(b2 + u + v * LANES, left(v));
          EACH(i, ROWS) sums[i][v] = add ? load(out[i] + v * LANES, left(v)) : bias;
          EACH(i, ROWS) __builtin_prefetch(out[i] + v * LANES, 1);  // by the time of the sums it is here
        }
        multiply(sums, rows.a + first * stride, stride, 1, panels + u * K, K);
        EACH(i, ROWS) EACH(v, W) store(out[i] + v * LANES, sums[i][v], left(v));
      });
  });
}

// Rows of a matrix [rows, columns] in panels, and what is added to by their product with the transpose of another.
struct Outer {
  const float* panels;
  float* out;
  i64 rows, columns;
};

// Of so many rows and columns of d at a time `outer` has a copy, tile by tile, which stays in the second cache. It is
// too large for the stack of a thread, which may be small.
constexpr int OUTER_ROWS = 1024, OUTER_COLUMNS = ACCUMULATORS / TWO * 2, OUTER_COPY = OUTER_ROWS * OUTER_COLUMNS;

// out [begin to end, columns] = d^T times a matrix, or added to what it is, of each of `outers`; and `sums` likewise of
// the columns of d [K, stride]. `near` is for OUTER_COPY numbers.
static void outer(const float* d, i64 stride, i64 K, i64 begin, i64 end, const Outer (&outers)[2], float* sums,
                  bool add, float* near) {
  constexpr int MOST = ACCUMULATORS / TWO, COLUMNS = OUTER_COLUMNS, DEPTH = OUTER_ROWS;
  for (i64 k0 = 0; k0 < std::max<i64>(K, 1); k0 += DEPTH, add = true) {
    const i64 depth = std::min<i64>(DEPTH, K - k0);
    for (i64 column = begin; column < end; column += COLUMNS) {
      const i64 columns = std::min<i64>(COLUMNS, end - column);
      by_rows<MOST>(columns, 0, [&](auto count, i64 first) {
        constexpr int ROWS = decltype(count)::value;
        float total[ROWS] = {}, *to = near + first * DEPTH;
        for (i64 k = 0; k < depth; ++k)
          for (int i = 0; i < ROWS; ++i) total[i] += to[k * ROWS + i] = d[(k0 + k) * stride + column + first + i];
        if (sums)
          for (int i = 0; i < ROWS; ++i) sums[column + first + i] = total[i] + (add ? sums[column + first + i] : 0.f);
      });
      for (const Outer& o : outers)
        if (o.out)
          by_units<PADDING>(0, o.columns, [&](i64 u, auto left) {
            by_rows<MOST>(columns, 0, [&](auto count, i64 first) {
              constexpr int ROWS = decltype(count)::value;
              V acc[ROWS][TWO];
              float* out = o.out + (column + first) * o.columns + u;
              EACH(i, ROWS) EACH(v, TWO) acc[i][v] = add ? load(out + i * o.columns + v * LANES, left(v)) : V{};
              multiply(acc, near + first * DEPTH, 1, ROWS, o.panels + u * o.rows + k0 * PADDING, depth);
              EACH(i, ROWS) EACH(v, TWO) store(out + i * o.columns + v * LANES, acc[i][v], left(v));
            });
          });
    }
  }
}
