// The backward of norms with an edit before or behind them, in one pass. Only for aligned rows; wide.cuh takes the others.
//
// A persistent grid: each group of threads takes one row after the other and keeps the column sums of its columns in
// registers. All that a row needs (dy, dz, z, x, residual) is copied to shared memory together, one row fewer ahead of the
// arithmetic than there are stages, by the very threads that will read it, so that only the sums over a row make threads wait
// for each other. N vectors of 16 bytes for each thread. What kinds there are of it, and what each can do: see BackwardKind
// in rules.h.
#pragma once

#include "group.h"
#include "kernels.h"
#include "norm_backward_exact.cuh"
#include "rows.h"
#include "sorted.h"

namespace red {
namespace cuda {

// Starts the copies of a row's vectors, and counts the arrays in the order dy, dz, z, x, residual.
template <class T, int N, BackwardKind KIND>
RED_DEVICE void fetch(const NormBackward& a, const Columns<T, N>& column, int d, const Stages<N>& stages, int stage,
                      int64_t row) {
  int array = 0;
  const Rows* inputs[5] = {&a.dy, &a.dz, &a.z, &a.x, &a.residual};
  RED_UNROLL for (int i = 0; i < (KIND == kPlain ? 4 : 5); ++i) {
    if (!*inputs[i]) continue;
    const T* from = as_base(row_of<T>(*inputs[i], row) + column.first);
    RED_UNROLL for (int k = 0; k < N; ++k)
      if (column(k) < d) copy_async(stages.address(stage, array, k), from + k * column.step);
    ++array;
  }
}

template <class T, int N, bool CENTERED, BackwardKind KIND>
RED_KERNEL(32 * most_warps(KIND, N, kTypeOf<T>), 1) norm_backward(RED_ARGUMENT NormBackward a) {
  constexpr int kSize = kVector<T>;
  constexpr bool OPTIONS = KIND == kOptions || KIND == kFull, FULL = KIND == kFull, MORE = KIND == kMore;
  constexpr int kSums = FULL ? 4 : 2;
  Group<16> group(a.cluster, reinterpret_cast<float*>(shared_memory()));
  const Columns<T, N> column(group);
  const Stages<N> stages(a.stages, a.arrays);
  const int d = static_cast<int>(a.d);
  const bool again = KIND != kPlain && !a.z;  // z is made from x and residual
  const int at_dz = 1, at_z = at_dz + bool(a.dz), at_x = at_z + !again, at_r = at_x + bool(a.x);
  const int64_t groups = a.cluster > 1 ? 1 : blockDim.y, block = blockIdx.x / a.cluster, blocks = gridDim.x / a.cluster;
  const int64_t worker = worker_number(group.index, block, blocks), workers = blocks * groups;
  const bool sorted = OPTIONS && a.deal.order != nullptr;
  const int64_t seed = KIND == kPlain ? 0 : dropout_seed(a.edit);

  // Where they are the usual ones, from the thread's first column on.
  const Vectors weight{static_cast<const T*>(a.weight.data) + column.first, false};
  const Vectors scale{static_cast<const float*>(a.edit.scale.data) + column.first, true};
  const Vectors bias{static_cast<const float*>(a.edit.bias.data) + column.first, true};

  RowSums<T, N, kSums> sums;
  sums.clear(kSums);
  const Places<true> all(a.deal, OPTIONS ? a.rows : 0, worker, workers);
  Places<OPTIONS> here(a.deal, a.rows, worker, workers);
  Current current(a.deal, sorted, all, worker, a.edit.edits);
  for (int stage = 0; stage < a.stages - 1; ++stage) {
    if (here.more(stage)) fetch<T, N, KIND>(a, column, d, stages, stage, here.row(stage));
    commit_copies();
  }
  int stage = 0;
  int64_t own_row = 0, id = 0;  // of the row at hand
  float rstd = 0.0f, mean = 0.0f;
  if (here.more()) {
    own_row = here.row();
    if constexpr (OPTIONS) id = sorted ? a.deal.sorted[here.place] : edit_id(a.edit, own_row);
    rstd = a.rstd[own_row];
    if constexpr (CENTERED) mean = a.mean[own_row];
  }
  while (here.more()) {
    const int64_t row = OPTIONS ? own_row : here.place;
    const int free_stage = stage == 0 ? a.stages - 1 : stage - 1;
    if (here.more(a.stages - 1)) fetch<T, N, KIND>(a, column, d, stages, free_stage, here.row(a.stages - 1));
    commit_copies();
    // What the next row needs besides, so that it need not be waited for then.
    here.advance();
    int64_t next_id = 0;
    float next_rstd = 0.0f, next_mean = 0.0f;
    if (here.more()) {
      own_row = here.row();
      if constexpr (OPTIONS) next_id = sorted ? a.deal.sorted[here.place] : edit_id(a.edit, own_row);
      next_rstd = a.rstd[own_row];
      if constexpr (CENTERED) next_mean = a.mean[own_row];
    }
    if (sorted && id != current.id) {
      const int64_t line = current.line();
      RED_UNROLL for (int s = 0; s < 2; ++s)
        if (a.lines[s] != nullptr && line >= 0) sums.store(a.lines[s], line, d, column, s);
      sums.clear(2);
      current.next(id);
    }
    const RowEdit own(a.edit, id);
    wait_all_but(a.stages - 1);

    // What was normed, and the gradient of its result, times the weight.
    const auto terms = [&](int k, float (&normed)[kSize], float (&g)[kSize], float (&weighted)[kSize]) {
      unpack<T>(*stages.at(stage, 0, k), g);
      if (MORE && again) {  // as edited() does it, of vectors that are known
        float v[kSize], u[kSize], b[kSize];
        unpack<T>(*stages.at(stage, at_x, k), v);
        load_vector<T, kWide>(scale, k * column.step, kSize, true, u);
        load_vector<T, kWide>(bias, k * column.step, kSize, true, b);
        RED_UNROLL for (int i = 0; i < kSize; ++i) v[i] = multiply_add(v[i], u[i], b[i]);
        if (a.edit.dropout.seed != nullptr) drop<T>(a.edit.dropout, seed, row, column(k), v);
        add_raw<T>(*stages.at(stage, at_r, k), v);
        unpack<T>(pack<T>(v), normed);
      } else if (again) {
        const Raw x = *stages.at(stage, at_x, k), r = a.residual ? *stages.at(stage, at_r, k) : Raw{};
        unpack<T>(edited<T>(a.edit, own, seed, row, column(k), kSize, true, x, r, bool(a.residual)), normed);
      } else {
        unpack<T>(*stages.at(stage, at_z, k), normed);
      }
      if (FULL && a.edit_last) apply_scale<T>(a.edit, own, column(k), kSize, true, g);
      float w[kSize];
      if constexpr (!OPTIONS)
        load_weight<T, kNarrow>(weight, a.weight_offset, k * column.step, kSize, true, w);
      else
        load_weight<T>(a.weight, a.weight_offset, column(k), kSize, true, w);
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        normed[i] = (normed[i] - mean) * rstd;
        weighted[i] = product(g[i], w[i]);
      }
    };

    float c[2] = {0.0f, 0.0f};
    RED_UNROLL for (int k = 0; k < N; ++k) {
      if (column(k) >= d) continue;
      float normed[kSize], g[kSize], weighted[kSize];
      terms(k, normed, g, weighted);
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        c[0] = multiply_add(normed[i], weighted[i], c[0]);
        c[1] += weighted[i];
      }
    }
    if constexpr (CENTERED) {
      group.sum(c);
    } else {
      float only[1] = {c[0]};
      group.sum(only);
      c[0] = only[0];
      c[1] = 0.0f;
    }
    const float width = static_cast<float>(d), c1 = c[0] / width, c2 = c[1] / width;

    RED_UNROLL for (int k = 0; k < N; ++k) {
      if (column(k) >= d) continue;
      float total[kSize], g[kSize], h[kSize];
      {
        float normed[kSize], weighted[kSize];
        terms(k, normed, g, weighted);
        if constexpr (FULL)
          RED_UNROLL for (int i = 0; i < kSize; ++i) {
            sums.v[2][k][i] += g[i] * normed[i];
            sums.v[3][k][i] += g[i];
          }
        RED_UNROLL for (int i = 0; i < kSize; ++i) total[i] = norm_gradient(normed[i], weighted[i], rstd, c1, c2);
        if (FULL && a.edit_last) {
          float w[kSize], b[kSize];
          load_weight<T>(a.weight, a.weight_offset, column(k), kSize, true, w);
          load_norm_bias<T>(a.norm_bias, column(k), kSize, true, b);
          RED_UNROLL for (int i = 0; i < kSize; ++i) h[i] = affine(normed[i], w[i], b[i]);
          unpack<T>(*stages.at(stage, 0, k), g);
        }
      }
      const int64_t at = row * d + column.first + k * column.step;
      if (!(FULL && a.edit_last)) {
        if (a.dz) {
          unpack<T>(*stages.at(stage, at_dz, k), g);
          RED_UNROLL for (int i = 0; i < kSize; ++i) total[i] += g[i];
        }
        if (a.dresidual != nullptr) store16(static_cast<T*>(a.dresidual) + at, pack<T>(total));
        if (KIND != kPlain && a.edit.dropout.seed != nullptr) drop<T>(a.edit.dropout, seed, row, column(k), total);
        RED_UNROLL for (int i = 0; i < kSize; ++i) g[i] = total[i];
        if (a.x)
          unpack<T>(*stages.at(stage, at_x, k), h);
        else
          fill<T>(h, 0.0f);
        if (a.dx != nullptr) {
          if constexpr (OPTIONS) {
            apply_scale<T>(a.edit, own, column(k), kSize, true, total);
          } else {
            float u[kSize];
            load_vector<T, kWide>(scale, k * column.step, kSize, true, u);
            RED_UNROLL for (int i = 0; i < kSize; ++i) total[i] = product(total[i], u[i]);
          }
        }
      }
      if (a.dx != nullptr) store16(static_cast<T*>(a.dx) + at, pack<T>(total));
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        sums.v[0][k][i] = multiply_add(g[i], h[i], sums.v[0][k][i]);
        sums.v[1][k][i] += g[i];
      }
    }
    id = next_id, rstd = next_rstd, mean = next_mean;
    stage = stage + 1 == a.stages ? 0 : stage + 1;
  }

  let_next_start();
  if (sorted) {
    RED_UNROLL for (int s = 0; s < 2; ++s)
      if (a.lines[s] != nullptr) sums.store(a.lines[s], current.last_line(), d, column, s);
    if (group.thread == 0 && group.rank == 0) current.store(a.deal.owners);
  }
  RED_UNROLL for (int s = 0; s < kSums; ++s) {
    if (a.lines[s] == nullptr || (sorted && s < 2)) continue;
    store_sums<T, N, kSums>(sums, a.lines[s], block, d, column, s, group, groups);
  }
}

template <class T, int N, bool CENTERED, BackwardKind KIND>
Kernel<NormBackward> norm_backward_of(const Launch& l) {
  if constexpr (!has_backward(KIND, N, kVector<T>)) {
  } else if constexpr (KIND == kExact) {
    if (l.cluster == 1) return kernel_of<NormBackward, norm_backward_exact<T, N, CENTERED, false>>();
    if constexpr (few_columns(N * kVector<T>)) return kernel_of<NormBackward, norm_backward_exact<T, N, CENTERED, true>>();
  } else {
    return kernel_of<NormBackward, norm_backward<T, N, CENTERED, KIND>>();
  }
  throw std::logic_error(described(l, "it is not compiled for " + std::to_string(N) + " vectors"));
}

template <class T, bool CENTERED, BackwardKind KIND>
Kernel<NormBackward> norm_backward_of(const Launch& l, int n) {
  switch (n) {
    case 1:
      return norm_backward_of<T, 1, CENTERED, KIND>(l);
    case 2:
      return norm_backward_of<T, 2, CENTERED, KIND>(l);
    case 3:
      return norm_backward_of<T, 3, CENTERED, KIND>(l);
    case 4:
      return norm_backward_of<T, 4, CENTERED, KIND>(l);
    case 6:
      return norm_backward_of<T, 6, CENTERED, KIND>(l);
    case 8:
      return norm_backward_of<T, 8, CENTERED, KIND>(l);
  }
  throw std::logic_error(described(l, "it is not compiled for " + std::to_string(n) + " vectors"));
}

template <class T, bool CENTERED>
Kernel<NormBackward> norm_backward_of(const Launch& l, int n, BackwardKind kind) {
  switch (kind) {
    case kExact:
      return norm_backward_of<T, CENTERED, kExact>(l, n);
    case kPlain:
      return norm_backward_of<T, CENTERED, kPlain>(l, n);
    case kMore:
      return norm_backward_of<T, CENTERED, kMore>(l, n);
    case kOptions:
      return norm_backward_of<T, CENTERED, kOptions>(l, n);
    default:
      return norm_backward_of<T, CENTERED, kFull>(l, n);
  }
}

template <class T>
Kernel<NormBackward> norm_backward_kernel(const Launch& l, int n, bool centered, BackwardKind kind) {
  return centered ? norm_backward_of<T, true>(l, n, kind) : norm_backward_of<T, false>(l, n, kind);
}

}  // namespace cuda
}  // namespace red
