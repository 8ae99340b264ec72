// The recurrence on the CPU, all steps in one call, compiled for the machine and a cell: GATES, STATES, SAVED, SPLIT,
// FORWARD and BACKWARD (statements on vectors of hidden units), vector.h and tiles.h come before this text. Shapes as
// in forward.cu.
#ifdef _OPENMP
#include <omp.h>
#endif
constexpr int CACHE = 1 << 19;  // bytes of W_hh that a core keeps near, whatever else it reads
constexpr int WIDE = GATES == 1 ? 2 : 1;  // vectors of hidden units of a tile, of each gate, going forward
constexpr int INPUT_WIDE = GATES % 4 ? 2 : 4, INPUT_TILE = INPUT_WIDE * LANES;  // of all gates, in the product with x

static inline void cell_forward(const V* x, const V* r, const V* s, V* n, V* a) { FORWARD }
static inline void cell_backward(const V* a, const V* s, const V* n, const V* d, V* x, V* r, V* p) { BACKWARD }

// What native.py gives: s0, dlast (zero if missing) and `last`, the last states or the gradients of the first ones,
// [N, S, B, H]; y [R, N, H], states [S-1, R, N, H] and saved [A, R, N, H] are written going forward, where they are
// wanted, and read in the adjoint.
struct Given {
  const float *x, *w_ih, *w_hh, *b_ih, *b_hh, *s0, *dy, *dstates, *dlast;
  float *y, *states, *saved, *last;
  float *x_grad, *w_ih_grad, *w_hh_grad, *b_ih_grad, *b_hh_grad;
  const i64* offsets;
  const bool* resets;
  i64 steps, B, R, I, H, N, reverses, threads, window;
};

// A window is some steps, first to end in the order of the recurrence; gates, dx, dr [N, most, G, H] and came
// [N, most, H] have the rows of one window, or, going forward with one gate, gates is y.
struct Call : Given {
  static constexpr bool IN_PLACE = GATES == 1 && !SPLIT;
  i64 first = 0, used = 0, end, most, padded, inputs, gates_width, buffer_width;
  bool in_turn;  // with one window the panels of W_ih and those of W_hh have the same place, one after the other
  float *gates, *dx, *dr, *came, *input_panels, *panels, *buffer, *x_rows, *h_rows;

  // `memory` has as many numbers as `needed` says.
  Call(const Given& given, bool adjoint, float* memory) : Given(given) {
    auto pad = [](i64 n, i64 tile) { return (n + tile - 1) / tile * tile; };
    auto take = [&](i64 size) {
      const i64 at = std::exchange(used, used + pad(size, 16));
      return memory ? memory + at : nullptr;
    };
    end = std::min(window, steps), most = std::min(R, end * B), padded = pad(H, PADDING);
    inputs = adjoint ? pad(I, PADDING) : pad(GATES * H, INPUT_TILE);
    // Rows a power of 2 apart would have the same place in the caches.
    gates_width = IN_PLACE && !adjoint ? N * H : pad(GATES * H, LANES) + LANES, buffer_width = padded + LANES;
    const i64 input_size = N * inputs * (adjoint ? GATES * H : I), size = N * padded * GATES * H;
    in_turn = end == steps;
    panels = take(in_turn ? std::max(size, input_size) : size), input_panels = in_turn ? panels : take(input_size);
    buffer = take((2 - adjoint) * N * STATES * B * buffer_width);
    const i64 rows = N * most;
    if (!adjoint) gates = IN_PLACE ? y : take(rows * gates_width);
    else dr = take(rows * gates_width), dx = SPLIT ? take(rows * gates_width) : dr, came = take(rows * H),
         x_rows = I == PADDING ? nullptr : take(rows * inputs), h_rows = H == PADDING ? came : take(rows * padded);
  }
  i64 row(i64 t) const { return offsets ? t < steps ? offsets[t] : R : t * B; }
  i64 size(i64 t) const { return t < 0 || t >= steps ? 0 : row(t + 1) - row(t); }
  bool cut(i64 t, i64 b) const { return resets && resets[t * B + b]; }
  bool reverse(i64 n) const { return reverses >> n & 1; }
  i64 base(i64 n) const { return row(reverse(n) ? steps - end : first); }  // the first row of the window
  i64 bound(i64 n) const { return row(reverse(n) ? steps - first : end); }
  // The first sequence of a group, where each has about as many rows of the window as the others.
  i64 first_of(i64 group, i64 groups, i64 n) const {
    const i64 from = reverse(n) ? steps - end : first, all = bound(n) - base(n);
    i64 length = end - first;
    for (i64 b = 0, rows = 0; group < groups; rows += length, ++b) {
      while (length && size(from + length - 1) <= b) --length;
      if ((2 * rows + length) * groups >= 2 * all * group) return b;
    }
    return B;
  }
  float* gates_of(i64 n, i64 row) const {
    return IN_PLACE ? y + (row * N + n) * H : gates + (n * most + row - base(n)) * gates_width;
  }
};

// What a thread has of a window: of recurrence n the sequences from `first` on, before `bound`, and of the units some
// tiles.
struct Part {
  i64 n, first, bound, begin, end;
  bool reverse;
  const float* panel;

  Part(const Call& c, i64 item, i64 groups, i64 share, i64 shares, int tile) {
    const i64 tiles = (c.H + tile - 1) / tile, group = item % groups;
    n = item / groups, reverse = c.reverse(n);
    first = c.first_of(group, groups, n), bound = c.first_of(group + 1, groups, n);
    begin = share * tiles / shares * tile, end = std::min(c.H, (share + 1) * tiles / shares * tile);
    panel = c.panels + n * GATES * c.H * c.padded;
  }
  i64 before(i64 t) const { return reverse ? t + 1 : t - 1; }
  // Whether the states that came into step t of sequence b were reset.
  bool cut(const Call& c, i64 t, i64 b) const { return (!reverse || b < c.size(t + 1)) && c.cut(t + reverse, b); }
  i64 rows(i64 size) const { return std::max<i64>(0, std::min(size, bound) - first); }
};

// One step of a part. The states that come into it lie in buffer [2, N, S, B, buffer_width], half by half in turns.
static void forward_step(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, s = part.reverse ? c.steps - 1 - t : t, later = part.reverse ? t - 1 : t + 1;
  const i64 plane = c.R * c.N * H, states = c.B * P, row = c.row(t), half = c.N * STATES * states;
  const float* olds = c.buffer + s % 2 * half + part.n * STATES * states;
  float* news = c.buffer + (s + 1) % 2 * half + part.n * STATES * states;
  constexpr int MOST = std::max(1, ACCUMULATORS / (GATES * WIDE));
  const i64 rows = part.rows(c.size(t)), width = c.gates_width;
  const float *x = c.gates_of(part.n, row), *bias = c.b_hh ? c.b_hh + part.n * GATES * H : nullptr;
  by_units<WIDE * LANES>(part.begin, part.end, [&](i64 u, auto left) {
    by_rows<MOST>(rows, 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      V sums[ROWS][GATES * WIDE];
      ROW(i, ROWS) EACH(v, GATES * WIDE) {
        const i64 unit = u + v % WIDE * LANES, b = part.first + first + i, g = v / WIDE;
        const float* from = SPLIT ? bias : x + b * width;
        sums[i][v] = from ? load(from + g * H + unit, left(v % WIDE)) : V{};
      }
      multiply(sums, olds + (part.first + first) * P, P, 1, part.panel + u * GATES * H, H);
      ROW(i, ROWS) EACH(v, WIDE) {
        const i64 unit = u + v * LANES, b = part.first + first + i;
        if (left(v) <= 0) continue;
        const i64 to = ((row + b) * c.N + part.n) * H + unit;
        V gates[GATES], r[GATES], o[STATES], n[STATES], a[SAVED + 1];
        const float* from = x + b * width + unit;
        EACH(g, GATES) r[g] = sums[i][g * WIDE + v], gates[g] = SPLIT ? load(from + g * H, left(v)) : V{};
        EACH(k, STATES) o[k] = load(olds + k * states + b * P + unit, LANES);
        cell_forward(gates, r, o, n, a);
        store(c.y + to, n[0], left(v));
        EACH(k, SAVED) if (c.saved) store(c.saved + k * plane + to, a[k], left(v));
        const bool cut = later >= 0 && later < c.steps && c.cut(later + part.reverse, b);
        EACH(k, STATES) {
          if (k && c.states) store(c.states + (k - 1) * plane + to, n[k], left(v));
          if (b >= c.size(later)) store(c.last + ((part.n * STATES + k) * c.B + b) * H + unit, n[k], left(v));
          store(news + k * states + b * P + unit, cut ? V{} : n[k], LANES);
        }
      }
    });
  });
}

// The gradients of the pre-activations of a step, and what of those of the states does not flow back through W_hh.
static void adjoint_step(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, before = part.before(t), plane = c.R * c.N * H, states = c.B * P;
  float* const ds = c.buffer + part.n * STATES * states;
  for (i64 i = 0; i < part.rows(c.size(t)); ++i) {
    const i64 b = part.first + i, at = ((c.row(t) + b) * c.N + part.n) * H;
    const i64 row = part.n * c.most + c.row(t) - c.base(part.n) + b;
    const bool ran = b < c.size(before), cut = part.cut(c, t, b);
    const i64 came = ran ? ((c.row(before) + b) * c.N + part.n) * H : 0;
    by_units<LANES>(part.begin, part.end, [&](i64 u, auto left) {
      V a[SAVED + 1], o[STATES], n[STATES], d[STATES], x[GATES], r[GATES], p[STATES];
      EACH(k, SAVED) a[k] = load(c.saved + k * plane + at + u, left(0));
      EACH(k, STATES) {
        const float* kept = k ? c.states + (k - 1) * plane : c.y;
        const float* given = k ? c.dstates ? c.dstates + (k - 1) * plane : nullptr : c.dy;
        const float* first = c.s0 + ((part.n * STATES + k) * c.B + b) * H;
        n[k] = load(kept + at + u, left(0));
        o[k] = cut ? V{} : load(ran ? kept + came + u : first + u, left(0));
        d[k] = load(ds + k * states + b * P + u, LANES);
        if (given) d[k] += load(given + at + u, left(0));
      }
      cell_backward(a, o, n, d, x, r, p);
      EACH(g, GATES) {
        if (SPLIT) store(c.dx + row * c.gates_width + g * H + u, x[g], left(0));
        store(c.dr + row * c.gates_width + g * H + u, r[g], left(0));
      }
      store(c.came + row * H + u, o[0], left(0));
      EACH(k, STATES) store(ds + k * states + b * P + u, cut && k ? V{} : p[k], LANES);
    });
  }
}

// What flows back through W_hh.
static void adjoint_product(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, width = c.gates_width;
  float* const ds = c.buffer + part.n * STATES * c.B * P;
  constexpr int MOST = ACCUMULATORS / TWO;
  const i64 rows = part.rows(c.size(t));
  const float* dr = c.dr + (part.n * c.most + c.row(t) - c.base(part.n)) * width;
  for (i64 u = part.begin; u < part.end; u += PADDING)
    by_rows<MOST>(rows, 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      const i64 b0 = part.first + first;
      V sums[ROWS][TWO];
      ROW(i, ROWS) EACH(v, TWO) sums[i][v] = load(ds + (b0 + i) * P + u + v * LANES, LANES);
      multiply(sums, dr + b0 * width, width, 1, part.panel + u * GATES * H, GATES * H);
      ROW(i, ROWS) {
        const i64 b = b0 + i;
        const bool cut = part.cut(c, t, b);
        EACH(v, TWO) store(ds + b * P + u + v * LANES, cut ? V{} : sums[i][v], LANES);
      }
    });
}

// Each thread has sequences of its own, which it takes through time alone; or, where they are too few, units of some,
// and then all threads meet in every step, between `first` and `second`.
struct Team {
  i64 thread = 0, threads = 1, groups, shares;
  int tile;
  std::vector<Part> parts;  // of this thread
  bool shared, alone;       // whether parts are of some units only; whether they are of many sequences of one length

  Team(const Call& c, int tile) : tile(tile) {
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    const i64 least = GATES * c.H * c.H * 4 > CACHE ? ACCUMULATORS : 4;
    groups = std::max<i64>(1, std::min((threads + c.N - 1) / c.N, (c.B + least - 1) / least));
    shares = std::max<i64>(1, std::min(threads / (c.N * groups), (c.H + tile - 1) / tile));
    shared = shares > 1, alone = !shared && !c.offsets && c.B / groups >= ACCUMULATORS / 2;
    split(c);
  }
  void split(const Call& c) {
    parts.clear();
    for (i64 i = thread; i < c.N * groups * shares; i += threads)
      parts.push_back(Part(c, i / shares, groups, i % shares, shares, tile));
  }
  template <typename Body> void each(i64 count, Body&& body) const {
    for (i64 i = thread; i < count; i += threads) body(i);
  }
  template <typename First, typename Second>
  void steps(const Call& c, bool adjoint, First&& first, Second&& second) const {
    auto time = [&](const Part& part, i64 i) {
      const i64 s = adjoint ? c.end - 1 - i : c.first + i;
      return part.reverse ? c.steps - 1 - s : s;
    };
    const i64 count = c.end - c.first;
    if (!shared)
      for (const Part& part : parts)
        for (i64 i = 0; i < count; ++i) first(c, part, time(part, i)), second(c, part, time(part, i));
    else
      for (i64 i = 0; i < count; ++i) {
        for (const Part& part : parts) first(c, part, time(part, i));
#pragma omp barrier
        for (const Part& part : parts) second(c, part, time(part, i));
      }
  }
};

// Calls body for each state of each sequence with where those of its units that a part has are, in s0 or `last` and in
// the buffer, their bytes, and whether it is reset before the first step.
template <typename Body> static void each_state(const Call& c, const Team& team, Body&& body) {
  for (const Part& part : team.parts)
    for (i64 k = 0; k < STATES; ++k)
      for (i64 b = part.first; b < part.bound; ++b) {
        const i64 row = (part.n * STATES + k) * c.B + b;
        body(row * c.H + part.begin, c.buffer + row * c.buffer_width + part.begin, 4 * (part.end - part.begin),
             !part.reverse && c.cut(0, b));
      }
}

// The same for both directions, so that they share it: what is never touched takes no memory.
extern "C" i64 needed(const Given& given) {
  return std::max(Call(given, false, nullptr).used, Call(given, true, nullptr).used);
}

// All steps, in windows.
extern "C" void forward(const Given& given, float* memory) {
#pragma omp parallel num_threads(given.threads)
  {
    Call c(given, false, memory);
    Team team(c, WIDE * LANES);
    const i64 H = c.H, P = c.padded, I = c.I, half = c.N * STATES * c.B * c.buffer_width;
    auto pack_hidden = [&] {
      team.each(c.N * GATES * P / LANES, [&](i64 i) {  // by recurrence, tile, gate and vector of its units
        const i64 n = i / (GATES * P / LANES), tile = i / (GATES * WIDE) % (P / LANES / WIDE), v = i % (GATES * WIDE);
        const i64 unit = (tile * WIDE + v % WIDE) * LANES;
        pack(c.panels + (n * P + tile * WIDE * LANES) * GATES * H + v * LANES, GATES * WIDE * LANES,
             c.w_hh + (n * GATES * H + v / WIDE * H + unit) * H, H, H, H - unit, false);
      });
    };
    if (!c.in_turn) pack_hidden();
    team.each(c.N * c.inputs / LANES, [&](i64 i) {
      const i64 n = i / (c.inputs / LANES), row = i % (c.inputs / LANES) * LANES;
      pack(c.input_panels + (n * c.inputs + row / INPUT_TILE * INPUT_TILE) * I + row % INPUT_TILE, INPUT_TILE,
           c.w_ih + (n * GATES * H + row) * I, I, I, GATES * H - row, false);
    });
    each_state(c, team, [&](i64 at, float* buffer, i64 bytes, bool cut) {
      std::memcpy(c.last + at, c.s0 + at, bytes);  // of sequences without a step, it stays
      if (cut) std::memset(buffer, 0, bytes);
      else std::memcpy(buffer, c.s0 + at, bytes);
      std::memcpy(buffer + half, buffer, bytes);
    });
    for (; c.first < c.steps; c.first = c.end, c.end = std::min(c.steps, c.end + c.window)) {
#pragma omp barrier
      team.split(c);
      auto project = [&](i64 n, i64 begin, i64 end, i64 blocks) {
        const float* b = c.b_ih ? c.b_ih + n * GATES * H : nullptr;
        const float* b2 = b && !SPLIT ? c.b_hh + n * GATES * H : nullptr;
        product<INPUT_WIDE>(c.gates_of(n, begin), c.gates_width, c.x + begin * I, I, end - begin, blocks, c.B,
                            c.input_panels + n * c.inputs * I, I, GATES * H, b, b2, false);
      };
      if (team.alone)
        for (const Part& part : team.parts)  // as it is the one to read it
          project(part.n, c.base(part.n) + part.first, c.base(part.n) + part.bound, c.end - c.first);
      else
        for (i64 n = 0; n < c.N; ++n) {
          const i64 from = c.base(n), rows = c.bound(n) - from;
          project(n, from + rows * team.thread / team.threads, from + rows * (team.thread + 1) / team.threads, 1);
        }
#pragma omp barrier
      if (c.in_turn) {
        pack_hidden();
#pragma omp barrier
      }
      team.steps(c, false, forward_step, [](const Call&, const Part&, i64) {});
    }
  }
}

// The adjoint, likewise. With more than one recurrence the gradient of x is added to.
extern "C" void backward(const Given& given, float* memory) {
#pragma omp parallel num_threads(given.threads)
  {
    Call c(given, true, memory);
    Team team(c, PADDING);
    const i64 H = c.H, I = c.I, K = GATES * H, P = c.padded, inputs = c.inputs, width = c.gates_width;
    // The columns of `from` [rows, columns] into panels.
    auto across = [&](float* to, const float* from, i64 rows, i64 columns, i64 padded) {
      team.each(padded / LANES, [&](i64 i) {
        const i64 u = i * LANES;
        pack(to + u / PADDING * PADDING * rows + u % PADDING, PADDING, from + u, columns, rows, columns - u, true);
      });
    };
    auto pack_input = [&] {
      for (i64 n = 0; c.x_grad && n < c.N; ++n)
        across(c.input_panels + n * K * inputs, c.w_ih + n * K * I, K, I, inputs);
    };
    for (i64 n = 0; n < c.N; ++n) across(c.panels + n * K * P, c.w_hh + n * K * H, K, H, P);
    if (!c.in_turn) pack_input();
    each_state(c, team, [&](i64 at, float* buffer, i64 bytes, bool) {
      if (c.dlast) std::memcpy(buffer, c.dlast + at, bytes);
      else std::memset(buffer, 0, bytes);
    });
    for (c.first = (c.steps - 1) / c.window * c.window; c.first >= 0; c.first -= c.window) {
      c.end = std::min(c.steps, c.first + c.window);
      const bool add = c.end < c.steps;
      team.split(c);
#pragma omp barrier
      team.steps(c, true, adjoint_step, adjoint_product);
#pragma omp barrier
      if (c.in_turn) {
        pack_input();
#pragma omp barrier
      }
      for (i64 n = 0; n < c.N; ++n) {
        const i64 from = c.base(n), rows = c.bound(n) - from;
        const i64 begin = rows * team.thread / team.threads, end = rows * (team.thread + 1) / team.threads;
        if (c.x_grad)
          product<TWO>(c.x_grad + (from + begin) * I, I, c.dx + (n * c.most + begin) * width, width, end - begin, 1, 0,
                       c.input_panels + n * K * inputs, K, I, nullptr, nullptr, c.N > 1);
#pragma omp barrier
        // Rows of that width are a panel as they are.
        if (c.w_ih_grad && I != PADDING) across(c.x_rows + n * c.most * inputs, c.x + from * I, rows, I, inputs);
        if (c.w_hh_grad && H != PADDING) across(c.h_rows + n * c.most * P, c.came + n * c.most * H, rows, H, P);
      }
#pragma omp barrier
      for (i64 n = 0; n < c.N; ++n) {
        const i64 rows = c.bound(n) - c.base(n), begin = K * team.thread / team.threads;
        const i64 end = K * (team.thread + 1) / team.threads, at = n * c.most * width;
        const float* x_rows = I == PADDING ? c.x + c.base(n) * I : c.x_rows + n * c.most * inputs;
        const Outer x = {x_rows, c.w_ih_grad ? c.w_ih_grad + n * K * I : nullptr, I};
        const Outer h = {c.h_rows + n * c.most * P, c.w_hh_grad ? c.w_hh_grad + n * K * H : nullptr, H}, none = {};
        float *b_ih = c.b_ih_grad ? c.b_ih_grad + n * K : nullptr, *b_hh = c.b_hh_grad ? c.b_hh_grad + n * K : nullptr;
        outer(c.dr + at, width, rows, begin, end, {h, SPLIT ? none : x}, b_hh, add);
        if (SPLIT) outer(c.dx + at, width, rows, begin, end, {x, none}, b_ih, add);
      }
    }
    each_state(c, team, [&](i64 at, float* buffer, i64 bytes, bool) { std::memcpy(c.last + at, buffer, bytes); });
  }
}

// One step of one recurrence, for which W is used once: as it is, without panels.
struct Step {
  const float *x, *w_ih, *w_hh, *b_ih, *b_hh, *s[STATES];
  float *y, *n[STATES];
  i64 B, I, H, threads;
};

extern "C" void step(const Step& c) {
  const i64 H = c.H, tiles = (H + LANES - 1) / LANES;
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1)
  for (i64 tile = 0; tile < tiles; ++tile) {
    const i64 u = tile * LANES;
    const int left = static_cast<int>(std::min<i64>(LANES, H - u));
    by_rows<4>(c.B, 0, [&](auto count, i64 b) {
      constexpr int ROWS = decltype(count)::value;
      float x[GATES][ROWS][LANES] = {}, r[GATES][ROWS][LANES] = {};
      EACH(g, GATES) {
        dots<ROWS>(x[g], c.x + b * c.I, c.w_ih + (g * H + u) * c.I, c.I, left);
        dots<ROWS>(r[g], c.s[0] + b * H, c.w_hh + (g * H + u) * H, H, left);
      }
      ROW(i, ROWS) {
        V gates[GATES], sums[GATES], o[STATES], n[STATES], a[SAVED + 1];
        EACH(g, GATES) {
          gates[g] = load(x[g][i], LANES), sums[g] = load(r[g][i], LANES);
          if (c.b_ih) gates[g] += load(c.b_ih + g * H + u, left), sums[g] += load(c.b_hh + g * H + u, left);
          if (!SPLIT) sums[g] += gates[g], gates[g] = V{};
        }
        EACH(k, STATES) o[k] = load(c.s[k] + (b + i) * H + u, left);
        cell_forward(gates, sums, o, n, a);
        store(c.y + (b + i) * H + u, n[0], left);
        EACH(k, STATES) store(c.n[k] + (b + i) * H + u, n[k], left);
      }
    });
  }
}
