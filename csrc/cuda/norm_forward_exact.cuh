// Norms behind an edit, forward, as most calls have them: norm_forward's usual arguments (PLAIN), with z kept; besides every
// thread has all of its columns, the rows of x and residual lie one behind the other, nothing is added to the weight, a mean
// comes with a norm_bias and none without, and one block has the row. Nothing of it is asked, and each address is one that is
// known plus a constant: two thirds of the instructions of norm_forward.cuh, to the same bits.
#pragma once

#include "kernels.h"
#include "moments.h"

namespace red {
namespace cuda {

// All of them are there.
template <class T, int N>
struct AllColumns : Columns<T, N> {
  using Columns<T, N>::Columns;
  RED_DEVICE bool has(int, int) const { return true; }
};

template <class T, int N, bool CENTERED>
RED_KERNEL(kForwardThreads, 2) norm_forward_exact(RED_ARGUMENT NormForward a) {
  constexpr int kSize = kVector<T>;
  Group<kForwardGroups, false> group(1, reinterpret_cast<float*>(shared_memory()));
  const AllColumns<T, N> column(group);
  const int d = static_cast<int>(a.d);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + group.index;
  if (row >= a.rows) return;  // the whole group
  const int64_t at = row * d + column.first;

  Raw x[N], r[N];
  const T* from = as_base(static_cast<const T*>(a.x.data) + at);
  RED_UNROLL for (int k = 0; k < N; ++k) x[k] = load16(from + k * column.step);
  from = as_base(static_cast<const T*>(a.residual.data) + at);
  RED_UNROLL for (int k = 0; k < N; ++k) r[k] = load16(from + k * column.step);

  float v[N][kSize], s[1] = {0.0f};
  const Vectors scales{as_base(static_cast<const float*>(a.edit.scale.data) + column.first), true};
  const Vectors biases{as_base(static_cast<const float*>(a.edit.bias.data) + column.first), true};
  T* z = as_base(static_cast<T*>(a.z) + at);
  RED_UNROLL for (int k = 0; k < N; ++k) {
    float scale[kSize], bias[kSize];
    load_vector<T, kWide>(scales, k * column.step, kSize, true, scale);
    load_vector<T, kWide>(biases, k * column.step, kSize, true, bias);
    unpack<T>(x[k], v[k]);
    RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] = multiply_add(v[k][i], scale[i], bias[i]);
    add_raw<T>(r[k], v[k]);
    const Raw rounded = pack<T>(v[k]);
    put16(z + k * column.step, rounded);
    unpack<T>(rounded, v[k]);
    RED_UNROLL for (int i = 0; i < kSize; ++i) s[0] = first_sum<CENTERED>(v[k][i], s[0]);
  }
  group.sum(s);

  const auto [mean, rstd] = row_statistics<T, N, CENTERED>(group, column, a, row, v, s);

  const T* weights = as_base(static_cast<const T*>(a.weight.data) + column.first);
  T* y = as_base(static_cast<T*>(a.y) + at);
  RED_UNROLL for (int k = 0; k < N; ++k) {
    float w[kSize], b[kSize];
    unpack<T>(load16(weights + k * column.step), w);
    if constexpr (CENTERED)
      load_vector<T>(a.norm_bias, column(k), kSize, true, b);
    else
      fill<T>(b, -0.0f);
    RED_UNROLL for (int i = 0; i < kSize; ++i) v[k][i] = affine((v[k][i] - mean) * rstd, w[i], b[i]);
    put16(y + k * column.step, pack<T>(v[k]));
  }
}

}  // namespace cuda
}  // namespace red
