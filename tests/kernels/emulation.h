// Runs CUDA kernels on a CPU, for tests: every thread of a block is a fiber with a stack of its own; blocks run one
// after another. A fiber runs until it meets a barrier or a shuffle, and goes on when all who must come have come.
//
// It aborts, with a line that says why, where a GPU would hang or read nonsense: threads of a block that wait for
// different things, a shuffle from a lane that does not take part. A missing __syncthreads shows in one of the two
// orders of fibers (emulation_reverse), a wild access under AddressSanitizer. It knows nothing of real races, memory
// order or speed. Needs CUDA's headers, no GPU and no nvcc.
#pragma once
#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <cuda_runtime.h>

namespace emulation {

enum class Waits { kNot, kForWarp, kForBlock, kDone };
constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;

struct Thread {
  ucontext_t context;
  dim3 index;
  unsigned number;
  Waits waits;
  unsigned mask;   // of lanes that it waits for
  uint64_t value;  // what it shows to the others of its warp
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Gpu {
  ucontext_t scheduler;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  dim3 grid, block, block_index;
  std::function<void()> kernel;
  bool reverse = false;
};

inline Gpu& gpu() {
  static Gpu only;
  return only;
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

inline void wait(Waits what) {
  Gpu& g = gpu();
  g.running->waits = what;
  swapcontext(&g.running->context, &g.scheduler);
}

inline void thread_main() {
  gpu().kernel();
  wait(Waits::kDone);
}

inline void resume(Thread& t) {
  Gpu& g = gpu();
  g.running = &t;
  swapcontext(&g.scheduler, &t.context);
}

// Lets the lanes of a warp go on that all wait for each other. Returns whether there were any.
inline bool release_warp(std::vector<Thread>& threads, size_t first) {
  bool released = false;
  for (size_t i = first; i < threads.size() && i < first + kWarp; ++i) {
    if (threads[i].waits != Waits::kForWarp) continue;
    const unsigned mask = threads[i].mask;
    bool all = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const size_t j = first + lane;
      all = all && j < threads.size() && threads[j].waits == Waits::kForWarp && threads[j].mask == mask;
    }
    if (!all) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) threads[first + lane].waits = Waits::kNot;
    released = true;
  }
  return released;
}

inline bool release_block(std::vector<Thread>& threads) {
  for (const Thread& t : threads)
    if (t.waits != Waits::kForBlock && t.waits != Waits::kDone) return false;
  bool released = false;
  for (Thread& t : threads)
    if (t.waits == Waits::kForBlock) t.waits = Waits::kNot, released = true;
  return released;
}

// A warp runs as far ahead of the others as barriers let it: that is how they get in each other's way, if they can.
inline void run_warp(std::vector<Thread>& threads, size_t first) {
  const size_t count = std::min<size_t>(kWarp, threads.size() - first);
  do {
    for (size_t i = 0; i < count; ++i) {
      Thread& t = threads[first + (gpu().reverse ? count - 1 - i : i)];
      if (t.waits == Waits::kNot) resume(t);
    }
  } while (release_warp(threads, first));
}

inline void run_block() {
  std::vector<Thread>& threads = gpu().threads;
  const size_t warps = (threads.size() + kWarp - 1) / kWarp;
  do {
    for (size_t w = 0; w < warps; ++w) run_warp(threads, kWarp * (gpu().reverse ? warps - 1 - w : w));
  } while (release_block(threads));
  for (const Thread& t : threads)
    if (t.waits != Waits::kDone) fail("threads wait for what will never come: a divergent barrier or shuffle");
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
  Gpu& g = gpu();
  g.grid = grid, g.block = block, g.kernel = std::move(kernel);
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads");
  if (g.threads.size() != count) g.threads = std::vector<Thread>(count);
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    g.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = g.threads[i];
      t.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      t.number = i, t.waits = Waits::kNot;
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStack;
      makecontext(&t.context, thread_main, 0);
    }
    run_block();
  }
}

// Every lane of `mask` shows a value and reads that of lane `from`.
template <class T>
T exchange(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  Thread& me = *gpu().running;
  if (!(mask >> me.number % kWarp & 1)) fail("a lane that is not in its own mask");
  if (!(mask >> from & 1)) fail("a shuffle from a lane that does not take part");
  std::memcpy(&me.value, &value, sizeof value);
  me.mask = mask;
  wait(Waits::kForWarp);
  T result;
  std::memcpy(&result, &gpu().threads[me.number / kWarp * kWarp + from].value, sizeof result);
  wait(Waits::kForWarp);  // so that nobody shows the next value before all have read this one
  return result;
}

}  // namespace emulation

// Runs the threads of a block in reverse order from now on, or in order.
extern "C" __attribute__((used, visibility("default"))) inline void emulation_reverse(int on) {
  emulation::gpu().reverse = on != 0;
}

#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // there is one block at a time
#define threadIdx (emulation::gpu().running->index)
#define blockIdx (emulation::gpu().block_index)
#define blockDim (emulation::gpu().block)
#define gridDim (emulation::gpu().grid)
#define cudaGetLastError() cudaSuccess
#define MEGALITE_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); }))

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::exchange(mask, value, emulation::gpu().running->number % emulation::kWarp ^ distance);
}
inline void __syncthreads() { emulation::wait(emulation::Waits::kForBlock); }
