#pragma once
// The recurrence on the CPU, all steps in one call, compiled for the machine and a cell: GATES, STATES, SAVED, SPLIT,
// FORWARD and BACKWARD, statements on vectors of hidden units. native.py defines them. Shapes as in forward.cu.
#ifndef GATES  // in an editor
#include "example_cell.h"
#endif
#include "schedule.h"
#ifdef _OPENMP
#include <omp.h>
#endif

static inline void cell_forward(const V* x, const V* r, const V* s, V* n, V* a) { FORWARD }
static inline void cell_backward(const V* a, const V* s, const V* n, const V* d, V* x, V* r, V* p) { BACKWARD }

// From the place `at` of a tensor, or zeros where there is none.
static inline void copy_or_zero(float* to, const float* from, i64 at, i64 bytes) {
  if (from) std::memcpy(to, from + at, bytes);
  else std::memset(to, 0, bytes);
}

// One step of a part.
static void forward_step(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, s = part.reverse ? c.steps - 1 - t : t, later = part.reverse ? t - 1 : t + 1;
  const i64 plane = c.R * c.N * H, width = c.gates_width, going = c.size(later);
  const i64 *const rows = part.rows_of(t), *const sequences = part.sequences.data();
  constexpr int MOST = std::max(1, ACCUMULATORS / (GATES * WIDE));
  const float* bias = c.b_hh ? c.b_hh + part.n * GATES * H : nullptr;
  auto at = [&](i64 i) { return (rows[i] * c.N + part.n) * H; };  // in [R, N, H]
  const float* const gates = c.gates + (Call::IN_PLACE ? 0 : (part.area + part.slot(t)) * width);
  auto x = [&](i64 i) { return gates + (Call::IN_PLACE ? at(i) : i * width); };
  by_units<WIDE * LANES>(part.begin, part.end, [&](i64 u, auto left) {
    by_rows<MOST>(part.count(t), 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      V sums[ROWS][GATES * WIDE];
      ROW(i, ROWS) {
        const float* const from = SPLIT ? bias : x(first + i);
        EACH(v, GATES * WIDE)
          sums[i][v] = from ? load(from + v / WIDE * H + u + v % WIDE * LANES, left(v % WIDE)) : V{};
      }
      multiply(sums, part.near(c, 0, first, s % 2), P, 1, part.panel + u * GATES * H, H);
      ROW(i, ROWS) {
        const i64 b = sequences[first + i], to = at(first + i);
        const float *const x_row = x(first + i), *const came = part.near(c, 0, first + i, s % 2);
        float* const goes = part.near(c, 0, first + i, (s + 1) % 2);
        const bool ends = b >= going, cut = later >= 0 && later < c.steps && c.cut(later + part.reverse, b);
        EACH(v, WIDE) {
          const i64 unit = u + v * LANES;
          if (left(v) <= 0) continue;
          V gates[GATES], r[GATES], o[STATES], n[STATES], a[SAVED + 1];
          EACH(g, GATES) r[g] = sums[i][g * WIDE + v], gates[g] = SPLIT ? load(x_row + g * H + unit, left(v)) : V{};
          EACH(k, STATES) o[k] = load(came + k * part.state_size + unit, LANES);
          cell_forward(gates, r, o, n, a);
          store(c.y + to + unit, n[0], left(v));
          EACH(k, SAVED) if (c.saved) store(c.saved + to * SAVED + k * H + unit, a[k], left(v));
          EACH(k, STATES) {
            if (k && c.states) store(c.states + (k - 1) * plane + to + unit, n[k], left(v));
            if (ends) store(c.last[k] + part.state(c, b) + unit, n[k], left(v));
            store(goes + k * part.state_size + unit, cut ? V{} : n[k], LANES);
          }
        }
      }
    });
  });
}

// The gradients of the pre-activations of a step, and what of those of the states does not flow back through W_hh.
static void adjoint_step(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, before = part.before(t), plane = c.R * c.N * H, size = c.size(before);
  const i64 *const rows = part.rows_of(t), *const sequences = part.sequences.data();
  for (i64 i = 0; i < part.count(t); ++i) {
    const i64 b = sequences[i], at = (rows[i] * c.N + part.n) * H, slot = part.slot(t) + i;
    const bool ran = b < size, cut = part.cut(c, t, b);
    const i64 came = ran ? ((c.row(before) + b) * c.N + part.n) * H : 0;
    float* const h_row = c.h_rows + part.area * c.padded + slot * PADDING;
    float* const dr = c.dr + (part.area + slot) * c.gates_width;
    float* const dx = c.dx + (part.area + slot) * c.gates_width;
    float* const ds = part.near(c, 0, i);
    by_units<LANES>(part.begin, part.end, [&](i64 u, auto left) {
      V a[SAVED + 1], o[STATES], n[STATES], d[STATES], x[GATES], r[GATES], p[STATES];
      EACH(k, SAVED) a[k] = load(c.saved + at * SAVED + k * H + u, left(0));
      EACH(k, STATES) {
        const float* kept = k ? c.states + (k - 1) * plane : c.y;
        const float* given = k ? c.dstates ? c.dstates + (k - 1) * plane : nullptr : c.dy;
        n[k] = load(kept + at + u, left(0));
        o[k] = cut || (!ran && !c.s0[k]) ? V{} : load(ran ? kept + came + u : c.s0[k] + part.state(c, b) + u, left(0));
        d[k] = load(ds + k * part.state_size + u, LANES);
        if (given) d[k] += load(given + at + u, left(0));
      }
      cell_backward(a, o, n, d, x, r, p);
      EACH(g, GATES) {
        if (SPLIT) store(dx + g * H + u, x[g], left(0));
        store(dr + g * H + u, r[g], left(0));
      }
      store(h_row + u / PADDING * PADDING * part.rows + u % PADDING, o[0], LANES);
      EACH(k, STATES) store(ds + k * part.state_size + u, cut && k ? V{} : p[k], LANES);
    });
    if (const i64 rest = H % PADDING; part.end == H && rest && rest <= LANES)
      store(h_row + (H - rest) * part.rows + LANES, V{}, LANES);
  }
}

// What flows back through W_hh.
static void adjoint_product(const Call& c, const Part& part, i64 t) {
  const i64 H = c.H, P = c.buffer_width, width = c.gates_width;
  constexpr int MOST = ACCUMULATORS / TWO;
  const float* dr = c.dr + (part.area + part.slot(t)) * width;
  for (i64 u = part.begin; u < part.end; u += PADDING)
    by_rows<MOST>(part.count(t), 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      float* const ds = part.near(c, 0, first) + u;
      V sums[ROWS][TWO];
      ROW(i, ROWS) EACH(v, TWO) sums[i][v] = load(ds + i * P + v * LANES, LANES);
      multiply(sums, dr + first * width, width, 1, part.panel + u * GATES * H, GATES * H);
      ROW(i, ROWS) {
        const bool cut = part.cut(c, t, part.sequences[first + i]);
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

  explicit Team(const Call& c) {
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    for (i64 i = thread; i < c.N * c.groups * c.shares; i += threads) parts.emplace_back(c, i);
  }
  template <typename Body> void each(i64 count, Body&& body) const {
    for (i64 i = thread; i < count; i += threads) body(i);
  }
  // Of window w.
  template <typename First, typename Second>
  void steps(const Call& c, i64 w, bool adjoint, First&& first, Second&& second) const {
    auto time = [&](const Part& part, i64 i) { return part.reverse != adjoint ? part.to - 1 - i : part.from + i; };
    if (c.shares == 1)
      for (const Part& part : parts)
        for (i64 i = 0; i < part.to - part.from; ++i) first(c, part, time(part, i)), second(c, part, time(part, i));
    else {
      auto each_part = [&](i64 i, auto&& body) {
        for (const Part& part : parts)
          if (i < part.to - part.from) body(c, part, time(part, i));
      };
      for (i64 i = 0, count = c.longest(w); i < count; ++i) {
        each_part(i, first);
#pragma omp barrier
        each_part(i, second);
      }
    }
  }
};

// Where all threads meet, if they have to.
static inline void meet(bool have_to) {
  if (have_to) {
#pragma omp barrier
  }
}

// For a check against what Python packs.
extern "C" i64 struct_size(int i) {
  constexpr i64 sizes[] = {sizeof(Arguments), sizeof(Step), sizeof(StepAdjoint)};
  return sizes[i];
}

// The same for both directions, so that they share it: what is never touched takes no memory.
extern "C" i64 needed(const Arguments& given) {
  return std::max(Call(given, false, nullptr).used, Call(given, true, nullptr).used);
}

// All steps, in windows.
extern "C" void forward(const Arguments& given, float* memory) {
  const Call c(given, false, memory);
#pragma omp parallel num_threads(given.threads)
  {
    Team team(c);
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
    for (const Part& part : team.parts)
      part.each(c, [&](i64 k, i64 b, i64 at, float* near, i64 bytes) {
        copy_or_zero(c.last[k] + at, c.s0[k], at, bytes);  // of sequences without a step, it stays
        const bool cut = !part.reverse && c.cut(0, b);
        for (i64 turn = 0; turn < c.turns; ++turn, near += STATES * part.state_size)
          copy_or_zero(near, cut ? nullptr : c.s0[k], at, bytes);
      });
    meet(true);
    for (i64 w = 0; w < c.windows; ++w) {
      for (Part& part : team.parts) {
        part.move(c, w, false);
        const i64 n = part.n;
        const float* b = c.b_ih ? c.b_ih + n * GATES * H : nullptr;
        const float* b2 = b && !SPLIT ? c.b_hh + n * GATES * H : nullptr;
        product<INPUT_WIDE>(part.input_rows(c), I, c.input_panels + n * c.inputs * I, I, GATES * H, b, b2, false);
      }
      meet(c.shares > 1 || c.in_turn);
      if (c.in_turn) pack_hidden(), meet(true);
      team.steps(c, w, false, forward_step, [](const Call&, const Part&, i64) {});
    }
  }
}

// The adjoint, likewise. With more than one recurrence the gradient of x is added to.
extern "C" void backward(const Arguments& given, float* memory) {
  const Call c(given, true, memory);
#pragma omp parallel num_threads(given.threads)
  {
    Team team(c);
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
    for (const Part& part : team.parts)
      part.each(c, [&](i64 k, i64, i64 at, float* near, i64 bytes) { copy_or_zero(near, c.dlast[k], at, bytes); });
    const bool shared = c.shares > 1 || !c.apart;  // rows of others are read, or others read these
    for (i64 w = 0; w < c.windows; ++w) {
      meet(w == 0 || shared);
      for (Part& part : team.parts) part.move(c, w, true);
      team.steps(c, w, true, adjoint_step, adjoint_product);
      meet(shared || c.in_turn);
      if (c.in_turn) pack_input(), meet(true);
      for (i64 round = 0; round < c.N; ++round) {  // in which each recurrence has rows of x of its own
        for (const Part& part : team.parts) {
          const i64 n = part.n, area = (n + round) % c.N;
          if (c.x_grad)
            product<TWO>(part.input_gradients(c, c.R * area / c.N, c.R * (area + 1) / c.N), width,
                         c.input_panels + n * K * inputs, K, I, nullptr, nullptr, c.N > 1);
          if (round == 0 && c.w_ih_grad && !c.as_it_is()) part.pack_input(c);
        }
        meet(c.N > 1 || shared);
      }
      auto sum = [&](const Sums& to, i64 first, i64 rows, i64 base, i64 begin, i64 end) {
        const float* x_rows = c.as_it_is() ? c.x + base * I : c.x_rows + first * inputs;
        const Outer x = {x_rows, to.w_ih, rows, I}, none = {}, h = {c.h_rows + first * P, to.w_hh, rows, H};
        float* const near = c.copy(team.thread);
        outer(c.dr + first * width, width, rows, begin, end, {h, SPLIT ? none : x}, to.b_hh, w > 0, near);
        if (SPLIT) outer(c.dx + first * width, width, rows, begin, end, {x, none}, to.b_ih, w > 0, near);
      };
      if (c.apart)
        for (const Part& part : team.parts)
          sum(Sums(c, part.n, part.group), part.area, part.rows, 0, K * part.share / c.shares,
              K * (part.share + 1) / c.shares);
      else
        for (i64 n = 0; n < c.N; ++n) {
          const i64 j = c.place(n, w, true);
          sum(Sums(c, n, 0), n * c.groups * c.most, c.rows(0, c.groups, j), c.row(c.begin(0, j)),
              K * team.thread / team.threads, K * (team.thread + 1) / team.threads);
        }
    }
    for (const Part& part : team.parts)
      part.each(c, [&](i64 k, i64, i64 at, float* near, i64 bytes) {
        if (c.last[k]) std::memcpy(c.last[k] + at, near, bytes);
      });
    if (c.apart) {
      meet(true);
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
