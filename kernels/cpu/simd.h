// Vectors of as many numbers as the machine has in a register, and a cell's functions of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
#define ROW(i, n) _Pragma("GCC unroll 1") for (int i = 0; i < (n); ++i)  // or there is much code, slow to compile

typedef int64_t i64;
#if defined(__AVX512F__)
constexpr int BYTES = 64, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int BYTES = 16, ACCUMULATORS = 24;
#else
constexpr int BYTES = 16, ACCUMULATORS = 12;
#endif
constexpr int LANES = BYTES / 4;
typedef float V __attribute__((vector_size(BYTES)));
typedef float Unaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(BYTES)));

static inline V load(const float* from, int n) {
  if (n >= LANES) return *reinterpret_cast<const Unaligned*>(from);
  V v = {};
  if (n > 0) std::memcpy(&v, from, 4 * n);
  return v;
}
static inline void store(float* to, V v, int n) {
  if (n >= LANES) *reinterpret_cast<Unaligned*>(to) = v;
  else if (n > 0) std::memcpy(to, &v, 4 * n);
}
// In a register from here on: GCC would read memory again for each product of a small tile, more than a core can load.
static inline V held(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

static inline V number(float v) { return V{} + v; }
static inline V clamp(V x, float limit) {  // NaN stays
  return x > limit ? number(limit) : x < -limit ? number(-limit) : x;
}
// e^x = scale (1 + p) for |x| < 88: x = n log 2 + r, scale = 2^n, and p = e^r - 1 to Taylor's seventh term.
struct Exponential {
  V scale, p;
  Exponential(V x) {
    const float shift = 12582912 + 127;  // 1.5 2^23 and the exponent's bias: rounds to n, and has it in its last bits
    const V shifted = x * 1.44269504f + shift, n = shifted - shift;
    const V r = x - n * 0.693145752f - n * 1.42860677e-6f;
    p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120, p = p * r + 1.f / 24, p = p * r + 1.f / 6, p = p * r + 0.5f, p = p * (r * r) + r;
    scale = (V)((Bits)shifted << 23);
  }
  V plus(float k) const { return scale * p + (scale + k); }
};
static inline V tanh(V x) {
  const Exponential e(2.f * clamp(x, 20.f));
  return e.plus(-1.f) / e.plus(1.f);
}
static inline V sigmoid(V x) { return x < -87.f ? V{} : 1.f / Exponential(-clamp(x, 87.f)).plus(1.f); }
static inline V relu(V x) { return x < 0.f ? V{} : x; }
static inline V relu_grad(V d, V y) { return y <= 0.f ? V{} : d; }
