// The edit with its dropout and residual add, forward and backward (edit_forward, edit_backward in reference.py).
#pragma once

#include "philox.h"

namespace red {
namespace RED_ISA {

// residual + dropout(scale * x + bias) at one place of a row; absent residuals and factors are null.
template <class T, class At>
RED_INLINE V edited(At at, int64_t j, const T* x, const T* residual, const float* scale, const float* bias,
                    const float* factor) {
  V h = at.load(x + j) * at.load(scale + j) + at.load(bias + j);
  if (factor) h *= at.load(factor + j);
  if (residual) h += at.load(residual + j);
  return h;
}

template <class T, bool Stream>
void edit_forward_rows(const EditForward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const T *x = row<T>(p.x, i), *residual = p.residual ? row<T>(p.residual, i) : nullptr;
    const float *scale = p.scale.row(i), *bias = p.bias.row(i);
    const float* factor = dropout_factors(p.dropout, i, p.d, scratch);
    T* z = output<T>(p.z, p.d, i);
    sweep(p.d, [&](auto at, int64_t j, int) __attribute__((always_inline)) {
      at.template store<Stream>(z + j, edited(at, j, x, residual, scale, bias, factor));
    });
  }
  if (Stream) fence();
}

template <class T>
void edit_forward(const EditForward& p, int64_t begin, int64_t end, float* scratch) {
  (p.stream ? edit_forward_rows<T, true> : edit_forward_rows<T, false>)(p, begin, end, scratch);
}

// The part of every backward behind the gradient g of z: the dropout, dx, and the two column sums.
template <class T, bool Stream, class At>
RED_INLINE void edit_gradient(At at, int64_t j, V g, const T* x, const float* scale, const float* factor, T* dx,
                              const Columns& sums) {
  if (factor) g *= at.load(factor + j);
  if (sums.dscale) at.template store<false>(sums.dscale + j, at.load(sums.dscale + j) + g * at.load(x + j));
  if (sums.dbias) at.template store<false>(sums.dbias + j, at.load(sums.dbias + j) + g);
  if (dx) at.template store<Stream>(dx + j, g * at.load(scale + j));
}

template <class T, bool Stream>
void edit_backward_rows(const EditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dz = row<T>(p.dz, i), *x = p.x ? row<T>(p.x, i) : nullptr;
    const float* scale = p.scale.row(i);
    const float* factor = dropout_factors(p.dropout, i, p.d, scratch);
    T* dx = output<T>(p.dx, p.d, i);
    sweep(p.d, [&](auto at, int64_t j, int) __attribute__((always_inline)) {
      edit_gradient<T, Stream>(at, j, at.load(dz + j), x, scale, factor, dx, sums);
    });
  }
  if (Stream) fence();
}

template <class T>
void edit_backward(const EditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  (p.stream ? edit_backward_rows<T, true> : edit_backward_rows<T, false>)(p, chunk, sums, scratch);
}

}  // namespace RED_ISA
}  // namespace red
