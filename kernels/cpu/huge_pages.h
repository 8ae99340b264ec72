// The first touch of fresh memory by small pages takes up to a third of a call that trains.
#pragma once
#include "simd.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

// Pieces of memory from this size on are asked of the system anew by each call.
constexpr i64 LARGE_BYTES = 1 << 22;
constexpr i64 HUGE_PAGE_BYTES = 1 << 21;

// A hint, for an array of `count` numbers that is written next; where the system refuses it, the
// array is as good.
static inline void prefer_huge_pages(Number* array, i64 count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const i64 first = reinterpret_cast<i64>(array);
  const i64 end = first + count * i64(sizeof(Number));
  if (!array || end - first < LARGE_BYTES) return;
  const i64 start = (first + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
  const i64 bytes = end / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES - start;
  madvise(reinterpret_cast<void*>(start), bytes, MADV_HUGEPAGE);
#endif
}
