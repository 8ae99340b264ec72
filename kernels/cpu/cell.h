// The cell on vectors of hidden units: the statements FORWARD and BACKWARD, which native.py defines.
#pragma once
#include "simd.h"

// A row of hidden units on its way through the stages of a cell that takes means over it (if
// WHOLE_ROWS): their sums, and the values of each unit that go from one stage to a later one.
struct Row {
  Number* values;
  i64 width;
  i64 unit = 0;
  int lanes = 0;
  Vector sums[MEANS + 1] = {};
  Vector means[MEANS + 1] = {};

  Row(Number* memory, i64 H) : values(memory), width(H) {}
  // To the vector of units from u on.
  void enter(i64 u, int valid_lanes) {
    unit = u;
    lanes = valid_lanes;
  }
  void keep(int k, Vector v) { store(values + k * width + unit, v, lanes); }
  Vector kept(int k) const { return load(values + k * width + unit, lanes); }
  void add(int k, Vector v) {
    sums[k] += lanes < LANES ? load(reinterpret_cast<const Number*>(&v), lanes) : v;
  }
  Vector mean(int k) const { return means[k]; }
  // After all units, and before the next stage.
  void end_stage() {
    UNROLLED(k, MEANS) {
      Number sum = 0;
      UNROLLED(lane, LANES) sum += sums[k][lane];
      means[k] = number(sum / width);
    }
  }
};

// Calls body(stage) for each of so many stages, `stage` being an integral constant.
template <int STAGES, int STAGE = 0, typename Body>
static inline void for_each_stage(Body&& body) {
  body(std::integral_constant<int, STAGE>());
  if constexpr (STAGE + 1 < STAGES) for_each_stage<STAGES, STAGE + 1>(body);
}

// From the products with x and h (one for both, r, unless SEPARATE_RECURRENT_GRAD) and the states
// s: the new states and the activations.
template <int STAGE = 0>
static inline void cell_forward(const Vector* x, const Vector* r, const Vector* s, Vector* n,
                                Vector* a, Row* row = nullptr) {
  FORWARD
}

// From the activations, the states before and after and the gradients d of the latter: gradients of
// the products, and of the states before but for what flows through W_hh.
template <int STAGE = 0>
static inline void cell_backward(const Vector* a, const Vector* s, const Vector* n, const Vector* d,
                                 Vector* x, Vector* r, Vector* p, Row* row = nullptr) {
  BACKWARD
}
