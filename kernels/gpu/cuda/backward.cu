// The adjoint, back through time: state [N, S, B, H] came into the first step; ds likewise, in and out; dx (where it is
// not dr) and dr [R, N, G, H]; h_came [R, N, H], where it is wanted.
extern "C" __global__ CLUSTER_SIZE __launch_bounds__(THREADS, 1) void recurrence(
    const T* w_hh, const T* state, const T* y, const T* states, const T* saved, const T* dy, const T* dstates,
    float* ds, T* dx, T* dr, T* h_came, const i64* lengths, const i64* offsets, const bool* resets, u64* flags,
    i64 steps, i64 B, i64 R, i64 H, i64 reverses) {
  SHARED_MEMORY(memory);
  Thread me(*reinterpret_cast<Shared*>(memory), w_hh, lengths, offsets, resets, flags, steps, B, R, H, reverses);
  float news[VECTORS][P][2], sums[ROWS][P][2];
  state += me.s0, y += me.y0, states += me.y0, saved += me.y0, dy += me.y0,
  dstates += dstates ? me.y0 : 0, ds += me.s0, dr += me.x0, dx += me.x0;
  struct Given { Pair s[STATES], d[STATES], saved[SAVED + 1]; } now[P], later[P];  // of the steps t and `before`
  float d[P][STATES][2] = {};
  bool cuts[P], cuts_later[P];
  auto fetch = [&](Given (&given)[P], bool (&cuts)[P], int t, i64 row) {
    row *= me.y_row;
    me.find_cuts(cuts, t);
    EACH(p, P) {
      given[p] = {};
      if (!me.runs(t, p)) continue;
      EACH(k, STATES) given[p].s[k] = me.load((k ? states + (k - 1) * me.plane : y) + row + me.at(p, me.y_row));
      given[p].d[0] = me.load(dy + row + me.at(p, me.y_row));
      EACH(k, STATES)
        if (k && dstates) given[p].d[k] = me.load(dstates + (k - 1) * me.plane + row + me.at(p, me.y_row));
      EACH(k, SAVED) given[p].saved[k] = me.load(saved + k * me.plane + row + me.at(p, me.y_row));
    }
  };
  EACH(p, P) EACH(k, STATES) if (me.inside(p)) me.load(d[p][k], ds + k * me.layer + me.at(p, H));
  int t = me.time(0, !me.reverse);
  i64 row = me.row(t);
  fetch(now, cuts, t, row);
  for (int u = 0;; ++u) {
    const int before = me.time(u + 1, !me.reverse);  // in time: what ran before it, and comes after it here
    const i64 row_before = me.row(before), far = me.far(u);
    fetch(later, cuts_later, before, row_before);
    me.warm(dy, far, me.y_row);
    EACH(k, STATES) me.warm(k ? states + (k - 1) * me.plane : y, far, me.y_row);
    EACH(k, SAVED) me.warm(saved + k * me.plane, far, me.y_row);
    if (u) {
      me.receive(u - 1, sums);
      EACH(p, P) d[p][0][0] += sums[0][p][0], d[p][0][1] += sums[0][p][1];
    }
    if (u == me.steps) break;
    EACH(p, P) {
      const bool runs = me.runs(t, p), flows = runs && !cuts[p], first = flows && !me.runs(before, p);
      float gx[2][GATES], gr[2][GATES], came[2][STATES];
      EACH(k, STATES) {
        const Pair s = first ? me.load(state + k * me.layer + me.at(p, H)) : later[p].s[k];
        came[0][k] = flows ? half_of(s, 0) : 0.f, came[1][k] = flows ? half_of(s, 1) : 0.f;
      }
      EACH(e, 2) {
        float s[STATES], given[STATES], a[SAVED + 1], passed[STATES];
        EACH(k, STATES) s[k] = half_of(now[p].s[k], e), given[k] = d[p][k][e] + half_of(now[p].d[k], e);
        EACH(k, SAVED) a[k] = half_of(now[p].saved[k], e);
        cell_backward(a, came[e], s, given, gx[e], gr[e], passed);
        EACH(k, STATES) if (runs) d[p][k][e] = flows ? passed[k] : 0.f;
        EACH(g, GATES) news[g][p][e] = flows ? gr[e][g] : 0.f;
      }
      now[p] = later[p], cuts[p] = cuts_later[p];
      if (!runs) continue;
      EACH(g, GATES) {
        me.store(dr + row * me.x_row + (g * me.H + me.at(p, me.x_row)), narrow(gr[0][g], gr[1][g]));
        if (SEPARATE_RECURRENT_GRAD) me.store(dx + row * me.x_row + (g * me.H + me.at(p, me.x_row)), narrow(gx[0][g], gx[1][g]));
      }
      if (MASKS && h_came)
        me.store(h_came + me.y0 + row * me.y_row + me.at(p, me.y_row), narrow(came[0][0], came[1][0]));
    }
    me.tell(u, news);
    t = before, row = row_before;
  }
  EACH(p, P) EACH(k, STATES) if (me.inside(p)) me.store(ds + k * me.layer + me.at(p, H), d[p][k]);
  cluster_sync();  // nobody leaves while others may write into his memory
}
