// A thread of the recurrence on matrix units, for every cell and every scope of the step barrier.
// forward.cu and backward.cu take it through time.
//
// In each step a block multiplies its rows of W_hh (W_hh^T in the adjoint), which its warps hold in
// registers, with all of h (all gates' gradients), which the blocks exchange:
//   BLOCK    through shared memory and one barrier
//   CLUSTER  by asynchronous stores into each other's shared memory, which a barrier there counts
//   GRID     through the L2 cache, in packets that say whether they have arrived
// Double buffering suffices: a block writes buffer c + 2 only after receiving all of c + 1, whose
// senders had read c.

// A thread's place, its weights, and its exchange with other threads.
struct Worker {
  Shared& shared;
  // GRID: two buffers of packets and then two of signs, of the blocks that share these sequences
  uint4* const packets;
  const i64* offsets;
  const bool* resets;
  const int steps, B, H, n, rank, reverse, lane, wm, wk, unit;
  // its first sequence within the block; the address of its words in the inbox, for ldmatrix
  const int sequence0;
  const u32 inbox;
  // row pitches of [R, N, G, H] and [R, N, H]
  const int x_row, y_row;
  // first sequence of the block, where the launch begins at tile `first` of the batch; pitch of
  // [A, R, N, H]; where the thread's first pair is in x, y and [N, B, H]
  const i64 b0, plane, x0, y0, s0;
  // whether the second of its two units, `unit` + 1, is inside
  const bool two;
  // 0, which the compiler does not know
  const u32 nothing;
#if SCOPE == GRID
  const int signs_at;
#endif
  Words w[ROWS][HELD];
  // steps of its pairs' sequences, -1 for those outside
  int end[P];

  DEVICE Worker(Shared& shared, const T* w_hh, const i64* lengths, const i64* offsets,
                const bool* resets, uint4* packets, i64 steps, i64 B, i64 R, i64 H, i64 reverses,
                i64 first)
      : shared(shared),
        packets(packets +
                (i64)(blockIdx.z * gridDim.y + blockIdx.y) * 2 * (PACKETS + SIGNS / 4)),
        offsets(offsets),
        resets(resets),
        steps(steps),
        B(B),
        H(H),
        n(blockIdx.z),
        rank(blockIdx.x),
        reverse(reverses >> blockIdx.z & 1),
        lane(pin_register(threadIdx.x % 32)),
        wm(threadIdx.x / 32 % WM),
        wk(threadIdx.x / 32 / WM),
        unit(rank * U + wm * 16 + lane / 4 * 2),
        // pinned: the compiler would compute them again in each step
        sequence0(pin_register((u32)(wk * P / 2 * 8 + lane % 4 * 2 + wk * P % 2))),
        inbox(pin_register(shared_address(
            &shared.inbox[0][SCOPE == GRID ? 0 : lane % 8]
                         [SCOPE == GRID ? 0 : wk * KS * 8 + lane / 8 * 4]))),
        x_row(pin_register((u32)(gridDim.z * GATES * H))),
        y_row(pin_register((u32)(gridDim.z * H))),
        b0((first + blockIdx.y) * NB),
        plane(pin_register(R * y_row)),
        x0(pin_register((b0 + sequence0) * x_row + n * GATES * H + unit)),
        y0(pin_register((b0 + sequence0) * y_row + n * H + unit)),
        s0((n * B + b0 + sequence0) * H + unit),
        two(EVEN || unit + 1 < H),
        nothing((u64)first >> 32)
#if SCOPE == GRID
        , signs_at(own_signs())
#endif
  {
    load_weights(w_hh + (i64)n * GATES * H * H);
    EACH(p, P) end[p] = !inside(p) ? -1 : lengths ? (int)lengths[b0 + sequence(p)] : steps;
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

  // Two numbers side by side in memory, each 0 where it is not there.
  DEVICE u32 load_pair_if(const T* p, bool first, bool second) const {
    if (EVEN) return load_word_if(p, first);
    return load_if(p, first) | load_if(p + 1, second) << 16;
  }
  // The word that the thread multiplies first in k-step `step`, and how far from it is that of half
  // a k-step number k. A packet of a grid is for one thread: of two k-steps what it multiplies.
  DEVICE int first_word(int step) const {
    const int k = wk * KS + step;
    return SCOPE == GRID ? k / 2 * 16 + lane % 4 * 4 + k % 2 * 2 : k * 8 + lane % 4;
  }
  static DEVICE constexpr int word_after(int k) {
    return SCOPE == GRID ? k / 4 * 16 + k % 4 : k * 4;
  }
  // A few k-steps at a time: with all in flight the registers would not suffice.
  DEVICE void load_weights(const T* w_hh) {
#pragma unroll 1
    for (int k0 = 0; k0 < KS; k0 += K_LOADED) {
      u32 words[K_LOADED][ROWS][4];
      load_words(words, w_hh, k0);
      EACH(k, KS) if (k / K_LOADED * K_LOADED == k0)
        EACH(row, ROWS) keep_weights(row, k, words[k % K_LOADED][row]);
    }
  }
#if ADJOINT
  // Of this unit and the next, over all units of all gates: columns of W_hh.
  DEVICE void load_words(u32 (&words)[K_LOADED][ROWS][4], const T* w_hh, int k0) const {
    constexpr int OF_A_GATE = C * U / WORD;
    EACH(k, 2 * K_LOADED) {
      const int word = first_word(k0) + word_after(k);
      const int i = word % OF_A_GATE * WORD;
      const int left = word < WORDS && unit < H ? H - i : 0;
      const T* from = w_hh + ((word / OF_A_GATE * H + i) * H + unit);
      u32* const to = &words[k / 2][0][k % 2 * 2];
#if TYPE == FLOAT32
      to[0] = operand(load_if(from, left > 0));
      to[1] = operand(load_if(from + 1, left > 0 && two));
#else
      const u32 row = load_pair_if(from, left > 0, left > 0 && two);
      const u32 next = load_pair_if(from + H, left > 1, left > 1 && two);
      to[0] = select_bytes(row, next, 0x5410);
      to[1] = select_bytes(row, next, 0x7632);
#endif
    }
  }
#else
  // Of this unit and the next, all gates, over all units: rows of W_hh.
  DEVICE void load_words(u32 (&words)[K_LOADED][ROWS][4], const T* w_hh, int k0) const {
    const int i = first_word(k0) * WORD;
    EACH(e, 2 * ROWS) {
      const T* from = w_hh + ((e / 2 * H + unit + e % 2) * H + i);
      EACH(k, 2 * K_LOADED) {
        const int left = unit + e % 2 < H ? H - i - word_after(k) * WORD : 0;
#if TYPE == FLOAT32
        const u32 word = operand(load_if(from + word_after(k), left > 0));
#else
        const u32 word = load_pair_if(from + word_after(k) * WORD, left > 0, left > 1);
#endif
        words[k / 2][e / 2][k % 2 * 2 + e % 2] = word;
      }
    }
  }
#endif

  DEVICE void keep_weights(int row, int k, const Words& words) {
    if (k < HELD) EACH(e, 4) w[row][k][e] = words[e];
    else shared.weights[(k - HELD) * ROWS + row][threadIdx.x] =
        uint4{words[0], words[1], words[2], words[3]};
  }
  // Those of k-step k and row `row` of tiles, read into `stored` where they are not in registers.
  DEVICE const Words& weights(int row, int k, Words& stored) const {
    if (k < HELD) return w[row][k];
    const uint4 words = shared.weights[(k - HELD) * ROWS + row][threadIdx.x];
    stored[0] = words.x, stored[1] = words.y, stored[2] = words.z, stored[3] = words.w;
    return stored;
  }

  // Its pairs are of the columns wk * P + p of its tiles: a sequence each.
  DEVICE bool owner() const { return wk * P < 2 * NT; }
  DEVICE int sequence(int p) const { return sequence0 + p / 2 * 8 + p % 2; }
  DEVICE bool inside(int p) const { return owner() && b0 + sequence(p) < B && unit < H; }
  // Offset of a pair from the first, in rows of this pitch.
  DEVICE int at(int p, int pitch) const { return (p / 2 * 8 + p % 2) * pitch; }

  // A pair, or `other` where it is not there.
  DEVICE Loaded load(const T* p, bool there, Pair other = {}) const {
#if EVEN
    return load_if((const Pair*)p, there, other);
#else
    return loaded(load_if(p, there, bits(part(other, 0))),
                  load_if(p + 1, there && two, bits(part(other, 1))));
#endif
  }
  DEVICE void store(T* p, Pair v) const {
    if (EVEN) *(Pair*)p = v;
    else p[0] = part(v, 0), p[two] = part(v, two);
  }

  // The step with number u of a sweep, and the row that it begins at.
  DEVICE int time(int u, bool descending) const {
    if (u >= steps) return 1 << 30;
    return descending ? steps - 1 - u : u;
  }
  DEVICE i64 row(int t) const {
    if (!MASKS) return t >= steps ? 0 : (i64)t * B;
    // plus 0, which the compiler does not know: a uniform address, and it waits to move the row
    // into a uniform register
    const i64* const from = offsets + t + (sequence0 >> 30);
    return load_row_if(from, offsets && t < steps, t < steps ? (i64)t * B : 0);
  }
  DEVICE bool runs(int t, int p) const { return t < end[p]; }
  // v, for what is not done before `late` is known: else what was loaded would be waited for where
  // the assembler moves its first use to.
  DEVICE u32 after(float late, u32 v) const {
    return IN_ORDER ? v | (__float_as_uint(late) & nothing) : pin_register(v);
  }
  DEVICE i64 after(float late, i64 v) const {
    return IN_ORDER ? (u64)after(late, (u32)((u64)v >> 32)) << 32 | after(late, (u32)v) : v;
  }
  // Waits for what was loaded before the time loop. A step that may be the first would wait for it,
  // and with it for its own loads, as these set the same one of the few scoreboards.
  template <class Loads> DEVICE void settle(Loads& loads) const {
    u32* const words = (u32*)&loads;
    EACH(i, sizeof(loads) / 4) if (SETTLED) words[i] |= nothing;
  }
  // As bytes, which are looked at only when they are needed.
  DEVICE void find_cuts(u32 (&cuts)[P], int t) const {
    const i64 boundary = (i64)(t + reverse) * B + b0;
    EACH(p, P) {
      const bool there = RESETS && t + reverse < end[p];
      cuts[p] = RESETS ? load_byte_if(resets + boundary + sequence(p), there) : 0;
    }
  }
  // Reads the row of step t into the L2 cache. Neighbouring lanes share a line.
  DEVICE void prefetch(const T* p, int t, i64 row, int pitch) const {
    EACH(i, P) if (READS_AHEAD && lane < 4 && runs(t, i))
      prefetch_l2(p + row * pitch + at(i, pitch));
  }

  // Sends these numbers, for the sums of step c, to all blocks that share the sequences.
  DEVICE void publish(int c, const float (&values)[VECTORS][P][2]) {
#if SCOPE == GRID
    if (owner()) send_packets(c, values);
#else
    EACH(v, VECTORS) EACH(p, P) {
      if (!owner()) continue;
      const Pair pair = sent(values[v][p][0], two ? values[v][p][1] : 0.f);
#if SCOPE == BLOCK
      *(Pair*)&shared.inbox[c & 1][sequence(p)][(v * C * U + unit) / WORD] = pair;
#else
      *(Pair*)&shared.outbox[wm][v][sequence(p)][unit % 16] = pair;
#endif
    }
#endif
#if SCOPE == BLOCK
    __syncthreads();
#elif SCOPE == CLUSTER
    __syncwarp();
    if (owner()) send_chunks(c);
    __syncwarp();
#endif
  }

#if SCOPE == CLUSTER
  // Sends the warp's part of the outbox to all blocks. Neighbouring lanes send chunks to one block,
  // and a lane its chunk to several; unrolled, as each turn waits for the one before.
  DEVICE void send_chunks(int c) {
    const u32 inbox = shared_address(&shared.inbox[c & 1][0][0]);
    const u32 barrier = shared_address(&shared.barrier[c & 1]);
    EACH(first, CHUNKS / CHUNK_LANES) {
      const int chunk = first * CHUNK_LANES + lane % CHUNK_LANES;
      const int part = chunk % (16 / CHUNK);
      const int number = chunk / (16 / CHUNK);
      const int v = number / (4 * P);
      const int p = number / 4 % P + wk * P;
      const int b = p / 2 * 8 + number % 4 * 2 + p % 2;
      const int word = (v * C * U + rank * U + wm * 16 + part * CHUNK) / WORD;
      const uint4 numbers = *(const uint4*)&shared.outbox[wm][v][b][part * CHUNK];
      EACH(turn, (C + PEERS - 1) / PEERS) {
        const int peer = turn * PEERS + lane / CHUNK_LANES;
        if (C % PEERS && peer >= C) continue;
        const u32 to = (peer + rank) % C;
        store_async(peer_address(inbox + 4 * (b * PITCH + word), to), numbers,
                    peer_address(barrier, to));
      }
    }
  }
#endif

  // Until all blocks of the cluster have published their part of step c.
  DEVICE void wait(int c) {
#if SCOPE == CLUSTER
    u32 waited = 0;
    const u32 barrier = shared_address(&shared.barrier[c & 1]);
    while (!barrier_passed(barrier, c >> 1 & 1)) wait_more(waited, c);
    acquire_shared();
    if (lane + wm + wk == 0) barrier_expect(barrier, 4 * NB * WORDS);
    __syncwarp();
#endif
  }

#if SCOPE == GRID
  DEVICE uint4* packets_of(int c) const { return packets + (c & 1) * PACKETS; }
  DEVICE u32* signs_of(int c) const {
    return (u32*)(packets + 2 * PACKETS) + (c & 1) * SIGNS;
  }
  DEVICE void send_packets(int c, const float (&values)[VECTORS][P][2]) {
    static_assert(VECTORS * P <= 32);
    u32 signs = 0;
    EACH(v, VECTORS) EACH(p, P) {
      uint4 packet = packet_of(sent(values[v][p][0], two ? values[v][p][1] : 0.f));
      const u32 of_all = ballot(packet.w & SIGN);
      if (lane == v * P + p) signs = of_all;
      packet.w = with_sign(packet.w, phase(c));
      const int b = sequence(p);
      const int part = lane / 4 * 2 / (4 * WORD);
      const int at = (((v * C * U + rank * U) / 16 + wm) * NT + b / 8) * 8 + b % 8;
      // the first of the lanes that have words of the packet
      if (lane / 4 * 2 % (4 * WORD) == 0 && b0 + b < B)
        store_packet(packets_of(c) + (at * PARTS + part), packet);
    }
    if (signs_at >= 0) store_word(signs_of(c) + signs_at, with_sign(signs, phase(c)));
  }
  // Where the lane puts signs: of vector lane / P and pair lane % P; or -1.
  DEVICE int own_signs() const {
    const int column = wk * P + lane % P;
    if (!owner() || lane >= VECTORS * P || b0 + column / 2 * 8 + column % 2 >= B) return -1;
    return place_of_signs((lane / P * C * U + rank * U) / 16 + wm, column);
  }
  // For sequences that are none it is of the last one that is, which costs no traffic.
  DEVICE void poll(int c, int group, Seen& seen) const {
    const int b = min((u32)(group / GROUPS * 8 + lane / 4), (u32)(B - b0 - 1));
    const int first = wk * KS / 2 + group % GROUPS * POLLED / 2;
    const int sender = first * WORD + lane % 4 / PARTS;
    const uint4* const from = packets_of(c) + ((sender * NT + b / 8) * 8 + b % 8) * PARTS +
                              lane % PARTS;
    const int signs = (wk * GROUPS + group % GROUPS) * NT + b / 8;
    seen.signs = load_packet((const uint4*)signs_of(c) + signs * 4 + lane % 4 / PARTS * 2 + b % 2);
    EACH(pair, POLLED / 2) {
      const bool there = group % GROUPS * POLLED + 2 * pair < KS &&
                         (WORDS == 8 * KS * WK || (first + pair) * 16 + lane % 4 * 4 < WORDS);
      if (there) seen.packets[pair] = load_packet(from + pair * NT * 32);
      else seen.nothing(c, pair);
    }
  }
#endif
  // The warp's sums of products with what was published for step c.
  template <bool EXACT>
  DEVICE void multiply(int c, float (&total)[ROWS][NT][4]) {
    float d[CHAINS][ROWS][NT][4] = {};
#if SCOPE == GRID
    EACH(group, NT * GROUPS) {
      Seen seen;
      u32 waited = 0;
      for (bool all = false; !all; all ? void() : wait_more(waited, c)) {
        poll(c, group, seen);
        all = seen.arrived(c);
      }
      __syncwarp();
      seen.restore_signs(lane);
      EACH(k, POLLED) EACH(row, ROWS) {
        const int at = group % GROUPS * POLLED + k;
        if (at < KS) {
          Words stored;
          Tile<EXACT>(weights(row, at, stored))
              .multiply(d[k % CHAINS][row][group / GROUPS], seen.word(k / 2, k % 2 * 2),
                        seen.word(k / 2, k % 2 * 2 + 1));
        }
      }
    }
#else
    const u32 from = inbox + (c & 1) * NB * 4 * PITCH;
#pragma unroll
    for (int k = 0; k < KS; k += 2) {
      u32 words[NT][4];
      EACH(j, NT) load_matrices(words[j], from + j * 8 * 4 * PITCH + k * 32);
      EACH(half, 2) EACH(row, ROWS) {
        Words stored;
        const Tile<EXACT> tile(weights(row, k + half, stored));
        EACH(j, NT)
          tile.multiply(d[(k + half) % CHAINS][row][j], words[j][2 * half], words[j][2 * half + 1]);
      }
    }
#endif
    EACH(row, ROWS) EACH(i, 4 * NT) {
      total[row][i / 4][i % 4] = d[0][row][i / 4][i % 4];
      EACH(chain, CHAINS) if (chain)
        total[row][i / 4][i % 4] += d[chain][row][i / 4][i % 4];
    }
  }

  // The sums of step c, after the wait for it.
  DEVICE void accumulate(int c, float (&sums)[ROWS][P][2]) {
    float total[ROWS][NT][4];
    multiply<false>(c, total);
#if PRECISE
    bool nan = false;
    EACH(row, ROWS) EACH(i, 4 * NT)
      nan |= total[row][i / 4][i % 4] != total[row][i / 4][i % 4];
    // maybe of an infinite number; a sum that is none stays, as it depends on no other sequence
    if (any_of_warp(nan)) {
      float exact[ROWS][NT][4];
      multiply<true>(c, exact);
      EACH(row, ROWS) EACH(i, 4 * NT) {
        float& sum = total[row][i / 4][i % 4];
        sum = sum == sum ? sum : exact[row][i / 4][i % 4];
      }
    }
#endif
    auto& partial = shared.sums[SCOPE == GRID ? c & 1 : 0];
    EACH(row, ROWS) EACH(i, 4 * NT) {
      const float sum = total[row][i / 4][i % 4];
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
