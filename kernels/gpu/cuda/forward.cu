// Forward through time: x [R, N, G, H] input pre-activations, state [N, S, B, H] in and out, y [R, N, H], and where
// they are wanted states [S-1, R, N, H] and saved [A, R, N, H].
extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
    const T* x, const T* w_hh, const T* b_hh, float* state, T* y, T* states, T* saved, const i64* lengths,
    const i64* offsets, const bool* resets, u64* flags, i64 steps, i64 B, i64 R, i64 H, i64 reverses) {
  SHARED_MEMORY(memory);
  Thread me(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, flags, steps, B, R, H, reverses);
  float news[VECTORS][P][2], sums[ROWS][P][2];
  x += me.x0, state += me.s0, y += me.y0, states += states ? me.y0 : 0, saved += saved ? me.y0 : 0;
  float s[P][STATES][2] = {}, bias[GATES][2] = {};
  Pair now[P][GATES], later[P][GATES];
  bool cuts[P];
  auto fetch = [&](Pair (&given)[P][GATES], int t, i64 row) {
    const T* from = x + row * me.x_row;
    me.find_cuts(cuts, t);
    EACH(p, P) EACH(g, GATES) {
      given[p][g] = {};
      if (me.runs(t, p)) given[p][g] = me.load(from + (g * me.H + me.at(p, me.x_row)));
    }
  };
  // The states that come into the step that was fetched, and the h among them to be multiplied.
  auto enter = [&] {
    EACH(p, P) EACH(e, 2) {
      EACH(k, STATES) if (cuts[p]) s[p][k][e] = 0.f;
      news[0][p][e] = s[p][0][e];
    }
  };
  EACH(g, GATES) if (b_hh && me.unit < H) {
    const Pair b = me.load(b_hh + (me.n * GATES + g) * H + me.unit);
    bias[g][0] = half_of(b, 0), bias[g][1] = half_of(b, 1);
  }
  EACH(p, P) EACH(k, STATES) if (me.inside(p)) me.load(s[p][k], state + k * me.layer + me.at(p, H));
  int t = me.time(0, me.reverse);
  i64 row = me.row(t);
  fetch(now, t, row);
  enter();
  me.tell(0, news);
  for (int u = 0; u < me.steps; ++u) {
    const int next = me.time(u + 1, me.reverse);
    const i64 next_row = me.row(next), far = me.far(u), at = row * me.y_row;
    fetch(later, next, next_row);
    EACH(g, GATES) me.warm(x + g * H, far, me.x_row);
    me.receive(u, sums);
    EACH(p, P) {
      float a[2][SAVED + 1];
      if (me.runs(t, p)) {
        EACH(e, 2) {
          float gates[GATES], r[GATES], old[STATES], new_s[STATES];
          EACH(g, GATES) gates[g] = half_of(now[p][g], e), r[g] = sums[g][p][e] + bias[g][e];
          EACH(k, STATES) old[k] = s[p][k][e];
          cell_forward(gates, r, old, new_s, a[e]);
          EACH(k, STATES) s[p][k][e] = new_s[k];
        }
        me.store(y + at + me.at(p, me.y_row), narrow(s[p][0][0], s[p][0][1]));
        EACH(k, STATES) if (k && states)
          me.store(states + (k - 1) * me.plane + at + me.at(p, me.y_row), narrow(s[p][k][0], s[p][k][1]));
        EACH(k, SAVED) if (saved) me.store(saved + k * me.plane + at + me.at(p, me.y_row), narrow(a[0][k], a[1][k]));
      }
      EACH(g, GATES) now[p][g] = later[p][g];
    }
    enter();
    if (u + 1 < me.steps) me.tell(u + 1, news);
    t = next, row = next_row;
  }
  EACH(p, P) EACH(k, STATES) if (me.inside(p)) me.store(state + k * me.layer + me.at(p, H), s[p][k]);
  cluster_sync();  // nobody leaves while others may write into his memory
}
