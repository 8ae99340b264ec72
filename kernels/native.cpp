// The recurrence on the CPU, all steps in one call, compiled for the machine and a cell: GATES, STATES, SAVED, SPLIT,
// FORWARD and BACKWARD (statements on vectors of hidden units), vector.h, tiles.h and parts.h come before this text.
// Shapes as in forward.cu.
#ifdef _OPENMP
#include <omp.h>
#endif

static inline void cell_forward(const V* x, const V* r, const V* s, V* n, V* a) { FORWARD }
static inline void cell_backward(const V* a, const V* s, const V* n, const V* d, V* x, V* r, V* p) { BACKWARD }

// One step of a part.
static void forward_step(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, s = part.reverse ? c.steps - 1 - t : t, later = part.reverse ? t - 1 : t + 1;
  const i64 plane = c.R * c.N * H, count = part.rows(c.size(t)), width = c.gates_width;
  const i64 row = c.row(t) + part.first, going = s + 1 < c.end ? c.size(later) : 0;  // sequences going on in the window
  constexpr int MOST = std::max(1, ACCUMULATORS / (GATES * WIDE));
  const float* x = Call::IN_PLACE ? c.y + (row * c.N + part.n) * H : c.gates + part.slot(c, t) * width;
  const float* bias = c.b_hh ? c.b_hh + part.n * GATES * H : nullptr;
  by_units<WIDE * LANES>(part.begin, part.end, [&](i64 u, auto left) {
    by_rows<MOST>(count, 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      V sums[ROWS][GATES * WIDE];
      ROW(i, ROWS) EACH(v, GATES * WIDE) {
        const i64 unit = u + v % WIDE * LANES, g = v / WIDE;
        const float* from = SPLIT ? bias : x + (first + i) * width;
        sums[i][v] = from ? load(from + g * H + unit, left(v % WIDE)) : V{};
      }
      multiply(sums, part.near(c, 0, part.first + first, s % 2), P, 1, part.panel + u * GATES * H, H);
      ROW(i, ROWS) EACH(v, WIDE) {
        const i64 unit = u + v * LANES, b = part.first + first + i;
        if (left(v) <= 0) continue;
        const i64 to = ((row + first + i) * c.N + part.n) * H + unit;
        V gates[GATES], r[GATES], o[STATES], n[STATES], a[SAVED + 1];
        const float* from = x + (first + i) * width + unit;
        EACH(g, GATES) r[g] = sums[i][g * WIDE + v], gates[g] = SPLIT ? load(from + g * H, left(v)) : V{};
        EACH(k, STATES) o[k] = load(part.near(c, k, b, s % 2) + unit, LANES);
        cell_forward(gates, r, o, n, a);
        store(c.y + to, n[0], left(v));
        EACH(k, SAVED) if (c.saved) store(c.saved + (to - unit) * SAVED + k * H + unit, a[k], left(v));
        const bool cut = later >= 0 && later < c.steps && c.cut(later + part.reverse, b);
        EACH(k, STATES) {
          if (k && c.states) store(c.states + (k - 1) * plane + to, n[k], left(v));
          if (b >= going) store(c.last + part.state(c, k, b) + unit, n[k], left(v));
          store(part.near(c, k, b, (s + 1) % 2) + unit, cut ? V{} : n[k], LANES);
        }
      }
    });
  });
}

// The gradients of the pre-activations of a step, and what of those of the states does not flow back through W_hh.
static void adjoint_step(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, before = part.before(t), plane = c.R * c.N * H, rows = c.rows(part.n), slot = part.slot(c, t);
  for (i64 i = 0; i < part.rows(c.size(t)); ++i) {
    const i64 b = part.first + i, at = ((c.row(t) + b) * c.N + part.n) * H;
    const bool ran = b < c.size(before), cut = part.cut(c, t, b);
    const i64 came = ran ? ((c.row(before) + b) * c.N + part.n) * H : 0;
    float* const h_row = c.h_rows + part.n * c.most * c.padded + (slot - part.n * c.most + i) * PADDING;
    by_units<LANES>(part.begin, part.end, [&](i64 u, auto left) {
      V a[SAVED + 1], o[STATES], n[STATES], d[STATES], x[GATES], r[GATES], p[STATES];
      EACH(k, SAVED) a[k] = load(c.saved + at * SAVED + k * H + u, left(0));
      EACH(k, STATES) {
        const float* kept = k ? c.states + (k - 1) * plane : c.y;
        const float* given = k ? c.dstates ? c.dstates + (k - 1) * plane : nullptr : c.dy;
        n[k] = load(kept + at + u, left(0));
        o[k] = cut ? V{} : load(ran ? kept + came + u : c.s0 + part.state(c, k, b) + u, left(0));
        d[k] = load(part.near(c, k, b) + u, LANES);
        if (given) d[k] += load(given + at + u, left(0));
      }
      cell_backward(a, o, n, d, x, r, p);
      EACH(g, GATES) {
        if (SPLIT) store(c.dx + (slot + i) * c.gates_width + g * H + u, x[g], left(0));
        store(c.dr + (slot + i) * c.gates_width + g * H + u, r[g], left(0));
      }
      store(h_row + u / PADDING * PADDING * rows + u % PADDING, o[0], LANES);
      EACH(k, STATES) store(part.near(c, k, b) + u, cut && k ? V{} : p[k], LANES);
    });
    if (const i64 rest = H % PADDING; part.end == H && rest && rest <= LANES)
      store(h_row + (H - rest) * rows + LANES, V{}, LANES);
  }
}

// What flows back through W_hh.
static void adjoint_product(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, width = c.gates_width;
  constexpr int MOST = ACCUMULATORS / TWO;
  const float* dr = c.dr + part.slot(c, t) * width;
  for (i64 u = part.begin; u < part.end; u += PADDING)
    by_rows<MOST>(part.rows(c.size(t)), 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      float* const ds = part.near(c, 0, part.first + first) + u;
      V sums[ROWS][TWO];
      ROW(i, ROWS) EACH(v, TWO) sums[i][v] = load(ds + i * P + v * LANES, LANES);
      multiply(sums, dr + first * width, width, 1, part.panel + u * GATES * H, GATES * H);
      ROW(i, ROWS) {
        const bool cut = part.cut(c, t, part.first + first + i);
        EACH(v, TWO) store(ds + i * P + v * LANES, cut ? V{} : sums[i][v], LANES);
      }
    });
}

// Where a group sums up the gradients of W of a recurrence, those that are wanted: the first one in their place.
struct Sums {
  float *w_ih, *w_hh, *b_ih, *b_hh;

  Sums(const Call& c, i64 n, i64 group) {
    const i64 K = GATES * c.H;
    float* const own = group ? c.sums + (n * (c.groups - 1) + group - 1) * c.sum_size() : nullptr;
    auto place = [&](float* grad, i64 size, i64 at) { return !grad ? nullptr : group ? own + at : grad + n * size; };
    w_ih = place(c.w_ih_grad, K * c.I, 0), w_hh = place(c.w_hh_grad, K * c.H, K * c.I);
    b_ih = place(c.b_ih_grad, K, K * (c.I + c.H)), b_hh = place(c.b_hh_grad, K, K * (c.I + c.H + 1));
  }
};

// Each thread has parts of its own, whose sequences it takes through time alone; or, where these are too few, threads
// have parts of the same sequences, and then all meet in every step, between `first` and `second`.
struct Team {
  i64 thread = 0, threads = 1;
  std::vector<Part> parts;

  Team() {
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
  }
  void split(const Call& c) {
    parts.clear();
    for (i64 i = thread; i < c.N * c.groups * c.shares; i += threads) parts.emplace_back(c, i);
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
    if (c.shares == 1)
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

// The same for both directions, so that they share it: what is never touched takes no memory.
extern "C" i64 needed(const Given& given) {
  return std::max(Call(given, false, nullptr).used, Call(given, true, nullptr).used);
}

// All steps, in windows.
extern "C" void forward(const Given& given, float* memory) {
#pragma omp parallel num_threads(given.threads)
  {
    Call c(given, false, memory);
    Team team;
    const i64 H = c.H, P = c.padded, I = c.I;
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
    for (; c.first < c.steps; c.first = c.end, c.end = std::min(c.steps, c.end + c.window)) {
#pragma omp barrier
      team.split(c);
      for (const Part& part : team.parts) {
        const i64 n = part.n, t = part.reverse ? c.steps - 1 - c.first : c.first, bytes = 4 * (part.end - part.begin);
        part.each([&](i64 k, i64 b) {
          float* const last = c.last + part.state(c, k, b) + part.begin;  // of sequences without a step, it stays
          if (c.first == 0) std::memcpy(last, c.s0 + part.state(c, k, b) + part.begin, bytes);
          for (int turn = 0; turn < 2; ++turn) {
            float* const to = part.near(c, k, b, turn) + part.begin;
            if (part.cut(c, t, b)) std::memset(to, 0, bytes);
            else std::memcpy(to, last, bytes);
          }
        });
        const float* b = c.b_ih ? c.b_ih + n * GATES * H : nullptr;
        const float* b2 = b && !SPLIT ? c.b_hh + n * GATES * H : nullptr;
        std::vector<Rows> runs;
        for (const Run& run : part.mine(c, 0, c.R)) {
          const float* x = c.x + (c.base(n) + run.row) * I;
          if (c.together) {
            float* const rows = c.x_rows + (n * c.most + run.slot) * I;
            for (i64 i = 0; i < run.count; ++i) std::memcpy(rows + i * I, c.x + (c.base(n) + run[i]) * I, 4 * I);
            x = rows;
          }
          float* const out = Call::IN_PLACE ? c.y + ((c.base(n) + run.row) * c.N + n) * H
                                            : c.gates + (n * c.most + run.slot) * c.gates_width;
          runs.push_back({out, c.gates_width, nullptr, x, run.count});
        }
        product<INPUT_WIDE>(runs, I, c.input_panels + n * c.inputs * I, I, GATES * H, b, b2, false);
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
    Team team;
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
    for (c.first = (c.steps - 1) / c.window * c.window; c.first >= 0; c.first -= c.window) {
      c.end = std::min(c.steps, c.first + c.window);
      const bool add = c.end < c.steps;
      team.split(c);
      auto each_state = [&](auto&& body) {
        for (const Part& part : team.parts)
          part.each([&](i64 k, i64 b) {
            body(part.state(c, k, b) + part.begin, part.near(c, k, b) + part.begin, 4 * (part.end - part.begin));
          });
      };
      each_state([&](i64 at, float* near, i64 bytes) {
        const float* from = add ? c.last : c.dlast;
        if (from) std::memcpy(near, from + at, bytes);
        else std::memset(near, 0, bytes);
      });
#pragma omp barrier
      team.steps(c, true, adjoint_step, adjoint_product);
      each_state([&](i64 at, float* near, i64 bytes) { std::memcpy(c.last + at, near, bytes); });
#pragma omp barrier
      if (c.in_turn) {
        pack_input();
#pragma omp barrier
      }
      for (i64 round = 0; round < c.N; ++round) {  // in which each recurrence has rows of x of its own
        for (const Part& part : team.parts) {
          const i64 n = part.n, base = c.base(n), area = (n + round) % c.N;
          if (c.x_grad) {
            std::vector<Rows> runs;
            for (const Run& run : part.mine(c, c.R * area / c.N - base, c.R * (area + 1) / c.N - base))
              runs.push_back({c.x_grad + (base + (run.index ? 0 : run.row)) * I, I, run.index,
                              c.dx + (n * c.most + run.slot) * width, run.count});
            product<TWO>(runs, width, c.input_panels + n * K * inputs, K, I, nullptr, nullptr, c.N > 1);
          }
          if (round == 0 && c.w_ih_grad && !c.as_it_is())
            for (const Run& run : part.mine(c, 0, c.R))
              for (i64 i = 0; i < run.count; ++i)
                for (i64 u = 0; u < inputs; u += LANES)
                  store(c.x_rows + n * c.most * inputs + u / PADDING * PADDING * c.rows(n) + (run.slot + i) * PADDING +
                        u % PADDING, load(c.x + (base + run[i]) * I + u, static_cast<int>(I - u)), LANES);
        }
#pragma omp barrier
      }
      auto sum = [&](const Sums& to, i64 n, i64 slot, i64 count, i64 begin, i64 end) {
        const i64 rows = c.rows(n), at = (n * c.most + slot) * width;
        const float* x_rows = c.as_it_is() ? c.x + c.base(n) * I : c.x_rows + n * c.most * inputs;
        const Outer x = {x_rows + slot * PADDING, to.w_ih, rows, I}, none = {};
        const Outer h = {c.h_rows + n * c.most * P + slot * PADDING, to.w_hh, rows, H};
        outer(c.dr + at, width, count, begin, end, {h, SPLIT ? none : x}, to.b_hh, add);
        if (SPLIT) outer(c.dx + at, width, count, begin, end, {x, none}, to.b_ih, add);
      };
      if (c.apart)
        for (const Part& part : team.parts) {
          // Of just as many rows each: nearly all are the part's own.
          const i64 all = c.rows(part.n), slot = all * part.group / c.groups;
          sum(Sums(c, part.n, part.group), part.n, slot, all * (part.group + 1) / c.groups - slot,
              K * part.share / c.shares, K * (part.share + 1) / c.shares);
        }
      else
        for (i64 n = 0; n < c.N; ++n)
          sum(Sums(c, n, 0), n, 0, c.rows(n), K * team.thread / team.threads, K * (team.thread + 1) / team.threads);
    }
    if (c.apart) {
#pragma omp barrier
      for (i64 n = 0; n < c.N; ++n)
        for (i64 group = 1; group < c.groups; ++group) {
          const Sums to(c, n, 0), from(c, n, group);
          auto add = [&](float* to, const float* from, i64 size) {
            if (to) team.each(size / 64 + 1, [&](i64 i) {
              for (i64 k = i * 64; k < std::min(size, i * 64 + 64); ++k) to[k] += from[k];
            });
          };
          add(to.w_ih, from.w_ih, K * I), add(to.w_hh, from.w_hh, K * H);
          add(to.b_ih, from.b_ih, K), add(to.b_hh, from.b_hh, K);
        }
    }
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
