// The last step of column sums: one deterministic kernel adds up the lines of all sums.
#pragma once

#include "device.h"
#include "rules.h"

namespace red {
namespace cuda {

// The sum over a block's lines of what its threads have, in pairs; in the threads of the first line.
RED_DEVICE float add_up(float part) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + threadIdx.y * kSumColumns + threadIdx.x;
  *shared = part;
  for (int half = kSumLines / 2; half > 0; half /= 2) {
    block_barrier();
    if (threadIdx.y < half) *shared += shared[half * kSumColumns];
  }
  return *shared;
}

// Grid: (pieces of the columns, sums).
RED_KERNEL(kSumColumns * kSumLines, 1) add_lines(RED_ARGUMENT AddLines a) {
  wait_for_previous();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const float* lines = a.lines[blockIdx.y];
  constexpr int kParts = 4;  // on their way at once
  float parts[kParts] = {};
  if (column < a.d)
    for (int64_t line = threadIdx.y; line < a.count; line += kParts * kSumLines)
      RED_UNROLL for (int i = 0; i < kParts; ++i)
        if (line + i * kSumLines < a.count) parts[i] += lines[(line + i * kSumLines) * a.d + column];
  const float total = add_up((parts[0] + parts[1]) + (parts[2] + parts[3]));
  if (threadIdx.y == 0 && column < a.d) a.out[blockIdx.y][column] = total;
}

// The first places of the sorted ids whose id is not below `id`, and not below the next: where its rows begin and end.
RED_DEVICE void find_rows(const int64_t* sorted, int64_t rows, int64_t id, int64_t (&places)[2]) {
  int64_t low[2] = {0, 0}, high[2] = {rows, rows};
  while (low[0] < high[0] || low[1] < high[1]) {  // both searches at once: a step is a wait for memory
    RED_UNROLL for (int i = 0; i < 2; ++i) {
      if (low[i] >= high[i]) continue;
      const int64_t middle = low[i] + (high[i] - low[i]) / 2;
      if (sorted[middle] < id + i)
        low[i] = middle + 1;
      else
        high[i] = middle;
    }
  }
  places[0] = low[0];
  places[1] = low[1];
}

// Grid: (edits, pieces of the columns, sums). An edit has its own line, or those that its workers share; see Deal.
RED_KERNEL(kSumColumns * kSumLines, 1) add_edits(RED_ARGUMENT AddLines a) {
  wait_for_previous();
  const int64_t id = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kSumColumns + threadIdx.x;
  const float* lines = a.lines[blockIdx.z];
  int64_t places[2];
  find_rows(a.deal.sorted, a.rows, id, places);
  const int64_t begin = places[0], end = places[1], length = a.deal.length;
  float part = 0.0f;
  if (end > begin && column < a.d) {
    const int64_t first = begin / length, last = (end - 1) / length;  // workers
    const int64_t stretch_end = (first + 1) * length < a.rows ? (first + 1) * length : a.rows;
    if (first == last && begin > first * length && end < stretch_end) {
      if (threadIdx.y == 0) part = lines[id * a.d + column];
    } else {
      for (int64_t line = 2 * first + threadIdx.y; line < 2 * last + 2; line += kSumLines)
        if (a.deal.owners[line] == id) part += lines[(a.edits + line) * a.d + column];
    }
  }
  const float total = add_up(part);
  if (threadIdx.y == 0 && column < a.d) a.out[blockIdx.z][id * a.d + column] = total;
}

}  // namespace cuda
}  // namespace red
