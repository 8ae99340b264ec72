// What a thread computes with: pairs of numbers, the cell, and products of tiles on matrix units.
// Between sizes.cuh, which says what is defined before, and packets.cuh.

// A pair that was loaded: in two registers where it is not in one piece in memory, as to join it
// would be to wait for it.
#if EVEN || TYPE == FLOAT32
typedef Pair Loaded;
DEVICE Loaded loaded(u32 a, u32 b) { return join(a, b); }
DEVICE Pair joined(Loaded pair) { return pair; }
DEVICE float half_of(Loaded pair, int e) { return widen(part(pair, e)); }
#else
struct Loaded { u32 a, b; };
DEVICE Loaded loaded(u32 a, u32 b) { return {a, b}; }
DEVICE Pair joined(Loaded pair) { return join(pair.a, pair.b); }
DEVICE float half_of(Loaded pair, int e) { return widen((T)(e ? pair.b : pair.a)); }
#endif
#if TYPE == FLOAT32
DEVICE u32 bits(T v) { return __float_as_uint(v); }
#else
DEVICE u32 bits(T v) { return v; }
#endif
DEVICE float number(float v) { return v; }
// Cuts the gradient, in the adjoint.
DEVICE float clip_grad(float x, float) { return x; }
// NaN stays NaN
DEVICE float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }
DEVICE float relu(float x) { return x < 0.f ? 0.f : x; }
DEVICE float relu_grad(float d, float y) { return y <= 0.f ? 0.f : d; }
#if ADJOINT
DEVICE void cell_backward(const float* a, const float* s, const float* n, const float* d,
                          float* x, float* r, float* p)
#else
DEVICE void cell_forward(const float* x, const float* r, const float* s, float* n, float* a)
#endif
{ CELL }

#if TYPE == FLOAT32
// What of a number takes part in products.
DEVICE u32 operand(u32 v) { return PRECISE ? v : tf32(v); }
// Rounded once here, not by each warp that receives it.
DEVICE Pair sent(float a, float b) {
  return {__uint_as_float(operand(__float_as_uint(a))),
          __uint_as_float(operand(__float_as_uint(b)))};
}
#else
DEVICE Pair sent(float a, float b) { return narrow(a, b); }
#endif
// The products of a 16 x 8 tile of W over 8 words with those words of 8 sequences, b0 and b1.
#if PRECISE
// 0 in place of a number that is not finite.
DEVICE u32 finite(u32 v) { return (v & 0x7F800000) == 0x7F800000 ? 0 : v; }
DEVICE u32 difference(u32 a, u32 b) {
  return __float_as_uint(__uint_as_float(a) - __uint_as_float(b));
}
// A number as the sum of two that TF32 holds: of `high` the unit ignores the low 13 bits, which are
// in `low`. Of an infinite number `low` is NaN.
struct Parts {
  u32 high;
  u32 low;
};
DEVICE Parts truncated(u32 v) { return {v, difference(v, v & 0xFFFFE000)}; }
DEVICE Parts rounded(u32 v) {
  const u32 high = v + 0x1000;
  return {high, difference(v, high & 0xFFFFE000)};
}
// The same where numbers may be infinite: such a one has no low part, and multiplies none.
DEVICE Parts exact_parts(u32 v) {
  const u32 high = tf32(v);
  return {high, finite(tf32(difference(v, high)))};
}
template <bool EXACT>
struct Tile {
  u32 high[4];
  u32 low[4];
  DEVICE Tile(const u32 (&w)[4]) {
    EACH(e, 4) {
      // not split before the loop: the parts would take twice the registers
      const u32 v = pin_register(w[e]);
      const Parts parts = EXACT ? exact_parts(v) : truncated(v);
      high[e] = parts.high;
      low[e] = parts.low;
    }
  }
  // d += the products
  DEVICE void multiply(float (&d)[4], u32 b0, u32 b1) const {
    const Parts v0 = EXACT ? exact_parts(b0) : rounded(b0);
    const Parts v1 = EXACT ? exact_parts(b1) : rounded(b1);
    mma(d, low, EXACT ? finite(v0.high) : v0.high, EXACT ? finite(v1.high) : v1.high);
    mma(d, high, v0.low, v1.low);
    mma(d, high, v0.high, v1.high);
  }
};
#else
template <bool EXACT>
struct Tile {
  const u32 (&w)[4];
  DEVICE Tile(const u32 (&w)[4]) : w(w) {}
  DEVICE void multiply(float (&d)[4], u32 b0, u32 b1) const { mma(d, w, b0, b1); }
};
#endif

