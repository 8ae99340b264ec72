// A GPU's threads as fibers on the CPU: every CUDA thread is one, instructions of a warp wait for its lanes, stores to
// other blocks arrive late and in any order, a deadlock is found.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>
typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64; typedef long long i64;

namespace emulate {
struct Fiber { ucontext_t context; std::unique_ptr<char[]> stack; u32 thread, rank; bool unacquired = false; };
inline std::vector<Fiber*> ready;
inline std::vector<std::function<void()>> in_flight;  // stores that have not arrived
inline ucontext_t scheduler;
inline Fiber* self;
inline std::mt19937 random{7};
inline u64 progress;
inline u32 tile, direction, tiles, directions;
inline void pause() { swapcontext(&self->context, &scheduler); }
inline void look_again() { ready.push_back(self); pause(); }

struct Barrier {
  u32 threads = 0;
  std::vector<Fiber*> waiting;
  void wait() {
    waiting.push_back(self);
    if (waiting.size() == threads) { ready.insert(ready.end(), waiting.begin(), waiting.end()); waiting.clear(); ++progress; }
    pause();
  }
};
struct Arrivals {  // an mbarrier with one arrival to a phase
  int pending = 1; long bytes = 0; u32 phase = 0;
  void settle() { if (!pending && !bytes) { ++phase; pending = 1; ++progress; } }
};
struct Warp { Barrier barrier; const char* rows[32]; u32 a[32][4], b[32][2]; };
struct Block { std::vector<u64> memory; Barrier all, groups[16]; std::map<u32, Arrivals> arrivals; std::vector<Warp> warps; };
inline std::vector<Block> blocks;
inline Barrier cluster;
inline Block& block() { return blocks[self->rank]; }
inline Warp& warp() { return block().warps[self->thread / 32]; }
inline char* memory(u32 address) { return (char*)blocks[address >> 24].memory.data() + (address & 0xFFFFFF); }
inline Arrivals& arrivals(u32 address) { return blocks[address >> 24].arrivals[address & 0xFFFFFF]; }
inline void deliver() {
  std::swap(in_flight[random() % in_flight.size()], in_flight.back());
  auto arrive = std::move(in_flight.back());
  in_flight.pop_back();
  arrive();
  ++progress;
}

// Whether `size` blocks that may wait for each other came to an end.
inline bool run(int size, int threads, size_t bytes, void (*body)()) {
  static void (*entry)();
  entry = body;
  blocks.assign(size, Block());
  cluster = Barrier{(u32)(size * threads), {}};
  std::vector<std::unique_ptr<Fiber>> fibers;
  ready.clear();
  for (int rank = 0; rank < size; ++rank) {
    blocks[rank].memory.assign((bytes + 7) / 8, ~0ull);
    blocks[rank].all.threads = threads;
    blocks[rank].warps.resize(threads / 32);
    for (auto& warp : blocks[rank].warps) warp.barrier.threads = 32;
    for (int thread = 0; thread < threads; ++thread) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber* f = fibers.back().get();
      f->thread = thread, f->rank = rank, f->stack.reset(new char[128 << 10]);
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.get(), f->context.uc_stack.ss_size = 128 << 10, f->context.uc_link = &scheduler;
      makecontext(&f->context, [] { entry(); ++progress; }, 0);
      ready.push_back(f);
    }
  }
  for (u64 looked = 0, before = progress; !ready.empty() || !in_flight.empty(); ++looked) {
    if (progress != before) looked = 0, before = progress;
    if (!in_flight.empty() && (ready.empty() || random() % 16 == 0 || looked > 2 * ready.size())) deliver();
    else if (looked > 100 * fibers.size()) return false;
    else {
      std::swap(ready[random() % ready.size()], ready.back());
      self = ready.back();
      ready.pop_back();
      swapcontext(&scheduler, &self->context);
    }
  }
  for (auto& b : blocks) {
    for (auto& w : b.warps) if (!w.barrier.waiting.empty()) return false;
    for (auto& g : b.groups) if (!g.waiting.empty()) return false;
    if (!b.all.waiting.empty()) return false;
  }
  return cluster.waiting.empty();
}
template <u32 (*get)()> struct Index { operator u32() const { return get(); } };
}  // namespace emulate
