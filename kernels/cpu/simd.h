// SIMD vectors of the width of the machine's registers, and the functions of a cell on them.
#pragma once
#ifndef GATES  // in an editor
#include "example_cell.h"
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
// Not unrolled, where that would make too much code, slow to compile.
#define LOOP(i, n) _Pragma("GCC unroll 1") for (int i = 0; i < (n); ++i)

typedef int64_t i64;
typedef NUMBER Number;

// What an exponential needs to know of a type of number.
template <typename T> struct Format;

template <> struct Format<float> {
  typedef int32_t Integer;
  static constexpr int MANTISSA_BITS = 23;
  static constexpr int BIAS = 127;
  static constexpr float LOG2_E = 1.44269504f;
  // log 2 in two parts: n times the first is exact.
  static constexpr float LOG_2_HIGH = 0.693145752f;
  static constexpr float LOG_2_LOW = 1.42860677e-6f;
  static constexpr int TAYLOR_TERMS = 7;
  // e^x and e^-x are normal numbers up to here.
  static constexpr float LARGEST = 87;
};

template <> struct Format<double> {
  typedef int64_t Integer;
  static constexpr int MANTISSA_BITS = 52;
  static constexpr int BIAS = 1023;
  static constexpr double LOG2_E = 1.4426950408889634;
  static constexpr double LOG_2_HIGH = 6.93147180369123816490e-1;
  static constexpr double LOG_2_LOW = 1.90821492927058770002e-10;
  static constexpr int TAYLOR_TERMS = 13;
  static constexpr double LARGEST = 708;
};

typedef Format<Number>::Integer Integer;

// ACCUMULATORS is how many registers hold the sums of a tile; the others are for its factors.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
constexpr int ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16;
constexpr int ACCUMULATORS = 24;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int ACCUMULATORS = 12;
#endif
constexpr int NUMBER_BYTES = sizeof(Number);
constexpr int LANES = VECTOR_BYTES / NUMBER_BYTES;

typedef Number Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef Number UnalignedVector
    __attribute__((vector_size(VECTOR_BYTES), aligned(NUMBER_BYTES), may_alias));
typedef Integer IntegerVector __attribute__((vector_size(VECTOR_BYTES)));

// The first n lanes; the others are zero.
static inline Vector load(const Number* from, int n) {
  if (n >= LANES) return *reinterpret_cast<const UnalignedVector*>(from);
  Vector v = {};
  if (n > 0) std::memcpy(&v, from, NUMBER_BYTES * n);
  return v;
}

static inline void store(Number* to, Vector v, int n) {
  if (n >= LANES) *reinterpret_cast<UnalignedVector*>(to) = v;
  else if (n > 0) std::memcpy(to, &v, NUMBER_BYTES * n);
}

// Keeps the vector in a register. GCC would load it again for each product of a small tile, which
// makes loads the bottleneck.
static inline Vector pin_register(Vector v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

static inline Vector number(Number v) { return Vector{} + v; }

// NaN stays NaN.
static inline Vector clamp(Vector x, Vector limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}
static inline Vector clamp(Vector x, Number limit) { return clamp(x, number(limit)); }
// Cuts the gradient, in the adjoint.
static inline Vector clip_grad(Vector x, Vector) { return x; }

// TAYLOR[k] = 1 / k!
struct TaylorSeries {
  Number coefficients[Format<Number>::TAYLOR_TERMS + 1];

  constexpr TaylorSeries() : coefficients() {
    Number factorial = 1;
    for (int k = 0; k <= Format<Number>::TAYLOR_TERMS; factorial *= ++k)
      coefficients[k] = 1 / factorial;
  }
  constexpr Number operator[](int k) const { return coefficients[k]; }
};
constexpr TaylorSeries TAYLOR;

// e^x = scale (1 + p) for |x| <= LARGEST and a little more: x = n log 2 + r, scale = 2^n, and
// p = e^r - 1 by Taylor's series.
struct Exponential {
  typedef Format<Number> Of;
  Vector scale;
  Vector p;

  Exponential(Vector x) {
    // 1.5 2^MANTISSA_BITS and the exponent's bias: the sum rounds to n, and has it in its last bits.
    constexpr Number shift = (i64(3) << (Of::MANTISSA_BITS - 1)) + Of::BIAS;
    const Vector shifted = x * Of::LOG2_E + shift;
    const Vector n = shifted - shift;
    const Vector r = x - n * Of::LOG_2_HIGH - n * Of::LOG_2_LOW;
    constexpr int LAST = Of::TAYLOR_TERMS;
    p = r * TAYLOR[LAST] + TAYLOR[LAST - 1];
    UNROLLED(i, LAST - 3) p = p * r + TAYLOR[LAST - 2 - i];
    p = p * (r * r) + r;
    scale = (Vector)((IntegerVector)shifted << Of::MANTISSA_BITS);
  }
  // e^x + k, without cancellation for k = -1.
  Vector plus(Number k) const { return scale * p + (scale + k); }
};

static inline Vector tanh(Vector x) {
  const Exponential e(Number(2) * clamp(x, 20));
  return e.plus(-1) / e.plus(1);
}

static inline Vector sigmoid(Vector x) {
  constexpr Number LARGEST = Format<Number>::LARGEST;
  return x < -LARGEST ? Vector{} : Number(1) / Exponential(-clamp(x, LARGEST)).plus(1);
}

// The square of e^(x/2), which is finite as long as e^x is.
static inline Vector exp(Vector x) {
  const Vector root = Exponential(clamp(x * Number(0.5), Format<Number>::LARGEST)).plus(0);
  return root * root;
}

static inline Vector rsqrt(Vector x) {
  UNROLLED(lane, LANES) x[lane] = std::sqrt(x[lane]);
  return Number(1) / x;
}

static inline Vector relu(Vector x) { return x < Number(0) ? Vector{} : x; }
static inline Vector relu_grad(Vector d, Vector y) { return y <= Number(0) ? Vector{} : d; }
