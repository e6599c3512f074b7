// What the backwards of whole rows share: rows ahead in shared memory, and column sums in registers.
#pragma once

#include "group.h"

namespace red {
namespace cuda {

// Where the N vectors of a thread lie in shared memory: [warp of the block][stage][array][k][thread of the warp].
template <int N>
struct Stages {
  RED_DEVICE Stages(int stages, int arrays) : stage_step_(arrays * kArray) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    own_ = reinterpret_cast<Raw*>(shared_memory() + kGroupBytes) + thread / kWarp * stages * stage_step_ + thread % kWarp;
    address_ = shared_address(own_);
  }
  RED_DEVICE const Raw* at(int stage, int array, int k) const { return own_ + offset(stage, array, k); }
  RED_DEVICE SharedAddress address(int stage, int array, int k) const {
    return address_ + offset(stage, array, k) * static_cast<int>(sizeof(Raw));
  }

 private:
  static constexpr int kArray = N * kWarp;
  RED_DEVICE int offset(int stage, int array, int k) const { return stage * stage_step_ + array * kArray + k * kWarp; }

  int stage_step_;
  Raw* own_;
  SharedAddress address_;
};

// Waits for all groups of copies but the last 0 to 3.
RED_DEVICE void wait_all_but(int groups) {
  if (groups <= 0)
    wait_copies<0>();
  else if (groups == 1)
    wait_copies<1>();
  else if (groups == 2)
    wait_copies<2>();
  else
    wait_copies<3>();
}

// The column sums of a thread: kSums for each of its columns.
template <class T, int N, int kSums>
struct RowSums {
  RED_DEVICE void clear(int sums) {
    RED_UNROLL for (int s = 0; s < kSums; ++s)
      RED_UNROLL for (int k = 0; k < N; ++k)
        if (s < sums) fill<T>(v[s][k], 0.0f);
  }
  template <class C>
  RED_DEVICE void store(float* lines, int64_t line, int d, const C& column, int s) const {
    float* to = lines + line * d;
    RED_UNROLL for (int k = 0; k < N; ++k)
      RED_UNROLL for (int i = 0; i < kVector<T>; i += 4) {
        const float part[4] = {v[s][k][i], v[s][k][i + 1], v[s][k][i + 2], v[s][k][i + 3]};
        if (column.has(k, d)) store16(to + column(k) + i, pack<float>(part));
      }
  }

  float v[kSums][N][kVector<T>];
};

// The sums of a block's groups, in order: line `block` of `lines`. The stages are not needed any more, they make room.
template <class T, int N, int kSums, class C, class G>
RED_DEVICE void store_sums(const RowSums<T, N, kSums>& sums, float* lines, int64_t block, int d, const C& column, int s,
                           const G& group, int64_t groups) {
  constexpr int kSize = kVector<T>, kQuads = N * kSize / 4;
  if (groups == 1) return sums.store(lines, block, d, column, s);
  Raw* shared = reinterpret_cast<Raw*>(shared_memory() + kGroupBytes);
  const int threads = group.threads * blockDim.y, own = group.index * group.threads + group.thread;
  block_barrier();  // all copies have been read
  RED_UNROLL for (int q = 0; q < kQuads; ++q) {
    const float part[4] = {sums.v[s][q * 4 / kSize][q * 4 % kSize], sums.v[s][q * 4 / kSize][q * 4 % kSize + 1],
                           sums.v[s][q * 4 / kSize][q * 4 % kSize + 2], sums.v[s][q * 4 / kSize][q * 4 % kSize + 3]};
    shared[q * threads + own] = pack<float>(part);
  }
  block_barrier();
  for (int q = group.index; q < kQuads; q += blockDim.y) {
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int g = 0; g < groups; g += 2) {  // in pairs, as they lose fewer digits
      float one[4], other[4];
      unpack<float>(shared[q * threads + g * group.threads + group.thread], one);
      unpack<float>(g + 1 < groups ? shared[q * threads + (g + 1) * group.threads + group.thread] : Raw{}, other);
      RED_UNROLL for (int i = 0; i < 4; ++i) total[i] += one[i] + other[i];
    }
    const int k = q * 4 / kSize;
    if (column.has(k, d)) store16(lines + block * d + column(k) + q * 4 % kSize, pack<float>(total));
  }
}

}  // namespace cuda
}  // namespace red
