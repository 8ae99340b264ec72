// The adjoint, back through time. state [S, N, B, H] entered the first step; dy where GRAD_OF_Y;
// dx (unused where it equals dr) and dr [R, N, G, H]; h_prev [R, N, H] or null; S gradients of the
// last states [N, B, H], or null for zeros, and S of the initial ones, or null. marks [R] or null:
// all bits of rows that are steps, none of those past an end; with resets [1 + N, R], zeros that
// become all bits in rows that a gradient comes to, in any direction and in each.
extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
    const T* w_hh, const T* state, const T* y, const T* states, const T* saved, const T* dy,
    const T* dstates, T* dx, T* dr, T* h_prev,
    STATE_PARAMETERS(const T, dlast_), STATE_PARAMETERS(T, dfirst_),
    const i64* lengths, const i64* offsets, const bool* resets, Bits* marks, uint4* packets,
    i64 steps, i64 B, i64 R, i64 H, i64 reverses, i64 first_tile) {
  if (MASKS && lengths && !offsets) {
    zero_past_ends(dr, 1, GATES, lengths, steps, B, R, H, first_tile);
    if (SEPARATE_RECURRENT_GRAD)
      zero_past_ends(dx, 1, GATES, lengths, steps, B, R, H, first_tile);
    zero_past_ends(h_prev, 1, 1, lengths, steps, B, R, H, first_tile);
    if (marks && !resets && blockIdx.x + blockIdx.z == 0)
      mark_rows(marks, lengths, steps, B, first_tile);
  }
  SHARED_MEMORY(memory);
  Worker worker(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, packets,
                steps, B, R, H, reverses, first_tile);
  const T* const dlast[STATES] = STATE_POINTERS(dlast_);
  T* const dfirst[STATES] = STATE_POINTERS(dfirst_);
  float outgoing[VECTORS][P][2];
  float sums[ROWS][P][2];
  state += worker.s0;
  y += worker.y0;
  states += worker.y0;
  saved += worker.y0;
  dy += worker.y0;
  dstates += dstates ? worker.y0 : 0;
  dr += worker.x0;
  dx += worker.x0;
  struct Inputs {
    Loaded s[STATES];
    Loaded d[STATES];
    Loaded saved[SAVED + 1];
  };
  // of step t, and of `before`, which precedes it in time and follows it here
  Inputs now[P];
  Inputs later[P];
  u32 cuts[P];
  u32 cuts_later[P];
  float d[P][STATES][2] = {};
  auto fetch = [&](Inputs (&inputs)[P], u32 (&cuts)[P], int t, i64 offset) {
    worker.find_cuts(cuts, t);
    EACH(p, P) {
      inputs[p] = {};
      if (!worker.runs(t, p)) {
        // before its first step a sequence is in its initial state
        EACH(k, STATES) if (worker.end[p])
          inputs[p].s[k] = worker.load(state + k * worker.layer + worker.at(p, H));
        continue;
      }
      EACH(k, STATES) {
        const T* from = k ? states + (k - 1) * worker.plane : y;
        inputs[p].s[k] = worker.load(from + offset + worker.at(p, worker.y_row));
      }
      if (GRAD_OF_Y) inputs[p].d[0] = worker.load(dy + offset + worker.at(p, worker.y_row));
      EACH(k, STATES) if (k && dstates)
        inputs[p].d[k] =
            worker.load(dstates + (k - 1) * worker.plane + offset + worker.at(p, worker.y_row));
      EACH(k, SAVED)
        inputs[p].saved[k] =
            worker.load(saved + k * worker.plane + offset + worker.at(p, worker.y_row));
    }
  };
  EACH(p, P) EACH(k, STATES) if (worker.inside(p) && dlast[k]) {
    const Loaded pair = worker.load(dlast[k] + worker.s0 + worker.at(p, H));
    d[p][k][0] = half_of(pair, 0);
    d[p][k][1] = half_of(pair, 1);
  }
  int t = worker.time(0, !worker.reverse);
  i64 row = worker.row(t);
  fetch(now, cuts, t, row * worker.y_row);
  // with masks a step ahead of its use, as it may have to be loaded
  i64 row_ahead = MASKS_AHEAD ? worker.row(worker.time(1, !worker.reverse)) : 0;
  for (int u = 0;; ++u) {
    const int before = worker.time(u + 1, !worker.reverse);
    const i64 row_before = MASKS_AHEAD ? row_ahead : worker.row(before);
    if (MASKS_AHEAD) row_ahead = worker.row(worker.time(u + 2, !worker.reverse));
    const i64 prefetch_row = worker.prefetch_row(u);
    const i64 y_before = pin_register(row_before * worker.y_row);
    if (GRAD_OF_Y) worker.prefetch(dy, prefetch_row, worker.y_row);
    EACH(k, STATES)
      worker.prefetch(k ? states + (k - 1) * worker.plane : y, prefetch_row, worker.y_row);
    EACH(k, SAVED) worker.prefetch(saved + k * worker.plane, prefetch_row, worker.y_row);
    // in this order, as the wait is also for all loads in flight
    if (u) worker.wait(u - 1);
    fetch(later, cuts_later, before, y_before);
    if (u) {
      worker.accumulate(u - 1, sums);
      EACH(p, P) {
        d[p][0][0] += sums[0][p][0];
        d[p][0][1] += sums[0][p][1];
      }
    }
    if (u == worker.steps) break;
    EACH(p, P) {
      const bool runs = worker.runs(t, p);
      // whether gradients flow on to the state that entered
      const bool flows = runs && !(MASKS && cuts[p]);
      float gx[2][GATES];
      float gr[2][GATES];
      float s_prev[2][STATES];
      bool reached = false;
      EACH(k, STATES) {
        s_prev[0][k] = flows ? half_of(later[p].s[k], 0) : 0.f;
        s_prev[1][k] = flows ? half_of(later[p].s[k], 1) : 0.f;
      }
      EACH(e, 2) {
        float s_next[STATES], ds_next[STATES], a[SAVED + 1], ds_prev[STATES];
        EACH(k, STATES) {
          s_next[k] = half_of(now[p].s[k], e);
          ds_next[k] = d[p][k][e] + half_of(now[p].d[k], e);
          if (k >= CARRIED) s_prev[e][k] = s_next[k];
        }
        EACH(k, SAVED) a[k] = half_of(now[p].saved[k], e);
        cell_backward(a, s_prev[e], s_next, ds_next, gx[e], gr[e], ds_prev);
        // else 0 times the NaN that the step may hold would be NaN
        bool comes = !(MASKS && resets);
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
      now[p] = later[p];
      cuts[p] = cuts_later[p];
      if (MASKS)
        set_bits_if(marks, row, worker.b0 + worker.sequence(p), 1 + worker.n, R,
                    runs && marks && resets && reached);
      if (!runs) continue;
      EACH(g, GATES) {
        worker.store(dr + row * worker.x_row + (g * worker.H + worker.at(p, worker.x_row)),
                     narrow(gr[0][g], gr[1][g]));
        if (SEPARATE_RECURRENT_GRAD)
          worker.store(dx + row * worker.x_row + (g * worker.H + worker.at(p, worker.x_row)),
                       narrow(gx[0][g], gx[1][g]));
      }
      if (MASKS && h_prev) {
        T* to = h_prev + worker.y0 + row * worker.y_row + worker.at(p, worker.y_row);
        worker.store(to, narrow(s_prev[0][0], s_prev[1][0]));
      }
    }
    worker.publish(u, outgoing);
    t = before;
    row = row_before;
  }
  EACH(p, P) EACH(k, STATES)
    if (worker.inside(p) && dfirst[k])
      worker.store(dfirst[k] + worker.s0 + worker.at(p, H), narrow(d[p][k][0], d[p][k][1]));
  // No block exits while others may still write to its shared memory.
  cluster_sync();
}
