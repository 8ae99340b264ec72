// What each thread has to do of a Schedule, and the barriers between threads.
#pragma once
#include "schedule.h"
#ifdef _OPENMP
#include <omp.h>
#endif

// What a thread does. Either it takes the sequences of its items through time alone; or, where
// there are too few sequences, threads have items of the same sequences, with a barrier after each
// step's first part.
struct ThreadWork {
  i64 thread = 0;
  i64 threads = 1;
  std::vector<WorkItem> items;

  explicit ThreadWork(const Schedule& schedule) {
#ifdef _OPENMP
    thread = omp_get_thread_num();
    threads = omp_get_num_threads();
#endif
    const i64 count = schedule.N * schedule.groups * schedule.shares;
    for (i64 i = thread; i < count; i += threads) items.emplace_back(schedule, i);
  }
  // Its share of 0 ... count - 1.
  template <typename Body> void for_each(i64 count, Body&& body) const {
    for (i64 i = thread; i < count; i += threads) body(i);
  }
  // All steps of window w, each in two parts, between which threads that share a group meet.
  template <typename Before, typename After>
  void for_each_step(const Schedule& schedule, i64 w, bool adjoint, Before&& before_barrier,
                     After&& after_barrier) const {
    auto step = [&](const WorkItem& item, i64 i) {
      return item.reverse != adjoint ? item.end_step - 1 - i : item.first_step + i;
    };
    if (schedule.shares == 1) {
      for (const WorkItem& item : items)
        for (i64 i = 0; i < item.end_step - item.first_step; ++i) {
          before_barrier(schedule, item, step(item, i));
          after_barrier(schedule, item, step(item, i));
        }
      return;
    }
    auto each_item = [&](i64 i, auto&& body) {
      for (const WorkItem& item : items)
        if (i < item.end_step - item.first_step) body(schedule, item, step(item, i));
    };
    // Every thread has to meet the barrier equally often. So it goes by longest_window(w), which is
    // the same for all of them, and not by the steps of its own items, of which it may have none.
    const i64 count = schedule.longest_window(w);
    for (i64 i = 0; i < count; ++i) {
      each_item(i, before_barrier);
#pragma omp barrier
      each_item(i, after_barrier);
    }
  }
};

static inline void barrier_if(bool condition) {
  if (condition) {
#pragma omp barrier
  }
}
