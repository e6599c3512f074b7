// What the kernels of mixes share: the threads of a row, which columns they have, and the mix of a vector.
//
// A rotation: z_j = residual_j + drop(first_j x_j + second_j x_{j ^ 32} + bias_j). A thread has both columns of a pair.
// Reflections, in each block of columns: z = residual + drop(x - first (first . x) + second (second . x) + bias). Some
// threads have a block to themselves, and sum over it with shuffles.
#pragma once

#include "group.h"
#include "kernels.h"

namespace red {
namespace cuda {

// blockDim is (threads of a row, rows). `lanes` threads have a block of columns: a power of 2, or whole warps.
template <int GROUPS>
struct MixGroup {
  RED_DEVICE MixGroup(int lanes, float* sums)
      : thread(threadIdx.x), threads(blockDim.x), index(threadIdx.y), warps(blockDim.x / kWarp), lanes(lanes),
        sums_(sums + index * warps) {}
  RED_DEVICE bool first() const { return thread == 0; }

  // Sums over the row, in all threads, always in the same order.
  template <int K>
  RED_DEVICE void sum(float (&v)[K]) {
    warp_sum(v);
    if (warps == 1) return;
    put(v, 0);
    group_barrier<GROUPS>(index, threads);
    get(v, 0, 0, warps);
    turn_ ^= 1;
  }
  // Sums over each block of columns.
  template <int K>
  RED_DEVICE void block_sum(float (&v)[K]) {
    part_sum(v, lanes < kWarp ? lanes : kWarp);
    if (lanes <= kWarp) return;
    put(v, 0);
    group_barrier<GROUPS>(index, threads);
    get(v, 0, thread / lanes * (lanes / kWarp), lanes / kWarp);
    turn_ ^= 1;
  }
  // Both, behind one barrier.
  template <int K, int B>
  RED_DEVICE void sum(float (&row)[K], float (&block)[B]) {
    static_assert(K + B <= kMixSums);
    warp_sum(row);
    part_sum(block, lanes < kWarp ? lanes : kWarp);
    if (warps == 1) return;
    put(row, 0);
    if (lanes > kWarp) put(block, K);
    group_barrier<GROUPS>(index, threads);
    get(row, 0, 0, warps);
    if (lanes > kWarp) get(block, K, thread / lanes * (lanes / kWarp), lanes / kWarp);
    turn_ ^= 1;
  }

  int thread, threads, index, warps, lanes;

 private:
  // Two buffers in turn: who writes to one has passed a barrier since it was last read.
  RED_DEVICE float* at(int k) const { return sums_ + (turn_ * kMixSums + k) * kMixWarps; }
  template <int K>
  RED_DEVICE void put(const float (&v)[K], int from) const {
    if (thread % kWarp == 0)
      RED_UNROLL for (int k = 0; k < K; ++k) at(from + k)[thread / kWarp] = v[k];
  }
  // The sums of what `count` warps from `warp` on have put.
  template <int K>
  RED_DEVICE void get(float (&v)[K], int from, int warp, int count) const {
    const int lane = thread % kMixWarps;
    RED_UNROLL for (int k = 0; k < K; ++k) v[k] = lane < count ? at(from + k)[warp + lane] : 0.0f;
    part_sum(v, kMixWarps);
  }

  float* sums_;
  int turn_ = 0;
};

// The N vectors of a row that a thread has. A rotation: those of a pair one after the other. Reflections: of one block.
// EXACT: it has all or none of them, see mix_exact.
template <class T, int N, bool ROTATION, bool EXACT>
struct MixColumns {
  template <int GROUPS>
  RED_DEVICE MixColumns(const MixGroup<GROUPS>& group, int d, int blocks) {
    constexpr int kSize = kVector<T>;
    if constexpr (ROTATION) {
      constexpr int kThreads = kPair / kSize;  // to one half of a group of pairs
      const int sharing = EXACT ? d / (N * kSize) : group.threads;
      first = group.thread / kThreads * 2 * kPair + group.thread % kThreads * kSize;
      step = sharing * 2 * kSize;
      end = EXACT ? group.thread < sharing : d;
    } else {
      const int width = d / blocks, block = group.thread / group.lanes, lane = group.thread % group.lanes;
      const int sharing = EXACT ? width / (N * kSize) : group.lanes;
      first = block * width + lane * kSize;
      step = sharing * kSize;
      end = block >= blocks ? 0 : EXACT ? lane < sharing : (block + 1) * width;
    }
  }
  RED_DEVICE int operator()(int k) const { return ROTATION ? first + k / 2 * step + k % 2 * kPair : first + k * step; }
  RED_DEVICE bool has(int k, int) const { return EXACT ? end != 0 : (*this)(k) < end; }

  int first, step, end;
};

// Adds to `dots` the parts of a vector in `first . v` and `second . v`.
template <class T>
RED_DEVICE void add_dots(const Vectors& first, const Vectors& second, int64_t at, const float (&v)[kVector<T>],
                         float (&dots)[2]) {
  float u[kVector<T>];
  load_vector<T, kWide>(first, at, kVector<T>, true, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) dots[0] += u[i] * v[i];
  if (second.data == nullptr) return;
  load_vector<T, kWide>(second, at, kVector<T>, true, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) dots[1] += u[i] * v[i];
}

// v - first dots[0] + second dots[1]
template <class T>
RED_DEVICE void reflect(const Vectors& first, const Vectors& second, int64_t at, const float (&dots)[2],
                        float (&v)[kVector<T>]) {
  float u[kVector<T>];
  load_vector<T, kWide>(first, at, kVector<T>, true, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = multiply_add(-u[i], dots[0], v[i]);
  if (second.data == nullptr) return;
  load_vector<T, kWide>(second, at, kVector<T>, true, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = multiply_add(u[i], dots[1], v[i]);
}

// first v + second other; `at_second` is where the second begins.
template <class T>
RED_DEVICE void rotate(const Vectors& first, const Vectors& second, int64_t at, int64_t at_second,
                       const float (&other)[kVector<T>], float (&v)[kVector<T>]) {
  float u[kVector<T>];
  load_vector<T, kWide>(first, at, kVector<T>, true, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = product(v[i], u[i]);
  load_vector<T, kWide>(second, at_second, kVector<T>, true, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = multiply_add(other[i], u[i], v[i]);
}

}  // namespace cuda
}  // namespace red
