// Forward through time. x [R, N, G, H] input pre-activations; y [R, N, H]; states [S-1, R, N, H]
// and saved [A, R, N, H], or null; S initial states [N, B, H], or null for zeros, and S last ones.
extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
    const T* x, const T* w_hh, const T* b_hh, T* y, T* states, T* saved,
    STATE_PARAMETERS(const T, first_), STATE_PARAMETERS(T, last_),
    const i64* lengths, const i64* offsets, const bool* resets, uint4* packets,
    i64 steps, i64 B, i64 R, i64 H, i64 reverses, i64 first_tile) {
  if (MASKS && lengths && !offsets) {
    zero_past_ends(y, 1, 1, lengths, steps, B, R, H, first_tile);
    if (states) zero_past_ends(states, STATES - 1, 1, lengths, steps, B, R, H, first_tile);
    if (saved) zero_past_ends(saved, SAVED, 1, lengths, steps, B, R, H, first_tile);
  }
  SHARED_MEMORY(memory);
  Worker worker(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, packets,
                steps, B, R, H, reverses, first_tile);
  const T* const first[STATES] = STATE_POINTERS(first_);
  T* const last[STATES] = STATE_POINTERS(last_);
  float outgoing[VECTORS][P][2];
  float sums[ROWS][P][2];
  x += worker.x0;
  y += worker.y0;
  states += states ? worker.y0 : 0;
  saved += saved ? worker.y0 : 0;
  float s[P][STATES][2] = {};
  float bias[GATES][2] = {};
  // What is loaded ahead: of step u x, of step u + 1 its row and which sequences are reset, and the
  // row of step u + AHEAD.
  struct Inputs {
    Loaded x[P][GATES];
    u32 cuts[P];
    i64 next_row;
    i64 far_row;
  };
  Inputs ahead;
  i64 x_at = 0;
  // To `ahead` for step u, in two parts: what can be done without a load, and the loads.
  auto prepare = [&](int u, i64 row, i64 far_row) {
    const int far = worker.time(u + AHEAD - 1, worker.reverse);
    EACH(g, GATES) worker.prefetch(x + g * H, far, far_row, worker.x_row);
    x_at = pin_register(row * worker.x_row);
  };
  auto fetch = [&](int u) {
    const int t = worker.time(u, worker.reverse);
    const int next = worker.time(u + 1, worker.reverse);
    const T* from = x + x_at;
    EACH(p, P) EACH(g, GATES)
      ahead.x[p][g] =
          worker.load(from + (g * worker.H + worker.at(p, worker.x_row)), worker.runs(t, p));
    worker.find_cuts(ahead.cuts, next);
    if (MASKS) {
      ahead.next_row = worker.row(next);
      if (READS_AHEAD) ahead.far_row = worker.row(worker.time(u + AHEAD, worker.reverse));
    }
  };
  // The states that enter a step, and of these h, which is multiplied.
  auto enter = [&](const u32 (&cuts)[P]) {
    EACH(p, P) EACH(e, 2) {
      EACH(k, CARRIED) if (RESETS && worker.after(s[p][0][e], cuts[p])) s[p][k][e] = 0.f;
      outgoing[0][p][e] = s[p][0][e];
    }
  };
  EACH(g, GATES) if (b_hh && worker.unit < H) {
    const Loaded b = worker.load(b_hh + (worker.n * GATES + g) * H + worker.unit, true);
    bias[g][0] = half_of(b, 0);
    bias[g][1] = half_of(b, 1);
  }
  // number by number, where there are registers: the time loop has fewer waits then
  constexpr bool BY_NUMBER = !MASKS || (TYPE != FLOAT32 && GATES > 3);
  EACH(k, STATES) if (BY_NUMBER && first[k]) EACH(p, P) if (worker.inside(p)) {
    const T* const from = first[k] + worker.s0 + worker.at(p, H);
    s[p][k][0] = widen(from[0]);
    s[p][k][1] = worker.two ? widen(from[1]) : 0.f;
  }
  EACH(p, P) EACH(k, STATES) if (!BY_NUMBER && worker.inside(p) && first[k]) {
    const Loaded pair = worker.load(first[k] + worker.s0 + worker.at(p, H), true);
    s[p][k][0] = half_of(pair, 0);
    s[p][k][1] = half_of(pair, 1);
  }
  int t = worker.time(0, worker.reverse);
  i64 row = worker.row(t);
  worker.find_cuts(ahead.cuts, t);
  enter(ahead.cuts);
  x_at = row * worker.x_row;
  fetch(0);
  worker.publish(0, outgoing);
  worker.settle(ahead);
  worker.settle(s);
  for (int u = 0; u < worker.steps; ++u) {
    const int next = worker.time(u + 1, worker.reverse);
    const i64 at = row * worker.y_row;
    const Inputs now = ahead;
    i64 next_row = MASKS ? now.next_row : worker.row(next);
    i64 far_row = MASKS ? now.far_row : worker.row(worker.time(u + AHEAD, worker.reverse));
    if (!LATE) prepare(u + 1, next_row, far_row);
    // the wait is also for all loads in flight
    worker.wait(u);
    if (EARLY) fetch(u + 1);
    worker.accumulate(u, sums);
    if (LATE) {
      next_row = worker.after(sums[0][0][0], next_row);
      far_row = worker.after(sums[0][0][0], far_row);
    }
    EACH(p, P) {
      float a[2][SAVED + 1];
      if (worker.runs(t, p)) {
        EACH(e, 2) {
          float gates[GATES], r[GATES], s_prev[STATES], s_next[STATES];
          EACH(g, GATES) {
            gates[g] = half_of(now.x[p][g], e);
            r[g] = sums[g][p][e] + bias[g][e];
          }
          EACH(k, STATES) s_prev[k] = s[p][k][e];
          cell_forward(gates, r, s_prev, s_next, a[e]);
          EACH(k, STATES) s[p][k][e] = s_next[k];
        }
        worker.store(y + at + worker.at(p, worker.y_row), narrow(s[p][0][0], s[p][0][1]));
        EACH(k, STATES) if (k && states)
          worker.store(states + (k - 1) * worker.plane + at + worker.at(p, worker.y_row),
                       narrow(s[p][k][0], s[p][k][1]));
        EACH(k, SAVED) if (saved)
          worker.store(saved + k * worker.plane + at + worker.at(p, worker.y_row),
                       narrow(a[0][k], a[1][k]));
      }
    }
    enter(now.cuts);
    // after all that waits for what was loaded before
    if (LATE) prepare(u + 1, next_row, far_row);
    if (!EARLY) fetch(u + 1);
    if (u + 1 < worker.steps) worker.publish(u + 1, outgoing);
    t = next;
    row = next_row;
  }
  // in three parts a cluster has no register left for whether a pair is inside
  EACH(p, P) EACH(k, STATES)
    if (PRECISE && MASKS && SCOPE == CLUSTER ? worker.end[p] >= 0 : worker.inside(p))
      worker.store(last[k] + worker.s0 + worker.at(p, H), narrow(s[p][k][0], s[p][k][1]));
  // No block exits while others may still write to its shared memory.
  cluster_sync();
}
