// The recurrence on the CPU, all steps in one call, compiled for a machine, a cell and a type of
// number. native.py defines these (NUMBER; GATES, STATES, SAVED, SEPARATE_RECURRENT_GRAD, and the
// statements FORWARD and BACKWARD on vectors of hidden units) and the structs of the calls. Shapes
// are as in forward.cu.
#include "huge_pages.h"
#include "panels.h"
#include "recurrence_step.h"
#include "weight_gradients.h"

static inline void copy_or_zero(Number* to, const Number* from, i64 at, i64 bytes) {
  if (from) std::memcpy(to, from + at, bytes);
  else std::memset(to, 0, bytes);
}

// The first states, to where they are between two steps; and to the last ones, where they stay if a
// sequence has no step.
static void load_first_states(const Schedule& schedule, const WorkItem& item) {
  item.for_each_state(schedule, [&](i64 k, i64 b, i64 at, Number* row, i64 bytes) {
    copy_or_zero(schedule.last[k] + at, schedule.s0[k], at, bytes);
    const bool reset = !item.reverse && schedule.is_reset(0, b);
    for (i64 parity = 0; parity < schedule.parities; ++parity) {
      copy_or_zero(row, reset ? nullptr : schedule.s0[k], at, bytes);
      row += STATES * item.state_size;
    }
  });
}

// W_ih x + b of an item's window. With a gradient of its own for h, b_hh is added to W_hh h.
static void input_product(const Schedule& schedule, const WorkItem& item) {
  const i64 I = schedule.I;
  const i64 K = GATES * schedule.H;
  const i64 n = item.n;
  const Number* const b_ih = schedule.b_ih ? schedule.b_ih + n * K : nullptr;
  const Number* const b_hh = b_ih && !SEPARATE_RECURRENT_GRAD ? schedule.b_hh + n * K : nullptr;
  const Number* const panels = schedule.input_panels + n * schedule.padded_inputs * I;
  product<INPUT_VECTORS>(item.input_rows(schedule), I, panels, I, K, b_ih, b_hh, false);
}

// The gradients of x in a window. In each round every recurrence has rows of x of its own.
static void input_gradients(const Schedule& schedule, const ThreadWork& work, bool shared_rows) {
  const i64 I = schedule.I;
  const i64 K = GATES * schedule.H;
  const i64 N = schedule.N;
  const i64 R = schedule.R;
  for (i64 round = 0; round < N; ++round) {
    for (const WorkItem& item : work.items) {
      const i64 area = (item.n + round) % N;
      if (schedule.x_grad) {
        const auto rows = item.input_grad_rows(schedule, R * area / N, R * (area + 1) / N);
        const Number* const panels = schedule.input_panels + item.n * K * schedule.padded_inputs;
        product<VECTORS_PER_TILE>(rows, schedule.gates_width, panels, K, I, nullptr, nullptr,
                                  N > 1);
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

// How many numbers of memory a call needs. Both directions get the same, so that they share it:
// what is never touched takes no memory.
extern "C" i64 needed(const Arguments& arguments) {
  const i64 forward = Schedule(arguments, false, nullptr).used;
  const i64 backward = Schedule(arguments, true, nullptr).used;
  return std::max(forward, backward);
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
      auto nothing = [](const Schedule&, const WorkItem&, i64) {};
      work.for_each_step(schedule, w, false, forward_step, nothing);
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
      input_gradients(schedule, work, shared_rows);
      window_weight_gradients(schedule, work, w);
    }
    for (const WorkItem& item : work.items)
      item.for_each_state(schedule, [&](i64 k, i64, i64 at, Number* row, i64 bytes) {
        if (schedule.last[k]) std::memcpy(schedule.last[k] + at, row, bytes);
      });
    if (schedule.private_weight_grads) {
      barrier_if(true);
      add_private_gradients(schedule, work);
    }
  }
}
