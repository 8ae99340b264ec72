// The gradients of W and of the biases: sums over all rows, window by window.
#pragma once
#include <cassert>

#include "thread_work.h"

// Where a group sums up the gradients of W of a recurrence, those that are wanted: group 0 writes
// into the caller's tensors, the others into memory that add_private_gradients adds to them.
struct WeightGrads {
  Number* w_ih;
  Number* w_hh;
  Number* b_ih;
  Number* b_hh;

  WeightGrads(const Schedule& schedule, i64 n, i64 group) {
    const i64 gate_rows = GATES * schedule.H;
    const i64 I = schedule.I;
    const i64 H = schedule.H;
    const i64 own = (n * (schedule.groups - 1) + group - 1) * schedule.weight_grads_size();
    auto place = [&](Number* grad, i64 size, i64 at) -> Number* {
      if (!grad) return nullptr;
      return group ? schedule.weight_grads + own + at : grad + n * size;
    };
    w_ih = place(schedule.w_ih_grad, gate_rows * I, 0);
    w_hh = place(schedule.w_hh_grad, gate_rows * H, gate_rows * I);
    b_ih = place(schedule.b_ih_grad, gate_rows, gate_rows * (I + H));
    b_hh = place(schedule.b_hh_grad, gate_rows, gate_rows * (I + H + 1));
  }
};

// The `rows` rows of a window over which products are summed. They begin at row `first` of dx and
// dr [N * groups * max_rows, gates_width]; h_rows and x_rows have them at the same place as panels
// [padded_hidden / PANEL_WIDTH, rows, PANEL_WIDTH], and likewise with padded_inputs. If
// input_is_packed(), x [R, PANEL_WIDTH] is such a panel itself, from row `x_row` on.
struct WindowRows {
  i64 first;
  i64 rows;
  i64 x_row;
};

// Adds a window's gradients of rows `begin` to `end` of W; in the first window of all it sets them.
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
    if (!WHOLE_ROWS)
      outer_products(dx, width, rows, begin, end, {x, none}, to.b_ih, add, copy);
  } else {
    outer_products(dr, width, rows, begin, end, {h, x}, to.b_hh, add, copy);
  }
}

// Private: each item sums its group's rows, for a share of the rows of W. Else all threads sum the
// rows of all groups, recurrence after recurrence, each thread for its parts of the rows of W.
static void window_weight_gradients(const Schedule& schedule, const ThreadWork& work, i64 w) {
  const i64 gate_rows = GATES * schedule.H;
  const i64 shares = schedule.shares;
  Number* const copy = schedule.copy(work.thread);
  const bool add = w > 0 || schedule.continues;
  if (schedule.private_weight_grads) {
    for (const WorkItem& item : work.items) {
      const WeightGrads to(schedule, item.n, item.group);
      const i64 begin = gate_rows * item.share / shares;
      const i64 end = gate_rows * (item.share + 1) / shares;
      weight_gradients(schedule, to, {item.base, item.rows, 0}, begin, end, add, copy);
    }
    return;
  }
  for (i64 n = 0; n < schedule.N; ++n) {
    const i64 j = schedule.window_in_memory(n, w, true);
    // Group 0's: input_is_packed() only if there is no other.
    assert(!schedule.input_is_packed() || schedule.groups == 1);
    const i64 x_row = schedule.first_row(schedule.window_begin(0, j));
    const WindowRows window = {n * schedule.groups * schedule.max_rows,
                               schedule.window_rows(0, schedule.groups, j), x_row};
    work.for_each(schedule.parts, [&](i64 part) {
      const i64 begin = gate_rows * part / schedule.parts;
      const i64 end = gate_rows * (part + 1) / schedule.parts;
      weight_gradients(schedule, WeightGrads(schedule, n, 0), window, begin, end, add, copy);
    });
  }
}

// Adds the groups' gradients of W to those of the first one.
static void add_private_gradients(const Schedule& schedule, const ThreadWork& work) {
  constexpr i64 BLOCK = 64;
  const i64 gate_rows = GATES * schedule.H;
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
      add(to.w_ih, from.w_ih, gate_rows * schedule.I);
      add(to.w_hh, from.w_hh, gate_rows * schedule.H);
      add(to.b_ih, from.b_ih, gate_rows);
      add(to.b_hh, from.b_hh, gate_rows);
    }
}
