// The threads that share a row, and sums over them.
#pragma once

#include "device.h"
#include "rules.h"

namespace red {
namespace cuda {

// blockDim is (threads of a group, groups). With a cluster each block has one group, and its blocks share a row. GROUPS is how
// many groups of several warps a block has at most: barriers that are counted when a kernel is compiled, as a
// multiprocessor has only so many, and a kernel that might use any takes 16. Without CLUSTER there is none, whatever is said.
template <int GROUPS, bool CLUSTER = true>
struct Group {
  RED_DEVICE Group(int blocks, float* sums)
      : thread(threadIdx.x), threads(blockDim.x), index(threadIdx.y), warps(blockDim.x / kWarp), cluster(CLUSTER ? blocks : 1),
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
      if constexpr (CLUSTER) {
        for (int i = lane; i < parts; i += kWarp) v[k] += sums[k * kGroupParts + i];
      } else {
        if (lane < parts) v[k] += sums[k * kGroupParts + lane];  // a block has no more than 32 warps
      }
    }
    warp_sum(v);
  }

  // Both sums over the row divided by its width; without CENTERED the second is 0.
  template <bool CENTERED>
  RED_DEVICE void averages(float (&c)[2], float width) {
    if constexpr (CENTERED) {
      sum(c);
      c[1] /= width;
    } else {
      float only[1] = {c[0]};
      sum(only);
      c[0] = only[0];
      c[1] = 0.0f;
    }
    c[0] /= width;
  }

  // Whether the thread is the first of its row, which has the first columns.
  RED_DEVICE bool first() const { return thread == 0 && rank == 0; }

  int thread, threads, index, warps, cluster, rank;

 private:
  RED_DEVICE Arrivals* arrivals(int turn) const { return reinterpret_cast<Arrivals*>(sums_ + kSums) + turn; }

  float* sums_;
  int turn_ = 0, phases_ = 0;
};

// The vectors of a row that a thread has: the k-th of N begins at column(k). A warp has neighbouring columns, so that the
// distance from one vector to the next is known when a kernel is compiled.
template <class T, int N>
struct Columns {
  template <class G>
  RED_DEVICE explicit Columns(const G& group)
      : first(((group.rank * group.warps + group.thread / kWarp) * kWarp * N + group.thread % kWarp) * kVector<T>) {}
  RED_DEVICE int operator()(int k) const { return first + k * step; }
  RED_DEVICE bool has(int k, int d) const { return (*this)(k) < d; }

  static constexpr int step = kWarp * kVector<T>;
  int first;
};

}  // namespace cuda
}  // namespace red
