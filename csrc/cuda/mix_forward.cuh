// Mixes forward, with a norm behind them or without, in one pass: a row lies in the registers of its threads. Only for
// rows that mix_layout has a layout for; mix_wide.cuh takes the others.
//
// PLAIN: the usual arguments, known when it is compiled: a norm's weight in the activations' type, no dropout, no
// edit_ids, and a width that its threads share exactly. The mix's vectors are in fp32 in any case.
//
// Grid: (rows / groups of a block).
#pragma once

#include "mix.cuh"
#include "moments.h"

namespace red {
namespace cuda {

constexpr int kMixForwardGroups = 2;  // of more than one warp: see mix_forward_layout

template <class T, bool ROTATION, bool PLAIN>
RED_KERNEL(kMixWarps * 32, 1) mix_row_forward(RED_ARGUMENT MixForward a) {
  constexpr int kSize = kVector<T>, N = kMixForwardColumns / kSize;
  const int d = static_cast<int>(a.d);
  MixGroup<kMixForwardGroups> group(a.lanes, reinterpret_cast<float*>(shared_memory()));
  const MixColumns<T, N, ROTATION, PLAIN> column(group, d, static_cast<int>(a.blocks));
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + group.index;
  if (row >= a.rows) return;  // the whole group

  Raw x[N], r[N];
  const T* from = row_of<T>(a.x, row);
  RED_UNROLL for (int k = 0; k < N; ++k)
    if (column.has(k, d)) x[k] = load16(from + column(k));
  if (a.residual) {
    from = row_of<T>(a.residual, row);
    RED_UNROLL for (int k = 0; k < N; ++k)
      if (column.has(k, d)) r[k] = load16(from + column(k));
  }
  const RowEdit own(a.edit, PLAIN ? 0 : edit_id(a.edit, row));
  const int64_t seed = PLAIN ? 0 : dropout_seed(a.edit), offset = PLAIN ? 0 : own.offset;

  float dots[2] = {0.0f, 0.0f};
  if constexpr (!ROTATION) {
    RED_UNROLL for (int k = 0; k < N; ++k) {
      if (!column.has(k, d)) continue;
      float h[kSize];
      unpack<T>(x[k], h);
      add_dots<T>(a.edit.scale, a.second, offset + column(k), h, dots);
    }
    group.block_sum(dots);
  }

  float v[N][kSize], s[1] = {0.0f};
  RED_UNROLL for (int k = 0; k < N; ++k) {
    fill<T>(v[k], 0.0f);
    if (!column.has(k, d)) continue;
    const int64_t at = offset + column(k);
    unpack<T>(x[k], v[k]);
    if constexpr (ROTATION) {
      float other[kSize];
      unpack<T>(x[k ^ 1], other);
      rotate<T>(a.edit.scale, a.second, at, at, other, v[k]);
    } else {
      reflect<T>(a.edit.scale, a.second, at, dots, v[k]);
    }
    if (a.edit.bias.data != nullptr) {
      float b[kSize];
      load_vector<T, kWide>(a.edit.bias, at, kSize, true, b);
      RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] += b[i];
    }
    if constexpr (!PLAIN) {
      if (!own.known) fill<T>(v[k], not_a_number());
      if (a.edit.dropout.seed != nullptr) drop<T>(a.edit.dropout, seed, row, column(k), v[k]);
    }
    if (a.residual) add_raw<T>(r[k], v[k]);
    const Raw z = pack<T>(v[k]);  // as the norm sees it
    store16(static_cast<T*>(a.z) + row * d + column(k), z);
    unpack<T>(z, v[k]);
  }
  if (a.y == nullptr) return;

  if (a.mean != nullptr) {
    RED_UNROLL for (int k = 0; k < N; ++k)
      RED_UNROLL for (int i = 0; i < kSize; ++i) s[0] += v[k][i];  // 0 where it has no column
  } else {
    RED_UNROLL for (int k = 0; k < N; ++k)
      RED_UNROLL for (int i = 0; i < kSize; ++i) s[0] += v[k][i] * v[k][i];
  }
  group.sum(s);
  float mean = 0.0f, variance;
  if (a.mean != nullptr)
    row_moments<T, N, true>(group, column, d, v, s, mean, variance);
  else
    row_moments<T, N, false>(group, column, d, v, s, mean, variance);
  const float rstd = reciprocal_root(variance + a.eps);
  if (group.first()) {
    if (a.mean != nullptr) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  RED_UNROLL for (int k = 0; k < N; ++k) {
    if (!column.has(k, d)) continue;
    float w[kSize], b[kSize];
    load_weight<T, PLAIN ? kNarrow : kAny>(a.weight, a.weight_offset, column(k), kSize, true, w);
    load_norm_bias<T>(a.norm_bias, column(k), kSize, true, b);
    RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] = affine((v[k][i] - mean) * rstd, w[i], b[i]);
    store16(static_cast<T*>(a.y) + row * d + column(k), pack<T>(v[k]));
  }
}

template <class T, bool PLAIN>
void run_mix_forward_of(const Launch& l, const MixForward& a) {
  if (a.blocks == 0)
    start<MixForward, mix_row_forward<T, true, PLAIN>>(l, a);
  else
    start<MixForward, mix_row_forward<T, false, PLAIN>>(l, a);
}

template <class T>
void run_mix_forward(const Launch& l, bool plain, const MixForward& a) {
  plain ? run_mix_forward_of<T, true>(l, a) : run_mix_forward_of<T, false>(l, a);
}

}  // namespace cuda
}  // namespace red
