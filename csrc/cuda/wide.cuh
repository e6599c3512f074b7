// Norms with an edit for rows that do not fit into registers, or do not begin on 16 bytes: piece by piece.
//
// One block for each row. Forward it goes over its row two or three times, the later ones through the cache. Backward,
// row_averages makes the two averages of each row that its gradient needs; with these every column is by itself:
// slab_backward in edit.cuh. 8 passes over an activation rather than 6.
#pragma once

#include "group.h"
#include "kernels.h"

namespace red {
namespace cuda {

template <class T>
struct Piece {
  RED_DEVICE Piece(int64_t d, bool aligned, int64_t first)
      : column(first), count(static_cast<int>(column + kVector<T> <= d ? kVector<T> : d - column)), whole(aligned) {}
  int64_t column;
  int count;
  bool whole;
};

template <class T>
RED_KERNEL(kWideThreads, 3) wide_forward(RED_ARGUMENT NormForward a) {
  constexpr int kSize = kVector<T>;
  Group<1> group(1, reinterpret_cast<float*>(shared_memory()));
  const int64_t row = blockIdx.x, seed = dropout_seed(a.edit);
  const RowEdit own(a.edit, edit_id(a.edit, row));
  const int64_t first = static_cast<int64_t>(group.thread) * kSize, step = static_cast<int64_t>(group.threads) * kSize;
  const bool centered = a.mean != nullptr;

  // What is normed, as rounded. A thread reads of z only what it wrote itself.
  const auto input = [&](const Piece<T>& p, bool kept, float (&v)[kSize]) {
    const T* from = kept ? static_cast<const T*>(a.z) + row * a.d : row_of<T>(a.x, row);
    const Raw x = load_raw(from, p.column, p.count, p.whole);
    if (kept || a.edit_last) return unpack<T>(x, v);
    Raw r{};
    if (a.residual) r = load_raw(row_of<T>(a.residual, row), p.column, p.count, p.whole);
    unpack<T>(edited<T>(a.edit, own, seed, row, p.column, p.count, p.whole, x, r, bool(a.residual)), v);
  };

  const float d = static_cast<float>(a.d);
  // The first value of the row. Equal values do not differ from it, and their distances from it do not overflow. Another turn
  // for the rows that need it, as in norm_forward, would take more registers than there are for three blocks.
  float origin = 0.0f;
  if (centered) {
    float v[kSize];
    input(Piece<T>(a.d, a.aligned, 0), false, v);
    origin = v[0];
  }
  float s[1] = {0.0f};
  for (int64_t c = first; c < a.d; c += step) {
    const Piece<T> p(a.d, a.aligned, c);
    float v[kSize];
    input(p, false, v);
    if (a.z != nullptr) store_raw<T>(a.z, row, a.d, p.column, p.count, p.whole, pack<T>(v));
    RED_UNROLL for (int i = 0; i < kSize; ++i)
      if (i < p.count) s[0] += centered ? half_distance(v[i], origin, 1.0f / d) : v[i] * v[i];
  }
  group.sum(s);
  float mean = 0.0f, variance = s[0] / d;
  if (centered) {
    const float middle = mean_from(origin, s[0]);
    float spread[2] = {0.0f, 0.0f};
    for (int64_t c = first; c < a.d; c += step) {
      const Piece<T> p(a.d, a.aligned, c);
      float v[kSize];
      input(p, a.z != nullptr, v);
      RED_UNROLL for (int i = 0; i < kSize; ++i) {
        const float away = i < p.count ? v[i] - middle : 0.0f;
        spread[0] += away;
        spread[1] += away * away;
      }
    }
    group.sum(spread);
    const Moments found = moments(middle, spread[0], spread[1], d);
    mean = found.mean;
    variance = found.variance;
  }
  const float rstd = reciprocal_root(variance + a.eps);
  if (group.thread == 0) {
    if (centered) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  for (int64_t c = first; c < a.d; c += step) {
    const Piece<T> p(a.d, a.aligned, c);
    float v[kSize], w[kSize], b[kSize];
    input(p, a.z != nullptr, v);
    load_weight<T>(a.weight, a.weight_offset, p.column, p.count, p.whole, w);
    load_norm_bias<T>(a.norm_bias, p.column, p.count, p.whole, b);
    RED_UNROLL for (int i = 0; i < kSize; ++i) v[i] = affine((v[i] - mean) * rstd, w[i], b[i]);
    if (a.edit_last) apply_edit<T>(a.edit, own, seed, row, p.column, p.count, p.whole, v);
    store_raw<T>(a.y, row, a.d, p.column, p.count, p.whole, pack<T>(v));
  }
}

template <class T>
RED_KERNEL(kWideThreads, 2) row_averages(RED_ARGUMENT RowAverages a) {
  constexpr int kSize = kVector<T>;
  Group<1> group(1, reinterpret_cast<float*>(shared_memory()));
  const int64_t row = blockIdx.x, seed = dropout_seed(a.edit);
  const RowEdit own(a.edit, edit_id(a.edit, row));
  const int64_t step = static_cast<int64_t>(group.threads) * kSize;
  const float rstd = a.rstd[row], mean = a.mean != nullptr ? a.mean[row] : 0.0f;
  float s[2] = {0.0f, 0.0f};
  for (int64_t c = static_cast<int64_t>(group.thread) * kSize; c < a.d; c += step) {
    const Piece<T> p(a.d, a.aligned, c);
    float v[kSize], g[kSize], w[kSize];
    unpack<T>(load_raw(row_of<T>(a.dy, row), p.column, p.count, p.whole), g);
    if (a.z) {
      unpack<T>(load_raw(row_of<T>(a.z, row), p.column, p.count, p.whole), v);
    } else {
      const Raw x = load_raw(row_of<T>(a.x, row), p.column, p.count, p.whole);
      Raw r{};
      if (a.residual) r = load_raw(row_of<T>(a.residual, row), p.column, p.count, p.whole);
      unpack<T>(edited<T>(a.edit, own, seed, row, p.column, p.count, p.whole, x, r, bool(a.residual)), v);
    }
    load_weight<T>(a.weight, a.weight_offset, p.column, p.count, p.whole, w);
    if (a.edit_last) apply_scale<T>(a.edit, own, p.column, p.count, p.whole, g);
    RED_UNROLL for (int i = 0; i < kSize; ++i) {
      if (i >= p.count) continue;  // what would stand there for a value may be infinitely far from the mean
      const float weighted = product(g[i], w[i]);
      s[0] += weighted * ((v[i] - mean) * rstd);
      s[1] += weighted;
    }
  }
  group.sum(s);
  if (group.thread == 0) {
    a.averages[row] = s[0] / static_cast<float>(a.d);
    a.averages[a.rows + row] = s[1] / static_cast<float>(a.d);
  }
}

template <class T>
void run_wide_forward(const Launch& l, const NormForward& a) {
  start<NormForward, wide_forward<T>>(l, a);
}

template <class T>
void run_row_averages(const Launch& l, const RowAverages& a) {
  start<RowAverages, row_averages<T>>(l, a);
}

}  // namespace cuda
}  // namespace red
