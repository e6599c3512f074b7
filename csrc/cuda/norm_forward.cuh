// Norms with an edit before or behind them, forward, in one pass: a row lies in the registers of its threads, which are those
// of a warp, of several, of a block, or of a cluster of blocks. Only for aligned rows; wide.cuh takes the others.
//
// Grid: (rows / groups of a block, or rows * blocks of a cluster). N vectors of 16 bytes for each thread.
#pragma once

#include "kernels.h"
#include "group.h"

namespace red {
namespace cuda {

constexpr int kForwardThreads = 256;

template <class T, int N, bool CENTERED>
RED_KERNEL(kForwardThreads, 1) norm_forward(RED_ARGUMENT NormForward a) {
  constexpr int kSize = kVector<T>;
  Group group(a.cluster, reinterpret_cast<float*>(shared_memory()));
  const Columns<T> column(group, N);
  const int64_t row = a.cluster > 1 ? blockIdx.x / a.cluster : static_cast<int64_t>(blockIdx.x) * blockDim.y + group.index;
  if (row >= a.rows) return;  // the whole group

  Raw x[N], r[N];
  const T* from = row_of<T>(a.x, row);
  RED_UNROLL for (int k = 0; k < N; ++k)
    if (column(k) < a.d) x[k] = load16(from + column(k));
  if (a.residual) {
    from = row_of<T>(a.residual, row);
    RED_UNROLL for (int k = 0; k < N; ++k)
      if (column(k) < a.d) r[k] = load16(from + column(k));
  }
  const int64_t id = edit_id(a.edit, row), seed = dropout_seed(a.edit);

  float v[N][kSize], s[1] = {0.0f};
  RED_UNROLL for (int k = 0; k < N; ++k) {
    fill<T>(v[k], 0.0f);
    if (column(k) >= a.d) continue;
    if (a.edit_last)
      unpack<T>(x[k], v[k]);
    else
      edited<T>(a.edit, id, seed, row, column(k), kSize, true, x[k], r[k], bool(a.residual), v[k]);
    if (a.z != nullptr) {  // the norm sees what is kept
      const Raw z = pack<T>(v[k]);
      store16(static_cast<T*>(a.z) + row * a.d + column(k), z);
      unpack<T>(z, v[k]);
    }
    RED_UNROLL for (int i = 0; i < kSize; ++i) s[0] += CENTERED ? v[k][i] : v[k][i] * v[k][i];
  }
  group.sum(s);

  const float d = static_cast<float>(a.d);
  float mean = 0.0f, variance;
  if constexpr (CENTERED) {
    const float first = s[0] / d;
    float spread[2] = {0.0f, 0.0f};
    RED_UNROLL for (int k = 0; k < N; ++k) {
      if (column(k) >= a.d) continue;
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        const float away = v[k][i] - first;
        spread[0] += away;
        spread[1] += away * away;
      }
    }
    group.sum(spread);
    const Moments found = moments(first, spread[0], spread[1], d);
    mean = found.mean;
    variance = found.variance;
  } else {
    variance = s[0] / d;
  }
  const float rstd = reciprocal_root(variance + a.eps);
  if (group.thread == 0 && group.rank == 0) {
    if constexpr (CENTERED) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }

  RED_UNROLL for (int k = 0; k < N; ++k) {
    if (column(k) >= a.d) continue;
    float w[kSize], b[kSize];
    load_weight<T>(a.weight, a.weight_offset, column(k), kSize, true, w);
    fill<T>(b, -0.0f);
    if (a.norm_bias.data != nullptr) load_vector<T>(a.norm_bias, 0, column(k), kSize, true, b);
    RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] = affine((v[k][i] - mean) * rstd, w[i], b[i]);
    if (a.edit_last) apply_edit<T>(a.edit, id, seed, row, column(k), kSize, true, v[k]);
    store16(static_cast<T*>(a.y) + row * a.d + column(k), pack<T>(v[k]));
  }
}

template <class T, bool CENTERED>
void run_norm_forward_of(const Launch& l, int n, const NormForward& a) {
  switch (n) {
    case 1:
      return start<NormForward, norm_forward<T, 1, CENTERED>>(l, a);
    case 2:
      return start<NormForward, norm_forward<T, 2, CENTERED>>(l, a);
    case 3:
      return start<NormForward, norm_forward<T, 3, CENTERED>>(l, a);
    case 4:
      return start<NormForward, norm_forward<T, 4, CENTERED>>(l, a);
    case 6:
      return start<NormForward, norm_forward<T, 6, CENTERED>>(l, a);
    case 8:
      return start<NormForward, norm_forward<T, 8, CENTERED>>(l, a);
  }
  throw std::logic_error(described(l, "it is not compiled for " + std::to_string(n) + " vectors"));
}

template <class T>
void run_norm_forward(const Launch& l, int n, bool centered, const NormForward& a) {
  centered ? run_norm_forward_of<T, true>(l, n, a) : run_norm_forward_of<T, false>(l, n, a);
}

}  // namespace cuda
}  // namespace red
