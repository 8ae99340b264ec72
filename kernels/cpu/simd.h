// SIMD vectors of the width of the machine's registers, and the functions of a cell on them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
// Not unrolled, where that would make too much code, slow to compile.
#define LOOP(i, n) _Pragma("GCC unroll 1") for (int i = 0; i < (n); ++i)

typedef int64_t i64;
typedef float Number;
typedef int32_t Integer;

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
static inline Vector clamp(Vector x, Number limit) {
  return x > limit ? number(limit) : x < -limit ? number(-limit) : x;
}

// e^x = scale (1 + p) for |x| < 88: x = n log 2 + r, scale = 2^n, and p = e^r - 1 to Taylor's
// seventh term.
struct Exponential {
  Vector scale;
  Vector p;

  Exponential(Vector x) {
    // 1.5 2^23 and the exponent's bias: the sum rounds to n, and has it in its last bits.
    const float shift = 12582912 + 127;
    const Vector shifted = x * 1.44269504f + shift;
    const Vector n = shifted - shift;
    const Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;
    p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    scale = (Vector)((IntegerVector)shifted << 23);
  }
  // e^x + k, without cancellation for k = -1.
  Vector plus(Number k) const { return scale * p + (scale + k); }
};

static inline Vector tanh(Vector x) {
  const Exponential e(2.f * clamp(x, 20.f));
  return e.plus(-1.f) / e.plus(1.f);
}

static inline Vector sigmoid(Vector x) {
  return x < -87.f ? Vector{} : 1.f / Exponential(-clamp(x, 87.f)).plus(1.f);
}

static inline Vector relu(Vector x) { return x < 0.f ? Vector{} : x; }
static inline Vector relu_grad(Vector d, Vector y) { return y <= 0.f ? Vector{} : d; }
