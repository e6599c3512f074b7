// The threads that share a row, and sums over them.
#pragma once

#include "device.h"

namespace red {
namespace cuda {

// blockDim is (threads of a group, groups). With a cluster each block has one group, and its blocks share a row.
struct Group {
  RED_DEVICE Group(int cluster, float* sums)
      : thread(threadIdx.x), threads(blockDim.x), index(threadIdx.y), warps(blockDim.x / kWarp), cluster(cluster),
        rank(cluster > 1 ? cluster_rank() : 0), sums_(sums) {
    // No block may write to another before that one runs.
    if (cluster > 1) cluster_barrier();
  }

  static constexpr int kParts = 128;  // warps of a cluster at most
  // Floats of shared memory for the sums of a block.
  static constexpr int kFloats = 2 * 2 * kParts;

  // The sums of K values over the group and its cluster, in all threads, always in the same order. Two buffers in turn:
  // who writes to one has passed a barrier since it was last read.
  template <int K>
  RED_DEVICE void sum(float (&v)[K]) {
    warp_sum(v);
    const int parts = warps * cluster;
    if (parts == 1) return;
    float* sums = sums_ + turn_ * (kFloats / 2);
    turn_ ^= 1;
    const int lane = thread % kWarp, part = rank * warps + thread / kWarp;
    if (cluster > 1) {
      if (lane < cluster)
        RED_UNROLL for (int k = 0; k < K; ++k) store_remote(sums + k * kParts + part, lane, v[k]);
      cluster_barrier();
    } else {
      sums += index * warps;
      if (lane == 0)
        RED_UNROLL for (int k = 0; k < K; ++k) sums[k * kParts + part] = v[k];
      named_barrier(1 + index, threads);
    }
    RED_UNROLL for (int k = 0; k < K; ++k) {
      v[k] = 0.0f;
      for (int i = lane; i < parts; i += kWarp) v[k] += sums[k * kParts + i];
    }
    warp_sum(v);
  }

  int thread, threads, index, warps, cluster, rank;

 private:
  float* sums_;
  int turn_ = 0;
};

// The vectors of a row that a thread has: the k-th begins at column(k).
template <class T>
struct Columns {
  RED_DEVICE Columns(const Group& group, int n)
      : first((group.rank * n * group.threads + group.thread) * kVector<T>), step(group.threads * kVector<T>) {}
  RED_DEVICE int operator()(int k) const { return first + k * step; }

  int first, step;
};

}  // namespace cuda
}  // namespace red
