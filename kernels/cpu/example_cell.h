// What native.py defines for the RNN with tanh, so that an editor understands recurrence.cpp. No
// build reads this.
#pragma once
#define NUMBER float
#define FIXED_ORDER 0
#define GATES 1
#define STATES 1
#define CARRIED 1
#define SAVED 0
#define SEPARATE_RECURRENT_GRAD 0
#define WHOLE_ROWS 0
#define FORWARD_STAGES 1
#define BACKWARD_STAGES 1
#define KEPT 0
#define MEANS 0
#define FORWARD const auto t0 = (x[0]+r[0]); const auto t1 = tanh(t0); n[0] = t1;
#define BACKWARD const auto t0 = (n[0]*n[0]); const auto t1 = (number(1.0)-t0); const auto t2 = (d[0]*t1); x[0] = t2; r[0] = t2; p[0] = number(0.0);
#include <cstdint>
struct Arguments {
  const NUMBER* x;
  const NUMBER* w_ih;
  const NUMBER* w_hh;
  const NUMBER* b_ih;
  const NUMBER* b_hh;
  const NUMBER* dy;
  const NUMBER* dstates;
  NUMBER* y;
  NUMBER* states;
  NUMBER* saved;
  NUMBER* x_grad;
  NUMBER* w_ih_grad;
  NUMBER* w_hh_grad;
  NUMBER* b_ih_grad;
  NUMBER* b_hh_grad;
  NUMBER* group_grads;
  NUMBER* kept;
  const int64_t* offsets;
  const int64_t* kept_steps;
  const bool* resets;
  const NUMBER* s0[STATES];
  const NUMBER* dlast[STATES];
  NUMBER* last[STATES];
  NUMBER* s0_grad[STATES];
  int64_t steps;
  int64_t B;
  int64_t R;
  int64_t I;
  int64_t H;
  int64_t N;
  int64_t reverses;
  int64_t threads;
  int64_t parts;
  int64_t continues;
  int64_t continued;
  int64_t segments;
  int64_t window[2];
};
struct Step {
  const NUMBER* x;
  const NUMBER* s[STATES];
  NUMBER* y;
  NUMBER* n[STATES];
  NUMBER* saved;
  NUMBER* memory;
  int64_t size;
  int64_t B;
  int64_t I;
  int64_t H;
  int64_t layers;
  int64_t parameters;
  int64_t threads;
  int64_t order;
};
struct StepAdjoint {
  const NUMBER* x;
  const NUMBER* s[STATES];
  const NUMBER* saved;
  const NUMBER* dy;
  const NUMBER* dy_alike;
  const NUMBER* dn[STATES];
  NUMBER* dx;
  NUMBER* ds[STATES];
  NUMBER* memory;
  int64_t size;
  int64_t B;
  int64_t I;
  int64_t H;
  int64_t layers;
  int64_t parameters;
  int64_t threads;
  int64_t order;
};
