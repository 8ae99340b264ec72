// The weights into panels, by all threads together.
#pragma once
#include "thread_work.h"

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
