// Windows of time, and who does what in them. GATES, STATES and SPLIT come before this text.
constexpr int CACHE = 1 << 19;  // bytes that a core keeps near, whatever else it reads
constexpr i64 APART = 1 << 10;  // numbers between what two threads write at once, as cores fetch ahead
constexpr int WIDE = GATES == 1 ? 2 : 1;  // vectors of hidden units of a tile, of each gate, going forward
constexpr int INPUT_WIDE = GATES % 4 ? 2 : 4, INPUT_TILE = INPUT_WIDE * LANES;  // of all gates, in the product with x

// What native.py gives: s0, dlast (zero if missing) and `last`, the last states or the gradients of the first ones,
// [N, S, B, H]; y [R, N, H], states [S-1, R, N, H] and saved [R, N, A, H] are written going forward, where they are
// wanted, and read in the adjoint.
struct Given {
  const float *x, *w_ih, *w_hh, *b_ih, *b_hh, *s0, *dy, *dstates, *dlast;
  float *y, *states, *saved, *last;
  float *x_grad, *w_ih_grad, *w_hh_grad, *b_ih_grad, *b_hh_grad;
  const i64* offsets;
  const bool* resets;
  i64 steps, B, R, I, H, N, reverses, threads, window;
};

// A window is some steps, first to end in the order of the recurrence, whose rows are in gates, dx and dr
// [N, most, gates_width] and in the panels x_rows and h_rows. Each of `groups` has sequences of its own, whose rows are
// `together` where that pays, and which sums up its gradients of W `apart` from the others, if these are small: threads
// keep to memory of their own. Where there are too few sequences, the units of a group are cut in `shares`. Going
// forward gates is y if there is one gate, and x_rows are rows of x in the same order.
struct Call : Given {
  static constexpr bool IN_PLACE = GATES == 1 && !SPLIT;
  i64 first = 0, used = 0, end, most, tile, groups, shares, turns, padded, inputs, gates_width, buffer_width;
  bool in_turn;  // with one window the panels of W_ih and those of W_hh have the same place, one after the other
  bool together, apart;
  float *gates, *dx, *dr, *input_panels, *panels, *buffer, *x_rows, *h_rows, *sums;

  // `memory` has as many numbers as `needed` says.
  Call(const Given& given, bool adjoint, float* memory) : Given(given) {
    auto pad = [](i64 n, i64 tile) { return (n + tile - 1) / tile * tile; };
    auto take = [&](i64 size) {
      const i64 at = std::exchange(used, used + pad(size, 16));
      return memory ? memory + at : nullptr;
    };
    end = std::min(window, steps), most = std::min(R, end * B), padded = pad(H, PADDING);
    tile = adjoint ? PADDING : WIDE * LANES;
    const i64 least = GATES * H * H * 4 > CACHE ? ACCUMULATORS : 4;
    groups = std::max<i64>(1, std::min((threads + N - 1) / N, (B + least - 1) / least));
    shares = std::max<i64>(1, std::min(threads / (N * groups), (H + tile - 1) / tile));
    inputs = adjoint ? pad(I, PADDING) : pad(GATES * H, INPUT_TILE);
    // Rows a power of 2 apart would have the same place in the caches.
    gates_width = IN_PLACE && !adjoint ? N * H : pad(GATES * H, LANES) + LANES, buffer_width = padded + LANES;
    const i64 input_size = N * inputs * (adjoint ? GATES * H : I), size = N * padded * GATES * H, rows = N * most;
    in_turn = end == steps;
    // Rows of x that are as wide as a panel are a panel as they are.
    together = groups > 1 && !IN_PLACE && (I != PADDING || B < ACCUMULATORS / 2 * groups);
    // First what is the same in both directions: of that a thread then has what it had.
    float* const same = take(IN_PLACE && !adjoint ? 0 : rows * gates_width);
    panels = take(in_turn ? std::max(size, input_size) : size), input_panels = in_turn ? panels : take(input_size);
    turns = 2 - adjoint, buffer = take(turns * N * STATES * B * buffer_width + N * groups * APART);
    apart = adjoint && together && GATES * H * (I + H) * 4 <= CACHE;
    if (adjoint)
      dr = same, dx = SPLIT ? take(rows * gates_width) : dr, h_rows = take(rows * padded),
      sums = take(apart ? N * (groups - 1) * sum_size() : 0), x_rows = as_it_is() ? nullptr : take(rows * inputs);
    else gates = IN_PLACE ? y : same, x_rows = together ? take(rows * I) : nullptr;
  }
  i64 sum_size() const { return GATES * H * (I + H + 2); }  // of the gradients of W_ih, W_hh and both biases
  bool as_it_is() const { return I == PADDING && !together; }
  i64 row(i64 t) const { return offsets ? t < steps ? offsets[t] : R : t * B; }
  i64 size(i64 t) const { return t < 0 || t >= steps ? 0 : row(t + 1) - row(t); }
  bool cut(i64 t, i64 b) const { return resets && resets[t * B + b]; }
  bool reverse(i64 n) const { return reverses >> n & 1; }
  i64 begin(i64 n) const { return reverse(n) ? steps - end : first; }  // the first step of the window, in memory
  i64 base(i64 n) const { return row(begin(n)); }                      // its first row
  i64 rows(i64 n) const { return row(begin(n) + end - first) - base(n); }
  // The first sequence of a group, where each has about as many rows of the window as the others.
  i64 first_of(i64 group, i64 n) const {
    i64 length = end - first;
    for (i64 b = 0, before = 0; group < groups; before += length, ++b) {
      while (length && size(begin(n) + length - 1) <= b) --length;
      if ((2 * before + length) * groups >= 2 * rows(n) * group) return b;
    }
    return B;
  }
};

// Rows of a window's memory from `slot` on, and which they are of the caller's window: from `row` on, or those of
// `index`.
struct Run {
  i64 slot, row, count;
  const i64* index;

  i64 operator[](i64 i) const { return index ? index[i] : row + i; }
  i64 place(i64 bound) const {  // of the first that is not before `bound`
    return index ? std::lower_bound(index, index + count, bound) - index : std::clamp<i64>(bound - row, 0, count);
  }
  Run cut(i64 from, i64 to) const { return {slot + from, row + from, to - from, index ? index + from : index}; }
};

// What a thread has of a window: of recurrence n the sequences from `first` on, before `bound`, of their units begin to
// end, and runs of rows, most of them theirs, to multiply a share of with W_ih.
struct Part {
  i64 n, group, first, bound, share, begin, end;
  bool reverse;
  const float* panel;
  float* buffer;                  // [turns, S, sequences, buffer_width] the states between two steps, by turns
  std::vector<i64> slots, index;  // of each step its first row in the window's memory; which rows they are, together
  std::vector<Run> runs;

  Part(const Call& c, i64 item) : n(item / c.shares / c.groups), share(item % c.shares), reverse(c.reverse(n)) {
    group = item / c.shares % c.groups;
    const i64 tiles = (c.H + c.tile - 1) / c.tile, from = c.begin(n);
    first = c.first_of(group, n), bound = c.first_of(group + 1, n);
    begin = share * tiles / c.shares * c.tile, end = std::min(c.H, (share + 1) * tiles / c.shares * c.tile);
    panel = c.panels + n * GATES * c.H * c.padded;
    buffer = c.buffer + c.turns * (n * c.B + first) * STATES * c.buffer_width + item / c.shares * APART;
    i64 at = 0;
    for (i64 t = from; c.together && t < from + c.end - c.first; ++t) at += std::min(c.size(t), first);
    const i64 all = c.rows(n), cut = all * group / c.groups, some = all * (group + 1) / c.groups - cut;
    const bool own = all >= 3 * c.groups * (c.end - c.first);  // or they are too few for tiles
    for (i64 t = from; t < from + c.end - c.first; ++t) {
      const i64 row = c.row(t) - c.base(n) + first, count = rows(c.size(t));
      slots.push_back(c.together ? at + index.size() : row);
      if (c.together)
        for (i64 i = 0; i < count; ++i) index.push_back(row + i);
      else if (!runs.empty() && runs.back().row + runs.back().count == row) runs.back().count += count;
      else if (own && count) runs.push_back({row, row, count, nullptr});
    }
    if (c.together) runs.push_back({at, 0, static_cast<i64>(index.size()), index.data()});
    else if (!own) runs.push_back({cut, cut, some, nullptr});
  }
  i64 before(i64 t) const { return reverse ? t + 1 : t - 1; }
  // Whether the states that came into step t of sequence b were reset.
  bool cut(const Call& c, i64 t, i64 b) const { return (!reverse || b < c.size(t + 1)) && c.cut(t + reverse, b); }
  i64 rows(i64 size) const { return std::max<i64>(0, std::min(size, bound) - first); }
  i64 slot(const Call& c, i64 t) const { return n * c.most + slots[t - c.begin(n)]; }
  // Of states [N, S, B, H] those of sequence b, and where they are between two steps.
  i64 state(const Call& c, i64 k, i64 b) const { return ((n * STATES + k) * c.B + b) * c.H; }
  float* near(const Call& c, i64 k, i64 b, i64 turn = 0) const {
    return buffer + ((turn * STATES + k) * (bound - first) + b - first) * c.buffer_width;
  }
  // Calls body with each of its states and sequences.
  template <typename Body> void each(Body&& body) const {
    for (i64 k = 0; k < STATES; ++k)
      for (i64 b = first; b < bound; ++b) body(k, b);
  }
  // Runs of its share of the rows that are `from` to `to` in the caller's window.
  std::vector<Run> mine(const Call& c, i64 from, i64 to) const {
    std::vector<Run> found;
    for (const Run& run : runs) {
      const i64 low = run.place(from), count = run.place(to) - low;
      found.push_back(run.cut(low + count * share / c.shares, low + count * (share + 1) / c.shares));
    }
    return found;
  }
};
