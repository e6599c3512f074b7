// The last step of column sums: one deterministic kernel adds up the lines of all sums.
#pragma once

#include "device.h"

namespace red {
namespace cuda {

constexpr int kSumColumns = 32, kSumLines = 16;  // blockDim

// The thread's part of a block's sum, added up over the lines in order; in the threads of the first line.
RED_DEVICE float add_up(float part) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.y * kSumColumns + threadIdx.x] = part;
  block_barrier();
  float total = 0.0f;
  if (threadIdx.y == 0)
    for (int i = 0; i < kSumLines; ++i) total += shared[i * kSumColumns + threadIdx.x];
  return total;
}

// Grid: (pieces of the columns, sums).
RED_KERNEL(kSumColumns * kSumLines, 1) add_lines(RED_ARGUMENT AddLines a) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const float* lines = a.lines[blockIdx.y];
  float part = 0.0f;
  if (column < a.d)
    RED_UNROLL4 for (int64_t line = threadIdx.y; line < a.count; line += kSumLines) part += lines[line * a.d + column];
  const float total = add_up(part);
  if (threadIdx.y == 0 && column < a.d) a.out[blockIdx.y][column] = total;
}

// The first place of the sorted ids whose id is not below `id`.
RED_DEVICE int64_t lower_bound(const int64_t* sorted, int64_t rows, int64_t id) {
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Grid: (edits, pieces of the columns, sums). An edit has its own line, or those that its workers share; see Deal.
RED_KERNEL(kSumColumns * kSumLines, 1) add_edits(RED_ARGUMENT AddLines a) {
  const int64_t id = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kSumColumns + threadIdx.x;
  const float* lines = a.lines[blockIdx.z];
  const int64_t begin = lower_bound(a.deal.sorted, a.rows, id), end = lower_bound(a.deal.sorted, a.rows, id + 1);
  float part = 0.0f;
  bool shared = false;
  if (end > begin) {
    const int64_t last = 2 * ((end - 1) / a.deal.length) + 2;
    for (int64_t line = 2 * (begin / a.deal.length); line < last; ++line) {
      if (a.deal.owners[line] != id) continue;
      shared = true;  // in all threads alike
      if (line % kSumLines == threadIdx.y && column < a.d) part += lines[(a.edits + line) * a.d + column];
    }
    if (!shared && threadIdx.y == 0 && column < a.d) part = lines[id * a.d + column];
  }
  const float total = add_up(part);
  if (threadIdx.y == 0 && column < a.d) a.out[blockIdx.z][id * a.d + column] = total;
}

}  // namespace cuda
}  // namespace red
