// What native.py defines for the RNN with tanh, so that an editor understands recurrence.cpp. No build reads this.
#pragma once
#define GATES 1
#define STATES 1
#define SAVED 0
#define SPLIT 0
#define FORWARD const auto t0 = x[0] + r[0]; const auto t1 = tanh(t0); n[0] = t1;
#define BACKWARD \
  const auto t0 = n[0] * n[0]; const auto t1 = number(1.0f) - t0; const auto t2 = d[0] * t1; \
  x[0] = t2; r[0] = t2; p[0] = number(0.0f);
