#if defined(RED_EMULATED)
#undef _FORTIFY_SOURCE  // it would take the switches between stacks for errors
#include "emulated.h"

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

#include "kernels.h"

namespace red {
namespace cuda {
namespace emulated {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kBarriers = 16;

struct Barrier {
  int arrived = 0;
  long passed = 0;
};

struct Warp {
  Barrier barrier;
  float values[2][32][4];
};

struct Block {
  Index index;
  int rank = 0;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  Barrier barriers[kBarriers];
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  const void* from;
};

}  // namespace

struct Thread {
  Index index;
  int linear = 0, exchanges = 0;
  Block* block = nullptr;
  bool begun = false, done = true;
  std::vector<Copy> copies;      // not landed yet, and where each of their groups ends
  std::vector<size_t> groups;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  jmp_buf state;
};

namespace {

std::mutex mutex;
// As for the pool of csrc/cpu/memory.cpp: a child must not begin with what another thread had locked.
[[maybe_unused]] const int at_fork = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
Thread* self = nullptr;
jmp_buf scheduler;
void (*kernel)(const void*) = nullptr;
const void* kernel_arguments = nullptr;
Barrier cluster;
int cluster_threads = 0;
long progress = 0;
const char* failure = nullptr;
std::vector<std::unique_ptr<Thread>> fibers;  // kept, as is what they have on their stacks
ucontext_t back;

void yield() {
  if (_setjmp(self->state) == 0) _longjmp(scheduler, 1);
}

void wait(Barrier& barrier, int threads) {
  const long mine = barrier.passed;
  ++progress;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == mine) yield();
  ++progress;
}

// What a fiber does for ever: one kernel's thread after the other.
void enter() {
  for (;;) {
    try {
      kernel(kernel_arguments);
    } catch (const char* message) {
      failure = message;
    }
    self->done = true;
    ++progress;
    yield();
  }
}

void resume(Thread& thread) {
  self = &thread;
  thread_index = thread.index;
  block_index = thread.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.state, 1);
  thread.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = &back;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Runs the blocks of a cluster to their end.
void run_cluster(std::vector<Block>& blocks, int threads) {
  const size_t all = blocks.size() * threads;
  cluster = {};
  cluster_threads = static_cast<int>(all);
  while (fibers.size() < all) fibers.push_back(std::make_unique<Thread>());
  for (size_t i = 0; i < all; ++i) {
    Thread& t = *fibers[i];
    t.linear = static_cast<int>(i) % threads;
    t.index = {t.linear % block_size.x, t.linear / block_size.x, 0};
    t.block = &blocks[i / threads];
    t.exchanges = 0;
    t.done = false;
    t.copies.clear();
    t.groups.clear();
  }
  for (size_t left = all; left > 0;) {
    const long before = progress;
    left = 0;
    for (size_t i = 0; i < all; ++i) {
      if (fibers[i]->done) continue;
      resume(*fibers[i]);
      left += !fibers[i]->done;
      if (failure != nullptr) break;
    }
    if (failure != nullptr) {
      fibers.clear();  // some stopped half-way
      return;
    }
    if (left > 0 && progress == before) {
      failure = "its threads wait for each other for ever";
      fibers.clear();
      return;
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return self->block->shared; }

void barrier(int number, int threads) {
  if (number >= kBarriers) throw "a barrier's number is above 15";
  wait(self->block->barriers[number], threads);
}
void cluster_barrier() { wait(cluster, cluster_threads); }
int cluster_rank() { return self->block->rank; }

unsigned char* remote(void* shared, int rank) {
  const ptrdiff_t offset = static_cast<unsigned char*>(shared) - self->block->shared;
  return self->block[rank - self->block->rank].shared + offset;
}

void pause(bool moved) {
  progress += moved;
  yield();
}

const float (*exchange(const float* v, int k))[4] {
  Warp& warp = self->block->warps[self->linear / 32];
  auto& values = warp.values[self->exchanges++ % 2];
  for (int i = 0; i < k; ++i) values[self->linear % 32][i] = v[i];
  wait(warp.barrier, 32);
  return values;
}

void copy_async(void* shared, const void* global) { self->copies.push_back({shared, global}); }
void commit_copies() { self->groups.push_back(self->copies.size()); }
void wait_copies(int but) {
  const int land = static_cast<int>(self->groups.size()) - but;
  if (land <= 0) return;
  auto& copies = self->copies;
  const size_t end = self->groups[land - 1];
  for (size_t i = 0; i < end; ++i) store16(copies[i].to, load16(copies[i].from));
  copies.erase(copies.begin(), copies.begin() + end);
  self->groups.erase(self->groups.begin(), self->groups.begin() + land);
  for (size_t& group : self->groups) group -= end;
}

namespace {

Device device{0, 90, 132, 227 << 10, true};
bool skipping = false;
std::string launched;  // the names of the kernels since it was last asked

}  // namespace
}  // namespace emulated

const Device& device_of(int) { return emulated::device; }

void emulate(const Launch& l, void (*run)(const void*), const void* arguments) {
  using namespace emulated;
  if (skipping) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const int threads = l.threads_x * l.threads_y;
  launched = (launched.size() < 4096 ? launched : "") + l.name + "\n";
  kernel = run;
  kernel_arguments = arguments;
  failure = nullptr;
  block_size = {static_cast<unsigned>(l.threads_x), static_cast<unsigned>(l.threads_y), 1};
  grid_size = {static_cast<unsigned>(l.grid.x), static_cast<unsigned>(l.grid.y), static_cast<unsigned>(l.grid.z)};
  if (l.shared > device.shared || threads > 1024 || threads % 32 || l.grid.x % l.cluster ||
      (l.cluster > 1 && !device.clusters))
    throw std::runtime_error(described(l, "the device cannot run it"));
  std::vector<int64_t> order(l.grid.x / l.cluster * l.grid.y * l.grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(0));
  std::vector<Block> blocks(l.cluster);
  for (const int64_t place : order) {
    for (int rank = 0; rank < l.cluster; ++rank) {
      Block& block = blocks[rank];
      const int64_t across = l.grid.x / l.cluster;
      block.rank = rank;
      block.index = {static_cast<unsigned>(place % across * l.cluster + rank),
                     static_cast<unsigned>(place / across % l.grid.y), static_cast<unsigned>(place / across / l.grid.y)};
      block.memory.assign(l.shared + 16, 0xff);  // NaN
      block.shared = block.memory.data() + (16 - reinterpret_cast<uintptr_t>(block.memory.data()) % 16) % 16;
      block.warps.assign(threads / 32, {});
      for (Barrier& b : block.barriers) b = {};
    }
    run_cluster(blocks, threads);
    if (failure != nullptr) throw std::runtime_error(described(l, failure));
  }
}

}  // namespace cuda
}  // namespace red

#define RED_EXPORT extern "C" __attribute__((visibility("default")))

// With 1 nothing is run, so that the way to a launch can be timed.
RED_EXPORT void red_kernels_cuda_skip_launches(int on) { red::cuda::emulated::skipping = on != 0; }

// The names of the kernels that were launched since this was last called, a line for each; the last ones, where there are many.
RED_EXPORT void red_kernels_cuda_launched(char* to, size_t size) {
  const std::lock_guard<std::mutex> lock(red::cuda::emulated::mutex);
  std::snprintf(to, size, "%s", red::cuda::emulated::launched.c_str());
  red::cuda::emulated::launched.clear();
}

// The device that is emulated: 10 * major + minor of its compute capability, its multiprocessors, and the bytes of shared
// memory that a block may have.
RED_EXPORT void red_kernels_cuda_emulate(int capability, int multiprocessors, int shared) {
  red::cuda::emulated::device = {0, capability, multiprocessors, shared, capability >= 90};
}
#endif
