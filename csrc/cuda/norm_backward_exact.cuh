// The backward of norms behind an edit, as most calls have it (kExact): every thread has all of its columns; dy, dz, z and x
// are there with their rows one behind the other, and so are dx, dresidual and both sums asked for; the edit is the same for
// all rows, without dropout, the vectors are the usual ones, and nothing is added to the weight. Nothing of it is asked in the
// loop, and each address is one that is known plus a constant: about 60 % of the instructions of norm_backward.cuh, to the
// same bits.
#pragma once

#include "group.h"
#include "kernels.h"
#include "rows.h"

namespace red {
namespace cuda {

// CLUSTER: several blocks may share a row.
template <class T, int N, bool CENTERED, bool CLUSTER>
RED_KERNEL(32 * most_warps(kExact, N, kTypeOf<T>), 1) norm_backward_exact(RED_ARGUMENT NormBackward a) {
  constexpr int kSize = kVector<T>, kSums = 2, kArrays = 4;  // dy, dz, z, x
  constexpr int kDz = 1, kZ = 2, kX = 3;
  // Where a thread has few columns, what the sums over a row need is not made twice, and its vectors stay in registers: the
  // scale only where there is room for it.
  constexpr bool KEPT = few_columns(N * kSize), HELD = KEPT && (N * kSize <= 8 || !(CENTERED || CLUSTER));
  constexpr int kKept = KEPT ? N : 1, kHeld = HELD ? N : 1;
  Group<16, CLUSTER> group(a.cluster, reinterpret_cast<float*>(shared_memory()));
  const Columns<T, N> column(group);
  const Stages<N> stages(a.stages, kArrays);
  const int d = static_cast<int>(a.d);
  const int groups = group.cluster > 1 ? 1 : blockDim.y, rows = static_cast<int>(a.rows);
  const int block = blockIdx.x / group.cluster, blocks = gridDim.x / group.cluster;
  const int worker = static_cast<int>(worker_number(group.index, block, blocks)), workers = blocks * groups;

  RowSums<T, N, kSums> sums;
  sums.clear(kSums);
  const T* weight = as_base(static_cast<const T*>(a.weight.data) + column.first);
  const Vectors scale{as_base(static_cast<const float*>(a.edit.scale.data) + column.first), true};
  Raw weights[kKept];
  float scales[kHeld][kSize];
  if constexpr (KEPT)
    RED_UNROLL for (int k = 0; k < N; ++k) {
      weights[k] = load16(weight + k * column.step);
      if constexpr (HELD) load_vector<T, kWide>(scale, k * column.step, kSize, true, scales[k]);
    }

  const auto place = [&](int row) { return static_cast<int64_t>(row) * d + column.first; };  // in all activations
  const Rows* inputs[kArrays] = {&a.dy, &a.dz, &a.z, &a.x};
  const auto fetch = [&](int row, int stage) {
    RED_UNROLL for (int i = 0; i < kArrays; ++i) {
      const T* from = as_base(static_cast<const T*>(inputs[i]->data) + place(row));
      RED_UNROLL for (int k = 0; k < N; ++k) copy_async(stages.address(stage, i, k), from + k * column.step);
    }
  };
  const int ahead = a.stages - 1;
  for (int stage = 0; stage < ahead; ++stage) {
    if (worker + stage * workers < rows) fetch(worker + stage * workers, stage);
    commit_copies();
  }
  float rstd = 0.0f, mean = 0.0f;
  if (worker < rows) {
    rstd = a.rstd[worker];
    if constexpr (CENTERED) mean = a.mean[worker];
  }
  int stage = 0;
  for (int row = worker; row < rows; row += workers) {
    if (row + ahead * workers < rows) fetch(row + ahead * workers, stage == 0 ? ahead : stage - 1);
    commit_copies();
    // What the next row needs besides, so that it need not be waited for then.
    float next_rstd = 0.0f, next_mean = 0.0f;
    if (row + workers < rows) {
      next_rstd = a.rstd[row + workers];
      if constexpr (CENTERED) next_mean = a.mean[row + workers];
    }
    wait_all_but(ahead);

    // What was normed, and the gradient of its result times the weight.
    const auto terms = [&](int k, float (&normed)[kSize], float (&weighted)[kSize]) {
      float g[kSize], w[kSize];
      unpack<T>(*stages.at(stage, 0, k), g);
      unpack<T>(*stages.at(stage, kZ, k), normed);
      unpack<T>(KEPT ? weights[k % kKept] : load16(weight + k * column.step), w);
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        normed[i] = (normed[i] - mean) * rstd;
        weighted[i] = product(g[i], w[i]);
      }
    };
    float normed[kKept][kSize], weighted[kKept][kSize], c[2] = {0.0f, 0.0f};
    RED_UNROLL for (int k = 0; k < N; ++k) {
      terms(k, normed[k % kKept], weighted[k % kKept]);
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        c[0] = multiply_add(normed[k % kKept][i], weighted[k % kKept][i], c[0]);
        c[1] += weighted[k % kKept][i];
      }
    }
    group.template averages<CENTERED>(c, static_cast<float>(d));
    T* dx = as_base(static_cast<T*>(a.dx) + place(row));
    T* dresidual = as_base(static_cast<T*>(a.dresidual) + place(row));

    RED_UNROLL for (int k = 0; k < N; ++k) {
      auto& n = normed[k % kKept];
      auto& w = weighted[k % kKept];
      if constexpr (!KEPT) terms(k, n, w);
      float total[kSize], more[kSize], h[kSize];
      unpack<T>(*stages.at(stage, kDz, k), more);
      RED_UNROLL for (int i = 0; i < kSize; ++i) total[i] = norm_gradient(n[i], w[i], rstd, c[0], c[1]) + more[i];
      put16(dresidual + k * column.step, pack<T>(total));
      RED_UNROLL for (int i = 0; i < kSize; ++i) sums.v[1][k][i] += total[i];
      unpack<T>(*stages.at(stage, kX, k), h);
      RED_UNROLL for (int i = 0; i < kSize; ++i) sums.v[0][k][i] = multiply_add(total[i], h[i], sums.v[0][k][i]);
      if constexpr (!HELD) load_vector<T, kWide>(scale, k * column.step, kSize, true, scales[0]);
      RED_UNROLL for (int i = 0; i < kSize; ++i) total[i] = product(total[i], scales[k % kHeld][i]);
      put16(dx + k * column.step, pack<T>(total));
    }
    rstd = next_rstd, mean = next_mean;
    stage = stage == ahead ? 0 : stage + 1;
  }
  let_next_start();
  RED_UNROLL for (int s = 0; s < kSums; ++s)
    store_sums<T, N, kSums>(sums, a.lines[s], block, d, column, s, group, groups);
}

}  // namespace cuda
}  // namespace red
