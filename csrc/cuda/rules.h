// Which threads take which part of a row, by width, type and device. Reasoned from registers and shared memory; nothing of it
// has been measured on a GPU yet (docs/gpu-status.md).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace red {
namespace cuda {

struct Device {
  int index = 0;
  int capability = 80;  // 10 * major + minor
  int multiprocessors = 1;
  int64_t shared = 48 << 10;  // bytes of shared memory that a block may have
  bool clusters = false;      // the kernels loaded on it can share rows between the blocks of a cluster
};

// A row over `cluster` blocks, in each over `warps` warps with n vectors for each thread; `groups` rows in a block.
struct RowLayout {
  int n = 0, warps = 0, groups = 0, cluster = 1, stages = 0;
  explicit operator bool() const { return n > 0; }
};

// The numbers of vectors that kernels are compiled for.
constexpr int kForwardVectors[] = {1, 2, 3, 4, 6, 8};
constexpr int kBackwardVectors[] = {1, 2, 3, 4, 6, 8};
constexpr int kMostElements = 32;      // of a thread in a backward with two column sums
constexpr int kMostElementsFull = 16;  // with four
constexpr int kMostCluster = 8;        // what every device with clusters can do

constexpr int vector_size(Type type) { return type == kFloat32 ? 4 : 8; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The n and the warps that leave the fewest lanes idle; of two within 6 %, the one with `better(n, warps)`.
template <int COUNT, class Better>
RowLayout fit(int64_t vectors, const int (&choices)[COUNT], int most_n, int most_warps, const Better& better) {
  RowLayout best;
  for (const int n : choices) {
    const int64_t warps = divide_up(vectors, 32 * n);
    if (n > most_n || warps > most_warps) continue;
    const int64_t lanes = warps * n, least = static_cast<int64_t>(best.warps) * best.n;
    const bool close = lanes * 100 <= least * 106 && least * 100 <= lanes * 106;
    if (!best || (close ? better(n, warps) > better(best.n, best.warps) : lanes < least)) {
      best.n = n;
      best.warps = static_cast<int>(warps);
    }
  }
  return best;
}

// Forward: few warps for each row, so that few wait for each other; blocks of 128 threads or more.
inline RowLayout norm_forward_layout(int64_t d, Type type, const Device& device) {
  const int64_t vectors = d / vector_size(type);
  for (int cluster = 1; cluster <= (device.clusters ? kMostCluster : 1); cluster *= 2) {
    RowLayout layout = fit(divide_up(vectors, cluster), kForwardVectors, 8, 8, [](int, int64_t warps) { return -warps; });
    if (!layout) continue;
    layout.cluster = cluster;
    layout.groups = cluster > 1 ? 1 : std::max(1, 4 / layout.warps);
    return layout;
  }
  return {};
}

// Backward: one warp for a row where its sums fit, else several; two groups or more in a block of 512 threads, so that one
// computes while another waits; as many rows ahead as shared memory holds, 3 at most.
inline RowLayout norm_backward_layout(int64_t d, Type type, const Device& device, bool full, int arrays) {
  const int64_t vectors = d / vector_size(type);
  const int most = (full ? kMostElementsFull : kMostElements) / vector_size(type);
  const int most_warps = full ? 8 : 16;  // a thread with four sums takes more than 128 registers
  const int wanted = 16 / vector_size(type);
  const auto better = [&](int n, int64_t warps) {
    return warps == 1 ? 3 : n <= wanted && warps <= 8 ? 2 : warps <= 8 ? 1 : 0;
  };
  for (int cluster = 1; cluster <= (device.clusters ? kMostCluster : 1); cluster *= 2) {
    RowLayout layout = fit(divide_up(vectors, cluster), kBackwardVectors, most, most_warps, better);
    if (!layout) continue;
    layout.cluster = cluster;
    const int64_t row = static_cast<int64_t>(layout.n) * layout.warps * 32 * 16 * arrays;  // bytes of a block's part
    for (layout.groups = cluster > 1 ? 1 : std::max(1, most_warps / layout.warps);; layout.groups /= 2) {
      layout.stages = static_cast<int>(std::min<int64_t>(3, (device.shared - 4096) / (row * layout.groups)));
      if (layout.stages >= 2) return layout;
      if (layout.groups == 1) break;
    }
    if (layout.stages == 1 && !(device.clusters && cluster < kMostCluster)) return layout;
  }
  return {};
}

// Bytes of shared memory of the backward: the stages, which at the end hold the column sums of the block.
inline int64_t norm_backward_shared(const RowLayout& layout, Type type, int arrays) {
  const int64_t threads = static_cast<int64_t>(layout.warps) * 32 * layout.groups;
  const int64_t copies = threads * layout.n * 16 * arrays * layout.stages;
  const int64_t sums = layout.groups > 1 ? threads * layout.n * vector_size(type) * 4 : 0;
  return std::max(copies, sums);
}

// Threads for each row of a slab of columns, a power of 2.
inline int slab_lanes(int64_t d, Type type) {
  const int64_t vectors = divide_up(d, vector_size(type));
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

inline int wide_threads(int64_t d, Type type) {
  return static_cast<int>(std::min<int64_t>(512, divide_up(divide_up(d, vector_size(type)), 32) * 32));
}

}  // namespace cuda
}  // namespace red
