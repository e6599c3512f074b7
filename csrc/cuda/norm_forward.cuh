// Norms with an edit before or behind them, forward, in one pass: a row lies in the registers of its threads, which are those
// of a warp, of several, of a block, or of a cluster of blocks. Only for aligned rows; wide.cuh takes the others.
//
// PLAIN: the usual arguments, known when it is compiled: a residual, scale and bias in fp32, a weight in the activations' type,
// no dropout, no edit_ids. It takes half the instructions.
//
// Grid: (rows / groups of a block, or rows * blocks of a cluster). N vectors of 16 bytes for each thread.
#pragma once

#include "kernels.h"
#include "moments.h"
#include "norm_forward_exact.cuh"

namespace red {
namespace cuda {

template <class T, int N, bool CENTERED, bool PLAIN>
RED_KERNEL(kForwardThreads, 1) norm_forward(RED_ARGUMENT NormForward a) {
  constexpr int kSize = kVector<T>;
  Group<kForwardGroups> group(a.cluster, reinterpret_cast<float*>(shared_memory()));
  const Columns<T, N> column(group);
  const int d = static_cast<int>(a.d);
  const int64_t row = a.cluster > 1 ? blockIdx.x / a.cluster : static_cast<int64_t>(blockIdx.x) * blockDim.y + group.index;
  if (row >= a.rows) return;  // the whole group

  Raw x[N], r[N];
  const T* from = row_of<T>(a.x, row);
  RED_UNROLL for (int k = 0; k < N; ++k)
    if (column(k) < d) x[k] = load16(from + column(k));
  if (PLAIN || a.residual) {
    from = row_of<T>(a.residual, row);
    RED_UNROLL for (int k = 0; k < N; ++k)
      if (column(k) < d) r[k] = load16(from + column(k));
  }
  const RowEdit own(a.edit, PLAIN ? 0 : edit_id(a.edit, row));
  const int64_t seed = PLAIN ? 0 : dropout_seed(a.edit);

  float v[N][kSize], s[1] = {0.0f};
  RED_UNROLL for (int k = 0; k < N; ++k) {
    fill<T>(v[k], 0.0f);
    if (column(k) >= d) continue;
    Raw z;  // as the norm sees it, whether it is kept or not
    if constexpr (PLAIN) {
      float scale[kSize], bias[kSize];
      load_vector<T, kWide>(a.edit.scale, column(k), kSize, true, scale);
      load_vector<T, kWide>(a.edit.bias, column(k), kSize, true, bias);
      unpack<T>(x[k], v[k]);
      RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] = multiply_add(v[k][i], scale[i], bias[i]);
      add_raw<T>(r[k], v[k]);
      z = pack<T>(v[k]);
    } else if (a.edit_last) {
      z = x[k];
    } else {
      z = edited<T>(a.edit, own, seed, row, column(k), kSize, true, x[k], r[k], bool(a.residual));
    }
    if (a.z != nullptr) store16(static_cast<T*>(a.z) + row * d + column(k), z);
    unpack<T>(z, v[k]);
    RED_UNROLL for (int i = 0; i < kSize; ++i) s[0] = first_sum<CENTERED>(v[k][i], s[0]);
  }
  group.sum(s);

  const auto [mean, rstd] = row_statistics<T, N, CENTERED>(group, column, a, row, v, s);

  RED_UNROLL for (int k = 0; k < N; ++k) {
    if (column(k) >= d) continue;
    float w[kSize], b[kSize];
    load_weight<T, PLAIN ? kNarrow : kAny>(a.weight, a.weight_offset, column(k), kSize, true, w);
    load_norm_bias<T>(a.norm_bias, column(k), kSize, true, b);
    RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] = affine((v[k][i] - mean) * rstd, w[i], b[i]);
    if (!PLAIN && a.edit_last) apply_edit<T>(a.edit, own, seed, row, column(k), kSize, true, v[k]);
    store16(static_cast<T*>(a.y) + row * d + column(k), pack<T>(v[k]));
  }
}

template <class T, int N, bool CENTERED, ForwardKind KIND>
void start_norm_forward(const Launch& l, const NormForward& a) {
  if constexpr (KIND == kExactForward)
    start<NormForward, norm_forward_exact<T, N, CENTERED>>(l, a);
  else
    start<NormForward, norm_forward<T, N, CENTERED, KIND == kPlainForward>>(l, a);
}

template <class T, bool CENTERED, ForwardKind KIND>
void run_norm_forward_of(const Launch& l, int n, const NormForward& a) {
  switch (n) {
    case 1:
      return start_norm_forward<T, 1, CENTERED, KIND>(l, a);
    case 2:
      return start_norm_forward<T, 2, CENTERED, KIND>(l, a);
    case 3:
      return start_norm_forward<T, 3, CENTERED, KIND>(l, a);
    case 4:
      return start_norm_forward<T, 4, CENTERED, KIND>(l, a);
    case 6:
      return start_norm_forward<T, 6, CENTERED, KIND>(l, a);
    case 8:
      return start_norm_forward<T, 8, CENTERED, KIND>(l, a);
  }
  throw std::logic_error(described(l, "it is not compiled for " + std::to_string(n) + " vectors"));
}

template <class T, ForwardKind KIND>
void run_norm_forward_kind(const Launch& l, int n, bool centered, const NormForward& a) {
  centered ? run_norm_forward_of<T, true, KIND>(l, n, a) : run_norm_forward_of<T, false, KIND>(l, n, a);
}

template <class T>
void run_norm_forward(const Launch& l, int n, bool centered, ForwardKind kind, const NormForward& a) {
  if (kind == kExactForward)
    run_norm_forward_kind<T, kExactForward>(l, n, centered, a);
  else if (kind == kPlainForward)
    run_norm_forward_kind<T, kPlainForward>(l, n, centered, a);
  else
    run_norm_forward_kind<T, kAnyForward>(l, n, centered, a);
}

}  // namespace cuda
}  // namespace red
