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
#define RED_UNROLL4

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
float* remote(float* shared, int rank);
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

using emulated::cluster_barrier;
using emulated::cluster_rank;
using emulated::commit_copies;
using emulated::copy_async;
using emulated::shared_memory;
template <int K>
void wait_copies() {
  emulated::wait_copies(K);
}
inline void block_barrier() { emulated::barrier(0, static_cast<int>(blockDim.x * blockDim.y)); }
inline void named_barrier(int number, int threads) { emulated::barrier(number, threads); }
inline void store_remote(float* shared, int rank, float v) { *emulated::remote(shared, rank) = v; }

template <int K>
void warp_sum(float (&v)[K]) {
  const auto values = emulated::exchange(v, K);
  for (int k = 0; k < K; ++k) {  // the tree of a GPU's shuffles, which is the same in every lane
    float lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = values[i][k];
    for (int offset = 16; offset > 0; offset /= 2)
      for (int i = 0; i < offset; ++i) lanes[i] = lanes[i] + lanes[i + offset];
    v[k] = lanes[0];
  }
}

}  // namespace cuda
}  // namespace red
