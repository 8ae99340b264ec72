// The recurrence on the CPU, all steps in one call, compiled for a machine and a cell. native.py
// defines the cell (GATES, STATES, SAVED, SEPARATE_RECURRENT_GRAD, and the statements FORWARD and
// BACKWARD on vectors of hidden units) and the structs of the calls. Shapes are as in forward.cu.
#ifndef GATES  // in an editor
#include "example_cell.h"
#endif
#include "schedule.h"
#ifdef _OPENMP
#include <omp.h>
#endif

// From the products with x and h (one for both, r, unless SEPARATE_RECURRENT_GRAD) and the states
// s: the new states and the activations.
static inline void cell_forward(const Vector* x, const Vector* r, const Vector* s, Vector* n,
                                Vector* a) {
  FORWARD
}

// From the activations, the states before and after and the gradients d of the latter: gradients of
// the products, and of the states before but for what flows through W_hh.
static inline void cell_backward(const Vector* a, const Vector* s, const Vector* n, const Vector* d,
                                 Vector* x, Vector* r, Vector* p) {
  BACKWARD
}

static inline void copy_or_zero(Number* to, const Number* from, i64 at, i64 bytes) {
  if (from) std::memcpy(to, from + at, bytes);
  else std::memset(to, 0, bytes);
}

static void forward_step(const Schedule& schedule, const WorkItem& item, i64 t) {
  constexpr int MAX_ROWS = std::max(1, ACCUMULATORS / (GATES * FORWARD_VECTORS));
  constexpr bool IN_Y = Schedule::GATES_IN_Y;
  const i64 H = schedule.H;
  const i64 N = schedule.N;
  const i64 n = item.n;
  const i64 P = schedule.state_width;
  const i64 width = schedule.gates_width;
  const i64 plane = schedule.R * N * H;
  const i64 next_t = item.reverse ? t - 1 : t + 1;
  const i64 next_size = schedule.batch_size(next_t);
  const bool has_next = next_t >= 0 && next_t < schedule.steps;
  const i64 parity = (item.reverse ? schedule.steps - 1 - t : t) % 2;
  const i64* const rows = item.rows_of(t);
  const i64* const sequences = item.sequences.data();
  const Number* const bias = schedule.b_hh ? schedule.b_hh + n * GATES * H : nullptr;
  const Number* const gates = schedule.gates + (IN_Y ? 0 : (item.base + item.slot(t)) * width);
  // In [R, N, H].
  auto offset = [&](i64 i) { return (rows[i] * N + n) * H; };
  auto x_gates = [&](i64 i) { return gates + (IN_Y ? offset(i) : i * width); };
  for_unit_tiles<FORWARD_VECTORS * LANES>(item.begin, item.end, [&](i64 u, auto valid_lanes) {
    for_row_tiles<MAX_ROWS>(item.count(t), 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      Vector sums[ROWS][GATES * FORWARD_VECTORS];
      LOOP(i, ROWS) {
        const Number* const from = SEPARATE_RECURRENT_GRAD ? bias : x_gates(first + i);
        UNROLLED(j, GATES * FORWARD_VECTORS) {
          const int g = j / FORWARD_VECTORS;
          const int v = j % FORWARD_VECTORS;
          sums[i][j] = from ? load(from + g * H + u + v * LANES, valid_lanes(v)) : Vector{};
        }
      }
      multiply(sums, item.state_row(schedule, 0, first, parity), P, 1, item.panel + u * GATES * H,
               H);
      LOOP(i, ROWS) {
        const i64 b = sequences[first + i];
        const i64 at = offset(first + i);
        const Number* const x_row = x_gates(first + i);
        const Number* const s_prev = item.state_row(schedule, 0, first + i, parity);
        Number* const next_state = item.state_row(schedule, 0, first + i, (parity + 1) % 2);
        const bool ends = b >= next_size;
        const bool reset = has_next && schedule.is_reset(next_t + item.reverse, b);
        UNROLLED(v, FORWARD_VECTORS) {
          const i64 unit = u + v * LANES;
          const int lanes = valid_lanes(v);
          if (lanes <= 0) continue;
          Vector x[GATES], r[GATES], s[STATES], n[STATES], a[SAVED + 1];
          UNROLLED(g, GATES) {
            r[g] = sums[i][g * FORWARD_VECTORS + v];
            x[g] = SEPARATE_RECURRENT_GRAD ? load(x_row + g * H + unit, lanes) : Vector{};
          }
          UNROLLED(k, STATES) s[k] = load(s_prev + k * item.state_size + unit, LANES);
          cell_forward(x, r, s, n, a);
          store(schedule.y + at + unit, n[0], lanes);
          UNROLLED(k, SAVED)
            if (schedule.saved) store(schedule.saved + at * SAVED + k * H + unit, a[k], lanes);
          UNROLLED(k, STATES) {
            if (k && schedule.states)
              store(schedule.states + (k - 1) * plane + at + unit, n[k], lanes);
            if (ends)
              store(schedule.last[k] + item.state_offset(schedule, b) + unit, n[k], lanes);
            store(next_state + k * item.state_size + unit, reset ? Vector{} : n[k], LANES);
          }
        }
      }
    });
  });
}

// The gradients of the pre-activations of a step, and those of the states before it but for what
// flows through W_hh.
static void adjoint_step(const Schedule& schedule, const WorkItem& item, i64 t) {
  const i64 H = schedule.H;
  const i64 N = schedule.N;
  const i64 prev_t = item.step_before(t);
  const i64 prev_size = schedule.batch_size(prev_t);
  const i64 plane = schedule.R * N * H;
  const i64* const rows = item.rows_of(t);
  const i64* const sequences = item.sequences.data();
  for (i64 i = 0; i < item.count(t); ++i) {
    const i64 b = sequences[i];
    const i64 at = (rows[i] * N + item.n) * H;
    const i64 slot = item.slot(t) + i;
    const bool has_prev = b < prev_size;
    const bool reset = item.is_reset(schedule, t, b);
    const i64 s0_at = item.state_offset(schedule, b);
    const i64 prev_at = has_prev ? ((schedule.first_row(prev_t) + b) * N + item.n) * H : 0;
    Number* const h_row =
        schedule.h_rows + item.base * schedule.padded_hidden + slot * PANEL_WIDTH;
    Number* const dr = schedule.dr + (item.base + slot) * schedule.gates_width;
    Number* const dx = schedule.dx + (item.base + slot) * schedule.gates_width;
    Number* const ds = item.state_row(schedule, 0, i);
    for_unit_tiles<LANES>(item.begin, item.end, [&](i64 u, auto valid_lanes) {
      const int lanes = valid_lanes(0);
      Vector a[SAVED + 1], s[STATES], n[STATES], d[STATES], x[GATES], r[GATES], p[STATES];
      UNROLLED(k, SAVED) a[k] = load(schedule.saved + at * SAVED + k * H + u, lanes);
      UNROLLED(k, STATES) {
        const Number* const states = k ? schedule.states + (k - 1) * plane : schedule.y;
        const Number* grad = schedule.dy;
        if (k) grad = schedule.dstates ? schedule.dstates + (k - 1) * plane : nullptr;
        n[k] = load(states + at + u, lanes);
        const Number* prev = states + prev_at;
        if (!has_prev) prev = schedule.s0[k] ? schedule.s0[k] + s0_at : nullptr;
        s[k] = reset || !prev ? Vector{} : load(prev + u, lanes);
        d[k] = load(ds + k * item.state_size + u, LANES);
        if (grad) d[k] += load(grad + at + u, lanes);
      }
      cell_backward(a, s, n, d, x, r, p);
      UNROLLED(g, GATES) {
        if (SEPARATE_RECURRENT_GRAD) store(dx + g * H + u, x[g], lanes);
        store(dr + g * H + u, r[g], lanes);
      }
      store(h_row + u / PANEL_WIDTH * PANEL_WIDTH * item.rows + u % PANEL_WIDTH, s[0], LANES);
      UNROLLED(k, STATES)
        store(ds + k * item.state_size + u, reset && k ? Vector{} : p[k], LANES);
    });
    // Units end within the first vector of the last panel: its second one is zero.
    const i64 rest = H % PANEL_WIDTH;
    if (item.end == H && rest && rest <= LANES)
      store(h_row + (H - rest) * item.rows + LANES, Vector{}, LANES);
  }
}

// Adds the gradients of h that flow through W_hh.
static void adjoint_product(const Schedule& schedule, const WorkItem& item, i64 t) {
  constexpr int MAX_ROWS = ACCUMULATORS / VECTORS_PER_TILE;
  const i64 H = schedule.H;
  const i64 P = schedule.state_width;
  const i64 width = schedule.gates_width;
  const Number* const dr = schedule.dr + (item.base + item.slot(t)) * width;
  for (i64 u = item.begin; u < item.end; u += PANEL_WIDTH)
    for_row_tiles<MAX_ROWS>(item.count(t), 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      Number* const ds = item.state_row(schedule, 0, first) + u;
      Vector sums[ROWS][VECTORS_PER_TILE];
      LOOP(i, ROWS) UNROLLED(v, VECTORS_PER_TILE)
        sums[i][v] = load(ds + i * P + v * LANES, LANES);
      multiply(sums, dr + first * width, width, 1, item.panel + u * GATES * H, GATES * H);
      LOOP(i, ROWS) {
        const bool reset = item.is_reset(schedule, t, item.sequences[first + i]);
        UNROLLED(v, VECTORS_PER_TILE)
          store(ds + i * P + v * LANES, reset ? Vector{} : sums[i][v], LANES);
      }
    });
}

// Where a group sums up the gradients of W of a recurrence, those that are wanted: the first group
// where the caller has them.
struct WeightGrads {
  Number* w_ih;
  Number* w_hh;
  Number* b_ih;
  Number* b_hh;

  WeightGrads(const Schedule& schedule, i64 n, i64 group) {
    const i64 K = GATES * schedule.H;
    const i64 I = schedule.I;
    const i64 H = schedule.H;
    const i64 own = (n * (schedule.groups - 1) + group - 1) * schedule.weight_grads_size();
    auto place = [&](Number* grad, i64 size, i64 at) -> Number* {
      if (!grad) return nullptr;
      return group ? schedule.weight_grads + own + at : grad + n * size;
    };
    w_ih = place(schedule.w_ih_grad, K * I, 0);
    w_hh = place(schedule.w_hh_grad, K * H, K * I);
    b_ih = place(schedule.b_ih_grad, K, K * (I + H));
    b_hh = place(schedule.b_hh_grad, K, K * (I + H + 1));
  }
};

// What a thread does. Either it takes the sequences of its items through time alone; or, where
// there are too few sequences, threads have items of the same sequences, with a barrier after each
// step's first half.
struct ThreadWork {
  i64 thread = 0;
  i64 threads = 1;
  std::vector<WorkItem> items;

  explicit ThreadWork(const Schedule& schedule) {
#ifdef _OPENMP
    thread = omp_get_thread_num();
    threads = omp_get_num_threads();
#endif
    const i64 count = schedule.N * schedule.groups * schedule.shares;
    for (i64 i = thread; i < count; i += threads) items.emplace_back(schedule, i);
  }
  // Its share of 0 ... count - 1.
  template <typename Body> void for_each(i64 count, Body&& body) const {
    for (i64 i = thread; i < count; i += threads) body(i);
  }
  // All steps of window w, each in two halves.
  template <typename First, typename Second>
  void for_each_step(const Schedule& schedule, i64 w, bool adjoint, First&& first,
                     Second&& second) const {
    auto step = [&](const WorkItem& item, i64 i) {
      return item.reverse != adjoint ? item.end_step - 1 - i : item.first_step + i;
    };
    if (schedule.shares == 1) {
      for (const WorkItem& item : items)
        for (i64 i = 0; i < item.end_step - item.first_step; ++i) {
          first(schedule, item, step(item, i));
          second(schedule, item, step(item, i));
        }
      return;
    }
    auto each_item = [&](i64 i, auto&& body) {
      for (const WorkItem& item : items)
        if (i < item.end_step - item.first_step) body(schedule, item, step(item, i));
    };
    for (i64 i = 0, count = schedule.longest_window(w); i < count; ++i) {
      each_item(i, first);
#pragma omp barrier
      each_item(i, second);
    }
  }
};

static inline void barrier_if(bool condition) {
  if (condition) {
#pragma omp barrier
  }
}

// W_hh into panels, going forward: by recurrence, tile, gate and vector of its units.
static void pack_hidden_forward(const Schedule& schedule, const ThreadWork& work) {
  constexpr i64 WIDTH = GATES * FORWARD_VECTORS;
  const i64 H = schedule.H;
  const i64 P = schedule.padded_hidden;
  const i64 tiles = P / LANES / FORWARD_VECTORS;
  work.for_each(schedule.N * GATES * P / LANES, [&](i64 i) {
    const i64 n = i / (GATES * P / LANES);
    const i64 tile = i / WIDTH % tiles;
    const i64 j = i % WIDTH;
    const i64 gate = j / FORWARD_VECTORS;
    const i64 unit = (tile * FORWARD_VECTORS + j % FORWARD_VECTORS) * LANES;
    const i64 first_unit = tile * FORWARD_VECTORS * LANES;
    Number* const panel = schedule.hidden_panels + (n * P + first_unit) * GATES * H;
    const Number* const w = schedule.w_hh + (n * GATES * H + gate * H + unit) * H;
    pack_rows(panel + j * LANES, WIDTH * LANES, w, H, H, H - unit);
  });
}

static void pack_input_forward(const Schedule& schedule, const ThreadWork& work) {
  const i64 I = schedule.I;
  const i64 K = GATES * schedule.H;
  const i64 P = schedule.padded_inputs;
  work.for_each(schedule.N * P / LANES, [&](i64 i) {
    const i64 n = i / (P / LANES);
    const i64 row = i % (P / LANES) * LANES;
    Number* const panel = schedule.input_panels + (n * P + row / INPUT_TILE * INPUT_TILE) * I;
    const Number* const w = schedule.w_ih + (n * K + row) * I;
    pack_rows(panel + row % INPUT_TILE, INPUT_TILE, w, I, I, K - row);
  });
}

// The columns of a matrix [rows, columns] into panels.
static void pack_matrix(const ThreadWork& work, Number* to, const Number* from, i64 rows,
                        i64 columns, i64 padded) {
  work.for_each(padded / LANES, [&](i64 i) {
    const i64 u = i * LANES;
    Number* const panel = to + u / PANEL_WIDTH * PANEL_WIDTH * rows;
    pack_columns(panel + u % PANEL_WIDTH, PANEL_WIDTH, from + u, columns, rows, columns - u);
  });
}

static void pack_hidden_adjoint(const Schedule& schedule, const ThreadWork& work) {
  const i64 H = schedule.H;
  const i64 K = GATES * H;
  const i64 P = schedule.padded_hidden;
  for (i64 n = 0; n < schedule.N; ++n)
    pack_matrix(work, schedule.hidden_panels + n * K * P, schedule.w_hh + n * K * H, K, H, P);
}

static void pack_input_adjoint(const Schedule& schedule, const ThreadWork& work) {
  const i64 I = schedule.I;
  const i64 K = GATES * schedule.H;
  const i64 P = schedule.padded_inputs;
  for (i64 n = 0; schedule.x_grad && n < schedule.N; ++n)
    pack_matrix(work, schedule.input_panels + n * K * P, schedule.w_ih + n * K * I, K, I, P);
}

// The first states, to where they are between two steps; and to the last ones, where they stay if a
// sequence has no step.
static void load_first_states(const Schedule& schedule, const WorkItem& item) {
  item.for_each_state(schedule, [&](i64 k, i64 b, i64 at, Number* row, i64 bytes) {
    copy_or_zero(schedule.last[k] + at, schedule.s0[k], at, bytes);
    const bool reset = !item.reverse && schedule.is_reset(0, b);
    for (i64 parity = 0; parity < schedule.parities; ++parity) {
      copy_or_zero(row, reset ? nullptr : schedule.s0[k], at, bytes);
      row += STATES * item.state_size;
    }
  });
}

// W_ih x + b of an item's window. With a gradient of its own for h, b_hh is added to W_hh h.
static void input_product(const Schedule& schedule, const WorkItem& item) {
  const i64 I = schedule.I;
  const i64 K = GATES * schedule.H;
  const i64 n = item.n;
  const Number* const b_ih = schedule.b_ih ? schedule.b_ih + n * K : nullptr;
  const Number* const b_hh = b_ih && !SEPARATE_RECURRENT_GRAD ? schedule.b_hh + n * K : nullptr;
  const Number* const panels = schedule.input_panels + n * schedule.padded_inputs * I;
  product<INPUT_VECTORS>(item.input_rows(schedule), I, panels, I, K, b_ih, b_hh, false);
}

// The gradients of x in a window. In each round every recurrence has rows of x of its own.
static void input_gradients(const Schedule& schedule, const ThreadWork& work, bool shared_rows) {
  const i64 I = schedule.I;
  const i64 K = GATES * schedule.H;
  const i64 N = schedule.N;
  const i64 R = schedule.R;
  for (i64 round = 0; round < N; ++round) {
    for (const WorkItem& item : work.items) {
      const i64 area = (item.n + round) % N;
      if (schedule.x_grad) {
        const auto rows = item.input_grad_rows(schedule, R * area / N, R * (area + 1) / N);
        const Number* const panels = schedule.input_panels + item.n * K * schedule.padded_inputs;
        product<VECTORS_PER_TILE>(rows, schedule.gates_width, panels, K, I, nullptr, nullptr,
                                  N > 1);
      }
      if (round == 0 && schedule.w_ih_grad && !schedule.input_is_packed())
        item.pack_input(schedule);
    }
    barrier_if(N > 1 || shared_rows);
  }
}

// Rows `first` to `first` + `rows` of a window's memory, in panels of so many rows. If rows of x
// are packed as they are, they begin with `x_row`.
struct WindowRows {
  i64 first;
  i64 rows;
  i64 x_row;
};

// Adds a window's gradients of rows `begin` to `end` of W; in the first window it sets them.
static void weight_gradients(const Schedule& schedule, const WeightGrads& to, WindowRows window,
                             i64 begin, i64 end, bool add, Number* copy) {
  const i64 I = schedule.I;
  const i64 H = schedule.H;
  const i64 width = schedule.gates_width;
  const i64 rows = window.rows;
  const Number* const x_rows = schedule.input_is_packed()
                                   ? schedule.x + window.x_row * I
                                   : schedule.x_rows + window.first * schedule.padded_inputs;
  const Number* const h_rows = schedule.h_rows + window.first * schedule.padded_hidden;
  const Number* const dr = schedule.dr + window.first * width;
  const OuterProduct none = {};
  const OuterProduct x = {x_rows, to.w_ih, rows, I};
  const OuterProduct h = {h_rows, to.w_hh, rows, H};
  if (SEPARATE_RECURRENT_GRAD) {
    const Number* const dx = schedule.dx + window.first * width;
    outer_products(dr, width, rows, begin, end, {h, none}, to.b_hh, add, copy);
    outer_products(dx, width, rows, begin, end, {x, none}, to.b_ih, add, copy);
  } else {
    outer_products(dr, width, rows, begin, end, {h, x}, to.b_hh, add, copy);
  }
}

static void window_weight_gradients(const Schedule& schedule, const ThreadWork& work, i64 w) {
  const i64 K = GATES * schedule.H;
  const i64 shares = schedule.shares;
  Number* const copy = schedule.copy(work.thread);
  if (schedule.private_weight_grads) {
    for (const WorkItem& item : work.items) {
      const WeightGrads to(schedule, item.n, item.group);
      weight_gradients(schedule, to, {item.base, item.rows, 0}, K * item.share / shares,
                       K * (item.share + 1) / shares, w > 0, copy);
    }
    return;
  }
  for (i64 n = 0; n < schedule.N; ++n) {
    const i64 j = schedule.window_in_memory(n, w, true);
    const i64 x_row = schedule.first_row(schedule.window_begin(0, j));
    const WindowRows window = {n * schedule.groups * schedule.max_rows,
                               schedule.window_rows(0, schedule.groups, j), x_row};
    weight_gradients(schedule, WeightGrads(schedule, n, 0), window, K * work.thread / work.threads,
                     K * (work.thread + 1) / work.threads, w > 0, copy);
  }
}

// Adds the groups' gradients of W to those of the first one.
static void add_private_gradients(const Schedule& schedule, const ThreadWork& work) {
  constexpr i64 BLOCK = 64;
  const i64 K = GATES * schedule.H;
  auto add = [&](Number* to, const Number* from, i64 size) {
    if (!to) return;
    work.for_each(size / BLOCK + 1, [&](i64 i) {
      for (i64 k = i * BLOCK; k < std::min(size, (i + 1) * BLOCK); ++k) to[k] += from[k];
    });
  };
  for (i64 n = 0; n < schedule.N; ++n)
    for (i64 group = 1; group < schedule.groups; ++group) {
      const WeightGrads to(schedule, n, 0);
      const WeightGrads from(schedule, n, group);
      add(to.w_ih, from.w_ih, K * schedule.I);
      add(to.w_hh, from.w_hh, K * schedule.H);
      add(to.b_ih, from.b_ih, K);
      add(to.b_hh, from.b_hh, K);
    }
}

// For a check against what Python packs.
extern "C" i64 struct_size(int i) {
  constexpr i64 sizes[] = {sizeof(Arguments), sizeof(Step), sizeof(StepAdjoint)};
  return sizes[i];
}

// How many numbers of memory a call needs. Both directions get the same, so that they share it:
// what is never touched takes no memory.
extern "C" i64 needed(const Arguments& arguments) {
  const i64 forward = Schedule(arguments, false, nullptr).used;
  const i64 backward = Schedule(arguments, true, nullptr).used;
  return std::max(forward, backward);
}

extern "C" void forward(const Arguments& arguments, Number* memory) {
  const Schedule schedule(arguments, false, memory);
#pragma omp parallel num_threads(arguments.threads)
  {
    ThreadWork work(schedule);
    if (!schedule.shared_panel) pack_hidden_forward(schedule, work);
    pack_input_forward(schedule, work);
    for (const WorkItem& item : work.items) load_first_states(schedule, item);
    barrier_if(true);
    for (i64 w = 0; w < schedule.windows; ++w) {
      for (WorkItem& item : work.items) {
        item.enter_window(schedule, w, false);
        input_product(schedule, item);
      }
      barrier_if(schedule.shares > 1 || schedule.shared_panel);
      if (schedule.shared_panel) {
        pack_hidden_forward(schedule, work);
        barrier_if(true);
      }
      auto nothing = [](const Schedule&, const WorkItem&, i64) {};
      work.for_each_step(schedule, w, false, forward_step, nothing);
    }
  }
}

// With more than one recurrence the gradient of x is added to what is there.
extern "C" void backward(const Arguments& arguments, Number* memory) {
  const Schedule schedule(arguments, true, memory);
#pragma omp parallel num_threads(arguments.threads)
  {
    ThreadWork work(schedule);
    // Whether threads read each other's rows.
    const bool shared_rows = schedule.shares > 1 || !schedule.private_weight_grads;
    pack_hidden_adjoint(schedule, work);
    if (!schedule.shared_panel) pack_input_adjoint(schedule, work);
    for (const WorkItem& item : work.items)
      item.for_each_state(schedule, [&](i64 k, i64, i64 at, Number* row, i64 bytes) {
        copy_or_zero(row, schedule.dlast[k], at, bytes);
      });
    for (i64 w = 0; w < schedule.windows; ++w) {
      barrier_if(w == 0 || shared_rows);
      for (WorkItem& item : work.items) item.enter_window(schedule, w, true);
      work.for_each_step(schedule, w, true, adjoint_step, adjoint_product);
      barrier_if(shared_rows || schedule.shared_panel);
      if (schedule.shared_panel) {
        pack_input_adjoint(schedule, work);
        barrier_if(true);
      }
      input_gradients(schedule, work, shared_rows);
      window_weight_gradients(schedule, work, w);
    }
    for (const WorkItem& item : work.items)
      item.for_each_state(schedule, [&](i64 k, i64, i64 at, Number* row, i64 bytes) {
        if (schedule.last[k]) std::memcpy(schedule.last[k] + at, row, bytes);
      });
    if (schedule.private_weight_grads) {
      barrier_if(true);
      add_private_gradients(schedule, work);
    }
  }
}
