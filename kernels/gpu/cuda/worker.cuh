// A thread of the recurrence on matrix units, for every cell and every scope of the step barrier.
// forward.cu and backward.cu take it through time. Defined before this text:
//   TYPE, SCOPE, ADJOINT
//   PRECISE                   float32 products in three parts
//   GATES, STATES, SAVED
//   SEPARATE_RECURRENT_GRAD   dx is not dr
//   UNITS                     of every gate, in a block
//   BLOCKS                    that share one sequence's units
//   SEQUENCES                 in a block
//   SPLITS                    warps that share a sum
//   MASKS                     there are lengths, offsets or resets
//   EVEN                      H is even, and pairs of numbers are aligned
//   PLAN                      its text
//   WAIT_LIMIT                in units of 2^32 ns, after which a wait for other blocks is an error
//   CELL                      the statements of cell_forward or cell_backward
//
// In each step a block multiplies its rows of W_hh (W_hh^T in the adjoint), which its warps hold in
// registers, with all of h (all gates' gradients), which the blocks exchange:
//   BLOCK    through shared memory and one barrier
//   CLUSTER  by asynchronous stores into each other's shared memory, which a barrier there counts
//   GRID     through the L2 cache, each word with the number of the step that it is for
// Double buffering suffices: a block writes buffer c + 2 only after receiving all of c + 1, whose
// senders had read c.

// numbers in 4 and in 16 bytes
constexpr int WORD = 4 / sizeof(T);
constexpr int CHUNK = 4 * WORD;
constexpr int U = UNITS;
constexpr int C = BLOCKS;
constexpr int NB = SEQUENCES;
constexpr int NT = NB / 8;
// a warp has 16 units of all gates, and 1 / WK of the sum
constexpr int WM = U / 16;
constexpr int WK = SPLITS;
constexpr int THREADS = 32 * WM * WK;
// tiles of a warp; vectors of length H that are exchanged
constexpr int ROWS = ADJOINT ? 1 : GATES;
constexpr int VECTORS = ADJOINT ? GATES : 1;
// words of those vectors, and k-steps of 8 words for each warp
constexpr int WORDS = VECTORS * C * U / WORD;
constexpr int KS = ((WORDS / 8 + WK - 1) / WK + 1) / 2 * 2;
// an odd number of 16 bytes: successive rows start in different banks
constexpr int PITCH = 8 * KS * WK + 4;
// pairs of each gate that a thread owns
constexpr int P = 2 * NT > WK ? 2 * NT / WK : 1;
// chunks that a warp publishes
constexpr int CHUNKS = VECTORS * P * 4 * (16 / CHUNK);
// independent sums, so that products overlap
constexpr int CHAINS = ROWS * NT < 4 ? 2 : 1;
// steps by which memory is read ahead into the L2 cache
constexpr int AHEAD = 8;

struct __align__(128) Shared {
  u32 inbox[SCOPE == GRID ? 1 : 2][NB][SCOPE == GRID ? 4 : PITCH];
  T outbox[SCOPE == CLUSTER ? WM : 1][VECTORS][NB][16];
  // two in GRID, where warps may be a step ahead
  float sums[SCOPE == GRID ? 2 : 1][WK > 1 ? WM : 1][WK][ROWS][4 * NT][32];
  u64 barrier[2];
};

DEVICE float half_of(Pair pair, int e) { return widen(part(pair, e)); }
DEVICE float number(float v) { return v; }
// NaN stays NaN
DEVICE float relu(float x) { return x < 0.f ? 0.f : x; }
DEVICE float relu_grad(float d, float y) { return y <= 0.f ? 0.f : d; }
#if ADJOINT
DEVICE void cell_backward(const float* a, const float* s, const float* n, const float* d,
                          float* x, float* r, float* p)
#else
DEVICE void cell_forward(const float* x, const float* r, const float* s, float* n, float* a)
#endif
{ CELL }

#if PRECISE
DEVICE u32 finite(u32 v) { return (v & 0x7F800000) == 0x7F800000 ? 0 : v; }
DEVICE u32 rest(u32 v, u32 high) {
  return finite(tf32(__float_as_uint(__uint_as_float(v) - __uint_as_float(high))));
}
#endif
// d += w v of 16 x 8 numbers over 8 words.
DEVICE void product(float (&d)[4], u32 (&w)[4], u32 b0, u32 b1) {
#if PRECISE
  const u32 h0 = tf32(b0);
  const u32 h1 = tf32(b1);
  u32 high[4];
  u32 low[4];
  EACH(e, 4) {
    // not split before the loop: the parts would take twice the registers
    keep(w[e]);
    high[e] = tf32(w[e]);
    low[e] = rest(w[e], high[e]);
  }
  // an infinite number has no low part, and multiplies none
  mma(d, low, finite(h0), finite(h1));
  mma(d, high, rest(b0, h0), rest(b1, h1));
  mma(d, high, h0, h1);
#elif TYPE == FLOAT32
  mma(d, w, tf32(b0), tf32(b1));
#else
  mma(d, w, b0, b1);
#endif
}

// A thread's place, its weights, and its exchange with other threads.
struct Worker {
  Shared& shared;
  // GRID: of the blocks that share these sequences, [2, k-steps, NT, 2, 8 sequences, 4 words]
  u64* const flags;
  const i64* offsets;
  const bool* resets;
  const int steps, B, H, n, rank, reverse, lane, wm, wk, unit;
  // row pitches of [R, N, G, H] and [R, N, H]
  const int x_row, y_row;
  // first sequence; pitches of [A, R, N, H] and [N, S, B, H]; where the block begins in each
  const i64 b0, plane, layer, x0, y0, s0;
  // whether the second of its two units, `unit` + 1, is inside
  const bool two;
  u32 w[ROWS][KS][4];
  // steps of its pairs' sequences, 0 for those outside
  int end[P];

  DEVICE Worker(Shared& shared, const T* w_hh, const i64* lengths, const i64* offsets,
                const bool* resets, u64* flags, i64 steps, i64 B, i64 R, i64 H, i64 reverses)
      : shared(shared),
        flags(flags +
              (i64)(blockIdx.z * gridDim.y + blockIdx.y) * 2 * (WORDS / 8) * NT * 64),
        offsets(offsets),
        resets(resets),
        steps(steps),
        B(B),
        H(H),
        n(blockIdx.z),
        rank(blockIdx.x),
        reverse(reverses >> blockIdx.z & 1),
        lane(threadIdx.x % 32),
        wm(threadIdx.x / 32 % WM),
        wk(threadIdx.x / 32 / WM),
        unit(rank * U + wm * 16 + lane / 4 * 2),
        x_row(gridDim.z * GATES * H),
        y_row(gridDim.z * H),
        b0((i64)blockIdx.y * NB),
        plane(R * y_row),
        layer(B * H),
        x0(b0 * x_row + n * GATES * H),
        y0(b0 * y_row + n * H),
        s0((n * STATES * B + b0) * H),
        two(EVEN || unit + 1 < H) {
    w_hh += (i64)n * GATES * H * H;
    // A few at a time: unrolled, all their addresses would be computed first, and spilled.
    constexpr int FEW = ROWS == 1 ? 4 : 1;
#pragma unroll 1
    for (int k0 = 0; k0 < KS; k0 += FEW) {
      u32 words[FEW][ROWS][4];
      EACH(e, FEW * ROWS * 4) words[e / 4 / ROWS][e / 4 % ROWS][e % 4] =
          weight(w_hh, e / 4 % ROWS, unit + e % 2,
                 (wk * KS + k0 + e / 4 / ROWS) * 8 + lane % 4 + e / 2 % 2 * 4);
      EACH(k, KS) if (k / FEW * FEW == k0)
        EACH(e, ROWS * 4) w[e / 4][k][e % 4] = words[k % FEW][e / 4][e % 4];
    }
    EACH(p, P) end[p] = !inside(p) ? 0 : lengths ? (int)lengths[b0 + sequence(p)] : steps;
    u32* words = &shared.inbox[0][0][0];
    for (int i = threadIdx.x; i < sizeof(shared.inbox) / 4; i += THREADS) words[i] = 0;
#if SCOPE == CLUSTER
    if (threadIdx.x < 2) {
      barrier_init(shared_address(&shared.barrier[threadIdx.x]));
      barrier_expect(shared_address(&shared.barrier[threadIdx.x]), 4 * NB * WORDS);
    }
#endif
    cluster_sync();
    __syncthreads();
  }

  // Word k of a row of the matrix: forward, of gate `row` and this unit, over all units; in the
  // adjoint, of this unit, over all units of all gates. Outside of the matrix it is 0, and what is
  // read lies inside.
  DEVICE u32 weight(const T* w_hh, u32 row, u32 unit, u32 k) const {
    const u32 size = H;
    const u32 j = min(unit, size - 1);
    const u32 g = ADJOINT ? min(k, (u32)WORDS - 1) * WORD / (C * U) : row;
    u32 word = 0;
    EACH(e, WORD) {
      const u32 from = (k * WORD + e) % (C * U), i = min(from, size - 1);
      const bool there = unit < size && from < size && k < WORDS;
      const T v = ADJOINT ? w_hh[(g * size + i) * size + j] : w_hh[(g * size + j) * size + i];
#if TYPE != FLOAT32
      word |= (there ? (u32)v : 0) << 16 * e;
#else
      word = !there ? 0 : PRECISE ? __float_as_uint(v) : tf32(__float_as_uint(v));
#endif
    }
    return word;
  }

  // Its pairs are of the columns wk * P + p of its tiles: a sequence each.
  DEVICE bool owner() const { return wk * P < 2 * NT; }
  DEVICE int sequence(int p) const {
    return (wk * P + p) / 2 * 8 + lane % 4 * 2 + (wk * P + p) % 2;
  }
  DEVICE bool inside(int p) const { return owner() && b0 + sequence(p) < B && unit < H; }
  // Offset of a pair from that of the block's first sequence and unit 0, in rows of this pitch.
  DEVICE int at(int p, int pitch) const { return sequence(p) * pitch + unit; }

  DEVICE Pair load(const T* p) const {
    return EVEN ? *(const Pair*)p : join(p[0], two ? p[1] : T(0));
  }
  DEVICE void store(T* p, Pair v) const {
    if (EVEN) *(Pair*)p = v;
    else p[0] = part(v, 0), p[two] = part(v, two);
  }
  DEVICE void load(float (&v)[2], const float* p) const { v[0] = p[0], v[1] = two ? p[1] : 0.f; }
  DEVICE void store(float* p, const float (&v)[2]) const {
    p[0] = v[0];
    p[two] = two ? v[1] : v[0];
  }

  // The step with number u of a sweep, and the row that it begins at.
  DEVICE int time(int u, bool descending) const {
    if (u >= steps) return 1 << 30;
    return descending ? steps - 1 - u : u;
  }
  DEVICE i64 row(int t) const {
    if (t >= steps) return 0;
    return MASKS && offsets ? offsets[t] : (i64)t * B;
  }
  DEVICE bool runs(int t, int p) const { return t < end[p]; }
  DEVICE void find_cuts(bool (&cuts)[P], int t) const {
    const i64 boundary = (i64)(t + reverse) * B + b0;
    EACH(p, P) cuts[p] = MASKS && resets && t + reverse < end[p] && resets[boundary + sequence(p)];
  }
  // The row of step u + AHEAD to read into the L2 cache, or -1. Neighbouring lanes share a line.
  DEVICE i64 prefetch_row(int u) const {
    if (MASKS || u + AHEAD >= steps || lane >= 4) return -1;
    return row(time(u + AHEAD, reverse != ADJOINT));
  }
  DEVICE void prefetch(const T* p, i64 row, int pitch) const {
    EACH(i, P) if (row >= 0 && inside(i)) prefetch_l2(p + row * pitch + at(i, pitch));
  }

  // Sends these numbers, for the sums of step c, to all blocks that share the sequences.
  DEVICE void publish(int c, const float (&values)[VECTORS][P][2]) {
    EACH(v, VECTORS) EACH(p, P) {
      if (!owner()) continue;
      const Pair pair = narrow(values[v][p][0], two ? values[v][p][1] : 0.f);
      const int word = (v * C * U + unit) / WORD, b = sequence(p);
#if SCOPE == BLOCK
      *(Pair*)&shared.inbox[c & 1][b][word] = pair;
#elif SCOPE == CLUSTER
      *(Pair*)&shared.outbox[wm][v][b][unit % 16] = pair;
#else
      EACH(e, 2 / WORD)
        store_flagged(flags + (((c & 1) * (WORDS / 8) + (word + e) / 8) * NT + b / 8) * 64 +
                          ((word + e) / 4 % 2 * 8 + b % 8) * 4 + (word + e) % 4,
                      ((const u32*)&pair)[e], c + 1);
#endif
    }
#if SCOPE == BLOCK
    __syncthreads();
#elif SCOPE == CLUSTER
    __syncwarp();
    // neighbouring lanes send chunks to one block
    for (int q = lane; owner() && q < CHUNKS * C; q += 32) {
      const int chunk = q % CHUNKS, part = chunk % (16 / CHUNK), number = chunk / (16 / CHUNK);
      const int v = number / (4 * P);
      const int p = number / 4 % P + wk * P;
      const int b = p / 2 * 8 + number % 4 * 2 + p % 2;
      const int word = (v * C * U + rank * U + wm * 16 + part * CHUNK) / WORD;
      const u32 peer = (q / CHUNKS + rank) % C;
      store_async(peer_address(shared_address(&shared.inbox[c & 1][b][word]), peer),
                  *(const uint4*)&shared.outbox[wm][v][b][part * CHUNK],
                  peer_address(shared_address(&shared.barrier[c & 1]), peer));
    }
    __syncwarp();
#endif
  }

  // The sums of step c, once all blocks have published their part.
  DEVICE void accumulate(int c, float (&sums)[ROWS][P][2]) {
#if SCOPE == CLUSTER
    u32 wait = 0;
    const u32 barrier = shared_address(&shared.barrier[c & 1]);
    while (!barrier_passed(barrier, c >> 1 & 1)) wait_more(wait, c);
    if (threadIdx.x == 0) barrier_expect(barrier, 4 * NB * WORDS);
    __syncwarp();
#endif
    float d[CHAINS][ROWS][NT][4] = {};
    EACH(j, NT) {
#if SCOPE == GRID
      const u64* from = flags + ((c & 1) * (WORDS / 8) + wk * KS) * NT * 64 + j * 64 + lane;
      constexpr int AT_ONCE = KS < 8 ? KS : 8;
#pragma unroll
      for (int k0 = 0; k0 < KS; k0 += AT_ONCE) {
        u64 seen[AT_ONCE][2];
        u32 wait = 0;
        for (bool ready = false; !ready;) {
          ready = true;
          EACH(k, AT_ONCE) EACH(half, 2) {
            const bool there =
                k0 + k < KS && (WORDS == 8 * KS * WK || wk * KS + k0 + k < WORDS / 8);
            seen[k][half] = there ? load_flagged(from + (k0 + k) * NT * 64 + half * 32)
                                  : (u64)(c + 1) << 32;
            ready &= (u32)(seen[k][half] >> 32) == (u32)c + 1;
          }
          if (!ready) wait_more(wait, c);
        }
        __syncwarp();
        EACH(k, AT_ONCE) EACH(row, ROWS)
          if (k0 + k < KS)
            product(d[k % CHAINS][row][j], w[row][k0 + k], (u32)seen[k][0], (u32)seen[k][1]);
      }
#else
      const u32 from =
          shared_address(&shared.inbox[c & 1][j * 8 + lane % 8][wk * KS * 8 + lane / 8 * 4]);
#pragma unroll
      for (int k = 0; k < KS; k += 2) {
        u32 words[4];
        load_matrices(words, from + k * 32);
        EACH(row, ROWS) {
          product(d[0][row][j], w[row][k], words[0], words[1]);
          product(d[CHAINS - 1][row][j], w[row][k + 1], words[2], words[3]);
        }
      }
#endif
    }
    auto& partial = shared.sums[SCOPE == GRID ? c & 1 : 0];
    EACH(row, ROWS) EACH(i, 4 * NT) {
      const float sum =
          d[0][row][i / 4][i % 4] + (CHAINS > 1 ? d[CHAINS - 1][row][i / 4][i % 4] : 0.f);
      if (WK > 1) partial[wm][wk][row][i][lane] = sum;
      else sums[row][i / 4 * 2 % P + i % 2][i / 2 % 2] = sum;
    }
    if (WK == 1) return;
    group_sync(1 + wm, 32 * WK);
    EACH(row, ROWS) EACH(p, P) sums[row][p][0] = sums[row][p][1] = 0.f;
    if (owner())
      EACH(row, ROWS) EACH(p, P) EACH(e, 2) EACH(q, WK)
        sums[row][p][e] +=
            partial[wm][q][row][(wk * P + p) / 2 * 4 + e * 2 + (wk * P + p) % 2][lane];
  }
};
