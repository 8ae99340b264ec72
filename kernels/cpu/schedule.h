#pragma once
#include "gemm.h"

// Who does what, and where, for a cell of GATES, STATES and SPLIT.
constexpr int CACHE = 1 << 19;  // bytes that a core keeps near, whatever else it reads
constexpr i64 APART = 1 << 10;  // numbers between what two threads write at once, as cores fetch ahead
constexpr int WIDE = GATES == 1 ? 2 : 1;  // vectors of hidden units of a tile, of each gate, going forward
constexpr int INPUT_WIDE = GATES % 4 ? 2 : 4, INPUT_TILE = INPUT_WIDE * LANES;  // of all gates, in the product with x

// Of the struct Arguments, which native.py defines: s0, dlast and `last` are [N, B, H] each; y [R, N, H], states
// [S-1, R, N, H] and saved [R, N, A, H] are written going forward, where they are wanted, and read in the adjoint.

// Sequences that are taken through time together, the longest first, and how many steps each has.
struct Group {
  std::vector<i64> sequences, lengths;
  i64 rows = 0;  // of all steps

  void add(i64 b, i64 length) { sequences.push_back(b), lengths.push_back(length), rows += length; }
  i64 size() const { return sequences.size(); }
  i64 rows_before(i64 t) const {
    if (lengths.empty() || t <= lengths.back()) return t * size();
    i64 sum = 0;
    for (const i64 length : lengths) sum += std::min(t, length);
    return sum;
  }
  // The step with which the window j of so many begins, in memory: all have about as many rows.
  i64 begin(i64 j, i64 windows) const {
    i64 low = 0, high = lengths.empty() ? 0 : lengths[0];
    while (low < high) {
      const i64 t = (low + high) / 2;
      if (rows_before(t) * windows < rows * j) low = t + 1;
      else high = t;
    }
    return low;
  }
};

// Each of `groups` takes sequences of its own through time, in `windows` of its own: threads keep to memory of their
// own, and none waits for another. In gates, dx, dr and x_rows [N, groups, most, ...] are the rows of a window. Groups
// sum up their gradients of W `apart`, if these are small; else all do it together, of windows whose panels x_rows and
// h_rows have the rows of all groups. Where there are too few sequences, the units of a group are cut in `shares`.
// Going forward gates is y if there is one gate.
struct Call : Arguments {
  static constexpr bool IN_PLACE = GATES == 1 && !SPLIT;
  i64 used = 0, most = 0, windows = 1, tile, groups, shares, turns, padded, inputs, gates_width, buffer_width;
  bool in_turn;  // with one window the panels of W_ih and those of W_hh have the same place, one after the other
  bool apart;
  float *gates, *dx, *dr, *input_panels, *panels, *buffer, *x_rows, *h_rows, *sums, *copies;
  std::vector<Group> group;

  // `memory` has as many numbers as `needed` says.
  Call(const Arguments& given, bool adjoint, float* memory) : Arguments(given) {
    auto pad = [](i64 n, i64 tile) { return (n + tile - 1) / tile * tile; };
    auto take = [&](i64 size) {
      const i64 at = std::exchange(used, used + pad(size, 16));
      return memory ? memory + at : nullptr;
    };
    padded = pad(H, PADDING), tile = adjoint ? PADDING : WIDE * LANES;
    const i64 least = GATES * H * H * 4 > CACHE ? ACCUMULATORS : 4;
    groups = std::max<i64>(1, std::min((threads + N - 1) / N, (B + least - 1) / least));
    shares = std::max<i64>(1, std::min(threads / (N * groups), (H + tile - 1) / tile));
    deal();
    const i64 wanted = std::max<i64>(1, window[adjoint] * B / groups);
    for (const Group& g : group) windows = std::max(windows, (g.rows + wanted - 1) / wanted);
    for (const Group& g : group) most = std::max(most, std::min(g.rows, g.rows / windows + g.size()));
    inputs = adjoint ? pad(I, PADDING) : pad(GATES * H, INPUT_TILE);
    // Long rows a power of 2 apart would have the same place in the caches.
    auto odd = [](i64 n) { return n < 256 ? n : n + LANES; };
    gates_width = IN_PLACE && !adjoint ? N * H : odd(pad(GATES * H, LANES)), buffer_width = odd(padded);
    const i64 input_panel = N * inputs * (adjoint ? GATES * H : I), panel = N * padded * GATES * H;
    const i64 slots = N * groups * most;
    in_turn = windows == 1;
    apart = !adjoint || (groups > 1 && GATES * H * (I + H) * 4 <= CACHE);
    // First what is the same in both directions: of that a thread then has what it had.
    float* const same = take(IN_PLACE && !adjoint ? 0 : slots * gates_width);
    panels = take(in_turn ? std::max(panel, input_panel) : panel), input_panels = in_turn ? panels : take(input_panel);
    turns = 2 - adjoint, buffer = take(turns * N * STATES * B * buffer_width + N * groups * APART);
    if (adjoint)
      dr = same, dx = SPLIT ? take(slots * gates_width) : dr, h_rows = take(slots * padded),
      sums = take(apart ? N * (groups - 1) * sum_size() : 0), x_rows = as_it_is() ? nullptr : take(slots * inputs),
      copies = take(threads * (OUTER_COPY + APART));
    else gates = IN_PLACE ? y : same, x_rows = groups > 1 ? take(slots * I) : nullptr;
  }
  // To each group neighbours, if all are as long; else the longest first, some neighbours to the one that has least.
  void deal() {
    group.resize(groups);
    std::vector<i64> lengths(B, offsets ? 0 : steps);
    for (i64 t = 0; offsets && t < steps; ++t)
      for (i64 b = size(t); b-- > size(t + 1);) lengths[b] = t + 1;
    const i64 some = std::max<i64>(1, B / (8 * groups));
    auto less = [](const Group& a, const Group& b) { return a.rows < b.rows; };
    for (i64 b = 0, to = 0; b < B; group[to].add(b, lengths[b]), ++b) {
      if (!offsets) to = b * groups / B;
      else if (b % some == 0) to = std::min_element(group.begin(), group.end(), less) - group.begin();
    }
  }
  float* copy(i64 thread) const { return copies + thread * (OUTER_COPY + APART); }
  i64 sum_size() const { return GATES * H * (I + H + 2); }  // of the gradients of W_ih, W_hh and both biases
  // Rows of x that are as wide as a panel are a panel as they are, if one group has all.
  bool as_it_is() const { return I == PADDING && groups == 1; }
  i64 row(i64 t) const { return offsets ? t < steps ? offsets[t] : R : t * B; }
  i64 size(i64 t) const { return t < 0 || t >= steps ? 0 : row(t + 1) - row(t); }
  bool cut(i64 t, i64 b) const { return resets && resets[t * B + b]; }
  bool reverse(i64 n) const { return reverses >> n & 1; }
  i64 begin(i64 g, i64 j) const { return group[g].begin(j, windows); }
  // Rows of window j of the groups from g on, before `end`.
  i64 rows(i64 g, i64 end, i64 j) const {
    i64 sum = 0;
    for (; g < end; ++g) sum += group[g].rows_before(begin(g, j + 1)) - group[g].rows_before(begin(g, j));
    return sum;
  }
  // Of recurrence n the window w, in the order of the recurrence or of its adjoint, is this one in memory.
  i64 place(i64 n, i64 w, bool adjoint) const { return reverse(n) != adjoint ? windows - 1 - w : w; }
  // The most steps that a group has in window w, or in the one that is as far from the other end.
  i64 longest(i64 w) const {
    i64 found = 0;
    for (i64 g = 0; g < groups; ++g)
      for (const i64 j : {w, windows - 1 - w}) found = std::max(found, begin(g, j + 1) - begin(g, j));
    return found;
  }
};

// What a thread has: of recurrence n the sequences of a group, of their units begin to end, a share of the rows to
// multiply with W_ih; and where they are in a window.
struct Part {
  i64 n, group, share, begin, end, state_size;
  bool reverse;
  const std::vector<i64>& sequences;
  const float* panel;
  float* buffer;  // [turns, S, sequences, buffer_width] the states between two steps, by turns
  i64 from, to;   // steps of the window
  // Of memory it has `rows` from `area` on, with other groups if these are not apart. Its own begin with `at` of them,
  // those of each step with one of `slots`; and of the caller's rows they are these.
  i64 area, at, rows;
  std::vector<i64> slots, index;

  Part(const Call& c, i64 item)
      : n(item / c.shares / c.groups), group(item / c.shares % c.groups), share(item % c.shares), reverse(c.reverse(n)),
        sequences(c.group[group].sequences) {
    const i64 tiles = (c.H + c.tile - 1) / c.tile;
    begin = share * tiles / c.shares * c.tile, end = std::min(c.H, (share + 1) * tiles / c.shares * c.tile);
    panel = c.panels + n * GATES * c.H * c.padded, index.reserve(c.most);
    state_size = sequences.size() * c.buffer_width;
    i64 before = n * c.B;
    for (i64 g = 0; g < group; ++g) before += c.group[g].size();
    buffer = c.buffer + c.turns * before * STATES * c.buffer_width + item / c.shares * APART;
  }
  void move(const Call& c, i64 w, bool adjoint) {
    const i64 j = c.place(n, w, adjoint);
    from = c.begin(group, j), to = c.begin(group, j + 1);
    area = (n * c.groups + (c.apart ? group : 0)) * c.most, at = c.apart ? 0 : c.rows(0, group, j);
    rows = c.apart ? c.rows(group, group + 1, j) : c.rows(0, c.groups, j);
    slots.clear(), index.clear();
    for (i64 t = from; t < to; ++t) {
      const i64 size = c.size(t), row = c.row(t);
      slots.push_back(at + index.size());
      for (const i64 b : sequences) {
        if (b >= size) break;
        index.push_back(row + b);
      }
    }
    slots.push_back(at + index.size());
  }
  i64 before(i64 t) const { return reverse ? t + 1 : t - 1; }
  // Whether the states that came into step t of sequence b were reset.
  bool cut(const Call& c, i64 t, i64 b) const { return (!reverse || b < c.size(t + 1)) && c.cut(t + reverse, b); }
  i64 slot(i64 t) const { return slots[t - from]; }
  i64 count(i64 t) const { return slots[t - from + 1] - slots[t - from]; }
  // The numbers of a step's rows, in memory.
  const i64* rows_of(i64 t) const { return index.data() + slot(t) - at; }
  // Of a state [N, B, H] that of sequence b, and where the states of its i-th are between two steps.
  i64 state(const Call& c, i64 b) const { return (n * c.B + b) * c.H; }
  float* near(const Call& c, i64 k, i64 i, i64 turn = 0) const {
    return buffer + (turn * STATES + k) * state_size + i * c.buffer_width;
  }
  // Calls body with each state and sequence, where it is among all, where between two steps, and its bytes.
  template <typename Body> void each(const Call& c, Body&& body) const {
    for (i64 k = 0; k < STATES; ++k)
      for (i64 i = 0; i < static_cast<i64>(sequences.size()); ++i)
        body(k, sequences[i], state(c, sequences[i]) + begin, near(c, k, i) + begin, 4 * (end - begin));
  }
  // Of its share of the window's rows those whose numbers are in a range: the first one, and the one past the last.
  std::pair<i64, i64> mine(const Call& c, i64 low, i64 high) const {
    auto place = [&](i64 row) { return std::lower_bound(index.begin(), index.end(), row) - index.begin(); };
    const i64 first = place(low), count = place(high) - first;
    return {first + count * share / c.shares, first + count * (share + 1) / c.shares};
  }
  // Rows of x, and where their products go: copied side by side if they are not; but with one gate neighbours in a tile
  // are enough, as there is too little to do for a row.
  std::vector<Rows> input_rows(const Call& c) const {
    const auto [first, last] = mine(c, 0, c.R);
    const i64 width = c.gates_width;
    std::vector<Rows> found;
    for (i64 i = first, next; i < last; i = next) {
      for (next = i + 1; next < last && index[next] - index[i] == next - i;) ++next;
      float* const out = Call::IN_PLACE ? c.y + (index[i] * c.N + n) * c.H : c.gates + (area + i) * width;
      found.push_back({out, width, nullptr, c.x + index[i] * c.I, next - i});
    }
    if (const i64 runs = found.size(); runs > 1 && (!Call::IN_PLACE || last - first < 4 * runs)) {
      float* const copy = c.x_rows + (area + first) * c.I;
      for (i64 i = first; i < last; ++i) std::memcpy(copy + (i - first) * c.I, c.x + index[i] * c.I, 4 * c.I);
      found = {Call::IN_PLACE ? Rows{c.y + n * c.H, width, &index[first], copy, last - first}
                              : Rows{c.gates + (area + first) * width, width, nullptr, copy, last - first}};
    }
    return found;
  }
  // Rows of the gradient of x, in that range, and what is to be multiplied for them.
  std::vector<Rows> input_gradients(const Call& c, i64 low, i64 high) const {
    const auto [first, last] = mine(c, low, high);
    return {{c.x_grad, c.I, index.data() + first, c.dx + (area + at + first) * c.gates_width, last - first}};
  }
  // Rows of x into panels.
  void pack_input(const Call& c) const {
    const auto [first, last] = mine(c, 0, c.R);
    for (i64 i = first; i < last; ++i)
      for (i64 u = 0; u < c.inputs; u += LANES)
        store(c.x_rows + area * c.inputs + u / PADDING * PADDING * rows + (at + i) * PADDING + u % PADDING,
              load(c.x + index[i] * c.I + u, static_cast<int>(c.I - u)), LANES);
  }
};
