// What native.py defines for the RNN with tanh, so that an editor understands recurrence.cpp. No
// build reads this.
#pragma once
#define GATES 1
#define STATES 1
#define SAVED 0
#define SEPARATE_RECURRENT_GRAD 0
#define FORWARD const auto t0 = (x[0]+r[0]); const auto t1 = tanh(t0); n[0] = t1;
#define BACKWARD const auto t0 = (n[0]*n[0]); const auto t1 = (number(1.0f)-t0); const auto t2 = (d[0]*t1); x[0] = t2; r[0] = t2; p[0] = number(0.0f);
#include <cstdint>
struct Arguments {
  const float* x;
  const float* w_ih;
  const float* w_hh;
  const float* b_ih;
  const float* b_hh;
  const float* dy;
  const float* dstates;
  float* y;
  float* states;
  float* saved;
  float* x_grad;
  float* w_ih_grad;
  float* w_hh_grad;
  float* b_ih_grad;
  float* b_hh_grad;
  const int64_t* offsets;
  const bool* resets;
  const float* s0[STATES];
  const float* dlast[STATES];
  float* last[STATES];
  int64_t steps;
  int64_t B;
  int64_t R;
  int64_t I;
  int64_t H;
  int64_t N;
  int64_t reverses;
  int64_t threads;
  int64_t window[2];
};
struct Step {
  const float* x;
  const float* s[STATES];
  float* y;
  float* n[STATES];
  float* saved;
  float* memory;
  int64_t size;
  int64_t B;
  int64_t I;
  int64_t H;
  int64_t layers;
  int64_t parameters;
  int64_t threads;
};
struct StepAdjoint {
  const float* x;
  const float* s[STATES];
  const float* saved;
  const float* dy;
  const float* dy_alike;
  const float* dn[STATES];
  float* dx;
  float* ds[STATES];
  float* memory;
  int64_t size;
  int64_t B;
  int64_t I;
  int64_t H;
  int64_t layers;
  int64_t parameters;
  int64_t threads;
};
