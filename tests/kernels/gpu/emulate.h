// The counterpart of kernels/gpu/cuda/ptx.cuh for the CPU: g++ compiles a kernel after fibers.h and
// this. Wrong indices, missing barriers and missing waits show; effects of a weaker memory model
// do not.
#define __global__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define CLUSTER_SIZE
#define DEVICE inline
#define EACH(i, count) for (int i = 0; i < (count); ++i)
struct uint4 { u32 x, y, z, w; };

inline struct { emulate::Index<+[] { return emulate::self->thread; }> x; } threadIdx;
inline struct { emulate::Index<+[] { return emulate::self->rank; }> x; emulate::Index<+[] { return emulate::tile; }> y;
                emulate::Index<+[] { return emulate::direction; }> z; } blockIdx;
inline struct { emulate::Index<+[] { return emulate::tiles; }> y; emulate::Index<+[] { return emulate::directions; }> z; } gridDim;
#define SHARED_MEMORY(name) unsigned char* name = (unsigned char*)emulate::block().memory.data()
DEVICE void __syncthreads() { emulate::block().all.wait(); }
DEVICE void __syncwarp() { emulate::warp().barrier.wait(); }
DEVICE void group_sync(int id, int threads) { auto& g = emulate::block().groups[id]; g.threads = threads; g.wait(); }
DEVICE bool any_of_warp(bool v) {
  auto& warp = emulate::warp();
  warp.b[emulate::self->thread % 32][0] = v;
  warp.barrier.wait();
  bool any = false;
  for (auto& b : warp.b) any |= b[0];
  warp.barrier.wait();
  return any;
}
DEVICE void prefetch_l2(const void*) {}
DEVICE u32 pin_register(u32 v) { return v; }
DEVICE i64 pin_register(i64 v) { return v; }
DEVICE u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
DEVICE float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
DEVICE u32 min(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 select_bytes(u32 a, u32 b, u32 digits) {
  const u64 both = (u64)b << 32 | a;
  u32 v = 0;
  for (int k = 0; k < 4; ++k) v |= (u32)(both >> 8 * (digits >> 4 * k & 7) & 255) << 8 * k;
  return v;
}
DEVICE u32 load_word_if(const void* p, bool there, u32 v = 0) {
  if (there) memcpy(&v, p, 4);
  return v;
}
DEVICE u32 load_byte_if(const bool* p, bool there) { return there ? *p : 0; }
DEVICE i64 load_row_if(const i64* p, bool there, i64 v) { return there ? *p : v; }
DEVICE u32 load_if(const float* p, bool there, u32 v = 0) { return load_word_if(p, there, v); }
DEVICE u32 load_if(const u16* p, bool there, u32 v = 0) { return there ? *p : v; }
template <class Bits> void set_bits_if(Bits* p, i64 i, i64 k, u32 plane, i64 pitch, bool there) {
  if (there) p[i + k] = p[i + k + plane * pitch] = (Bits)~0;
}
DEVICE float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

#if TYPE == FLOAT32
typedef float T;
DEVICE float widen(float v) { return v; }
DEVICE float narrow(float v) { return v; }
DEVICE u32 tf32(u32 v) { return (v & 0x7F800000) == 0x7F800000 ? v : (v + 0x1000) & 0xFFFFE000; }
#else
typedef u16 T;
#if TYPE == FLOAT16
DEVICE float widen(u16 v) { _Float16 h; memcpy(&h, &v, 2); return h; }
DEVICE u16 narrow(float f) { _Float16 h = f; u16 v; memcpy(&v, &h, 2); return v; }
#else
DEVICE float widen(u16 v) { return __uint_as_float((u32)v << 16); }
DEVICE u16 narrow(float f) { u32 v = __float_as_uint(f); return f != f ? 0x7FFF : (v + 0x7FFF + (v >> 16 & 1)) >> 16; }
#endif
#endif
struct alignas(2 * sizeof(T)) Pair { T a, b; };
DEVICE Pair load_if(const Pair* p, bool there, Pair v = {}) { return there ? *p : v; }
DEVICE Pair narrow(float a, float b) { return {narrow(a), narrow(b)}; }
DEVICE T part(Pair v, int e) { return e ? v.b : v.a; }
#if TYPE == FLOAT32
DEVICE Pair join(u32 a, u32 b) { return {__uint_as_float(a), __uint_as_float(b)}; }
#else
DEVICE Pair join(u32 a, u32 b) { return {(u16)a, (u16)b}; }
#endif

DEVICE u32 shared_address(const void* p) {
  return (u32)((const char*)p - (const char*)emulate::block().memory.data()) | emulate::self->rank << 24;
}
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  auto& warp = emulate::warp();
  const int lane = emulate::self->thread % 32;
  warp.rows[lane] = emulate::memory(address);
  warp.barrier.wait();
  for (int m = 0; m < 4; ++m) memcpy(&r[m], warp.rows[m * 8 + lane / 4] + lane % 4 * 4, 4);
  // what a relaxed wait does not order
  if (emulate::self->unacquired) memset(r, ~0, 16);
  warp.barrier.wait();
}
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  auto& warp = emulate::warp();
  const int lane = emulate::self->thread % 32;
  memcpy(warp.a[lane], a, 16);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  warp.barrier.wait();
  for (int e = 0; e < 4; ++e)
    for (int word = 0; word < 8; ++word) {
      const u32 x = warp.a[lane / 4 * 4 + word % 4][word / 4 * 2 + e / 2];
      const u32 y = warp.b[(lane % 4 * 2 + e % 2) * 4 + word % 4][word / 4];
#if TYPE == FLOAT32
      d[e] += __uint_as_float(x & 0xFFFFE000) * __uint_as_float(y & 0xFFFFE000);  // what it would not look at
#else
      d[e] += widen(x & 0xFFFF) * widen(y & 0xFFFF) + widen(x >> 16) * widen(y >> 16);
#endif
    }
  warp.barrier.wait();
}

DEVICE void store_packet(uint4* p, uint4 v) { emulate::in_flight.push_back([=] { *p = v; }); }
DEVICE uint4 load_packet(const uint4* p) { return *p; }
DEVICE void store_word(u32* p, u32 v) { emulate::in_flight.push_back([=] { *p = v; }); }
DEVICE u32 ballot(bool v) {
  auto& warp = emulate::warp();
  warp.b[emulate::self->thread % 32][0] = v;
  warp.barrier.wait();
  u32 all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= warp.b[lane][0] << lane;
  warp.barrier.wait();
  return all;
}
DEVICE u32 of_lane(u32 v, int bits) {
  auto& warp = emulate::warp();
  warp.b[emulate::self->thread % 32][0] = v;
  warp.barrier.wait();
  v = warp.b[emulate::self->thread % 32 ^ bits][0];
  warp.barrier.wait();
  return v;
}
DEVICE void wait_more(u32&, int) { emulate::look_again(); }
DEVICE u32 peer_address(u32 address, u32 rank) { return (address & 0xFFFFFF) | rank << 24; }
DEVICE void cluster_sync() { if (SCOPE == CLUSTER) emulate::cluster.wait(); }
DEVICE void barrier_init(u32 barrier) { emulate::arrivals(barrier) = {}; }
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  auto& a = emulate::arrivals(barrier);
  a.bytes += bytes, --a.pending;
  a.settle();
}
DEVICE bool barrier_passed(u32 barrier, u32 parity) {
  emulate::self->unacquired = true;
  return (emulate::arrivals(barrier).phase & 1) != parity;
}
DEVICE void acquire_shared() { emulate::self->unacquired = false; }
DEVICE void store_async(u32 address, uint4 v, u32 barrier) {
  emulate::in_flight.push_back([=] {
    memcpy(emulate::memory(address), &v, 16);
    emulate::arrivals(barrier).bytes -= 16;
    emulate::arrivals(barrier).settle();
  });
}
