// The weights into panels, by all threads together.
#pragma once
#include "thread_work.h"

// W_hh into panels, going forward: by recurrence, tile, gate and vector of its units.
static void pack_hidden_forward(const Schedule& schedule, const ThreadWork& work) {
  constexpr i64 WIDTH = GATES * FORWARD_VECTORS;
  const i64 H = schedule.H;
  const i64 padded = schedule.padded_hidden;
  const i64 tiles = padded / LANES / FORWARD_VECTORS;
  work.for_each(schedule.N * GATES * padded / LANES, [&](i64 i) {
    const i64 n = i / (GATES * padded / LANES);
    const i64 tile = i / WIDTH % tiles;
    const i64 j = i % WIDTH;
    const i64 gate = j / FORWARD_VECTORS;
    const i64 unit = (tile * FORWARD_VECTORS + j % FORWARD_VECTORS) * LANES;
    const i64 first_unit = tile * FORWARD_VECTORS * LANES;
    Number* const panel = schedule.hidden_panels + (n * padded + first_unit) * GATES * H;
    const Number* const w = schedule.w_hh + (n * GATES * H + gate * H + unit) * H;
    pack_rows(panel + j * LANES, WIDTH * LANES, w, H, H, H - unit);
  });
}

static void pack_input_forward(const Schedule& schedule, const ThreadWork& work) {
  const i64 I = schedule.I;
  const i64 gate_rows = GATES * schedule.H;
  const i64 padded = schedule.padded_inputs;
  work.for_each(schedule.N * padded / LANES, [&](i64 i) {
    const i64 n = i / (padded / LANES);
    const i64 row = i % (padded / LANES) * LANES;
    Number* const panel = schedule.input_panels + (n * padded + row / INPUT_TILE * INPUT_TILE) * I;
    const Number* const w = schedule.w_ih + (n * gate_rows + row) * I;
    pack_rows(panel + row % INPUT_TILE, INPUT_TILE, w, I, I, gate_rows - row);
  });
}

// The columns of a matrix [rows, columns] into panels.
static void pack_matrix(const ThreadWork& work, Number* to, const Number* from, i64 rows,
                        i64 columns, i64 padded) {
  work.for_each(padded / LANES, [&](i64 i) {
    const i64 u = i * LANES;
    pack_columns(to + panel_offset(u, rows), PANEL_WIDTH, from + u, columns, rows, columns - u);
  });
}

static void pack_hidden_adjoint(const Schedule& schedule, const ThreadWork& work) {
  const i64 H = schedule.H;
  const i64 gate_rows = GATES * H;
  const i64 padded = schedule.padded_hidden;
  for (i64 n = 0; n < schedule.N; ++n)
    pack_matrix(work, schedule.hidden_panels + n * gate_rows * padded,
                schedule.w_hh + n * gate_rows * H, gate_rows, H, padded);
}

static void pack_input_adjoint(const Schedule& schedule, const ThreadWork& work) {
  const i64 I = schedule.I;
  const i64 gate_rows = GATES * schedule.H;
  const i64 padded = schedule.padded_inputs;
  for (i64 n = 0; schedule.x_grad && n < schedule.N; ++n)
    pack_matrix(work, schedule.input_panels + n * gate_rows * padded,
                schedule.w_ih + n * gate_rows * I, gate_rows, I, padded);
}
