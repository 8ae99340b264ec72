// The recurrence on matrix units: one forward and one backward kernel for every cell and every scope of the step barrier.
// Defined before this text: TYPE, SCOPE, ADJOINT, PRECISE (float32 products in three parts), GATES, STATES, SAVED,
// SPLIT (dx is not dr), UNITS (of every gate, to a block), BLOCKS (that share one sequence's units), SEQUENCES (to a
// block), SPLITS (warps that share a sum), MASKS (there are lengths, offsets or resets), EVEN (H is, and pairs of numbers
// are aligned) and CELL, the statements of cell_forward or cell_backward.
//
// In each step a block multiplies its rows of W_hh (W_hh^T in the adjoint), which its warps hold in registers, with all
// of h (all gates' gradients), which the blocks tell each other: in scope BLOCK through shared memory and one barrier,
// in CLUSTER by asynchronous stores into each other's shared memory, which arrive at a barrier of the receiver, in GRID
// through the L2 cache, each word with the number of the step that it is for. There are two buffers, in turn: nobody
// writes the one of step c + 2 before he has all of step c + 1, and who sent that had read step c.
constexpr int WORD = 4 / sizeof(T), CHUNK = 4 * WORD;             // numbers in 4 and in 16 bytes
constexpr int U = UNITS, C = BLOCKS, NB = SEQUENCES, NT = NB / 8;
constexpr int WM = U / 16, WK = SPLITS, THREADS = 32 * WM * WK;   // a warp: 16 units of all gates, 1 / WK of the sum
constexpr int ROWS = ADJOINT ? 1 : GATES, VECTORS = ADJOINT ? GATES : 1;  // tiles of a warp; what is told, in units of H
constexpr int WORDS = VECTORS * C * U / WORD, KS = ((WORDS / 8 + WK - 1) / WK + 1) / 2 * 2;  // of 8 words, to a warp
constexpr int PITCH = 8 * KS * WK + 4;                            // an odd number of 16 bytes: no two rows in one bank
constexpr int P = 2 * NT > WK ? 2 * NT / WK : 1;                  // pairs of each gate that a thread owns
constexpr int CHUNKS = VECTORS * P * 4 * (16 / CHUNK);            // that a warp tells
constexpr int CHAINS = ROWS * NT < 4 ? 2 : 1;                     // sums under way, so that products overlap
constexpr int AHEAD = 8;                                          // steps by which memory is read into the L2 cache

struct __align__(128) Shared {
  u32 inbox[SCOPE == GRID ? 1 : 2][NB][SCOPE == GRID ? 4 : PITCH];
  T outbox[SCOPE == CLUSTER ? WM : 1][VECTORS][NB][16];
  float sums[SCOPE == GRID ? 2 : 1][WK > 1 ? WM : 1][WK][ROWS][4 * NT][32];  // in GRID warps may be a step ahead
  u64 barrier[2];
};

DEVICE float relu(float x) { return x < 0.f ? 0.f : x; }          // NaN stays
DEVICE float relu_grad(float d, float y) { return y <= 0.f ? 0.f : d; }
#if ADJOINT
DEVICE void cell_backward(const float* a, const float* s, const float* n, const float* d, float* x, float* r, float* p)
#else
DEVICE void cell_forward(const float* x, const float* r, const float* s, float* n, float* a)
#endif
{ CELL }

// d += w v of 16 x 8 numbers over 8 words.
DEVICE void product(float (&d)[4], u32 (&w)[4], u32 b0, u32 b1) {
#if TYPE == FLOAT32
  const u32 h0 = tf32(b0), h1 = tf32(b1);
#if PRECISE
  u32 high[4], low[4];
  EACH(e, 4) {
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

// A thread's place, its weights, and what it hears of the other threads.
struct Thread {
  Shared& shared;
  u64* const flags;               // scope GRID: of this group of blocks, [2, 8-word steps, NT, 2, 8 sequences, 4 words]
  const i64 *lengths, *offsets;
  const bool* resets;
  const int steps, B, H, n, rank, reverse, lane, wm, wk, unit;
  const i64 b0;
  const bool two;                 // of its two units, `unit` and the next, the second is inside, too
  u32 w[ROWS][KS][4];
  int end[P];                     // steps of the sequences of its pairs, 0 for those outside

  DEVICE Thread(Shared& shared, const T* w_hh, const i64* lengths, const i64* offsets, const bool* resets, u64* flags,
                int steps, int B, int H, int reverses)
      : shared(shared), flags(flags + (i64)(blockIdx.z * gridDim.y + blockIdx.y) * 2 * (WORDS / 8) * NT * 64),
        lengths(lengths), offsets(offsets), resets(resets), steps(steps), B(B), H(H), n(blockIdx.z), rank(blockIdx.x),
        reverse(reverses >> blockIdx.z & 1), lane(threadIdx.x % 32), wm(threadIdx.x / 32 % WM),
        wk(threadIdx.x / 32 / WM), unit(rank * U + wm * 16 + lane / 4 * 2), b0((i64)blockIdx.y * NB),
        two(EVEN || unit + 1 < H) {
    w_hh += (i64)n * GATES * H * H;
    // A few at a time: unrolled, all their addresses would be computed first, and spilled.
    constexpr int FEW = ROWS == 1 ? 4 : 1;
#pragma unroll 1
    for (int k0 = 0; k0 < KS; k0 += FEW) {
      u32 words[FEW][ROWS][4];
      EACH(e, FEW * ROWS * 4)
        words[e / 4 / ROWS][e / 4 % ROWS][e % 4] =
            weight(w_hh, e / 4 % ROWS, unit + e % 2, (wk * KS + k0 + e / 4 / ROWS) * 8 + lane % 4 + e / 2 % 2 * 4);
      EACH(k, KS)
        if (k / FEW * FEW == k0)
          EACH(e, ROWS * 4) w[e / 4][k][e % 4] = words[k % FEW][e / 4][e % 4];
    }
    EACH(p, P)
      end[p] = !inside(p) ? 0 : lengths ? (int)lengths[b0 + sequence(p)] : steps;
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
  // units of all gates. 0 outside of it, where something inside is read.
  DEVICE u32 weight(const T* w_hh, u32 row, u32 unit, u32 k) const {
    const u32 size = H, j = min(unit, size - 1), g = ADJOINT ? min(k, (u32)WORDS - 1) * WORD / (C * U) : row;
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
  DEVICE int sequence(int p) const { return (wk * P + p) / 2 * 8 + lane % 4 * 2 + (wk * P + p) % 2; }
  DEVICE bool inside(int p) const { return owner() && b0 + sequence(p) < B && unit < H; }
  // Offset of a pair from that of the block's first sequence and unit 0, in rows of this pitch.
  DEVICE int at(int p, int pitch) const { return sequence(p) * pitch + unit; }

  DEVICE Pair load(const T* p) const {
    if (EVEN) return *(const Pair*)p;
    return {p[0], two ? p[1] : T(0)};
  }
  DEVICE void store(T* p, Pair v) const {
    if (EVEN) { *(Pair*)p = v; return; }
    p[0] = v.a;
    if (two) p[1] = v.b;
  }
  DEVICE void load(float (&v)[2], const float* p) const { v[0] = p[0], v[1] = two ? p[1] : 0.f; }
  DEVICE void store(float* p, const float (&v)[2]) const {
    p[0] = v[0];
    if (two) p[1] = v[1];
  }

  // The step with number u of a sweep, and the row that it begins at.
  DEVICE int time(int u, bool descending) const { return u < 0 || u >= steps ? 1 << 30 : descending ? steps - 1 - u : u; }
  DEVICE i64 row(int t) const { return t >= steps ? 0 : MASKS && offsets ? offsets[t] : (i64)t * B; }
  DEVICE bool runs(int t, int p) const { return t < end[p]; }
  DEVICE bool cut(int t, int p) const {
    return MASKS && resets && t + reverse < end[p] && resets[(i64)(t + reverse) * B + b0 + sequence(p)];
  }
  // Reads what step u + AHEAD will want into the L2 cache; lanes side by side need that once.
  DEVICE void warm(const T* p, int u, int pitch) const {
    if (MASKS || u + AHEAD >= steps || lane >= 4) return;
    p += row(time(u + AHEAD, reverse != ADJOINT)) * pitch;
    EACH(i, P)
      if (inside(i)) prefetch(p + at(i, pitch));
  }

  // Tells all blocks of the group these numbers for step c of their sums.
  DEVICE void tell(int c, const float (&values)[VECTORS][P][2]) {
    EACH(v, VECTORS)
      EACH(p, P) {
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
                        ((word + e) / 4 % 2 * 8 + b % 8) * 4 + (word + e) % 4, ((const u32*)&pair)[e], c + 1);
#endif
      }
#if SCOPE == BLOCK
    __syncthreads();
#elif SCOPE == CLUSTER
    __syncwarp();
    for (int q = lane; owner() && q < CHUNKS * C; q += 32) {  // lanes side by side send chunks to one block
      const int chunk = q % CHUNKS, part = chunk % (16 / CHUNK), number = chunk / (16 / CHUNK);
      const int v = number / (4 * P), p = number / 4 % P + wk * P, b = p / 2 * 8 + number % 4 * 2 + p % 2;
      const int word = (v * C * U + rank * U + wm * 16 + part * CHUNK) / WORD;
      const u32 peer = (q / CHUNKS + rank) % C;
      store_async(peer_address(shared_address(&shared.inbox[c & 1][b][word]), peer),
                  *(const uint4*)&shared.outbox[wm][v][b][part * CHUNK],
                  peer_address(shared_address(&shared.barrier[c & 1]), peer));
    }
    __syncwarp();
#endif
  }

  // The sums of step c, once all have told their part.
  DEVICE void receive(int c, float (&sums)[ROWS][P][2]) {
#if SCOPE == CLUSTER
    u32 patience = 0;
    const u32 barrier = shared_address(&shared.barrier[c & 1]);
    while (!barrier_passed(barrier, c >> 1 & 1)) wait_more(patience);
    if (threadIdx.x == 0) barrier_expect(barrier, 4 * NB * WORDS);
#endif
    float d[CHAINS][ROWS][NT][4] = {};
    EACH(j, NT) {
#if SCOPE == GRID
      const u64* from = flags + ((c & 1) * (WORDS / 8) + wk * KS) * NT * 64 + j * 64 + lane;
      constexpr int AT_ONCE = KS < 8 ? KS : 8;
#pragma unroll
      for (int k0 = 0; k0 < KS; k0 += AT_ONCE) {
        u64 seen[AT_ONCE][2];
        u32 patience = 0;
        for (bool ready = false; !ready;) {
          ready = true;
          EACH(k, AT_ONCE)
            EACH(half, 2) {
              const bool there = k0 + k < KS && (WORDS == 8 * KS * WK || wk * KS + k0 + k < WORDS / 8);
              seen[k][half] = there ? load_flagged(from + (k0 + k) * NT * 64 + half * 32) : (u64)(c + 1) << 32;
              ready &= (u32)(seen[k][half] >> 32) == (u32)c + 1;
            }
          if (!ready) wait_more(patience);
        }
        __syncwarp();
        EACH(k, AT_ONCE)
          EACH(row, ROWS)
            if (k0 + k < KS) product(d[k % CHAINS][row][j], w[row][k0 + k], (u32)seen[k][0], (u32)seen[k][1]);
      }
#else
      const u32 from = shared_address(&shared.inbox[c & 1][j * 8 + lane % 8][wk * KS * 8 + lane / 8 * 4]);
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
    auto& mine = shared.sums[SCOPE == GRID ? c & 1 : 0];
    EACH(row, ROWS) {
      EACH(i, 4 * NT) {
        const float sum = d[0][row][i / 4][i % 4] + (CHAINS > 1 ? d[CHAINS - 1][row][i / 4][i % 4] : 0.f);
        if (WK > 1) mine[wm][wk][row][i][lane] = sum;
        else sums[row][i / 4 * 2 % P + i % 2][i / 2 % 2] = sum;
      }
    }
    if (WK == 1) return;
    group_sync(1 + wm, 32 * WK);
    EACH(row, ROWS)
      EACH(p, P)
        EACH(e, 2) {
          sums[row][p][e] = 0.f;
#pragma unroll
          for (int q = 0; owner() && q < WK; ++q)
            sums[row][p][e] += mine[wm][q][row][(wk * P + p) / 2 * 4 + e * 2 + (wk * P + p) % 2][lane];
        }
  }

  DEVICE void leave() const {
#if SCOPE == CLUSTER
    cluster_sync();  // nobody leaves while others may write into his memory
#endif
  }
};

DEVICE float half_of(Pair pair, int e) { return widen(e ? pair.b : pair.a); }

extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
#if ADJOINT
    const T* w_hh, const T* state, const T* y, const T* states, const T* saved, const T* dy, const T* dstates, float* ds,
    T* dx, T* dr, T* h_came,
#else
    const T* x, const T* w_hh, const T* b_hh, float* state, T* y, T* states, T* saved,
#endif
    const i64* lengths, const i64* offsets, const bool* resets, u64* flags, i64 steps, i64 B, i64 R, i64 H, i64 reverses) {
  SHARED_MEMORY(memory);
  Thread me(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, flags, (int)steps, (int)B, (int)H,
            (int)reverses);
  // Pitches of rows of [R, N, G, H] and [R, N, H]; arrays begin at the block's first sequence.
  const int N = gridDim.z, x_row = N * GATES * (int)H, y_row = N * (int)H;
  const i64 plane = R * y_row, x0 = (me.b0 * N + me.n) * GATES * H, y0 = (me.b0 * N + me.n) * H, layer = B * H;
  const i64 s0 = (me.n * STATES * B + me.b0) * H;
  float news[VECTORS][P][2], sums[ROWS][P][2];
#if ADJOINT
  state += s0, y += y0, states += y0, saved += y0, dy += y0, dstates += dstates ? y0 : 0, ds += s0, dr += x0, dx += x0;
  struct Given { Pair s[STATES], d[STATES], saved[SAVED + 1]; } now[P], later[P];  // of the steps t and `before`
  float d[P][STATES][2] = {};
  auto fetch = [&](Given (&given)[P], int t) {
    const i64 row = me.row(t) * y_row;
    EACH(p, P) {
      given[p] = {};
      if (!me.runs(t, p)) continue;
      EACH(k, STATES) given[p].s[k] = me.load((k ? states + (k - 1) * plane : y) + row + me.at(p, y_row));
      given[p].d[0] = me.load(dy + row + me.at(p, y_row));
#pragma unroll
      for (int k = 1; k < STATES; ++k)
        if (dstates) given[p].d[k] = me.load(dstates + (k - 1) * plane + row + me.at(p, y_row));
      EACH(k, SAVED) given[p].saved[k] = me.load(saved + k * plane + row + me.at(p, y_row));
    }
  };
  EACH(p, P)
    EACH(k, STATES)
      if (me.inside(p)) me.load(d[p][k], ds + k * layer + me.at(p, H));
  int t = me.time(0, !me.reverse);
  fetch(now, t);
  for (int u = 0;; ++u) {
    const int before = me.time(u + 1, !me.reverse);  // in time: what ran before it, and comes after it here
    fetch(later, before);
    me.warm(y, u, y_row);
    me.warm(dy, u, y_row);
#pragma unroll
    for (int k = 1; k < STATES; ++k) me.warm(states + (k - 1) * plane, u, y_row);
    EACH(k, SAVED) me.warm(saved + k * plane, u, y_row);
    if (u) {
      me.receive(u - 1, sums);
      EACH(p, P) d[p][0][0] += sums[0][p][0], d[p][0][1] += sums[0][p][1];
    }
    if (u == me.steps) break;
    const i64 row = me.row(t);
    EACH(p, P) {
      const bool runs = me.runs(t, p), flows = runs && !me.cut(t, p), first = flows && !me.runs(before, p);
      float gx[2][GATES], gr[2][GATES], came[2][STATES];
      EACH(k, STATES) {
        const Pair s = first ? me.load(state + k * layer + me.at(p, H)) : later[p].s[k];
        came[0][k] = flows ? half_of(s, 0) : 0.f, came[1][k] = flows ? half_of(s, 1) : 0.f;
      }
      EACH(e, 2) {
        float s[STATES], given[STATES], a[SAVED + 1], passed[STATES];
        EACH(k, STATES) s[k] = half_of(now[p].s[k], e), given[k] = d[p][k][e] + half_of(now[p].d[k], e);
        EACH(k, SAVED) a[k] = half_of(now[p].saved[k], e);
        cell_backward(a, came[e], s, given, gx[e], gr[e], passed);
        EACH(k, STATES)
          if (runs) d[p][k][e] = flows ? passed[k] : 0.f;
        EACH(g, GATES) news[g][p][e] = flows ? gr[e][g] : 0.f;
      }
      now[p] = later[p];
      if (!runs) continue;
      EACH(g, GATES) {
        me.store(dr + row * x_row + (g * (int)H + me.at(p, x_row)), narrow(gr[0][g], gr[1][g]));
        if (SPLIT) me.store(dx + row * x_row + (g * (int)H + me.at(p, x_row)), narrow(gx[0][g], gx[1][g]));
      }
      if (MASKS && h_came) me.store(h_came + y0 + row * y_row + me.at(p, y_row), narrow(came[0][0], came[1][0]));
    }
    me.tell(u, news);
    t = before;
  }
  EACH(p, P)
    EACH(k, STATES)
      if (me.inside(p)) me.store(ds + k * layer + me.at(p, H), d[p][k]);
#else
  x += x0, state += s0, y += y0, states += states ? y0 : 0, saved += saved ? y0 : 0;
  float s[P][STATES][2] = {}, bias[GATES][2] = {};
  Pair now[P][GATES], later[P][GATES];
  auto fetch = [&](Pair (&given)[P][GATES], int t) {
    const T* from = x + me.row(t) * x_row;
    EACH(p, P)
      EACH(g, GATES) {
        given[p][g] = {};
        if (me.runs(t, p)) given[p][g] = me.load(from + (g * (int)H + me.at(p, x_row)));
      }
  };
  // The states that come into step t, and the h among them to be multiplied.
  auto enter = [&](int t) {
    EACH(p, P)
      EACH(e, 2) {
        EACH(k, STATES)
          if (me.cut(t, p)) s[p][k][e] = 0.f;
        news[0][p][e] = s[p][0][e];
      }
  };
  EACH(g, GATES)
    if (b_hh && me.unit < H) {
      const Pair b = me.load(b_hh + (me.n * GATES + g) * H + me.unit);
      bias[g][0] = half_of(b, 0), bias[g][1] = half_of(b, 1);
    }
  EACH(p, P)
    EACH(k, STATES)
      if (me.inside(p)) me.load(s[p][k], state + k * layer + me.at(p, H));
  int t = me.time(0, me.reverse);
  fetch(now, t);
  enter(t);
  me.tell(0, news);
  for (int u = 0; u < me.steps; ++u) {
    const int next = me.time(u + 1, me.reverse);
    fetch(later, next);
    EACH(g, GATES) me.warm(x + g * H, u, x_row);
    me.receive(u, sums);
    const i64 row = me.row(t) * y_row;
    EACH(p, P) {
      float a[2][SAVED + 1];
      if (me.runs(t, p)) {
        EACH(e, 2) {
          float gates[GATES], r[GATES], old[STATES], new_s[STATES];
          EACH(g, GATES) gates[g] = half_of(now[p][g], e), r[g] = sums[g][p][e] + bias[g][e];
          EACH(k, STATES) old[k] = s[p][k][e];
          cell_forward(gates, r, old, new_s, a[e]);
          EACH(k, STATES) s[p][k][e] = new_s[k];
        }
        me.store(y + row + me.at(p, y_row), narrow(s[p][0][0], s[p][0][1]));
#pragma unroll
        for (int k = 1; k < STATES; ++k)
          if (states) me.store(states + (k - 1) * plane + row + me.at(p, y_row), narrow(s[p][k][0], s[p][k][1]));
        EACH(k, SAVED)
          if (saved) me.store(saved + k * plane + row + me.at(p, y_row), narrow(a[0][k], a[1][k]));
      }
      EACH(g, GATES) now[p][g] = later[p][g];
    }
    enter(next);
    if (u + 1 < me.steps) me.tell(u + 1, news);
    t = next;
  }
  EACH(p, P)
    EACH(k, STATES)
      if (me.inside(p)) me.store(state + k * layer + me.at(p, H), s[p][k]);
#endif
  me.leave();
}
