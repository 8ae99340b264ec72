// A step of the recurrence, forward and back, for the units and sequences of a work item.
#pragma once
#include "cell.h"
#include "schedule.h"

// Calls body(stage, u, valid_lanes) for every vector of an item's units, in each stage of a cell.
template <int STAGES, typename Body>
static inline void for_each_vector(const WorkItem& item, Row& row, Body&& body) {
  for_each_stage<STAGES>([&](auto stage) {
    for_unit_tiles<LANES>(item.begin, item.end, [&](i64 u, auto valid_lanes) {
      row.enter(u, valid_lanes(0));
      body(stage, u, valid_lanes);
    });
    row.end_stage();
  });
}

// What a row of a step has in common for all its units, going forward.
struct ForwardRow {
  i64 b;
  i64 at;
  const Number* x;
  const Number* s_prev;
  Number* next_state;
  bool ends;
  bool reset;
};

static void forward_step(const Schedule& schedule, const WorkItem& item, i64 t) {
  constexpr int MAX_ROWS = std::max(1, ACCUMULATORS / (GATES * FORWARD_VECTORS));
  constexpr bool IN_Y = Schedule::GATES_IN_Y;
  const i64 H = schedule.H;
  const i64 N = schedule.N;
  const i64 n = item.n;
  const i64 state_width = schedule.state_width;
  const i64 width = schedule.gates_width;
  const i64 plane = schedule.R * N * H;
  const i64 next_t = item.reverse ? t - 1 : t + 1;
  const i64 next_size = schedule.batch_size(next_t);
  const bool has_next = next_t >= 0 && next_t < schedule.steps;
  const i64 parity = (item.reverse ? schedule.steps - 1 - t : t) % 2;
  const i64* const rows = item.rows_of(t);
  const i64* const sequences = item.sequences.data();
  const Number* const bias = schedule.b_hh ? schedule.b_hh + n * GATES * H : nullptr;
  // Of x; or, of a cell of WHOLE_ROWS, of h: x are pre-activations as they come.
  Number* const gates = schedule.gates + (IN_Y ? 0 : (item.base + item.slot(t)) * width);
  // In [R, N, H].
  auto offset = [&](i64 i) { return (rows[i] * N + n) * H; };
  auto x_gates = [&](i64 i) -> const Number* {
    if (WHOLE_ROWS) return schedule.x + offset(i) * GATES;
    return gates + (IN_Y ? offset(i) : i * width);
  };
  auto row_at = [&](i64 i) -> ForwardRow {
    const i64 b = sequences[i];
    return {b,
            offset(i),
            x_gates(i),
            item.state_row(schedule, 0, i, parity),
            item.state_row(schedule, 0, i, (parity + 1) % 2),
            b >= next_size,
            has_next && schedule.is_reset(next_t + item.reverse, b)};
  };
  // The cell on a vector of units, from their products with h.
  auto finish = [&](auto stage, const ForwardRow& at, i64 unit, int lanes, const Vector* r,
                    Row* row) {
    constexpr int STAGE = decltype(stage)::value;
    Vector x[GATES], s[STATES], n[STATES], a[SAVED + 1];
    UNROLLED(g, GATES)
      x[g] = SEPARATE_RECURRENT_GRAD ? load(at.x + g * H + unit, lanes) : Vector{};
    UNROLLED(k, STATES) s[k] = load(at.s_prev + k * item.state_size + unit, LANES);
    cell_forward<STAGE>(x, r, s, n, a, row);
    if (STAGE + 1 < FORWARD_STAGES) return;
    store(schedule.y + at.at + unit, n[0], lanes);
    UNROLLED(k, SAVED)
      if (schedule.saved) store(schedule.saved + at.at * SAVED + k * H + unit, a[k], lanes);
    UNROLLED(k, STATES) {
      if (k && schedule.states)
        store(schedule.states + (k - 1) * plane + at.at + unit, n[k], lanes);
      if (at.ends)
        store(schedule.last[k] + item.state_offset(schedule, at.b) + unit, n[k], lanes);
      const bool cut = at.reset && k < CARRIED;
      store(at.next_state + k * item.state_size + unit, cut ? Vector{} : n[k], LANES);
    }
  };
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
      const Number* const h_prev = item.state_row(schedule, 0, first, parity);
      multiply(sums, h_prev, state_width, 1, item.panel + u * GATES * H, H);
      LOOP(i, ROWS) {
        const ForwardRow at = row_at(first + i);
        UNROLLED(v, FORWARD_VECTORS) {
          const i64 unit = u + v * LANES;
          const int lanes = valid_lanes(v);
          if (lanes <= 0) continue;
          Vector r[GATES];
          UNROLLED(g, GATES) r[g] = sums[i][g * FORWARD_VECTORS + v];
          if constexpr (WHOLE_ROWS)
            UNROLLED(g, GATES) store(gates + (first + i) * width + g * H + unit, r[g], lanes);
          else finish(std::integral_constant<int, 0>(), at, unit, lanes, r, nullptr);
        }
      }
    });
  });
  if constexpr (WHOLE_ROWS)
    for (i64 i = 0; i < item.count(t); ++i) {
      const ForwardRow at = row_at(i);
      Row row(schedule.row_values(item.n, item.group), H);
      for_each_vector<FORWARD_STAGES>(item, row, [&](auto stage, i64 u, auto valid_lanes) {
        const int lanes = valid_lanes(0);
        Vector r[GATES];
        UNROLLED(g, GATES) r[g] = load(gates + i * width + g * H + u, lanes);
        finish(stage, at, u, lanes, r, &row);
      });
    }
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
    Number* dx = schedule.dx + (item.base + slot) * schedule.gates_width;
    if (WHOLE_ROWS && schedule.x_grad) dx = schedule.x_grad + at * GATES;
    Number* const ds = item.state_row(schedule, 0, i);
    Row row(schedule.row_values(item.n, item.group), H);
    for_each_vector<BACKWARD_STAGES>(item, row, [&](auto stage, i64 u, auto valid_lanes) {
      constexpr int STAGE = decltype(stage)::value;
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
        s[k] = (reset && k < CARRIED) || !prev ? Vector{} : load(prev + u, lanes);
        d[k] = load(ds + k * item.state_size + u, LANES);
        if (grad) d[k] += load(grad + at + u, lanes);
      }
      cell_backward<STAGE>(a, s, n, d, x, r, p, &row);
      if (STAGE + 1 < BACKWARD_STAGES) return;
      UNROLLED(g, GATES) {
        if (SEPARATE_RECURRENT_GRAD) store(dx + g * H + u, x[g], lanes);
        store(dr + g * H + u, r[g], lanes);
      }
      store(h_row + panel_offset(u, item.rows), s[0], LANES);
      // A reset cuts the gradient of h once adjoint_product has added its part to it.
      UNROLLED(k, STATES)
        store(ds + k * item.state_size + u, reset && k && k < CARRIED ? Vector{} : p[k], LANES);
    });
    // Where units end within the first vector of the last panel, its second one is zero.
    static_assert(VECTORS_PER_TILE == 2, "more than one vector could be left over");
    const i64 rest = H % PANEL_WIDTH;
    if (item.end == H && rest && rest <= LANES)
      store(h_row + panel_offset(H - rest + LANES, item.rows), Vector{}, LANES);
  }
}

// Adds the gradients of h that flow through W_hh, and cuts the sum at resets.
static void adjoint_product(const Schedule& schedule, const WorkItem& item, i64 t) {
  constexpr int MAX_ROWS = ACCUMULATORS / VECTORS_PER_TILE;
  const i64 H = schedule.H;
  const i64 state_width = schedule.state_width;
  const i64 width = schedule.gates_width;
  const Number* const dr = schedule.dr + (item.base + item.slot(t)) * width;
  for (i64 u = item.begin; u < item.end; u += PANEL_WIDTH)
    for_row_tiles<MAX_ROWS>(item.count(t), 0, [&](auto count, i64 first) {
      constexpr int ROWS = decltype(count)::value;
      Number* const ds = item.state_row(schedule, 0, first) + u;
      Vector sums[ROWS][VECTORS_PER_TILE];
      LOOP(i, ROWS) UNROLLED(v, VECTORS_PER_TILE)
        sums[i][v] = load(ds + i * state_width + v * LANES, LANES);
      multiply(sums, dr + first * width, width, 1, item.panel + u * GATES * H, GATES * H);
      LOOP(i, ROWS) {
        const bool reset = item.is_reset(schedule, t, item.sequences[first + i]);
        UNROLLED(v, VECTORS_PER_TILE)
          store(ds + i * state_width + v * LANES, reset ? Vector{} : sums[i][v], LANES);
      }
    });
}
