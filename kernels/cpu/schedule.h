// Which thread does what, and where in memory, for a cell of GATES, STATES,
// SEPARATE_RECURRENT_GRAD and WHOLE_ROWS.
#pragma once
#include "gemm.h"

// What stays in a core's cache, whatever else it reads.
constexpr int CACHE_BYTES = 1 << 19;
// Padding against false sharing by the prefetcher, in numbers.
constexpr i64 SHARING_PAD = 1 << 10;
// Vectors of hidden units of a tile of the recurrent product, of each gate, going forward.
constexpr int FORWARD_VECTORS = GATES == 1 ? 2 : 1;
// Vectors of a tile of the product with x, whose columns are the units of all gates.
constexpr int INPUT_VECTORS = GATES % 4 ? 2 : 4;
constexpr int INPUT_TILE = INPUT_VECTORS * LANES;

static inline i64 padded_to(i64 n, i64 tile) { return (n + tile - 1) / tile * tile; }

// The width of long rows is no power of 2, or all rows would have the same place in the caches.
static inline i64 odd_width(i64 n) { return n < 256 ? n : n + LANES; }

// How many groups B sequences are divided into, for so many threads of a recurrence.
static inline i64 group_count(i64 threads, i64 B, i64 H) {
  const bool large = GATES * H * H * NUMBER_BYTES > CACHE_BYTES;
  const i64 min_rows = large ? ACCUMULATORS : 4;
  return std::max<i64>(1, std::min(threads, (B + min_rows - 1) / min_rows));
}

// Which of the groups sequence b is in, if all are as long; and the first sequence of a group.
static inline i64 group_of(i64 b, i64 groups, i64 B) { return b * groups / B; }
static inline i64 first_of_group(i64 g, i64 groups, i64 B) { return (g * B + groups - 1) / groups; }

// Sequences that are taken through time together, the longest first, and how many steps each has.
struct SequenceGroup {
  std::vector<i64> sequences;
  std::vector<i64> lengths;
  // Of all steps.
  i64 rows = 0;

  void add(i64 b, i64 length) {
    sequences.push_back(b);
    lengths.push_back(length);
    rows += length;
  }
  i64 size() const { return sequences.size(); }
  i64 rows_before(i64 t) const {
    if (lengths.empty() || t <= lengths.back()) return t * size();
    i64 sum = 0;
    for (const i64 length : lengths) sum += std::min(t, length);
    return sum;
  }
  // The step with which window j of so many begins, in memory. All have about as many rows.
  i64 window_begin(i64 j, i64 windows) const {
    i64 low = 0;
    i64 high = lengths.empty() ? 0 : lengths[0];
    while (low < high) {
      const i64 t = (low + high) / 2;
      if (rows_before(t) * windows < rows * j) low = t + 1;
      else high = t;
    }
    return low;
  }
};

// Of the struct Arguments, which native.py defines: s0, dlast, last and s0_grad are [N, B, H] each;
// y [R, N, H], states [S-1, R, N, H] and saved [R, N, A, H] are written going forward, where they
// are wanted, and read in the adjoint.
//
// Each of `groups` takes its own sequences through time, in `windows` of its own: a thread works in
// memory of its own and waits for no other. If there are too few sequences for all threads, the
// hidden units of a group are divided into `shares`, but for a cell of WHOLE_ROWS. Windows are in
// gates, dx, dr and x_rows [N, groups, max_rows, ...].
struct Schedule : Arguments {
  // Pre-activations of a single gate are computed where y goes.
  static constexpr bool GATES_IN_Y = GATES == 1 && !SEPARATE_RECURRENT_GRAD;
  // Numbers of memory that are taken.
  i64 used = 0;
  i64 max_rows = 0;
  i64 windows = 1;
  i64 tile;
  i64 groups;
  i64 shares;
  // Buffers of the states between two steps, by the step's parity: one in the adjoint.
  i64 parities;
  i64 padded_hidden;
  i64 padded_inputs;
  i64 gates_width;
  i64 state_width;
  // With one window the panels of W_ih and of W_hh have the same memory, one after the other.
  bool shared_panel;
  // Each group sums up its own gradients of W, if these are small. If not, all threads do it
  // together, over windows whose x_rows and h_rows have the rows of all groups.
  bool private_weight_grads;
  Number* gates;
  Number* dx;
  Number* dr;
  Number* input_panels;
  Number* hidden_panels;
  Number* buffer;
  Number* x_rows;
  Number* h_rows;
  Number* weight_grads;
  Number* copies;
  Number* rows;
  std::vector<SequenceGroup> group;

  // `memory` has as many numbers as `needed` says; or it is null, to find that out.
  Schedule(const Arguments& arguments, bool adjoint, Number* memory) : Arguments(arguments) {
    // No product with x, no panels for one: x are pre-activations [R, N, G, H].
    if (WHOLE_ROWS) I = 0;
    divide_work(adjoint);
    choose_windows(adjoint);
    take_memory(adjoint, memory);
  }
  void divide_work(bool adjoint) {
    tile = adjoint ? PANEL_WIDTH : FORWARD_VECTORS * LANES;
    groups = group_count((threads + N - 1) / N, B, H);
    shares = std::max<i64>(1, std::min(threads / (N * groups), (H + tile - 1) / tile));
    if (WHOLE_ROWS) shares = 1;
    assign_sequences();
  }
  void choose_windows(bool adjoint) {
    const i64 wanted = std::max<i64>(1, window[adjoint] * B / groups);
    for (const SequenceGroup& g : group)
      windows = std::max(windows, (g.rows + wanted - 1) / wanted);
    for (const SequenceGroup& g : group)
      max_rows = std::max(max_rows, std::min(g.rows, g.rows / windows + g.size()));
    const i64 weight_bytes = GATES * H * (I + H) * NUMBER_BYTES;
    private_weight_grads = !adjoint || (groups > 1 && weight_bytes <= CACHE_BYTES);
    shared_panel = windows == 1;
  }
  void take_memory(bool adjoint, Number* memory) {
    auto take = [&](i64 size) {
      const i64 at = used;
      used += padded_to(size, 16);
      return memory ? memory + at : nullptr;
    };
    const bool in_y = GATES_IN_Y && !adjoint;
    const i64 gate_rows = GATES * H;
    padded_hidden = padded_to(H, PANEL_WIDTH);
    padded_inputs = adjoint ? padded_to(I, PANEL_WIDTH) : padded_to(gate_rows, INPUT_TILE);
    gates_width = in_y ? N * H : odd_width(padded_to(gate_rows, LANES));
    state_width = odd_width(padded_hidden);
    const i64 input_panel = N * padded_inputs * (adjoint ? gate_rows : I);
    const i64 hidden_panel = N * padded_hidden * gate_rows;
    const i64 slots = N * groups * max_rows;
    // What forward and backward have in common comes first: then it is in the same caches in both.
    Number* const gates_or_dr = take(in_y ? 0 : slots * gates_width);
    hidden_panels = take(shared_panel ? std::max(hidden_panel, input_panel) : hidden_panel);
    input_panels = shared_panel ? hidden_panels : take(input_panel);
    parities = 2 - adjoint;
    rows = take(N * groups * row_values_size());
    buffer = take(parities * N * STATES * B * state_width + N * groups * SHARING_PAD);
    if (adjoint) {
      dr = gates_or_dr;
      dx = SEPARATE_RECURRENT_GRAD ? take(slots * gates_width) : dr;
      h_rows = take(slots * padded_hidden);
      const i64 private_size = N * (groups - 1) * weight_grads_size();
      weight_grads = take(private_weight_grads && !continues && !continued ? private_size : 0);
      if (group_grads) weight_grads = group_grads;
      x_rows = input_is_packed() ? nullptr : take(slots * padded_inputs);
      copies = take(threads * (OUTER_COPY + SHARING_PAD));
    } else {
      gates = GATES_IN_Y ? y : gates_or_dr;
      x_rows = groups > 1 ? take(slots * I) : nullptr;
    }
  }
  // To each group a range of sequences if all are as long. If not, the longest come first, some at
  // a time, to the group that has the fewest rows.
  void assign_sequences() {
    group.resize(groups);
    std::vector<i64> lengths(B, offsets ? 0 : steps);
    for (i64 t = 0; offsets && t < steps; ++t)
      for (i64 b = batch_size(t); b-- > batch_size(t + 1);) lengths[b] = t + 1;
    const i64 at_a_time = std::max<i64>(1, B / (8 * groups));
    auto less = [](const SequenceGroup& a, const SequenceGroup& b) { return a.rows < b.rows; };
    i64 to = 0;
    for (i64 b = 0; b < B; ++b) {
      if (!offsets) to = group_of(b, groups, B);
      else if (b % at_a_time == 0)
        to = std::min_element(group.begin(), group.end(), less) - group.begin();
      group[to].add(b, lengths[b]);
    }
  }
  // What a Row needs, of recurrence n and a group.
  i64 row_values_size() const { return WHOLE_ROWS ? KEPT * H + SHARING_PAD : 0; }
  Number* row_values(i64 n, i64 g) const { return rows + (n * groups + g) * row_values_size(); }
  Number* copy(i64 thread) const { return copies + thread * (OUTER_COPY + SHARING_PAD); }
  // Of the gradients of W_ih, W_hh and both biases.
  i64 weight_grads_size() const { return GATES * H * (I + H + 2); }
  // Whether x is a panel as it lies: its rows are as wide as one, and one group has them all.
  bool input_is_packed() const { return I == PANEL_WIDTH && groups == 1; }
  // In the tensors of the caller.
  i64 first_row(i64 t) const {
    if (!offsets) return t * B;
    return t < steps ? offsets[t] : R;
  }
  i64 batch_size(i64 t) const {
    return t < 0 || t >= steps ? 0 : first_row(t + 1) - first_row(t);
  }
  bool is_reset(i64 t, i64 b) const { return resets && resets[t * B + b]; }
  bool is_reverse(i64 n) const { return reverses >> n & 1; }
  // The segment whose first step is t, going forward or backward, or -1.
  i64 segment_entered(bool reverse, i64 t) const {
    const i64* const first = kept_steps + reverse * segments;
    const i64* const found = std::lower_bound(first, first + segments, t);
    if (found == first + segments || *found != t) return -1;
    const i64 place = found - first;
    return reverse ? place : segments - 1 - place;
  }
  i64 window_begin(i64 g, i64 j) const { return group[g].window_begin(j, windows); }
  // Rows of window j of the groups from g on, before `end`.
  i64 window_rows(i64 g, i64 end, i64 j) const {
    i64 sum = 0;
    for (; g < end; ++g) {
      sum += group[g].rows_before(window_begin(g, j + 1));
      sum -= group[g].rows_before(window_begin(g, j));
    }
    return sum;
  }
  // The index in memory of the window that is number w for recurrence n or its adjoint.
  i64 window_in_memory(i64 n, i64 w, bool adjoint) const {
    return is_reverse(n) != adjoint ? windows - 1 - w : w;
  }
  // The most steps that a group has in window w, or in the one that is as far from the other end.
  i64 longest_window(i64 w) const {
    i64 longest = 0;
    for (i64 g = 0; g < groups; ++g)
      for (const i64 j : {w, windows - 1 - w})
        longest = std::max(longest, window_begin(g, j + 1) - window_begin(g, j));
    return longest;
  }
};

// What one thread does: units `begin` to `end` of the sequences of a group of recurrence n, and a
// share of the rows that are multiplied with W_ih; and where these are in a window.
struct WorkItem {
  i64 n;
  i64 group;
  i64 share;
  i64 begin;
  i64 end;
  i64 state_size;
  bool reverse;
  const std::vector<i64>& sequences;
  const Number* panel;
  // The states between two steps, [parities, S, sequences, state_width].
  Number* buffer;
  // Steps of the window.
  i64 first_step;
  i64 end_step;
  // Its part of the Schedule's memory is `rows` from `base` on, with those of other groups if
  // weight gradients are not private. Its own are those from `offset` on.
  i64 base;
  i64 offset;
  i64 rows;
  // Of each step the first row, from `base` on; and for each of its own rows the caller's.
  std::vector<i64> slots;
  std::vector<i64> index;

  WorkItem(const Schedule& schedule, i64 number)
      : n(number / schedule.shares / schedule.groups),
        group(number / schedule.shares % schedule.groups),
        share(number % schedule.shares),
        reverse(schedule.is_reverse(n)),
        sequences(schedule.group[group].sequences) {
    const i64 H = schedule.H;
    const i64 tiles = (H + schedule.tile - 1) / schedule.tile;
    begin = share * tiles / schedule.shares * schedule.tile;
    end = std::min(H, (share + 1) * tiles / schedule.shares * schedule.tile);
    panel = schedule.hidden_panels + n * GATES * H * schedule.padded_hidden;
    index.reserve(schedule.max_rows);
    state_size = sequences.size() * schedule.state_width;
    i64 before = n * schedule.B;
    for (i64 g = 0; g < group; ++g) before += schedule.group[g].size();
    buffer = schedule.buffer + schedule.parities * before * STATES * schedule.state_width +
             number / schedule.shares * SHARING_PAD;
  }
  void enter_window(const Schedule& schedule, i64 w, bool adjoint) {
    const i64 j = schedule.window_in_memory(n, w, adjoint);
    first_step = schedule.window_begin(group, j);
    end_step = schedule.window_begin(group, j + 1);
    if (schedule.private_weight_grads) {
      base = (n * schedule.groups + group) * schedule.max_rows;
      offset = 0;
      rows = schedule.window_rows(group, group + 1, j);
    } else {
      base = n * schedule.groups * schedule.max_rows;
      offset = schedule.window_rows(0, group, j);
      rows = schedule.window_rows(0, schedule.groups, j);
    }
    slots.clear();
    index.clear();
    for (i64 t = first_step; t < end_step; ++t) {
      const i64 size = schedule.batch_size(t);
      const i64 row = schedule.first_row(t);
      slots.push_back(offset + index.size());
      for (const i64 b : sequences) {
        if (b >= size) break;
        index.push_back(row + b);
      }
    }
    slots.push_back(offset + index.size());
  }
  i64 step_before(i64 t) const { return reverse ? t + 1 : t - 1; }
  // Whether the states were reset before step t of sequence b.
  bool is_reset(const Schedule& schedule, i64 t, i64 b) const {
    return (!reverse || b < schedule.batch_size(t + 1)) && schedule.is_reset(t + reverse, b);
  }
  i64 slot(i64 t) const { return slots[t - first_step]; }
  i64 count(i64 t) const { return slots[t - first_step + 1] - slots[t - first_step]; }
  // Indices of the caller's rows of step t.
  const i64* rows_of(i64 t) const { return index.data() + slot(t) - offset; }
  // Where sequence b is in a state [N, B, H].
  i64 state_offset(const Schedule& schedule, i64 b) const {
    return (n * schedule.B + b) * schedule.H;
  }
  // Where state k of its sequence i is between two steps.
  Number* state_row(const Schedule& schedule, i64 k, i64 i, i64 parity = 0) const {
    return buffer + (parity * STATES + k) * state_size + i * schedule.state_width;
  }
  // Calls body(k, b, at, row, bytes) for each state and sequence: `at` is where it is in a state
  // [N, B, H], `row` where it is between two steps.
  template <typename Body> void for_each_state(const Schedule& schedule, Body&& body) const {
    for (i64 k = 0; k < STATES; ++k)
      for (i64 i = 0; i < static_cast<i64>(sequences.size()); ++i) {
        const i64 at = state_offset(schedule, sequences[i]) + begin;
        body(k, sequences[i], at, state_row(schedule, k, i) + begin, NUMBER_BYTES * (end - begin));
      }
  }
  // The first and last + 1 of its share of the window's rows, of those whose index is in a range.
  std::pair<i64, i64> my_rows(const Schedule& schedule, i64 low, i64 high) const {
    auto position = [&](i64 row) {
      return std::lower_bound(index.begin(), index.end(), row) - index.begin();
    };
    const i64 first = position(low);
    const i64 count = position(high) - first;
    return {first + count * share / schedule.shares, first + count * (share + 1) / schedule.shares};
  }
  // Rows of x, and where their products go. Rows that are apart are copied, so that tiles are full;
  // but not with one gate and runs of some length, where there is too little arithmetic for a copy.
  std::vector<RowBlock> input_rows(const Schedule& schedule) const {
    const auto [first, last] = my_rows(schedule, 0, schedule.R);
    const i64 H = schedule.H;
    const i64 I = schedule.I;
    const i64 width = schedule.gates_width;
    constexpr bool in_y = Schedule::GATES_IN_Y;
    Number* const gates = in_y ? nullptr : schedule.gates + base * width;
    std::vector<RowBlock> blocks;
    for (i64 i = first, next; i < last; i = next) {
      for (next = i + 1; next < last && index[next] - index[i] == next - i;) ++next;
      Number* const out = in_y ? schedule.y + (index[i] * schedule.N + n) * H : gates + i * width;
      blocks.push_back({out, width, nullptr, schedule.x + index[i] * I, next - i});
    }
    const i64 runs = blocks.size();
    if (runs > 1 && (!in_y || last - first < 4 * runs)) {
      Number* const copy = schedule.x_rows + (base + first) * I;
      for (i64 i = first; i < last; ++i)
        std::memcpy(copy + (i - first) * I, schedule.x + index[i] * I, NUMBER_BYTES * I);
      Number* const out = in_y ? schedule.y + n * H : gates + first * width;
      blocks = {{out, width, in_y ? &index[first] : nullptr, copy, last - first}};
    }
    return blocks;
  }
  // Rows of the gradient of x in that range, and of dx, whose products they are.
  std::vector<RowBlock> input_grad_rows(const Schedule& schedule, i64 low, i64 high) const {
    const auto [first, last] = my_rows(schedule, low, high);
    const Number* const dx = schedule.dx + (base + offset + first) * schedule.gates_width;
    return {{schedule.x_grad, schedule.I, index.data() + first, dx, last - first}};
  }
  // Rows of x into panels.
  void pack_input(const Schedule& schedule) const {
    const auto [first, last] = my_rows(schedule, 0, schedule.R);
    const i64 I = schedule.I;
    Number* const panels = schedule.x_rows + base * schedule.padded_inputs;
    for (i64 i = first; i < last; ++i)
      for (i64 u = 0; u < schedule.padded_inputs; u += LANES) {
        Number* const to = panels + panel_offset(u, rows);
        const Number* const from = schedule.x + index[i] * I + u;
        store(to + (offset + i) * PANEL_WIDTH, load(from, static_cast<int>(I - u)), LANES);
      }
  }
};
