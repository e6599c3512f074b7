// The backward of mixes, with a norm behind them or without, in one pass. Only for rows that mix_layout has a layout
// for; mix_wide.cuh takes the others. A persistent grid, rows ahead in shared memory, column sums in registers: as in
// norm_backward.cuh. The sums of the norm's own vectors are norm_backward's.
//
// g, the gradient behind the dropout, gives dx as the forward gives z. Of a rotation dfirst_j = sum g_j x_j and
// dsecond_j = sum g_j x_{j ^ 32}; of reflections dfirst = -sum ((first . x) g + (first . g) x), dsecond the same of the
// second without the minus; dbias = sum g.
#pragma once

#include "mix.cuh"
#include "rows.h"
#include "sorted.h"

namespace red {
namespace cuda {

// Starts the copies of a row's vectors, and counts the arrays in the order dy, dz, z, x.
template <class T, int N, class C>
RED_DEVICE void fetch_mix(const MixBackward& a, const C& column, int d, const Stages<N>& stages, int stage,
                          int64_t row) {
  int array = 0;
  const Rows* inputs[4] = {&a.dy, &a.dz, &a.z, &a.x};
  RED_UNROLL for (int i = 0; i < 4; ++i) {
    if (!*inputs[i]) continue;
    const T* from = row_of<T>(*inputs[i], row);
    RED_UNROLL for (int k = 0; k < N; ++k)
      if (column.has(k, d)) copy_async(stages.address(stage, array, k), from + column(k));
    ++array;
  }
}

// PLAIN: as in mix_forward.cuh.
template <class T, bool ROTATION, bool PLAIN>
RED_KERNEL(32 * mix_backward_warps(ROTATION, PLAIN), 1) mix_row_backward(RED_ARGUMENT MixBackward a) {
  constexpr int kSize = kVector<T>, N = kMixBackwardColumns / kSize, kSums = 3;
  const int d = static_cast<int>(a.d);
  MixGroup<16> group(a.lanes, reinterpret_cast<float*>(shared_memory()));
  const MixColumns<T, N, ROTATION, PLAIN> column(group, d, static_cast<int>(a.blocks));
  const Stages<N> stages(a.stages, a.arrays);
  const bool norm = a.rstd != nullptr, through = a.dx != nullptr || a.x;
  const int at_dz = 1, at_z = at_dz + bool(a.dz), at_x = at_z + bool(a.z);
  const int64_t groups = blockDim.y, workers = gridDim.x * groups;
  const int64_t worker = worker_number(group.index, blockIdx.x, gridDim.x);
  const bool sorted = !PLAIN && a.deal.order != nullptr;
  const int64_t seed = PLAIN ? 0 : dropout_seed(a.edit);

  RowSums<T, N, kSums> sums;
  sums.clear(kSums);
  const Places<true> all(a.deal, PLAIN ? 0 : a.rows, worker, workers);
  Places<!PLAIN> here(a.deal, a.rows, worker, workers);
  Current current(a.deal, sorted, all, worker, a.edit.edits);
  for (int stage = 0; stage < a.stages - 1; ++stage) {
    if (here.more(stage)) fetch_mix<T, N>(a, column, d, stages, stage, here.row(stage));
    commit_copies();
  }
  int stage = 0;
  int64_t own_row = 0, id = 0;  // of the row at hand
  float rstd = 1.0f, mean = 0.0f;
  const auto look_up = [&](int64_t& id, float& rstd, float& mean) {
    if (!here.more()) return;
    own_row = here.row();
    if constexpr (!PLAIN) id = sorted ? a.deal.sorted[here.place] : edit_id(a.edit, own_row);
    if (norm) rstd = a.rstd[own_row];
    if (a.mean != nullptr) mean = a.mean[own_row];
  };
  look_up(id, rstd, mean);
  while (here.more()) {
    const int64_t row = PLAIN ? here.place : own_row;
    const int free_stage = stage == 0 ? a.stages - 1 : stage - 1;
    if (here.more(a.stages - 1)) fetch_mix<T, N>(a, column, d, stages, free_stage, here.row(a.stages - 1));
    commit_copies();
    here.advance();
    // What the next row needs besides, so that it need not be waited for then.
    int64_t next_id = 0;
    float next_rstd = 1.0f, next_mean = 0.0f;
    look_up(next_id, next_rstd, next_mean);
    if (sorted && id != current.id) {
      const int64_t line = current.line();
      RED_UNROLL for (int s = 0; s < kSums; ++s)
        if (a.lines[s] != nullptr && line >= 0) sums.store(a.lines[s], line, d, column, s);
      sums.clear(kSums);
      current.next(id);
    }
    const RowEdit own(a.edit, id);
    const int64_t offset = PLAIN ? 0 : own.offset;
    wait_all_but(a.stages - 1);

    const auto load_normed = [&](int k, float (&normed)[kSize]) {
      unpack<T>(*stages.at(stage, at_z, k), normed);
      RED_UNROLL for (int i = 0; i < kSize; ++i) normed[i] = (normed[i] - mean) * rstd;
    };

    // Sums over the row for the norm, and over its blocks: first . x and second . x, and behind these those of g.
    float g[N][kSize];  // first what the norm's result has for a gradient, times the weight
    float c[2] = {0.0f, 0.0f}, of_x[2] = {0.0f, 0.0f}, of_g[2] = {0.0f, 0.0f};
    RED_UNROLL for (int k = 0; k < N; ++k) {
      fill<T>(g[k], 0.0f);
      if (!column.has(k, d)) continue;
      unpack<T>(*stages.at(stage, 0, k), g[k]);
      if (norm) {
        float normed[kSize], w[kSize];
        load_normed(k, normed);
        load_weight<T, PLAIN ? kNarrow : kAny>(a.weight, a.weight_offset, column(k), kSize, true, w);
        RED_UNROLL for (int i = 0; i < kSize; ++i) {
          g[k][i] = product(g[k][i], w[i]);
          c[0] += normed[i] * g[k][i];
          c[1] += g[k][i];
        }
      }
      if (!ROTATION && a.x) {
        float h[kSize];
        unpack<T>(*stages.at(stage, at_x, k), h);
        add_dots<T>(a.edit.scale, a.second, offset + column(k), h, of_x);
      }
    }
    if constexpr (ROTATION) {
      if (norm) group.sum(c);
    } else if (norm) {
      group.sum(c, of_x);
    } else if (a.x) {
      group.block_sum(of_x);
    }
    const float width = static_cast<float>(d), c1 = c[0] / width, c2 = a.mean != nullptr ? c[1] / width : 0.0f;

    RED_UNROLL for (int k = 0; k < N; ++k) {
      if (!column.has(k, d)) continue;
      if (norm) {
        float normed[kSize];
        load_normed(k, normed);
        RED_UNROLL for (int i = 0; i < kSize; ++i) g[k][i] = norm_gradient(normed[i], g[k][i], rstd, c1, c2);
        if (a.dz) {
          float more[kSize];
          unpack<T>(*stages.at(stage, at_dz, k), more);
          RED_UNROLL for (int i = 0; i < kSize; ++i) g[k][i] += more[i];
        }
        if (a.dresidual != nullptr) store16(static_cast<T*>(a.dresidual) + row * d + column(k), pack<T>(g[k]));
      }
      if (!PLAIN && a.edit.dropout.seed != nullptr) drop<T>(a.edit.dropout, seed, row, column(k), g[k]);
      if (!ROTATION && through) add_dots<T>(a.edit.scale, a.second, offset + column(k), g[k], of_g);
    }
    if (!ROTATION && through) group.block_sum(of_g);

    RED_UNROLL for (int k = 0; k < N; ++k) {
      if (!column.has(k, d)) continue;
      if (a.dx != nullptr) {
        float dx[kSize];
        if constexpr (ROTATION) {
          RED_UNROLL for (int i = 0; i < kSize; ++i) dx[i] = g[k][i];
          rotate<T>(a.edit.scale, a.second, offset + column(k), offset + column(k ^ 1), g[k ^ 1], dx);
        } else {
          RED_UNROLL for (int i = 0; i < kSize; ++i) dx[i] = g[k][i];
          reflect<T>(a.edit.scale, a.second, offset + column(k), of_g, dx);
        }
        if (!PLAIN && !own.known) fill<T>(dx, not_a_number());
        store16(static_cast<T*>(a.dx) + row * d + column(k), pack<T>(dx));
      }
      if (a.x) {
        float h[kSize];
        unpack<T>(*stages.at(stage, at_x, k), h);
        if constexpr (ROTATION) {
          float other[kSize];
          unpack<T>(*stages.at(stage, at_x, k ^ 1), other);
          RED_UNROLL for (int i = 0; i < kSize; ++i) {
            sums.v[0][k][i] += g[k][i] * h[i];
            sums.v[1][k][i] += g[k][i] * other[i];
          }
        } else {
          RED_UNROLL for (int i = 0; i < kSize; ++i) {
            sums.v[0][k][i] -= of_x[0] * g[k][i];
            sums.v[0][k][i] -= of_g[0] * h[i];
            sums.v[1][k][i] += of_x[1] * g[k][i];
            sums.v[1][k][i] += of_g[1] * h[i];
          }
        }
      }
      RED_UNROLL for (int i = 0; i < kSize; ++i) sums.v[2][k][i] += g[k][i];
    }
    id = next_id, rstd = next_rstd, mean = next_mean;
    stage = stage + 1 == a.stages ? 0 : stage + 1;
  }

  let_next_start();
  if (sorted) {
    RED_UNROLL for (int s = 0; s < kSums; ++s)
      if (a.lines[s] != nullptr) sums.store(a.lines[s], current.last_line(), d, column, s);
    if (group.thread == 0) current.store(a.deal.owners);
    return;
  }
  RED_UNROLL for (int s = 0; s < kSums; ++s)
    if (a.lines[s] != nullptr)
      store_sums<T, N, kSums>(sums, a.lines[s], blockIdx.x, d, column, s, group, groups);
}

template <class T, bool PLAIN>
void run_mix_backward_of(const Launch& l, const MixBackward& a) {
  if (a.blocks == 0)
    start<MixBackward, mix_row_backward<T, true, PLAIN>>(l, a);
  else
    start<MixBackward, mix_row_backward<T, false, PLAIN>>(l, a);
}

template <class T>
void run_mix_backward(const Launch& l, bool plain, const MixBackward& a) {
  plain ? run_mix_backward_of<T, true>(l, a) : run_mix_backward_of<T, false>(l, a);
}

}  // namespace cuda
}  // namespace red
