// The recurrence on the CPU, all steps in one call, compiled for a machine, a cell and a type of
// number. native.py defines these (NUMBER, FIXED_ORDER; GATES, STATES, SAVED,
// SEPARATE_RECURRENT_GRAD, and the statements FORWARD and BACKWARD on vectors of hidden units) and the structs of the calls. Shapes
// are as in forward.cu.
#include "huge_pages.h"
#include "panels.h"
#include "recurrence_step.h"
#include "weight_gradients.h"

static inline void copy_or_zero(Number* to, const Number* from, i64 at, i64 bytes) {
  if (from) std::memcpy(to, from + at, bytes);
  else std::memset(to, 0, bytes);
}

// s0 becomes the state between two steps; and the last states, which it remains for a sequence of
// length 0.
static void load_first_states(const Schedule& schedule, const WorkItem& item) {
  item.for_each_state(schedule, [&](i64 k, i64 b, i64 at, Number* row, i64 bytes) {
    copy_or_zero(schedule.last[k] + at, schedule.s0[k], at, bytes);
    const bool reset = k < CARRIED && !item.reverse && schedule.is_reset(0, b);
    for (i64 parity = 0; parity < schedule.parities; ++parity) {
      copy_or_zero(row, reset ? nullptr : schedule.s0[k], at, bytes);
      row += STATES * item.state_size;
    }
  });
}

// After step t: the states that enter the next one, if a segment begins with it.
static void keep_states(const Schedule& schedule, const WorkItem& item, i64 t) {
  if (!schedule.kept) return;
  const i64 next_t = item.reverse ? t - 1 : t + 1;
  const i64 segment = schedule.segment_entered(item.reverse, next_t);
  if (segment < 0) return;
  const i64 parity = (item.reverse ? schedule.steps - 1 - next_t : next_t) % 2;
  const i64 size = schedule.N * schedule.B * schedule.H;
  item.for_each_state(schedule, [&](i64 k, i64, i64 at, const Number* row, i64 bytes) {
    Number* const to = schedule.kept + (segment * STATES + k) * size + at;
    std::memcpy(to, row + parity * STATES * item.state_size, bytes);
  });
}

// W_ih x + b_ih of an item's window, and + b_hh unless the cell takes W_hh h + b_hh separately. A
// cell of WHOLE_ROWS takes pre-activations as they come.
static void input_product(const Schedule& schedule, const WorkItem& item) {
  if (WHOLE_ROWS) return;
  const i64 I = schedule.I;
  const i64 gate_rows = GATES * schedule.H;
  const i64 n = item.n;
  const Number* const b_ih = schedule.b_ih ? schedule.b_ih + n * gate_rows : nullptr;
  const bool add_b_hh = b_ih && !SEPARATE_RECURRENT_GRAD;
  const Number* const b_hh = add_b_hh ? schedule.b_hh + n * gate_rows : nullptr;
  const Number* const panels = schedule.input_panels + n * schedule.padded_inputs * I;
  product<INPUT_VECTORS>(item.input_rows(schedule), I, panels, I, gate_rows, b_ih, b_hh, false);
}

// The gradients of x in window w. Recurrences that have the same steps there, those of a direction,
// and in the middle window all, add to the same rows of x_grad, each by threads of its own: if two
// added to a row at the same time, they would race. So with M of them the rows are divided into M
// regions, and there are M rounds with a barrier after each: in round k the one of number i adds to
// region (i + k) % M. Other recurrences have other rows.
static void input_gradients(const Schedule& schedule, const ThreadWork& work, i64 w,
                            bool shared_rows) {
  if (WHOLE_ROWS) return;
  const i64 I = schedule.I;
  const i64 gate_rows = GATES * schedule.H;
  const i64 N = schedule.N;
  const i64 panels_size = gate_rows * schedule.padded_inputs;
  const bool middle = 2 * w + 1 == schedule.windows;
  // Of recurrences with the steps of recurrence n, those before `end`.
  auto alike = [&](i64 n, i64 end) {
    i64 sum = 0;
    for (i64 m = 0; m < end; ++m) sum += middle || schedule.is_reverse(m) == schedule.is_reverse(n);
    return sum;
  };
  i64 rounds = 0;
  for (i64 n = 0; n < N; ++n) rounds = std::max(rounds, alike(n, N));
  const bool add = N > 1;
  for (i64 round = 0; round < rounds; ++round) {
    for (const WorkItem& item : work.items) {
      const i64 count = alike(item.n, N);
      if (schedule.x_grad && round < count) {
        const i64 region = (alike(item.n, item.n) + round) % count;
        const i64 first = schedule.first_row(item.first_step);
        const i64 size = schedule.first_row(item.end_step) - first;
        const auto rows = item.input_grad_rows(schedule, first + size * region / count,
                                               first + size * (region + 1) / count);
        const Number* const panels = schedule.input_panels + item.n * panels_size;
        product<VECTORS_PER_TILE>(rows, schedule.gates_width, panels, gate_rows, I, nullptr,
                                  nullptr, add);
      }
      if (round == 0 && schedule.w_ih_grad && !schedule.input_is_packed())
        item.pack_input(schedule);
    }
    barrier_if(N > 1 || shared_rows);
  }
}

// For a check against what Python packs.
extern "C" i64 struct_size(int i) {
  constexpr i64 sizes[] = {sizeof(Arguments), sizeof(Step), sizeof(StepAdjoint)};
  return sizes[i];
}

// How many numbers of memory a call needs. A forward and a backward pass get equally many, so that
// they share it: pages that are never touched take no memory.
extern "C" i64 needed(const Arguments& arguments) {
  const i64 forward = Schedule(arguments, false, nullptr).used;
  return std::max(forward, Schedule(arguments, true, nullptr).used);
}

// The steps with which the windows of a backward pass begin, and how many these are; but for empty
// windows, which there are if each has fewer rows than a step of a group.
extern "C" i64 adjoint_windows(const Arguments& arguments, i64* begins) {
  const Schedule schedule(arguments, true, nullptr);
  i64 count = 0;
  for (i64 j = 0; j < schedule.windows; ++j) {
    const i64 begin = schedule.window_begin(0, j);
    const bool empty = begin == schedule.steps || (count && begin == begins[count - 1]);
    if (!empty) begins[count++] = begin;
  }
  return count;
}

extern "C" void forward(const Arguments& arguments, Number* memory) {
  const Schedule schedule(arguments, false, memory);
  const i64 row_numbers = arguments.R * arguments.N * arguments.H;
  prefer_huge_pages(arguments.y, row_numbers);
  prefer_huge_pages(arguments.states, (STATES - 1) * row_numbers);
  prefer_huge_pages(arguments.saved, SAVED * row_numbers);
#pragma omp parallel num_threads(arguments.threads)
  {
    ThreadWork work(schedule);
    if (!schedule.shared_panel) pack_hidden_forward(schedule, work);
    pack_input_forward(schedule, work);
    for (const WorkItem& item : work.items) load_first_states(schedule, item);
    barrier_if(true);
    for (i64 w = 0; w < schedule.windows; ++w) {
      for (WorkItem& item : work.items) {
        item.enter_window(schedule, w, false);
        input_product(schedule, item);
      }
      barrier_if(schedule.shares > 1 || schedule.shared_panel);
      if (schedule.shared_panel) {
        pack_hidden_forward(schedule, work);
        barrier_if(true);
      }
      work.for_each_step(schedule, w, false, forward_step, keep_states);
    }
  }
}

// With more than one recurrence the gradient of x is added to what is there.
extern "C" void backward(const Arguments& arguments, Number* memory) {
  const Schedule schedule(arguments, true, memory);
  prefer_huge_pages(arguments.x_grad, arguments.R * arguments.I);
#pragma omp parallel num_threads(arguments.threads)
  {
    ThreadWork work(schedule);
    // Whether threads read each other's rows.
    const bool shared_rows = schedule.shares > 1 || !schedule.private_weight_grads;
    pack_hidden_adjoint(schedule, work);
    if (!schedule.shared_panel) pack_input_adjoint(schedule, work);
    for (const WorkItem& item : work.items)
      item.for_each_state(schedule, [&](i64 k, i64, i64 at, Number* row, i64 bytes) {
        copy_or_zero(row, schedule.dlast[k], at, bytes);
      });
    for (i64 w = 0; w < schedule.windows; ++w) {
      barrier_if(w == 0 || shared_rows);
      for (WorkItem& item : work.items) item.enter_window(schedule, w, true);
      work.for_each_step(schedule, w, true, adjoint_step, adjoint_product);
      barrier_if(shared_rows || schedule.shared_panel);
      if (schedule.shared_panel) {
        pack_input_adjoint(schedule, work);
        barrier_if(true);
      }
      input_gradients(schedule, work, w, shared_rows);
      window_weight_gradients(schedule, work, w);
    }
    for (const WorkItem& item : work.items)
      item.for_each_state(schedule, [&](i64 k, i64, i64 at, Number* row, i64 bytes) {
        if (schedule.s0_grad[k]) std::memcpy(schedule.s0_grad[k] + at, row, bytes);
      });
    if (schedule.private_weight_grads && !schedule.continued) {
      barrier_if(true);
      add_private_gradients(schedule, work);
    }
  }
}

// So that a thread of a team can have a team of its own.
static void allow_nested_teams() {
#if defined(_OPENMP) && defined(__clang__)
  omp_set_max_active_levels(2);
#elif defined(_OPENMP)
  // What libgomp before GCC 11 listens to, too
  omp_set_nested(1);
#endif
}

// Several calls, of `forward` or of `backward`, by so many threads at a time, and those that the
// calls are divided among.
extern "C" void together(i64 count, i64 threads, const Arguments* const* calls,
                         Number* const* memory, i64 adjoint) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (i64 i = 0; i < count; ++i) {
    if (threads > 1 && calls[i]->threads > 1) allow_nested_teams();
    (adjoint ? backward : forward)(*calls[i], memory[i]);
  }
}
