// Matrix products by tiles, whose sums stay in registers. One factor is packed into panels: by
// tile, by k, by vector of columns.
#pragma once
#include "simd.h"

// Of all tiles but those of a cell's gates.
constexpr int VECTORS_PER_TILE = 2;
constexpr int PANEL_WIDTH = VECTORS_PER_TILE * LANES;

// Where row 0 of column u lies in a matrix [rows, columns] packed into panels [columns /
// PANEL_WIDTH, rows, PANEL_WIDTH]; its other rows follow PANEL_WIDTH numbers apart.
static inline i64 panel_offset(i64 u, i64 rows) {
  return u / PANEL_WIDTH * PANEL_WIDTH * rows + u % PANEL_WIDTH;
}

// How many sums of its own each element has, so that no product waits for the one before it. With
// FIXED_ORDER one, so that the order of a sum does not depend on the rows of its tile.
constexpr int independent_sums(int vectors) {
  if (FIXED_ORDER) return 1;
  if (vectors <= 4) return 4;
  return vectors <= 8 ? 2 : 1;
}

// sums[i][v] += a[i] . panel[v], where a[i, k] is a[i * stride + k * step]. Not inlined, or the
// sums do not stay in registers.
template <int ROWS, int VECTORS, int CHAINS = independent_sums(ROWS * VECTORS)>
__attribute__((noinline)) static void multiply(Vector (&sums)[ROWS][VECTORS], const Number* a,
                                               i64 stride, i64 step, const Number* panel, i64 K) {
  Vector chains[CHAINS][ROWS][VECTORS] = {};
  i64 k = 0;
  for (; k + CHAINS <= K; k += CHAINS)
    UNROLLED(c, CHAINS) {
      Vector w[VECTORS];
      UNROLLED(v, VECTORS)
        w[v] = pin_register(load(panel + ((k + c) * VECTORS + v) * LANES, LANES));
      UNROLLED(i, ROWS) UNROLLED(v, VECTORS)
        chains[c][i][v] += a[i * stride + (k + c) * step] * w[v];
    }
  for (; k < K; ++k)
    UNROLLED(i, ROWS) UNROLLED(v, VECTORS)
      chains[0][i][v] += a[i * stride + k * step] * load(panel + (k * VECTORS + v) * LANES, LANES);
  UNROLLED(c, CHAINS) UNROLLED(i, ROWS) UNROLLED(v, VECTORS) sums[i][v] += chains[c][i][v];
}

// Calls body(count, first) for each tile of rows, `count` being an integral constant: as few tiles
// of at most MAX_ROWS rows as possible, as even as possible.
template <int MAX_ROWS, int ROWS = MAX_ROWS, typename Body>
static inline void for_row_tiles(i64 rows, i64 first, Body&& body) {
  i64 tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (; tiles && (rows + tiles - 1) / tiles == ROWS; rows -= ROWS, first += ROWS, --tiles)
    body(std::integral_constant<int, ROWS>(), first);
  if constexpr (ROWS > 1) for_row_tiles<MAX_ROWS, ROWS - 1>(rows, first, body);
}

// Calls body(u, valid_lanes) for each tile of UNITS columns from u on. valid_lanes(v) is how many
// columns there are from its vector v on: a constant if the tile is whole.
template <int UNITS, typename Body>
static inline void for_unit_tiles(i64 begin, i64 end, Body&& body) {
  i64 u = begin;
  for (; u + UNITS <= end; u += UNITS) body(u, [](int) { return LANES; });
  if (u < end) body(u, [=](int v) { return static_cast<int>(end - u - v * LANES); });
}

#ifndef __clang__
// By halves: each level exchanges the numbers whose lane differs in one bit from their vector's
// index, with the vector whose index differs in that bit.
static inline void transpose(Vector (&v)[LANES]) {
  _Pragma("GCC unroll 4") for (int bit = 1; bit < LANES; bit *= 2) {
    Vector next[LANES];
    IntegerVector low, high;
    for (int lane = 0; lane < LANES; ++lane) {
      low[lane] = lane & bit ? LANES + lane - bit : lane;
      high[lane] = lane & bit ? LANES + lane : lane + bit;
    }
    UNROLLED(i, LANES)
      next[i] = __builtin_shuffle(v[i & ~bit], v[i | bit], i & bit ? high : low);
    UNROLLED(i, LANES) v[i] = next[i];
  }
}
#endif

// Rows of a matrix, `width` numbers apart, into columns of a panel, and zeros in lanes past
// `lanes`: to[k * stride + lane] = from[lane, k].
static void pack_rows(Number* to, i64 stride, const Number* from, i64 width, i64 K, i64 lanes) {
  i64 k0 = 0;
#ifndef __clang__  // it has no __builtin_shuffle
  for (; lanes >= LANES && k0 + LANES <= K; k0 += LANES) {
    Vector v[LANES];
    UNROLLED(lane, LANES) v[lane] = load(from + lane * width + k0, LANES);
    transpose(v);
    UNROLLED(k, LANES) store(to + (k0 + k) * stride, v[k], LANES);
  }
#endif
  // Blocks that stay in the first-level cache.
  for (; k0 < K; k0 += 16) {
    const i64 k1 = std::min(K, k0 + 16);
    for (i64 lane = 0; lane < std::min<i64>(LANES, lanes); ++lane)
      for (i64 k = k0; k < k1; ++k) to[k * stride + lane] = from[lane * width + k];
    for (i64 lane = std::max<i64>(0, lanes); lane < LANES; ++lane)
      for (i64 k = k0; k < k1; ++k) to[k * stride + lane] = 0;
  }
}

// Likewise columns of a matrix: to[k * stride + lane] = from[k, lane].
static void pack_columns(Number* to, i64 stride, const Number* from, i64 width, i64 K, i64 lanes) {
  for (i64 k = 0; k < K; ++k) store(to + k * stride, load(from + k * width, lanes), LANES);
}

// Rows of a product, one after the other or those of `index`, and the rows of its first factor,
// which are one after the other.
struct RowBlock {
  Number* out;
  i64 width;
  const i64* index;
  const Number* a;
  i64 count;

  Number* operator[](i64 i) const { return out + (index ? index[i] : i) * width; }
};

// Rows of K numbers, `stride` apart, times a matrix in panels of VECTORS vectors: a result of
// `columns` columns, plus two biases that can be null, or added to what is there. An element has
// one sum, so that its bits do not depend on the rows of its tile.
template <int VECTORS>
static void product(const std::vector<RowBlock>& blocks, i64 stride, const Number* panels, i64 K,
                    i64 columns, const Number* bias1, const Number* bias2, bool add) {
  constexpr int MAX_ROWS = ACCUMULATORS / VECTORS;
  for_unit_tiles<VECTORS * LANES>(0, columns, [&](i64 u, auto valid_lanes) {
    for (const RowBlock& block : blocks)
      for_row_tiles<MAX_ROWS>(block.count, 0, [&](auto count, i64 first) {
        constexpr int ROWS = decltype(count)::value;
        Vector sums[ROWS][VECTORS];
        Number* out[ROWS];
        UNROLLED(i, ROWS) out[i] = block[first + i] + u;
        UNROLLED(v, VECTORS) {
          const i64 at = u + v * LANES;
          Vector bias = bias1 ? load(bias1 + at, valid_lanes(v)) : Vector{};
          if (bias2) bias += load(bias2 + at, valid_lanes(v));
          UNROLLED(i, ROWS)
            sums[i][v] = add ? load(out[i] + v * LANES, valid_lanes(v)) : bias;
          // By the time that the sums are ready, their place is in the cache.
          UNROLLED(i, ROWS) __builtin_prefetch(out[i] + v * LANES, 1);
        }
        multiply<ROWS, VECTORS, 1>(sums, block.a + first * stride, stride, 1, panels + u * K, K);
        UNROLLED(i, ROWS) UNROLLED(v, VECTORS)
          store(out[i] + v * LANES, sums[i][v], valid_lanes(v));
      });
  });
}

// A matrix [rows, columns] in panels, and where the product of another's transpose with it goes;
// nowhere if `out` is null.
struct OuterProduct {
  const Number* panels;
  Number* out;
  i64 rows;
  i64 columns;
};

// outer_products copies a block of so many rows and columns of d, which stays in the second-level
// cache. The copy is too large for the stack of a thread, which may be small.
constexpr int OUTER_ROWS = 1024;
constexpr int OUTER_COLUMNS = ACCUMULATORS / VECTORS_PER_TILE * 2;
constexpr int OUTER_COPY = OUTER_ROWS * OUTER_COLUMNS;

// Copies `columns` columns of `depth` rows of d, by tiles of columns; and their sums over the rows
// go to `sums` if it is not null, or are added to what is there.
static void copy_and_sum(Number* copy, const Number* d, i64 stride, i64 depth, i64 columns,
                         Number* sums, bool add) {
  constexpr int MAX_ROWS = ACCUMULATORS / VECTORS_PER_TILE;
  for_row_tiles<MAX_ROWS>(columns, 0, [&](auto count, i64 first) {
    constexpr int ROWS = decltype(count)::value;
    Number total[ROWS] = {};
    Number* const to = copy + first * OUTER_ROWS;
    for (i64 k = 0; k < depth; ++k)
      for (int i = 0; i < ROWS; ++i)
        total[i] += to[k * ROWS + i] = d[k * stride + first + i];
    if (sums)
      for (int i = 0; i < ROWS; ++i)
        sums[first + i] = total[i] + (add ? sums[first + i] : 0);
  });
}

// For each of `products`, out [begin to end, columns] = d^T times its matrix, or is added to. d is
// [K, stride]; `sums` are those of its columns, likewise. `copy` is for OUTER_COPY numbers.
static void outer_products(const Number* d, i64 stride, i64 K, i64 begin, i64 end,
                           const OuterProduct (&products)[2], Number* sums, bool add,
                           Number* copy) {
  constexpr int MAX_ROWS = ACCUMULATORS / VECTORS_PER_TILE;
  for (i64 k0 = 0; k0 < std::max<i64>(K, 1); k0 += OUTER_ROWS, add = true) {
    const i64 depth = std::min<i64>(OUTER_ROWS, K - k0);
    for (i64 column = begin; column < end; column += OUTER_COLUMNS) {
      const i64 columns = std::min<i64>(OUTER_COLUMNS, end - column);
      copy_and_sum(copy, d + k0 * stride + column, stride, depth, columns,
                   sums ? sums + column : nullptr, add);
      for (const OuterProduct& product : products) {
        if (!product.out) continue;
        for_unit_tiles<PANEL_WIDTH>(0, product.columns, [&](i64 u, auto valid_lanes) {
          const Number* const panel = product.panels + u * product.rows + k0 * PANEL_WIDTH;
          for_row_tiles<MAX_ROWS>(columns, 0, [&](auto count, i64 first) {
            constexpr int ROWS = decltype(count)::value;
            Vector acc[ROWS][VECTORS_PER_TILE];
            Number* const out = product.out + (column + first) * product.columns + u;
            UNROLLED(i, ROWS) UNROLLED(v, VECTORS_PER_TILE)
              acc[i][v] = add ? load(out + i * product.columns + v * LANES, valid_lanes(v))
                              : Vector{};
            multiply(acc, copy + first * OUTER_ROWS, 1, ROWS, panel, depth);
            UNROLLED(i, ROWS) UNROLLED(v, VECTORS_PER_TILE)
              store(out + i * product.columns + v * LANES, acc[i][v], valid_lanes(v));
          });
        });
      }
    }
  }
}
