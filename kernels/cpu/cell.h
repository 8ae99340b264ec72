// The cell on vectors of hidden units: the statements FORWARD and BACKWARD, which native.py defines.
#pragma once
#include "simd.h"

// From the products with x and h (one for both, r, unless SEPARATE_RECURRENT_GRAD) and the states
// s: the new states and the activations.
static inline void cell_forward(const Vector* x, const Vector* r, const Vector* s, Vector* n,
                                Vector* a) {
  FORWARD
}

// From the activations, the states before and after and the gradients d of the latter: gradients of
// the products, and of the states before but for what flows through W_hh.
static inline void cell_backward(const Vector* a, const Vector* s, const Vector* n, const Vector* d,
                                 Vector* x, Vector* r, Vector* p) {
  BACKWARD
}
