// The threads that share a row, and sums over them.
#pragma once

#include "device.h"
#include "rules.h"

namespace red {
namespace cuda {

// blockDim is (threads of a group, groups). With a cluster each block has one group, and its blocks share a row. GROUPS is how
// many groups of several warps a block has at most: barriers that are counted when a kernel is compiled, as a
// multiprocessor has only so many, and a kernel that might use any takes 16.
template <int GROUPS>
struct Group {
  RED_DEVICE Group(int cluster, float* sums)
      : thread(threadIdx.x), threads(blockDim.x), index(threadIdx.y), warps(blockDim.x / kWarp), cluster(cluster),
        rank(cluster > 1 ? cluster_rank() : 0), sums_(sums) {
    if (cluster == 1) return;
    if (thread == 0) {
      init_arrivals(arrivals(0));
      init_arrivals(arrivals(1));
    }
    cluster_barrier();  // no block may write to another before that one runs, and can count what arrives
  }

  static constexpr int kSums = 2 * 2 * kGroupParts;  // two turns of two sums; behind them what counts those that arrive
  static_assert(kGroupFloats == kSums + 2 * sizeof(Arrivals) / sizeof(float));

  // The sums of K values over the group and its cluster, in all threads, always in the same order. Two buffers in turn:
  // who writes to one has got the sum after it was last read, for which all that read it had to send their parts.
  template <int K>
  RED_DEVICE void sum(float (&v)[K]) {
    warp_sum(v);
    const int parts = warps * cluster;
    if (parts == 1) return;
    float* sums = sums_ + turn_ * (kSums / 2);
    const int lane = thread % kWarp, part = rank * warps + thread / kWarp;
    if (cluster > 1) {
      // A cluster's barrier would wait for all that was stored before, and forget what the cache holds.
      Arrivals* arriving = arrivals(turn_);
      if (thread == 0) expect_arrivals(arriving, parts * K * static_cast<int>(sizeof(float)));
      if (lane < cluster)
        RED_UNROLL for (int k = 0; k < K; ++k) send(sums + k * kGroupParts + part, arriving, lane, v[k]);
      await_arrivals(arriving, phases_ >> turn_ & 1);
      phases_ ^= 1 << turn_;
    } else {
      sums += index * warps;
      if (lane == 0)
        RED_UNROLL for (int k = 0; k < K; ++k) sums[k * kGroupParts + part] = v[k];
      group_barrier<GROUPS>(index, threads);
    }
    turn_ ^= 1;
    RED_UNROLL for (int k = 0; k < K; ++k) {
      v[k] = 0.0f;
      for (int i = lane; i < parts; i += kWarp) v[k] += sums[k * kGroupParts + i];
    }
    warp_sum(v);
  }

  // Whether the thread is the first of its row, which has the first columns.
  RED_DEVICE bool first() const { return thread == 0 && rank == 0; }

  int thread, threads, index, warps, cluster, rank;

 private:
  RED_DEVICE Arrivals* arrivals(int turn) const { return reinterpret_cast<Arrivals*>(sums_ + kSums) + turn; }

  float* sums_;
  int turn_ = 0, phases_ = 0;
};

// The vectors of a row that a thread has: the k-th begins at column(k).
template <class T>
struct Columns {
  template <int GROUPS>
  RED_DEVICE Columns(const Group<GROUPS>& group, int n)
      : first((group.rank * n * group.threads + group.thread) * kVector<T>), step(group.threads * kVector<T>) {}
  RED_DEVICE int operator()(int k) const { return first + k * step; }
  RED_DEVICE bool has(int k, int d) const { return (*this)(k) < d; }

  int first, step;
};

}  // namespace cuda
}  // namespace red
