// The adjoint, back through time. dy where GRAD_OF_Y; dx (unused where it equals dr) and dr
// [R, N, G, H]; h_prev [R, N, H] or null; S initial states [N, B, H] and S gradients of the last
// ones, each or null for zeros, and S of the initial ones, or null. marks [R] or null: all bits of
// rows that are steps, none of those past an end; with resets [1 + N, R], zeros that become all
// bits in rows that a gradient comes to, in any direction and in each.
extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
    const T* w_hh, const T* y, const T* states, const T* saved, const T* dy,
    const T* dstates, T* dx, T* dr, T* h_prev,
    STATE_PARAMETERS(const T, first_), STATE_PARAMETERS(const T, dlast_),
    STATE_PARAMETERS(T, dfirst_),
    const i64* lengths, const i64* offsets, const bool* resets, Bits* marks, uint4* packets,
    i64 steps, i64 B, i64 R, i64 H, i64 reverses, i64 first_tile) {
  if (MASKS && lengths && !offsets) {
    zero_past_ends(dr, 1, GATES, lengths, steps, B, R, H, first_tile);
    if (SEPARATE_RECURRENT_GRAD)
      zero_past_ends(dx, 1, GATES, lengths, steps, B, R, H, first_tile);
    zero_past_ends(h_prev, 1, 1, lengths, steps, B, R, H, first_tile);
    if (marks && !RESETS && blockIdx.x + blockIdx.z == 0)
      mark_rows(marks, lengths, steps, B, first_tile);
  }
  SHARED_MEMORY(memory);
  Worker worker(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, packets,
                steps, B, R, H, reverses, first_tile);
  const T* const first[STATES] = STATE_POINTERS(first_);
  const T* const dlast[STATES] = STATE_POINTERS(dlast_);
  T* const dfirst[STATES] = STATE_POINTERS(dfirst_);
  float outgoing[VECTORS][P][2];
  float sums[ROWS][P][2];
  y += worker.y0;
  states += worker.y0;
  saved += worker.y0;
  dy += worker.y0;
  dstates += dstates ? worker.y0 : 0;
  dr += worker.x0;
  dx += worker.x0;
  // The states before a step are those of the next one, as the sweep goes back through time: loaded
  // at the beginning of the step or, as they would come too late at its end, a step before.
  constexpr int BEFORE = EARLY ? 0 : 1;
  // What is loaded ahead: of step u states, gradients, what was saved, which sequences are reset;
  // maybe the states before it; the rows of step u + 1 + BEFORE and of step u + AHEAD.
  struct Inputs {
    Loaded d[P][STATES];
    Loaded saved[P][SAVED + 1];
    Loaded s[P][STATES];
    Loaded before[P][STATES];
    u32 cuts[P];
    i64 row;
    i64 far_row;
  };
  Inputs ahead;
  i64 y_at = 0;
  i64 before_at = 0;
  // before its first step a sequence is in its initial state, which is loaded once
  Pair initial[P][STATES];
  EACH(p, P) EACH(k, STATES) {
    const bool given = worker.inside(p) && first[k];
    initial[p][k] = joined(worker.load(first[k] + worker.s0 + worker.at(p, H), given));
  }
  auto load_states = [&](Loaded (&s)[P][STATES], int t, i64 offset) {
    EACH(p, P) EACH(k, STATES) {
      const T* from = (k ? states + (k - 1) * worker.plane : y) + offset +
                      worker.at(p, worker.y_row);
      s[p][k] = worker.load(from, worker.runs(t, p), initial[p][k]);
    }
  };
  // To `ahead` for step u, in two parts: what can be done without a load, and the loads.
  auto prepare = [&](int u, i64 row, i64 row_of_states, i64 far_row) {
    const int far = worker.time(u + AHEAD - 1, !worker.reverse);
    if (GRAD_OF_Y) worker.prefetch(dy, far, far_row, worker.y_row);
    EACH(k, STATES)
      worker.prefetch(k ? states + (k - 1) * worker.plane : y, far, far_row, worker.y_row);
    EACH(k, SAVED) worker.prefetch(saved + k * worker.plane, far, far_row, worker.y_row);
    y_at = pin_register(row * worker.y_row);
    before_at = BEFORE ? pin_register(row_of_states * worker.y_row) : y_at;
  };
  auto fetch = [&](int u) {
    const int t = worker.time(u, !worker.reverse);
    EACH(p, P) {
      const i64 at = y_at + worker.at(p, worker.y_row);
      const bool runs = worker.runs(t, p);
      EACH(k, STATES) {
        const T* from = k ? dstates + (k - 1) * worker.plane : dy;
        ahead.d[p][k] = worker.load(from + at, runs && (k ? dstates != nullptr : GRAD_OF_Y));
      }
      EACH(k, SAVED) ahead.saved[p][k] = worker.load(saved + k * worker.plane + at, runs);
    }
    load_states(ahead.s, t, y_at);
    if (BEFORE) load_states(ahead.before, worker.time(u + 1, !worker.reverse), before_at);
    worker.find_cuts(ahead.cuts, t);
    if (ROWS_AHEAD) ahead.row = worker.row(worker.time(u + 1 + BEFORE, !worker.reverse));
    if (MASKS && READS_AHEAD)
      ahead.far_row = worker.row(worker.time(u + AHEAD, !worker.reverse));
  };
  float d[P][STATES][2] = {};
  EACH(p, P) EACH(k, STATES) if (worker.inside(p) && dlast[k]) {
    const Loaded pair = worker.load(dlast[k] + worker.s0 + worker.at(p, H), true);
    d[p][k][0] = half_of(pair, 0);
    d[p][k][1] = half_of(pair, 1);
  }
  int t = worker.time(0, !worker.reverse);
  // of step u and those that follow
  i64 rows[2 + BEFORE];
  EACH(i, 1 + BEFORE) rows[i] = worker.row(worker.time(i, !worker.reverse));
  y_at = rows[0] * worker.y_row;
  before_at = rows[BEFORE] * worker.y_row;
  fetch(0);
  worker.settle(ahead);
  worker.settle(initial);
  worker.settle(d);
  for (int u = 0;; ++u) {
    const Inputs now = ahead;
    rows[1 + BEFORE] =
        ROWS_AHEAD ? now.row : worker.row(worker.time(u + 1 + BEFORE, !worker.reverse));
    const i64 far_row = MASKS ? now.far_row : worker.row(worker.time(u + AHEAD, !worker.reverse));
    if (!LATE) prepare(u + 1, rows[1], rows[1 + BEFORE], far_row);
    // the wait is also for all loads in flight
    if (u) worker.wait(u - 1);
    if (EARLY) fetch(u + 1);
    if (u) {
      worker.accumulate(u - 1, sums);
      EACH(p, P) {
        d[p][0][0] += sums[0][p][0];
        d[p][0][1] += sums[0][p][1];
      }
    }
    if (u == worker.steps) break;
    if (LATE) rows[1 + BEFORE] = worker.after(d[0][0][0], rows[1 + BEFORE]);
    const auto& before = BEFORE ? now.before : ahead.s;
    EACH(p, P) {
      const bool runs = worker.runs(t, p);
      // whether gradients flow on to the state that entered
      const bool flows = runs && !(RESETS && worker.after(d[0][0][0], now.cuts[p]));
      float gx[2][GATES];
      float gr[2][GATES];
      float s_prev[2][STATES];
      bool reached = false;
      EACH(k, STATES) {
        s_prev[0][k] = flows ? half_of(before[p][k], 0) : 0.f;
        s_prev[1][k] = flows ? half_of(before[p][k], 1) : 0.f;
      }
      EACH(e, 2) {
        float s_next[STATES], ds_next[STATES], a[SAVED + 1], ds_prev[STATES];
        EACH(k, STATES) {
          s_next[k] = half_of(now.s[p][k], e);
          ds_next[k] = d[p][k][e] + half_of(now.d[p][k], e);
          if (k >= CARRIED) s_prev[e][k] = s_next[k];
        }
        EACH(k, SAVED) a[k] = half_of(now.saved[p][k], e);
        cell_backward(a, s_prev[e], s_next, ds_next, gx[e], gr[e], ds_prev);
        // else 0 times the NaN that the step may hold would be NaN
        bool comes = !RESETS;
        EACH(k, CARRIED) comes |= ds_next[k] != 0.f;
        EACH(g, GATES) {
          gx[e][g] = comes ? gx[e][g] : 0.f;
          gr[e][g] = comes ? gr[e][g] : 0.f;
        }
        EACH(k, STATES) ds_prev[k] = comes ? ds_prev[k] : ds_next[k];
        reached |= comes;
        EACH(k, STATES) if (runs) d[p][k][e] = flows || k >= CARRIED ? ds_prev[k] : 0.f;
        EACH(g, GATES) outgoing[g][p][e] = flows ? gr[e][g] : 0.f;
      }
      if (RESETS)
        set_bits_if(marks, rows[0], worker.b0 + worker.sequence(p), 1 + worker.n, R,
                    runs && marks && reached);
      if (!runs) continue;
      EACH(g, GATES) {
        worker.store(dr + rows[0] * worker.x_row + (g * worker.H + worker.at(p, worker.x_row)),
                     narrow(gr[0][g], gr[1][g]));
        if (SEPARATE_RECURRENT_GRAD)
          worker.store(dx + rows[0] * worker.x_row + (g * worker.H + worker.at(p, worker.x_row)),
                       narrow(gx[0][g], gx[1][g]));
      }
      if (MASKS && h_prev) {
        T* to = h_prev + worker.y0 + rows[0] * worker.y_row + worker.at(p, worker.y_row);
        worker.store(to, narrow(s_prev[0][0], s_prev[1][0]));
      }
    }
    // after all that waits for what was loaded before
    if (LATE) prepare(u + 1, rows[1], rows[1 + BEFORE], far_row);
    if (!EARLY) fetch(u + 1);
    worker.publish(u, outgoing);
    t = worker.time(u + 1, !worker.reverse);
    EACH(i, 1 + BEFORE) rows[i] = rows[i + 1];
  }
  EACH(p, P) EACH(k, STATES)
    if (worker.inside(p) && dfirst[k])
      worker.store(dfirst[k] + worker.s0 + worker.at(p, H), narrow(d[p][k][0], d[p][k][1]));
  // No block exits while others may still write to its shared memory.
  cluster_sync();
}
