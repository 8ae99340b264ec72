// One step of a stack of layers in one direction, and its adjoint: all layers in one call. Each W
// is used once, so it is read in place if few rows are multiplied with it. If not, it is packed a
// tile at a time, just before the tile is used.
#include "recurrence.cpp"
#include "single_step_backward.h"

// Numbers of memory that are on the stack.
constexpr i64 STACK_NUMBERS = 4096;

// Tensors are as rnn/single_step.py has them: states and their gradients [L, B, H], saved
// [L, SAVED_ALL, B, H]. `memory` has `size` numbers, none in the first call. After the struct Step
// come pointers, `parameters` of each layer: w_ih, w_hh, and with biases b_ih, b_hh. After the
// struct StepAdjoint come w_ih and w_hh of all layers, then the gradients of the parameters of all.
// What is not wanted is null. If all of dy are the same number, dy_alike has it.

static inline i64 thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Returns 0; or, having done nothing, how many numbers of memory it needs if it has fewer.
extern "C" i64 step(const Step& call) {
  const bool in_place = !call.order && call.B < MIN_PACKED_FORWARD;
  const i64 tile = in_place ? LANES : FORWARD_VECTORS * LANES;
  const i64 tiles = (call.H + tile - 1) / tile;
  const i64 width = GATES * tile;
  const i64 panel = in_place ? 0 : padded_to((std::max(call.I, call.H) + call.H) * width, 16);
  if (panel * call.threads > call.size) return panel * call.threads;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  for (i64 l = 0; l < call.layers; ++l) {
    const StepLayer layer(call, l);
    Number* const own_panel = call.memory + panel * thread_number();
#pragma omp for nowait
    for (i64 i = 0; i < tiles; ++i)
      if (in_place) layer.in_place(i * tile);
      else layer.packed(i * tile, own_panel);
    if (l + 1 == call.layers) continue;
#pragma omp barrier
  }
  return 0;
}

// As `step`.
extern "C" i64 step_backward(const StepAdjoint& call) {
  const StepMemory at(call);
  alignas(64) Number stack[STACK_NUMBERS];
  if (at.used > std::max(STACK_NUMBERS, call.size)) return at.used;
  Number* const memory = at.used <= STACK_NUMBERS ? stack : call.memory;
  const bool unpacked = call.B <= MAX_UNPACKED_GRADIENT;
  const i64 tiles = (call.H + LANES - 1) / LANES;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  for (i64 l = call.layers - 1; l >= 0; --l) {
    const StepLayerAdjoint layer(call, at, memory, l);
    const i64 input_tiles = (layer.I + LANES - 1) / LANES;
    Number* const own_panel = memory + at.panels + at.panel * thread_number();
#pragma omp for nowait
    for (i64 i = 0; i < call.B * tiles; ++i) layer.gates(i / tiles, i % tiles * LANES);
    if (!unpacked && layer.grads[0]) {
#pragma omp for nowait
      for (i64 i = 0; i < input_tiles; ++i)
        layer.pack(memory + at.x_panels, layer.x, layer.I, i);
    }
    if (!unpacked && layer.grads[1]) {
#pragma omp for nowait
      for (i64 i = 0; i < tiles; ++i) layer.pack(memory + at.h_panels, layer.h, call.H, i);
    }
#pragma omp barrier
#pragma omp for
    for (i64 i = 0; i < call.threads; ++i) layer.products(i, call.threads, own_panel);
  }
  return 0;
}
