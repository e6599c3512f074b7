// A GPU's blocks, warps, barriers, clusters and copies, on a CPU: for tests without a GPU. Every thread of a cluster is a
// fiber; they take turns at barriers. Shared memory begins as NaN, copies land only when they are waited for, and blocks run
// in no order, so that what a kernel may not rely on is not there. Slow, and for one kernel at a time.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "arithmetic.h"

#define RED_DEVICE inline
#define RED_KERNEL(threads, blocks) inline void
#define RED_ARGUMENT const
#define RED_UNROLL

namespace red {
namespace cuda {

namespace emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Thread;
extern Index thread_index, block_index, block_size, grid_size;  // of the thread that runs

unsigned char* shared_memory();
void barrier(int number, int threads);
void cluster_barrier();
int cluster_rank();
// The place in another block's shared memory.
unsigned char* remote(void* shared, int rank);
// Lets the other threads of the cluster run; `moved` says that this one has got on.
void pause(bool moved);
// All threads of a warp leave K values, and get those of all: values[lane][k].
const float (*exchange(const float* v, int k))[4];
void copy_async(void* shared, const void* global);
void commit_copies();
void wait_copies(int but);

}  // namespace emulated

#define threadIdx ::red::cuda::emulated::thread_index
#define blockIdx ::red::cuda::emulated::block_index
#define blockDim ::red::cuda::emulated::block_size
#define gridDim ::red::cuda::emulated::grid_size

inline float from_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

inline float widen(float v) { return v; }
inline float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
inline float widen(Float16 v) {
  _Float16 half;
  std::memcpy(&half, &v.bits, 2);
  return static_cast<float>(half);
}
inline uint16_t narrow(float v, BFloat16) {
  const uint32_t bits = bits_of(v);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
inline uint16_t narrow(float v, Float16) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <class T>
uint32_t narrow_two(float low, float high, T type) {
  return narrow(low, type) | static_cast<uint32_t>(narrow(high, type)) << 16;
}

inline Raw load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw "misaligned load of 16 bytes";
  Raw v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store16(void* p, const Raw& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw "misaligned store of 16 bytes";
  std::memcpy(p, &v, 16);
}
template <class T>
T* as_base(T* p) {
  return p;
}
inline void put16(void* p, const Raw& v) { store16(p, v); }

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* shared) { return static_cast<unsigned char*>(shared); }

using emulated::cluster_barrier;
using emulated::cluster_rank;
using emulated::commit_copies;
using emulated::copy_async;
using emulated::shared_memory;
template <int K>
void wait_copies() {
  emulated::wait_copies(K);
}
inline void let_next_start() {}
inline void wait_for_previous() {}
inline void block_barrier() { emulated::barrier(0, static_cast<int>(blockDim.x * blockDim.y)); }
template <int GROUPS>
void group_barrier(int group, int threads) {
  if (group >= GROUPS) throw "a block has more groups than its barriers are for";
  emulated::barrier(1 + group, threads);
}

struct Arrivals {
  int32_t bytes = 0;  // still to come; less than 0 where they came before they were expected
  int16_t left = 0, phase = 0;
};
inline void complete(Arrivals* a) {
  if (a->left != 0 || a->bytes != 0) return;
  a->left = 1;
  ++a->phase;
}
inline void init_arrivals(Arrivals* a) {
  *a = {0, 1, 0};
  emulated::pause(true);
}
inline void expect_arrivals(Arrivals* a, int bytes) {
  emulated::pause(true);
  a->bytes += bytes;
  --a->left;
  complete(a);
}
inline void send(float* shared, Arrivals* arrivals, int rank, float v) {
  std::memcpy(emulated::remote(shared, rank), &v, sizeof v);
  Arrivals* there = reinterpret_cast<Arrivals*>(emulated::remote(arrivals, rank));
  there->bytes -= sizeof v;
  complete(there);
}
inline void await_arrivals(const Arrivals* a, int parity) {
  while ((a->phase & 1) == parity) emulated::pause(false);
  emulated::pause(true);
}

// The tree of a GPU's shuffles, which is the same in every lane.
template <int K>
void part_sum(float (&v)[K], int lanes) {
  const auto values = emulated::exchange(v, K);
  const int first = static_cast<int>(threadIdx.x) % 32 / lanes * lanes;
  for (int k = 0; k < K; ++k) {
    float parts[32];
    for (int i = 0; i < lanes; ++i) parts[i] = values[first + i][k];
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      for (int i = 0; i < offset; ++i) parts[i] = parts[i] + parts[i + offset];
    v[k] = parts[0];
  }
}
template <int K>
void warp_sum(float (&v)[K]) {
  part_sum(v, 32);
}

}  // namespace cuda
}  // namespace red
