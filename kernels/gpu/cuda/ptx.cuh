// Instructions that CUDA C++ has no functions for, as inline PTX, without headers.
// (tests/kernels/gpu/emulate.h is its counterpart for the CPU.)
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
DEVICE bool any_of_warp(bool v) { return __any_sync(~0u, v); }
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
// The value in a register, hidden from the compiler, which neither moves nor repeats what made it.
DEVICE u32 pin_register(u32 v) { asm volatile("" : "+r"(v)); return v; }
DEVICE i64 pin_register(i64 v) { asm volatile("" : "+l"(v)); return v; }
// The bytes of a and b that the digits name.
DEVICE u32 select_bytes(u32 a, u32 b, u32 digits) { return __byte_perm(a, b, digits); }
// What lies at p, or v where it is not there; no kernel writes there. The compiler would put the
// load into a branch, and wait for it there. Not volatile: what no cell needs is not loaded.
DEVICE u32 load_word_if(const void* p, bool there, u32 v = 0) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.nc.u32 %0, [%1];\n}"
               : "+r"(v) : "l"(p), "r"((u32)there));
  return v;
}
DEVICE u32 load_byte_if(const bool* p, bool there) {
  u32 v = 0;
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.nc.u8 %0, [%1];\n}"
               : "+r"(v) : "l"(p), "r"((u32)there));
  return v;
}
DEVICE i64 load_row_if(const i64* p, bool there, i64 v) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.nc.s64 %0, [%1];\n}"
               : "+l"(v) : "l"(p), "r"((u32)there));
  return v;
}
DEVICE u32 load_if(const float* p, bool there, u32 v = 0) { return load_word_if(p, there, v); }
DEVICE u32 load_if(const u16* p, bool there, u32 v = 0) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.nc.u16 %0, [%1];\n}"
               : "+r"(v) : "l"(p), "r"((u32)there));
  return v;
}
// All bits, of numbers i + k and i + k + plane * pitch at p, where `there`. The compiler would put
// the stores into a branch, and keep more of their addresses than there are registers for.
DEVICE void set_bits_if(u32* p, i64 i, i64 k, u32 plane, i64 pitch, bool there) {
  asm volatile("{\n.reg .pred p;\n.reg .u64 a, b;\nsetp.ne.u32 p, %5, 0;\n"
               "add.u64 a, %1, %2;\nmad.lo.s64 a, a, 4, %0;\n@p st.global.u32 [a], -1;\n"
               "cvt.u64.u32 b, %3;\nmul.lo.u64 b, b, %4;\n"
               "mad.lo.s64 a, b, 4, a;\n@p st.global.u32 [a], -1;\n}"
               :: "l"(p), "l"(i), "l"(k), "r"(plane), "l"(pitch), "r"((u32)there) : "memory");
}
DEVICE void set_bits_if(u16* p, i64 i, i64 k, u32 plane, i64 pitch, bool there) {
  asm volatile("{\n.reg .pred p;\n.reg .u64 a, b;\n.reg .u16 v;\nmov.u16 v, -1;\n"
               "setp.ne.u32 p, %5, 0;\n"
               "add.u64 a, %1, %2;\nmad.lo.s64 a, a, 2, %0;\n@p st.global.u16 [a], v;\n"
               "cvt.u64.u32 b, %3;\nmul.lo.u64 b, b, %4;\n"
               "mad.lo.s64 a, b, 2, a;\n@p st.global.u16 [a], v;\n}"
               :: "l"(p), "l"(i), "l"(k), "r"(plane), "l"(pitch), "r"((u32)there) : "memory");
}
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers side by side in memory, and in registers.
#if TYPE == FLOAT32
typedef float T;
struct __align__(8) Pair { T a, b; };
DEVICE Pair load_if(const Pair* p, bool there, Pair v = {}) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p ld.global.nc.v2.f32 {%0, %1}, [%2];\n}"
               : "+f"(v.a), "+f"(v.b) : "l"(p), "r"((u32)there));
  return v;
}
DEVICE T part(Pair v, int e) { return e ? v.b : v.a; }
// of their bits
DEVICE Pair join(u32 a, u32 b) { return {__uint_as_float(a), __uint_as_float(b)}; }
DEVICE float widen(float v) { return v; }
DEVICE Pair narrow(float a, float b) { return {a, b}; }
DEVICE u32 tf32(u32 v) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(v)));
  return r;
}
#define MMA_SHAPE "m16n8k8.row.col.f32.tf32.tf32.f32"
#else
typedef u16 T;
// in one piece: two parts would be unpacked right after the load, which would wait for it
struct Pair { u32 both; };
DEVICE Pair load_if(const Pair* p, bool there, Pair v = {}) {
  return {load_word_if(p, there, v.both)};
}
DEVICE T part(Pair v, int e) { return (T)(v.both >> 16 * e); }
DEVICE Pair join(u32 a, u32 b) { return {b << 16 | a}; }
#if TYPE == FLOAT16
DEVICE float widen(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
#define NARROW "cvt.rn.f16x2.f32 %0, %2, %1;"
#define MMA_SHAPE "m16n8k16.row.col.f32.f16.f16.f32"
#else
DEVICE float widen(u16 v) { return __uint_as_float((u32)v << 16); }
#define NARROW "cvt.rn.bf16x2.f32 %0, %2, %1;"
#define MMA_SHAPE "m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
DEVICE Pair narrow(float a, float b) {
  Pair v;
  asm(NARROW : "=r"(v.both) : "f"(a), "f"(b));
  return v;
}
#endif

DEVICE float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-1.442695041f * x)); }
DEVICE float tanh(float x) {
#if TYPE == BFLOAT16
  // exact to 11 bits, where bfloat16 has 8
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float quotient = 1.f - 2.f * reciprocal(1.f + exp2_fast(2.885390082f * x));
  const float square = x * x;
  const float series =
      -1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835)));
  // the quotient cancels near 0
  return square < 0.06f ? x * (1.f + square * series) : quotient;
#endif
}

// Rows of 16 bytes, eight to a matrix. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix word l % 4 of row l / 4.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// d += a b, 16 x 8 numbers, over 8 words. Lane l holds of d rows l / 4 (+ 8) and columns
// l % 4 * 2 (+ 1); of a words l % 4 (+ 4) of those rows; of b those words of column l / 4.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned." MMA_SHAPE
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes in one access: a reader that sees a bit of a store has all of it. (CUDA before 12.3 has
// no word for that; what it makes of two words of 64 bits is the same instruction.)
#if __CUDACC_VER_MAJOR__ > 12 || __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 3
#define STORE_PACKET \
  "{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v;\n}"
#define LOAD_PACKET \
  "{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}"
#else
#define STORE_PACKET "st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};"
#define LOAD_PACKET "ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
#endif
DEVICE void store_packet(uint4* p, uint4 v) {
  asm volatile(STORE_PACKET
               :: "l"(p), "l"((u64)v.y << 32 | v.x), "l"((u64)v.w << 32 | v.z) : "memory");
}
DEVICE uint4 load_packet(const uint4* p) {
  u64 a, b;
  asm volatile(LOAD_PACKET : "=l"(a), "=l"(b) : "l"(p) : "memory");
  return {(u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32)};
}
DEVICE void store_word(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
// Of each lane's v a bit.
DEVICE u32 ballot(bool v) { return __ballot_sync(~0u, v); }
// The v of the lane whose number differs in these bits.
DEVICE u32 of_lane(u32 v, int bits) { return __shfl_xor_sync(~0u, v, bits); }

// Between two polls of a step; `wait` begins with 0. Its upper 20 bits are the time when the clock
// was first looked at, in units of 2^32 ns, its lower 12 bits count polls. Minutes are an error.
DEVICE void wait_more(u32& wait, int step) {
  wait = (wait & ~0xFFFu) | (wait + 1 & 0xFFFu);
  if (wait & 0xFFF) return;
  u32 now;
  asm volatile("mov.u32 %0, %globaltimer_hi;" : "=r"(now));
  if (!wait) wait = now << 12;
  if ((now << 12) - wait <= WAIT_LIMIT << 12) return;
#if PRECISE || SCOPE == GRID && \
    (GATES > 3 || !ADJOINT && GATES == 1 && BLOCKS > 64 && SEQUENCES > 8)
  // the call below would take registers that these kernels do not have
  asm volatile("trap;");
#else
  // As a failed assert (NVRTC declares the function): the driver prints the text, with the step in
  // place of a line's number. Nothing comes after, for which registers would have to be kept.
  __assertfail("the other blocks' h came in time for " PLAN, "step", step, "recurrence", 1);
  __builtin_unreachable();
#endif
}

#if SCOPE == CLUSTER
#define CLUSTER_SIZE __cluster_dims__(BLOCKS, 1, 1)
DEVICE u32 peer_address(u32 address, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n"
               "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void barrier_init(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
               "fence.mbarrier_init.release.cluster;" :: "r"(barrier) : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(barrier), "r"(bytes) : "memory");
}
// What others sent is visible only after acquire_shared(): acquired here, each wait would end in
// throwing away the L1 cache. (CUDA before 13 has no such fence.)
#if __CUDACC_VER_MAJOR__ >= 13
#define WAIT_ORDER "relaxed"
#define ACQUIRE_SHARED "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define WAIT_ORDER "acquire"
#define ACQUIRE_SHARED ""
#endif
DEVICE bool barrier_passed(u32 barrier, u32 parity) {
  u32 passed;
  asm volatile("{\n.reg .pred p;\n"
               "mbarrier.try_wait.parity." WAIT_ORDER ".cluster.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
  return passed;
}
DEVICE void acquire_shared() { asm volatile(ACQUIRE_SHARED ::: "memory"); }
DEVICE void store_async(u32 address, uint4 v, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
               " [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier) : "memory");
}
#else
#define CLUSTER_SIZE
DEVICE void cluster_sync() {}
#endif
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
