// The recurrence on matrix units: one forward and one backward kernel for every cell and every scope of the step barrier.
// Defined before this text: TYPE, SCOPE, ADJOINT, PRECISE (float32 products in three parts), GATES, STATES, SAVED,
// SPLIT (dx is not dr), UNITS (of every gate, to a block), BLOCKS (that share one sequence's units), SEQUENCES (to a
// block), SPLITS (warps that share a sum), and cell_forward or cell_backward.
//
// In each step a block multiplies its rows of W_hh (W_hh^T in the adjoint), which its warps hold in registers, with all
// of h (all gates' gradients), which the blocks tell each other: in scope BLOCK through shared memory and one barrier,
// in CLUSTER by asynchronous stores into each other's shared memory, which arrive at a barrier of the receiver, in GRID
// through the L2 cache, each word with the number of the step that it is for. There are two buffers, in turn: nobody
// writes the one of step c + 2 before he has all of step c + 1, and who sent that had read step c.
#if TYPE == FLOAT32
typedef float T;
#else
typedef u16 T;
#endif
constexpr int WORD = 4 / sizeof(T), CHUNK = 4 * WORD;             // numbers in 4 and in 16 bytes
constexpr int U = UNITS, C = BLOCKS, NB = SEQUENCES, NT = NB / 8;
constexpr int WM = U / 16, WK = SPLITS, THREADS = 32 * WM * WK;   // a warp: 16 units of all gates, 1 / WK of the sum
constexpr int ROWS = ADJOINT ? 1 : GATES, VECTORS = ADJOINT ? GATES : 1;  // tiles of a warp; what is told, in units of H
constexpr int WORDS = VECTORS * C * U / WORD, KS = ((WORDS / 8 + WK - 1) / WK + 1) / 2 * 2;  // of 8 words, to a warp
constexpr int PITCH = 8 * KS * WK + 4;                            // an odd number of 16 bytes: no two rows in one bank
constexpr int PER = 4 * NT > WK ? 4 * NT / WK : 1;                // numbers of each gate that a thread owns
constexpr int CHUNKS = VECTORS * PER * 4 * (8 / CHUNK);           // that a warp tells
constexpr int CHAINS = ROWS * NT < 4 ? 2 : 1;                     // sums under way, so that products overlap
constexpr int AHEAD = 8;                                          // steps by which memory is read into the L2 cache

struct __align__(128) Shared {
  u32 inbox[SCOPE == GRID ? 1 : 2][NB][SCOPE == GRID ? 4 : PITCH];
  T outbox[WM][VECTORS][NB][16];
  float sums[WK > 1 ? WM : 1][WK][ROWS][4 * NT][32];
  u64 barrier[2];
};

DEVICE float tanh(float x) { return tanhf(x); }
DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
DEVICE float relu(float x) { return x < 0.f ? 0.f : x; }          // NaN stays
DEVICE float relu_grad(float d, float y) { return y <= 0.f ? 0.f : d; }
#if ADJOINT
DEVICE void cell_backward(const float* a, const float* s, const float* n, const float* d, float* x, float* r, float* p)
#else
DEVICE void cell_forward(const float* x, const float* r, const float* s, float* n, float* a)
#endif
{ CELL }

// A warp's product: d += w v over its share of the words.
DEVICE void product(float (&d)[4], u32 (&w)[4], u32 b0, u32 b1) {
#if TYPE == FLOAT32
  const u32 h0 = tf32(b0), h1 = tf32(b1);
#if PRECISE
  u32 high[4], low[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    keep(w[e]);  // in one piece: its parts would take twice the registers
    high[e] = tf32(w[e]);
    low[e] = tf32(__float_as_uint(__uint_as_float(w[e]) - __uint_as_float(high[e])));
  }
  mma(d, low, h0, h1);
  mma(d, high, tf32(__float_as_uint(__uint_as_float(b0) - __uint_as_float(h0))),
      tf32(__float_as_uint(__uint_as_float(b1) - __uint_as_float(h1))));
  mma(d, high, h0, h1);
#else
  mma(d, w, h0, h1);
#endif
#else
  mma(d, w, b0, b1);
#endif
}

// One thread's place and what it needs to go through time.
struct Thread {
  Shared& shared;
  u64* flags;                     // scope GRID: of this group of blocks, [2, 8-word steps, NT, 2, 8 sequences, 4 words]
  const i64 *lengths, *offsets;
  const bool* resets;
  const int steps, B, H, n, rank, reverse, lane, wm, wk;
  const i64 b0;
  u32 w[ROWS][KS][4];
  int end[PER];                   // steps of the sequences of its numbers, 0 for those outside

  DEVICE Thread(Shared& shared, const T* w_hh, const i64* lengths, const i64* offsets, const bool* resets, u64* flags,
                int steps, int B, int H, int reverse)
      : shared(shared), flags(flags + (i64)(blockIdx.z * gridDim.y + blockIdx.y) * 2 * (WORDS / 8) * NT * 64),
        lengths(lengths), offsets(offsets), resets(resets), steps(steps), B(B), H(H), n(blockIdx.z), rank(blockIdx.x),
        reverse(reverse >> blockIdx.z & 1), lane(threadIdx.x % 32), wm(threadIdx.x / 32 % WM),
        wk(threadIdx.x / 32 / WM), b0((i64)blockIdx.y * NB) {
    w_hh += (i64)n * GATES * H * H;
    // A few at a time: unrolled, all their addresses would be computed first, and spilled.
    constexpr int FEW = ROWS == 1 ? 4 : 1;
#pragma unroll 1
    for (int k0 = 0; k0 < KS; k0 += FEW) {
      u32 words[FEW][ROWS][4];
#pragma unroll
      for (int e = 0; e < FEW * ROWS * 4; ++e)
        words[e / 4 / ROWS][e / 4 % ROWS][e % 4] =
            weight(w_hh, e / 4 % ROWS, rank * U + wm * 16 + lane / 4 + e % 2 * 8,
                   (wk * KS + k0 + e / 4 / ROWS) * 8 + lane % 4 + e / 2 % 2 * 4);
#pragma unroll
      for (int k = 0; k < KS; ++k)
        if (k / FEW * FEW == k0)
#pragma unroll
          for (int e = 0; e < ROWS * 4; ++e) w[e / 4][k][e % 4] = words[k % FEW][e / 4][e % 4];
    }
#pragma unroll
    for (int i = 0; i < PER; ++i)
      end[i] = inside(i) ? lengths ? (int)lengths[b0 + sequence(i)] : steps : 0;
    u32* words = &shared.inbox[0][0][0];
    for (int i = threadIdx.x; i < sizeof(shared.inbox) / 4; i += THREADS) words[i] = 0;
#if SCOPE == CLUSTER
    if (threadIdx.x < 2) {
      barrier_init(shared_address(&shared.barrier[threadIdx.x]));
      barrier_expect(shared_address(&shared.barrier[threadIdx.x]), 4 * NB * WORDS);
    }
    cluster_sync();
#endif
    __syncthreads();
  }

  // Word k of a row of the matrix: of gate `row` and this unit, over all units; in the adjoint of this unit, over all
  // units of all gates. 0 outside of it.
  DEVICE u32 weight(const T* w_hh, u32 row, u32 unit, u32 k) const {
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < WORD; ++e) {
      // Read from inside in any case: loads under conditions would all have their addresses computed first, and spilled.
      const u32 from = (k * WORD + e) % (C * U), size = H;
      const bool there = unit < size && from < size && k < WORDS;
      const u32 i = min(from, size - 1), j = min(unit, size - 1), g = ADJOINT ? min(k, (u32)WORDS - 1) * WORD / (C * U) : row;
      const T v = ADJOINT ? w_hh[(g * size + i) * size + j] : w_hh[(g * size + j) * size + i];
#if TYPE != FLOAT32
      word |= (there ? (u32)v : 0) << 16 * e;
#else
      word = !there ? 0 : PRECISE ? __float_as_uint(v) : tf32(__float_as_uint(v));
#endif
    }
    return word;
  }

  // This thread's numbers are of the accumulators wk * PER + i.
  DEVICE bool owner() const { return wk * PER < 4 * NT; }
  DEVICE int sequence(int i) const { return (wk * PER + i) / 4 * 8 + lane % 4 * 2 + (wk * PER + i) % 2; }
  DEVICE int unit(int i) const { return rank * U + wm * 16 + lane / 4 + (wk * PER + i) / 2 % 2 * 8; }

  DEVICE bool inside(int i) const { return owner() && b0 + sequence(i) < B && unit(i) < H; }

  // Offset of a number from that of the first sequence and unit 0, in rows of this pitch.
  DEVICE int at(int i, int pitch) const { return sequence(i) * pitch + unit(i); }

  // The step with number u of a sweep.
  DEVICE int time(int u, bool descending) const { return u < 0 || u >= steps ? 1 << 30 : descending ? steps - 1 - u : u; }
  DEVICE i64 row(int t) const { return t >= steps ? 0 : offsets ? offsets[t] : (i64)t * B; }
  DEVICE bool runs(int t, int i) const { return t < end[i]; }
  DEVICE bool cut(int t, int i) const {
    return resets && t + reverse < end[i] && resets[(i64)(t + reverse) * B + b0 + sequence(i)];
  }

  // Read what step u + AHEAD of a padded batch will want into the L2 cache; eight lanes side by side need it once.
  DEVICE void warm(const T* p, int u, int pitch) const {
    const int t = time(u + AHEAD, reverse != ADJOINT);
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (lane < 4 && !offsets && runs(t, i)) prefetch(p + row(t) * pitch + at(i, pitch));
  }

  // Tell all blocks of the group these numbers for step c of their sums.
  DEVICE void tell(int c, const float (&values)[VECTORS][PER]) {
    T* inbox = (T*)&shared.inbox[SCOPE == GRID ? 0 : c & 1][0][0];
    if (owner())
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < PER; ++i)
          *(SCOPE == BLOCK ? inbox + sequence(i) * PITCH * WORD + v * U + unit(i)
                           : &shared.outbox[wm][v][sequence(i)][unit(i) % 16]) = narrow(values[v][i]);
#if SCOPE == BLOCK
    __syncthreads();
#else
    __syncwarp();
    // Lanes side by side send pieces of one chunk, or chunks to different blocks.
    constexpr int PIECES = SCOPE == GRID ? 4 : C;
    for (int q = lane; owner() && q < CHUNKS * PIECES; q += 32) {
      const int chunk = SCOPE == GRID ? q / 4 : q % CHUNKS, part = chunk % (8 / CHUNK), number = chunk / (8 / CHUNK);
      const int vector = number / (4 * PER), i = number / 4 % PER + wk * PER;
      const int b = i / 4 * 8 + number % 4 * 2 + i % 2, first = i / 2 % 2 * 8 + part * CHUNK;
      const T* from = &shared.outbox[wm][vector][b][first];
      const int word = (vector * C * U + rank * U + wm * 16 + first) / WORD;
#if SCOPE == GRID
      store_flagged(flags + (((c & 1) * (WORDS / 8) + word / 8) * NT + b / 8) * 64 + (word / 4 % 2 * 8 + b % 8) * 4 + q % 4,
                    ((const u32*)from)[q % 4], c + 1);
#else
      const u32 peer = (q / CHUNKS + rank) % C;
      store_async(peer_address(shared_address(&shared.inbox[c & 1][b][word]), peer), *(const uint4*)from,
                  peer_address(shared_address(&shared.barrier[c & 1]), peer));
#endif
    }
    __syncwarp();
#endif
  }

  // Words of the sequences of tile j: those with numbers 8 k to 8 k + 15 of this warp's share.
  DEVICE void fetch(u32 (&words)[4], int c, int k, int j) const {
    load_matrices(words, shared_address(&shared.inbox[c & 1][j * 8 + lane % 8][(wk * KS + k) * 8 + lane / 8 * 4]));
  }

  // The sums of step c, once all have told their part.
  DEVICE void receive(int c, float (&sums)[ROWS][PER]) {
#if SCOPE != BLOCK
    u32 patience = 0;
#endif
#if SCOPE == GRID
    const u64* from = flags + ((c & 1) * (WORDS / 8) + wk * KS) * NT * 64 + lane;
#elif SCOPE == CLUSTER
    const u32 barrier = shared_address(&shared.barrier[c & 1]);
    while (!barrier_passed(barrier, c >> 1 & 1)) wait_more(patience);
    if (threadIdx.x == 0) barrier_expect(barrier, 4 * NB * WORDS);
#endif
    float d[CHAINS][ROWS][NT][4];
#pragma unroll
    for (int e = 0; e < CHAINS * ROWS * NT * 4; ++e) (&d[0][0][0][0])[e] = 0.f;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#if SCOPE == GRID
      constexpr int AT_ONCE = KS < 8 ? KS : 8;
#pragma unroll
      for (int k0 = 0; k0 < KS; k0 += AT_ONCE) {
        u64 seen[AT_ONCE][2];
        bool ready;
        do {
          ready = true;
#pragma unroll
          for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const bool there = k0 + k < KS && (WORDS == 8 * KS * WK || wk * KS + k0 + k < WORDS / 8);
              seen[k][half] = there ? load_flagged(from + ((k0 + k) * NT + j) * 64 + half * 32) : (u64)(c + 1) << 32;
              ready &= (u32)(seen[k][half] >> 32) == (u32)c + 1;
            }
          if (!ready) wait_more(patience);
        } while (!ready);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
          for (int row = 0; row < ROWS; ++row)
            if (k0 + k < KS) product(d[k % CHAINS][row][j], w[row][k0 + k], (u32)seen[k][0], (u32)seen[k][1]);
      }
#else
#pragma unroll
      for (int k = 0; k < KS; k += 2) {
        u32 words[4];
        fetch(words, c, k, j);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          product(d[0][row][j], w[row][k], words[0], words[1]);
          product(d[CHAINS - 1][row][j], w[row][k + 1], words[2], words[3]);
        }
      }
#endif
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) {
        const float sum = CHAINS == 1 ? d[0][row][i / 4][i % 4] : d[0][row][i / 4][i % 4] + d[CHAINS - 1][row][i / 4][i % 4];
        if (WK > 1) shared.sums[wm][wk][row][i][lane] = sum;
        else sums[row][i % PER] = sum;
      }
    }
    if (WK == 1) return;
    group_sync(1 + wm, 32 * WK);
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        sums[row][i] = 0.f;
#pragma unroll
        for (int q = 0; owner() && q < WK; ++q) sums[row][i] += shared.sums[wm][q][row][wk * PER + i][lane];
      }
  }

  DEVICE void leave() const {
#if SCOPE == CLUSTER
    cluster_sync();  // nobody leaves while others may write into his memory
#endif
  }
};

#if ADJOINT
// What the adjoint is given of a step, by a thread's numbers.
struct Given { float s[STATES], d[STATES], saved[SAVED + 1]; };
#endif

extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
#if ADJOINT
    const T* w_hh, const T* state, const T* y, const T* states, const T* saved, const T* dy, const T* dstates, float* ds,
    T* dx, T* dr, T* h_came,
#else
    const T* x, const T* w_hh, const T* b_hh, float* state, T* y, T* states, T* saved,
#endif
    const i64* lengths, const i64* offsets, const bool* resets, u64* flags, i64 steps, i64 B, i64 R, i64 H, i64 reverse) {
  SHARED_MEMORY(memory);
  Thread me(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, flags, (int)steps, (int)B, (int)H,
            (int)reverse);
  // Pitches of rows of [R, N, G, H] and [R, N, H]; arrays begin at the block's first sequence.
  const int N = gridDim.z, x_row = N * GATES * (int)H, y_row = N * (int)H;
  const i64 plane = R * y_row, x0 = (me.b0 * N + me.n) * GATES * H, y0 = (me.b0 * N + me.n) * H;
  const i64 s0 = (me.n * STATES * B + me.b0) * H;
  float news[VECTORS][PER], sums[ROWS][PER];
#if ADJOINT
  state += s0, y += y0, states += y0, saved += y0, dy += y0, ds += s0, dr += x0;
  float d[PER][STATES];
  auto fetch = [&](Given (&given)[PER], int t) {
    const i64 row = me.row(t) * y_row;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      given[i] = {};
      if (!me.runs(t, i)) continue;
#pragma unroll
      for (int k = 0; k < STATES; ++k) given[i].s[k] = widen((k ? states + (k - 1) * plane : y)[row + me.at(i, y_row)]);
      given[i].d[0] = widen(dy[row + me.at(i, y_row)]);
#pragma unroll
      for (int k = 1; k < STATES; ++k)
        if (dstates) given[i].d[k] = widen(dstates[y0 + (k - 1) * plane + row + me.at(i, y_row)]);
#pragma unroll
      for (int k = 0; k < SAVED; ++k) given[i].saved[k] = widen(saved[k * plane + row + me.at(i, y_row)]);
    }
  };
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int k = 0; k < STATES; ++k) d[i][k] = me.inside(i) ? ds[k * B * H + me.at(i, H)] : 0.f;
  int t = me.time(0, !me.reverse);
  Given now[PER], later[PER];
  fetch(now, t);
  for (int u = 0;; ++u) {
    const int before = me.time(u + 1, !me.reverse);  // in time: what ran before it, and comes after it here
    fetch(later, before);
    me.warm(y, u, y_row);
    me.warm(dy, u, y_row);
#pragma unroll
    for (int k = 1; k < STATES; ++k) me.warm(states + (k - 1) * plane, u, y_row);
#pragma unroll
    for (int k = 0; k < SAVED; ++k) me.warm(saved + k * plane, u, y_row);
    if (u) {
      me.receive(u - 1, sums);
#pragma unroll
      for (int i = 0; i < PER; ++i) d[i][0] += sums[0][i];
    }
    if (u == me.steps) break;
    T* const to = dr + me.row(t) * x_row;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const bool runs = me.runs(t, i), flows = runs && !me.cut(t, i), first = flows && !me.runs(before, i);
      float gx[GATES], gr[GATES], passed[STATES], came[STATES];
#pragma unroll
      for (int k = 0; k < STATES; ++k) {
        now[i].d[k] += d[i][k];
        came[k] = first ? widen(state[k * B * H + me.at(i, H)]) : flows ? later[i].s[k] : 0.f;
      }
      cell_backward(now[i].saved, came, now[i].s, now[i].d, gx, gr, passed);
#pragma unroll
      for (int k = 0; k < STATES; ++k)
        if (runs) d[i][k] = flows ? passed[k] : 0.f;
#pragma unroll
      for (int g = 0; g < GATES; ++g) {
        news[g][i] = flows ? gr[g] : 0.f;
        if (runs) to[g * H + me.at(i, x_row)] = narrow(gr[g]);
        if (runs && SPLIT) dx[x0 + me.row(t) * x_row + g * H + me.at(i, x_row)] = narrow(gx[g]);
      }
      if (runs && h_came) h_came[y0 + me.row(t) * y_row + me.at(i, y_row)] = narrow(came[0]);
      now[i] = later[i];
    }
    me.tell(u, news);
    t = before;
  }
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int k = 0; k < STATES; ++k)
      if (me.inside(i)) ds[k * B * H + me.at(i, H)] = d[i][k];
#else
  x += x0, state += s0, y += y0;
  float s[PER][STATES], bias[PER][GATES];
  T now[PER][GATES], later[PER][GATES];
  auto fetch = [&](T (&given)[PER][GATES], int t) {
    const T* from = x + me.row(t) * x_row;
#pragma unroll
    for (int i = 0; i < PER; ++i)
#pragma unroll
      for (int g = 0; g < GATES; ++g) given[i][g] = me.runs(t, i) ? from[g * H + me.at(i, x_row)] : T(0);
  };
  // The states that come into step t, and the h among them to be multiplied.
  auto enter = [&](int t) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
#pragma unroll
      for (int k = 0; k < STATES; ++k)
        if (me.cut(t, i)) s[i][k] = 0.f;
      news[0][i] = s[i][0];
    }
  };
  int t = me.time(0, me.reverse);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
#pragma unroll
    for (int k = 0; k < STATES; ++k) s[i][k] = me.inside(i) ? state[k * B * H + me.at(i, H)] : 0.f;
#pragma unroll
    for (int g = 0; g < GATES; ++g)
      bias[i][g] = b_hh && me.inside(i) ? widen(b_hh[(me.n * GATES + g) * H + me.unit(i)]) : 0.f;
  }
  fetch(now, t);
  enter(t);
  me.tell(0, news);
  for (int u = 0; u < me.steps; ++u) {
    const int next = me.time(u + 1, me.reverse);
    fetch(later, next);
#pragma unroll
    for (int g = 0; g < GATES; ++g) me.warm(x + g * H, u, x_row);
    me.receive(u, sums);
    const i64 row = y0 + me.row(t) * y_row;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      float gates[GATES], r[GATES], new_s[STATES], a[SAVED + 1];
#pragma unroll
      for (int g = 0; g < GATES; ++g) {
        gates[g] = widen(now[i][g]);
        r[g] = sums[g][i] + bias[i][g];
        now[i][g] = later[i][g];
      }
      cell_forward(gates, r, s[i], new_s, a);
      if (!me.runs(t, i)) continue;
      y[row - y0 + me.at(i, y_row)] = narrow(new_s[0]);
#pragma unroll
      for (int k = 0; k < STATES; ++k) {
        s[i][k] = new_s[k];
        if (k && states) states[(k - 1) * plane + row + me.at(i, y_row)] = narrow(new_s[k]);
      }
#pragma unroll
      for (int k = 0; k < SAVED; ++k)
        if (saved) saved[k * plane + row + me.at(i, y_row)] = narrow(a[k]);
    }
    enter(next);
    if (u + 1 < me.steps) me.tell(u + 1, news);
    t = next;
  }
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int k = 0; k < STATES; ++k)
      if (me.inside(i)) state[k * B * H + me.at(i, H)] = s[i][k];
#endif
  me.leave();
}
