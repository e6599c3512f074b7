// Which threads take which part of a row, by width, type and device. Reasoned from registers and shared memory; nothing of it
// has been measured on a GPU yet (docs/gpu-status.md).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "../types.h"

namespace red {
namespace cuda {

struct Device {
  int index = 0;
  int capability = 80;  // 10 * major + minor
  int multiprocessors = 1;
  int64_t shared = 48 << 10;  // bytes of shared memory that a block may have
  bool clusters = false;      // the kernels loaded on it can share rows between the blocks of a cluster
  bool early = false;         // they can be started before the kernel before them has ended
};

// A row over `cluster` blocks, in each over `warps` warps with n vectors for each thread; `groups` rows in a block.
struct RowLayout {
  int n = 0, warps = 0, groups = 0, cluster = 1, stages = 0;
  int lanes = 0;  // threads for each of the blocks of columns that a mix reflects
  explicit operator bool() const { return n > 0; }
};

// The kinds of norm_forward, from the fewest instructions to the most.
enum ForwardKind {
  kExactForward,  // see norm_forward_exact.cuh
  kPlainForward,  // the usual arguments: see PLAIN in norm_forward.cuh
  kAnyForward
};

// The kinds of norm_backward. Each costs more registers than the one before.
enum BackwardKind {
  kExact,    // kPlain, with everything there, and where it is easiest to reach: see norm_backward_exact.cuh
  kPlain,    // an edit before the norm, the same for all rows, and its gradients; the usual vectors (usual_edit)
  kMore,     // also dropout, and z made again: post-norm models, and any model with dropout
  kOptions,  // also any vectors, and edit_ids
  kFull      // also the gradients of the norm's own vectors, and an edit behind the norm
};
constexpr int most_elements(BackwardKind kind) { return kind == kFull ? 16 : 32; }  // of a thread
// Whether there is a kernel with n vectors of `size` elements for each thread.
constexpr bool has_backward(BackwardKind kind, int n, int size) {
  return n * size <= most_elements(kind) && !(kind == kExact && n > 6);
}
// So few that a thread of norm_backward_exact has room for more than their sums.
constexpr bool few_columns(int columns) { return columns <= 16; }
// Warps of a block, with n vectors for each thread. Of kExact no more than the largest shared memory has two rows for; and no
// 13 to 15, which would leave each thread as few registers as 16 do, as each quarter of a multiprocessor has its own.
// With many vectors kMore would spill some, but of bfloat16, whose conversions take the fewest registers.
constexpr int most_warps(BackwardKind kind, int n, Type type) {
  if (kind == kExact) {
    const int room = (227 << 10) / (2 * 4 * 32 * 16 * n);
    return room >= 16 ? 16 : room < 12 ? room : 12;
  }
  if (kind == kPlain) return n < 8 ? 16 : 12;
  if (kind == kMore) return n >= 4 && type != kBFloat16 ? 12 : 16;
  return 8;
}
// The numbers of vectors that kernels are compiled for.
constexpr int kForwardVectors[] = {1, 2, 3, 4, 6, 8};
constexpr int kBackwardVectors[] = {1, 2, 3, 4, 6, 8};
constexpr int kMostCluster = 8;          // what every device with clusters can do
constexpr int64_t kOnTheWay = 48 << 10;  // bytes ahead of a backward's arithmetic that are enough for a multiprocessor

// What kernels and those who start them have to agree on.
constexpr int kGroupParts = 128;                             // warps of a cluster at most
constexpr int kGroupFloats = 2 * 2 * kGroupParts + 4;        // of shared memory, for the sums over a row: see group.h
constexpr int kGroupBytes = kGroupFloats * static_cast<int>(sizeof(float));
constexpr int kForwardThreads = 256;                         // of a block of norm_forward at most
constexpr int kForwardGroups = 2;                            // of more than one warp, of such a block: see norm_forward_layout
constexpr int kSlabThreads = 256, kEditRows = 4;             // of a block; rows of a thread of edit_forward
constexpr int kWideThreads = 256;                            // of a block at most
constexpr int kPair = 32;                                    // columns from one of a rotation's pair to the other
constexpr int kMixWarps = 16;                                // of a block of threads at most
constexpr int kMixForwardColumns = 32, kMixBackwardColumns = 16;  // of a thread
constexpr int kMixSums = 4;                                  // over a row or its blocks at once
constexpr int kMixGroupBytes = 2 * kMixSums * kMixWarps * static_cast<int>(sizeof(float));
constexpr int kMixStretch = 512;                             // blocks of columns whose sums are made together
constexpr int kSumColumns = 32, kSumLines = 16;              // the block of add_lines and add_edits

// The type of the activations that kernels of T are for.
template <class T>
constexpr Type kTypeOf = kFloat32;
template <>
constexpr Type kTypeOf<BFloat16> = kBFloat16;
template <>
constexpr Type kTypeOf<Float16> = kFloat16;

constexpr int vector_size(Type type) { return type == kFloat32 ? 4 : 8; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of a worker of column sums: of a group of rows' threads in a block (or in a cluster of them) that has others
// beside it. Neighbours in number are in different blocks, so that rows left over go to as many multiprocessors.
constexpr int64_t worker_number(int64_t group, int64_t block, int64_t blocks) { return group * blocks + block; }

// Forward: the layout that leaves the fewest lanes idle; of those within 6 % the one with the fewest warps for each row, so
// that few wait for each other. Blocks of 128 threads or more.
inline RowLayout norm_forward_layout(int64_t d, Type type, const Device& device) {
  constexpr int kMostWarps = kForwardThreads / 32;
  const int64_t vectors = d / vector_size(type);
  for (int cluster = 1; cluster <= (device.clusters ? kMostCluster : 1); cluster *= 2) {
    RowLayout best;
    for (const int n : kForwardVectors) {  // from few to many: the warps become fewer
      const int64_t warps = divide_up(divide_up(vectors, cluster), 32 * n);
      if (warps > kMostWarps || (best && warps * n * 100 > int64_t{best.n} * best.warps * 106)) continue;
      best.n = n;
      best.warps = static_cast<int>(warps);
    }
    if (!best) continue;
    best.cluster = cluster;
    best.groups = cluster > 1 ? 1 : std::max(1, 4 / best.warps);
    return best;
  }
  return {};
}

// Whether every thread of a layout has all of its vectors.
inline bool exact(const RowLayout& layout, int64_t d, Type type) {
  return int64_t{32} * layout.warps * layout.n * layout.cluster * vector_size(type) == d;
}

// Backward: as many rows ahead as hide memory's latency, where shared memory holds them, but one at least. Of the layouts that leave about as few lanes idle,
// one with a warp for each row, as its warps never wait for each other; but many warps in any case, and in many groups, so
// that some compute while others wait.
inline RowLayout norm_backward_layout(int64_t d, Type type, const Device& device, BackwardKind kind, int arrays) {
  const int64_t vectors = d / vector_size(type);
  const int most = most_warps(kind, 1, type);
  for (int cluster = 1; cluster <= (device.clusters ? kMostCluster : 1); cluster *= 2) {
    const int64_t part = divide_up(vectors, cluster);  // vectors of a block
    int64_t least = INT64_MAX;
    const auto warps_of = [&](int n) {
      const int64_t warps = divide_up(part, 32 * n);
      const bool idle = warps * 32 * n * cluster != vectors;
      if (kind == kExact && (idle || (cluster > 1 && !few_columns(n * vector_size(type))))) return 0;
      return has_backward(kind, n, vector_size(type)) && warps <= most_warps(kind, n, type) ? static_cast<int>(warps) : 0;
    };
    for (const int n : kBackwardVectors)
      if (warps_of(n)) least = std::min<int64_t>(least, n * warps_of(n));
    RowLayout best;
    const auto rank = [&](const RowLayout& l) {
      const int warps = l.groups * l.warps;
      return std::make_tuple(bool(l), 2 * warps >= most, l.warps == 1, warps, l.groups);
    };
    for (const int n : kBackwardVectors) {
      RowLayout layout;
      layout.warps = warps_of(n);
      if (!layout.warps || n * layout.warps * 100 > least * 106) continue;
      layout.n = n;
      layout.cluster = cluster;
      const int64_t bytes = static_cast<int64_t>(n) * layout.warps * 32 * 16 * arrays;  // of one row ahead
      for (layout.groups = cluster > 1 ? 1 : most_warps(kind, n, type) / layout.warps; layout.groups > 0; --layout.groups) {
        const int64_t rows = bytes * layout.groups;
        const int wanted = 2 * rows < kOnTheWay ? 4 : 3;
        layout.stages = static_cast<int>(std::min<int64_t>(wanted, (device.shared - 4096) / rows));
        if (layout.stages >= 2) break;
      }
      if (layout.stages >= 2 && rank(layout) > rank(best)) best = layout;
    }
    if (best) return best;
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

// A mix: each thread has so many columns of its row, whole pairs of a rotation, or of one block of reflections. A block
// of columns has a power of 2 of threads, or whole warps, so that its sums need shuffles and at most one barrier. None
// where blocks do not begin on 16 bytes, or a row takes too many threads; any power of 2 of blocks fits up to a width of
// 32 * most_warps * columns.
inline RowLayout mix_layout(int64_t d, Type type, int64_t blocks, int columns, int most_warps = kMixWarps) {
  const int64_t size = vector_size(type);
  RowLayout layout;
  int64_t threads = 0;
  if (blocks == 0) {
    threads = divide_up(d, columns);
  } else {
    const int64_t width = d / blocks, wanted = divide_up(width, columns);
    if (width % size != 0 || wanted > most_warps * 32) return {};
    layout.lanes = 1;
    while (layout.lanes < wanted && layout.lanes < 32) layout.lanes *= 2;
    if (wanted > 32) layout.lanes = static_cast<int>(divide_up(wanted, 32) * 32);
    threads = layout.lanes * blocks;
  }
  if (threads > most_warps * 32) return {};
  layout.n = static_cast<int>(columns / size);
  layout.warps = static_cast<int>(divide_up(threads, 32));
  return layout;
}

// Whether each thread that has columns has as many as it can, in the order that rotations need.
inline bool mix_exact(int64_t d, Type type, int64_t blocks, int columns) {
  return blocks == 0 ? d / columns * columns == d && d / columns % (kPair / vector_size(type)) == 0
                     : d / blocks % columns == 0;
}

inline RowLayout mix_forward_layout(int64_t d, Type type, int64_t blocks) {
  RowLayout layout = mix_layout(d, type, blocks, kMixForwardColumns);
  if (layout) layout.groups = std::max(1, 4 / layout.warps);
  return layout;
}

// Backward: many warps, as many as the kernel's registers allow, and rows ahead as in norm_backward_layout; in wide rows
// of fp32 there may be none. `plain` as in mix_forward.cuh.
constexpr int mix_backward_warps(bool rotation, bool plain) { return rotation || plain ? kMixWarps : 12; }
inline RowLayout mix_backward_layout(int64_t d, Type type, const Device& device, int64_t blocks, bool plain,
                                     int arrays) {
  const int most = mix_backward_warps(blocks == 0, plain);
  RowLayout layout = mix_layout(d, type, blocks, kMixBackwardColumns, most);
  if (!layout) return layout;
  const int64_t bytes = static_cast<int64_t>(layout.n) * layout.warps * 32 * 16 * arrays;  // of one row ahead
  for (layout.groups = most / layout.warps; layout.groups > 0; --layout.groups) {
    const int64_t rows = bytes * layout.groups;
    const int wanted = 2 * rows < kOnTheWay ? 4 : 3;
    layout.stages = static_cast<int>(std::min<int64_t>(wanted, (device.shared - 4096) / rows));
    if (layout.stages >= 2 || (layout.groups == 1 && layout.stages == 1)) return layout;
  }
  return {};
}

// Blocks of slab_backward on a multiprocessor, with a norm or without: as many as have registers.
constexpr int slab_blocks(bool norm) { return norm ? 1 : 2; }

// Blocks for each slab where `room` of them run at once: so many that they fill it in one turn, or in as few as leave little of
// it idle. More would leave as many more lines to add up.
inline int64_t blocks_of_slab(int64_t room, int64_t slabs) {
  for (int64_t turns = 1; turns <= 4; ++turns) {
    const int64_t blocks = turns * room / slabs;
    if (blocks * slabs * 10 >= turns * room * 9) return blocks;
  }
  return std::max<int64_t>(1, 4 * room / slabs);
}

// Threads for each row of a slab of columns, a power of 2.
inline int slab_lanes(int64_t d, Type type) {
  const int64_t vectors = divide_up(d, vector_size(type));
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

inline int wide_threads(int64_t d, Type type) {
  return static_cast<int>(std::min<int64_t>(kWideThreads, divide_up(divide_up(d, vector_size(type)), 32) * 32));
}

}  // namespace cuda
}  // namespace red
