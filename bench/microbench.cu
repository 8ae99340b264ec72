// What a step costs before it computes anything: barriers, exchanges between blocks, the rate of the matrix units.
// Each kernel does `steps` of one of them and writes the cycles that each block took, or -1 if a wait was given up:
// no kernel here can hang. What stands before this text: kernels/gpu/cuda/ptx.cuh, so that the
// instructions are those of the recurrence itself, and its BLOCKS, the number in a cluster, for each
// of which it is compiled once.
#define KERNEL extern "C" __global__ void __launch_bounds__(512)
constexpr i64 PATIENCE = 400000000;  // cycles, about 0.2 s

__device__ bool late(i64 start) { return clock64() - start > PATIENCE; }

__device__ void report(i64* cycles, i64 start, bool failed) {
  if (threadIdx.x == 0) cycles[blockIdx.x] = failed ? -1 : clock64() - start;
}

KERNEL nothing(i64*, int) {}

// cycles[0] by the multiprocessor's clock and cycles[1] nanoseconds, for the same work
KERNEL clock_rate(i64* cycles, int steps) {
  i64 begin, end, start = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  for (int i = 0; i < steps; ++i) __syncthreads();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
  if (threadIdx.x == 0) cycles[0] = clock64() - start, cycles[1] = end - begin;
}

KERNEL block_barrier(i64* cycles, int steps) {
  __syncthreads();
  i64 start = clock64();
  for (int i = 0; i < steps; ++i) __syncthreads();
  report(cycles, start, false);
}

// Four independent products a warp, so that issue counts and not latency.
#define PRODUCTS(NAME, SHAPE, K_TYPES)                                                                          \
  KERNEL NAME(i64* cycles, int steps) {                                                                         \
    float d[4][4] = {};                                                                                         \
    u32 a = threadIdx.x & 1, b = threadIdx.x & 2;                                                               \
    __syncthreads();                                                                                            \
    i64 start = clock64();                                                                                      \
    for (int i = 0; i < steps; ++i)                                                                             \
      _Pragma("unroll") for (int j = 0; j < 4; ++j) asm volatile(                                               \
          "mma.sync.aligned." SHAPE ".row.col.f32." K_TYPES ".f32 {%0,%1,%2,%3},{%4,%4,%4,%4},{%5,%5},{%0,%1,%2,%3};" \
          : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]) : "r"(a), "r"(b));                       \
    __syncthreads();                                                                                            \
    report(cycles, start, d[0][0] + d[1][0] + d[2][0] + d[3][0] == 1.f);                                        \
  }
PRODUCTS(product_bf16, "m16n8k16", "bf16.bf16")
PRODUCTS(product_tf32, "m16n8k8", "tf32.tf32")

// Between all blocks of the launch, which must be resident together. *arrived is 0 before.
KERNEL grid_barrier(i64* cycles, int steps, u32* arrived) {
  i64 start = clock64();
  bool failed = false;
  for (u32 i = 1; i <= steps && !failed; ++i) {
    bool waits = threadIdx.x == 0;
    __syncthreads();
    if (waits) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    while (waits && !failed) {
      u32 arrivals;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrivals) : "l"(arrived) : "memory");
      waits = arrivals < i * gridDim.x;
      failed = waits && late(start);
    }
    failed = __syncthreads_or(failed);
  }
  report(cycles, start, failed);
}

// Every block sends packets of 16 bytes to all, each with the number of the step, so that the data
// is its own flag. Two buffers are enough: who sends step i has seen all of step i - 1, and so
// nobody still reads step i - 2.
// all [2, gridDim.x * packets] is 0 before.
KERNEL grid_exchange(i64* cycles, int steps, uint4* all, int packets) {
  i64 start = clock64();
  bool failed = false;
  int total = packets * gridDim.x;
  for (u32 i = 1; i <= steps && !failed; ++i) {
    uint4* buffer = all + (i & 1) * total;
    for (u32 k = threadIdx.x; k < packets; k += blockDim.x)
      store_packet(buffer + blockIdx.x * packets + k, {k, k, k, i});
    for (int k = threadIdx.x; k < total && !failed; k += blockDim.x)
      for (u32 step = 0; step != i && !failed; failed = failed || (step != i && late(start)))
        step = load_packet(buffer + k).w;
    failed = __syncthreads_or(failed);
  }
  report(cycles, start, failed);
}

#if SCOPE == CLUSTER
#define CLUSTER_KERNEL extern "C" __global__ void CLUSTER_SIZE __launch_bounds__(512)

DEVICE void cluster_wait() {
  __syncwarp();
  cluster_sync();
}

CLUSTER_KERNEL cluster_barrier(i64* cycles, int steps) {
  cluster_wait();
  i64 start = clock64();
  for (int i = 0; i < steps; ++i) cluster_wait();
  report(cycles, start, false);
}

// Every block sends `bytes` bytes, a multiple of 16, to each of its cluster and waits for all of theirs: asynchronous
// stores into the others' shared memory, which count themselves on the receiver's barrier. Two buffers, as above.
CLUSTER_KERNEL cluster_exchange(i64* cycles, int steps, int bytes) {
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ __align__(8) u64 barriers[2];
  u32 rank = blockIdx.x % BLOCKS, total = BLOCKS * bytes;
  if (threadIdx.x == 0)
    for (u64& barrier : barriers) barrier_init(shared_address(&barrier));
  __syncthreads();
  cluster_wait();
  i64 start = clock64();
  bool failed = false;
  for (int i = 0; i < steps && !failed; ++i) {
    u32 barrier = shared_address(&barriers[i & 1]), to = shared_address(buffers) + (i & 1) * total + rank * bytes;
    if (threadIdx.x == 0) barrier_expect(barrier, total);
    for (u32 at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16)
      for (u32 k = 0; k < BLOCKS; ++k) {
        u32 other = (rank + k) % BLOCKS, word = i;
        store_async(peer_address(to + at, other), {word, word, word, word}, peer_address(barrier, other));
      }
    for (bool done = false; !done && !failed; failed = !done && late(start)) done = barrier_passed(barrier, i >> 1 & 1);
  }
  report(cycles, start, failed);
  cluster_wait();
}
#endif
