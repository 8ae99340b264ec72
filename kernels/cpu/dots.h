// Products with rows of a matrix that is read in place: sums within vectors, then across them.
#pragma once
#include "gemm.h"

// Sums across each of N vectors: out[i] is that of v[i]. Every level adds the halves of segments of
// WIDTH numbers, of two vectors at once.
template <int N, int WIDTH = LANES> static inline void sum_lanes(const Vector* v, Number* out) {
#ifdef __clang__  // it has no __builtin_shuffle
  for (int i = 0; i < N; ++i) {
    Number sum = 0;
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
  const Number* w[COLUMNS];
  w[0] = f.w;
  if (count >= COLUMNS) UNROLLED(m, COLUMNS - 1) w[m + 1] = w[m] + f.K;
  else UNROLLED(m, COLUMNS - 1) w[m + 1] = w[m] + (m + 1 < count ? f.K : 0);
  auto add = [&](i64 k, int lanes) {
    Vector v[COLUMNS];
    UNROLLED(m, COLUMNS) v[m] = load(w[m] + k, lanes);
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
