// The edit by itself, with a residual or without, and all backwards in which every column is by itself.
//
// A block has 256 threads: `lanes` of them take the vectors of a slab of columns, so that scale and bias are loaded once, and
// the others the same slab of other rows. Grid: (blocks for each slab, slabs).
#pragma once

#include "kernels.h"
#include "sorted.h"

namespace red {
namespace cuda {

constexpr int kSlabRows = 3, kNormSlabRows = 2;  // rows of a thread that are on their way at once, as kEditRows

template <class T>
struct Slab {
  RED_DEVICE Slab(int64_t d, bool aligned, int lanes)
      : lane(threadIdx.x % lanes), slot(threadIdx.x / lanes), slots(kSlabThreads / lanes),
        column((static_cast<int64_t>(blockIdx.y) * lanes + lane) * kVector<T>),
        count(column + kVector<T> <= d ? kVector<T> : column < d ? d - column : 0), whole(aligned && count > 0) {}

  int lane, slot, slots;
  int64_t column, count;
  bool whole;
};

// PLAIN: scale and bias in fp32, no dropout, no edit_ids.
template <class T, bool PLAIN>
RED_KERNEL(kSlabThreads, 3) edit_forward(RED_ARGUMENT EditForward a) {
  const Slab<T> s(a.d, a.aligned, a.lanes);
  if (s.count == 0) return;
  const int64_t seed = PLAIN ? 0 : dropout_seed(a.edit);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * s.slots * kEditRows + s.slot;
  Raw x[kEditRows], r[kEditRows];
  RED_UNROLL for (int u = 0; u < kEditRows; ++u) {
    const int64_t row = first + u * s.slots;
    if (row >= a.rows) continue;
    x[u] = load_raw(row_of<T>(a.x, row), s.column, s.count, s.whole);
    if (a.residual) r[u] = load_raw(row_of<T>(a.residual, row), s.column, s.count, s.whole);
  }
  float scale[kVector<T>], bias[kVector<T>];
  if constexpr (PLAIN) {
    load_vector<T, kWide>(a.edit.scale, s.column, s.count, s.whole, scale);
    load_vector<T, kWide>(a.edit.bias, s.column, s.count, s.whole, bias);
  }
  RED_UNROLL for (int u = 0; u < kEditRows; ++u) {
    const int64_t row = first + u * s.slots;
    if (row >= a.rows) continue;
    float v[kVector<T>];
    unpack<T>(x[u], v);
    if constexpr (PLAIN) {
      RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = multiply_add(v[i], scale[i], bias[i]);
    } else {
      const RowEdit own(a.edit, edit_id(a.edit, row));
      apply_edit<T>(a.edit, own, seed, row, s.column, s.count, s.whole, v);
    }
    if (a.residual) add_raw<T>(r[u], v);
    store_raw<T>(a.z, row, a.d, s.column, s.count, s.whole, pack<T>(v));
  }
}

// The column sums of a thread: kSums vectors.
template <class T, int kSums>
struct SlabSums {
  RED_DEVICE SlabSums() { clear(kSums); }
  RED_DEVICE void clear(int sums) {
    RED_UNROLL for (int k = 0; k < kSums; ++k)
      if (k < sums) fill<T>(v[k], 0.0f);
  }
  RED_DEVICE void store(float* lines, int64_t line, int64_t d, const Slab<T>& s, int k) const {
    float* to = lines + line * d + s.column;
    RED_UNROLL for (int i = 0; i < kVector<T>; ++i)
      if (i < s.count) to[i] = v[k][i];
  }

  float v[kSums][kVector<T>];
};

// NORM: with the norm's part, from the averages over each row. kRows rows of a thread are on their way at once.
template <class T, bool NORM, int kRows>
RED_KERNEL(kSlabThreads, slab_blocks(NORM)) slab_backward(RED_ARGUMENT SlabBackward a) {
  constexpr int kSums = NORM ? 4 : 2;
  constexpr int kSize = kVector<T>;
  const Slab<T> s(a.d, a.aligned, a.lanes);
  const int64_t seed = dropout_seed(a.edit);
  const int64_t worker = worker_number(s.slot, blockIdx.x, gridDim.x);
  const int64_t workers = static_cast<int64_t>(gridDim.x) * s.slots;
  const bool sorted = a.deal.order != nullptr;
  SlabSums<T, kSums> sums;
  Places<true> places(a.deal, a.rows, worker, workers);
  Current current(a.deal, sorted, places, worker, a.edit.edits);
  const bool scaled = a.edit.scale.data != nullptr, same = a.edit.ids == nullptr && !sorted;
  float scale[kSize];
  fill<T>(scale, 1.0f);
  if (scaled && same && s.count > 0) load_vector<T>(a.edit.scale, s.column, s.count, s.whole, scale);
  if (s.count > 0) {
    while (places.more()) {
      Raw dy[kRows], dz[kRows], z[kRows], x[kRows], r[kRows];
      int64_t rows[kRows], ids[kRows];
      bool live[kRows];
      RED_UNROLL for (int u = 0; u < kRows; ++u) {
        live[u] = places.more();
        if (!live[u]) continue;
        const int64_t row = rows[u] = places.row();
        ids[u] = sorted ? a.deal.sorted[places.place] : edit_id(a.edit, row);
        dy[u] = load_raw(row_of<T>(a.dy, row), s.column, s.count, s.whole);
        if (a.x) x[u] = load_raw(row_of<T>(a.x, row), s.column, s.count, s.whole);
        if constexpr (NORM) {
          if (a.dz) dz[u] = load_raw(row_of<T>(a.dz, row), s.column, s.count, s.whole);
          if (a.z) z[u] = load_raw(row_of<T>(a.z, row), s.column, s.count, s.whole);
          if (a.residual) r[u] = load_raw(row_of<T>(a.residual, row), s.column, s.count, s.whole);
        }
        places.advance();
      }
      RED_UNROLL for (int u = 0; u < kRows; ++u) {
        if (!live[u]) continue;
        if (sorted && ids[u] != current.id) {
          const int64_t line = current.line();
          RED_UNROLL for (int k = 0; k < 2; ++k)
            if (a.lines[k] != nullptr && line >= 0) sums.store(a.lines[k], line, a.d, s, k);
          sums.clear(2);
          current.next(ids[u]);
        }
        const RowEdit own(a.edit, same ? 0 : ids[u]);
        if (scaled && !same) {
          load_vector<T>(a.edit.scale, own.offset + s.column, s.count, s.whole, scale);
          if (!own.known) fill<T>(scale, not_a_number());
        }
        float g[kSize], h[kSize];
        unpack<T>(dy[u], g);
        if (a.x) unpack<T>(x[u], h);
        if constexpr (NORM) {
          float v[kSize], w[kSize], b[kSize];
          if (a.z)
            unpack<T>(z[u], v);
          else
            unpack<T>(edited<T>(a.edit, own, seed, rows[u], s.column, s.count, s.whole, x[u], r[u], bool(a.residual)), v);
          const float rstd = a.rstd[rows[u]], mean = a.mean != nullptr ? a.mean[rows[u]] : 0.0f;
          const float c1 = a.averages[rows[u]], c2 = a.averages[a.rows + rows[u]];
          load_weight<T>(a.weight, a.weight_offset, s.column, s.count, s.whole, w);
          load_norm_bias<T>(a.norm_bias, s.column, s.count, s.whole, b);
          float gy[kSize];  // the gradient of the norm's result
          RED_UNROLL for (int i = 0; i < kSize; ++i) gy[i] = a.edit_last ? product(g[i], scale[i]) : g[i];
          float total[kSize];
          RED_UNROLL for (int i = 0; i < kSize; ++i) {
            const float normed = (v[i] - mean) * rstd;
            sums.v[2][i] += gy[i] * normed;
            sums.v[3][i] += gy[i];
            total[i] = norm_gradient(normed, product(gy[i], w[i]), rstd, c1, a.mean != nullptr ? c2 : 0.0f);
            if (a.edit_last) h[i] = affine(normed, w[i], b[i]);
          }
          if (a.edit_last) {
            RED_UNROLL for (int i = 0; i < kSize; ++i) {
              sums.v[0][i] += g[i] * h[i];
              sums.v[1][i] += g[i];
            }
            if (a.dx != nullptr) store_raw<T>(a.dx, rows[u], a.d, s.column, s.count, s.whole, pack<T>(total));
            continue;
          }
          if (a.dz) {
            unpack<T>(dz[u], g);
            RED_UNROLL for (int i = 0; i < kSize; ++i) total[i] += g[i];
          }
          if (a.dresidual != nullptr)
            store_raw<T>(a.dresidual, rows[u], a.d, s.column, s.count, s.whole, pack<T>(total));
          RED_UNROLL for (int i = 0; i < kSize; ++i) g[i] = total[i];
        }
        if (a.edit.dropout.seed != nullptr) drop<T>(a.edit.dropout, seed, rows[u], s.column, g);
        RED_UNROLL for (int i = 0; i < kSize; ++i) {
          if (a.x) sums.v[0][i] += g[i] * h[i];
          sums.v[1][i] += g[i];
        }
        if (a.dx != nullptr) {
          RED_UNROLL for (int i = 0; i < kSize; ++i) g[i] *= scale[i];
          store_raw<T>(a.dx, rows[u], a.d, s.column, s.count, s.whole, pack<T>(g));
        }
      }
    }
  }
  let_next_start();
  if (sorted) {
    RED_UNROLL for (int k = 0; k < 2; ++k)
      if (a.lines[k] != nullptr && s.count > 0) sums.store(a.lines[k], current.last_line(), a.d, s, k);
    if (blockIdx.y == 0 && s.lane == 0) current.store(a.deal.owners);
  }
  // The sums of the block's slots, in pairs: always in the same order, and few roundings deep.
  float* shared = reinterpret_cast<float*>(shared_memory());
  RED_UNROLL for (int k = 0; k < kSums; ++k) {
    if (a.lines[k] == nullptr || (sorted && k < 2)) continue;
    RED_UNROLL for (int i = 0; i < kSize; ++i) shared[i * kSlabThreads + threadIdx.x] = sums.v[k][i];
    for (int half = s.slots / 2; half > 0; half /= 2) {
      block_barrier();
      if (s.slot >= half) continue;
      RED_UNROLL for (int i = 0; i < kSize; ++i)
        shared[i * kSlabThreads + threadIdx.x] += shared[i * kSlabThreads + half * a.lanes + threadIdx.x];
    }
    if (s.slot == 0) {
      RED_UNROLL for (int i = 0; i < kSize; ++i) sums.v[k][i] = shared[i * kSlabThreads + threadIdx.x];
      sums.store(a.lines[k], blockIdx.x, a.d, s, k);
    }
    block_barrier();
  }
}

template <class T>
void run_edit_forward(const Launch& l, bool plain, const EditForward& a) {
  plain ? start<EditForward, edit_forward<T, true>>(l, a) : start<EditForward, edit_forward<T, false>>(l, a);
}

template <class T>
void run_slab_backward(const Launch& l, bool norm, const SlabBackward& a) {
  if (norm)
    start<SlabBackward, slab_backward<T, true, kNormSlabRows>>(l, a);
  else
    start<SlabBackward, slab_backward<T, false, kSlabRows>>(l, a);
}

}  // namespace cuda
}  // namespace red
