// The edit, the residual add and the norm behind it in one pass (edit_norm_forward, edit_norm_backward in reference.py).
#pragma once

#include "edit.h"
#include "norm.h"

namespace red {
namespace RED_ISA {

template <class T, bool Centered, bool Stream>
void edit_norm_forward_rows(const EditNormForward& p, int64_t begin, int64_t end, float* scratch) {
  float *held = scratch, *factors = scratch + padded(p.d);
  for (int64_t i = begin; i < end; ++i) {
    const T *x = row<T>(p.x, i), *residual = p.residual ? row<T>(p.residual, i) : nullptr;
    const float *scale = p.scale.row(i), *bias = p.bias.row(i);
    const float* factor = dropout_factors(p.dropout, i, p.d, factors);
    T *y = output<T>(p.y, p.d, i), *z = output<T>(p.z, p.d, i);
    Sum first;
    sweep(p.d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      prepare<Stream>(y + j);
      V h = edited(at, j, x, residual, scale, bias, factor);
      if (z) {
        h = rounded(T{}, h);
        at.template store<Stream>(z + j, h);
      }
      at.template store<false>(held + j, h);
      first.add(k, first_term<Centered>(h));
    });
    const Statistics s = statistics<Centered>(held, p.d, first, p.eps);
    if (Centered) p.mean[i] = s.mean;
    p.rstd[i] = s.rstd;
    const int64_t next = i + 1 < end ? i + 1 : i;
    const T *next_x = row<T>(p.x, next), *next_residual = residual ? row<T>(p.residual, next) : next_x;
    sweep(p.d, [&](auto at, int64_t j, int) __attribute__((always_inline)) {
      // This pass reads nothing from memory, so the next row can come in meanwhile.
      __builtin_prefetch(next_x + j);
      __builtin_prefetch(next_residual + j);
      const V normed = normalised<Centered>(at.load(held + j), s);
      at.template store<Stream>(y + j, normed * at.load(p.weight + j) + at.load(p.norm_bias + j));
    });
  }
  if (Stream) fence();
}

template <class T, bool Centered>
void edit_norm_forward(const EditNormForward& p, int64_t begin, int64_t end, float* scratch) {
  (p.stream ? edit_norm_forward_rows<T, Centered, true> : edit_norm_forward_rows<T, Centered, false>)(p, begin, end,
                                                                                                     scratch);
}

template <class T, bool Centered, bool Stream, bool HasZ>
void edit_norm_backward_rows(const EditNormBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  float *held = scratch, *factors = scratch + padded(p.d);
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dy = row<T>(p.dy, i), *dz = p.dz ? row<T>(p.dz, i) : nullptr;
    const T *z = p.z ? row<T>(p.z, i) : nullptr, *x = p.x ? row<T>(p.x, i) : nullptr;
    const T* residual = p.residual ? row<T>(p.residual, i) : nullptr;
    const float *scale = p.scale.row(i), *bias = p.bias.row(i);
    const float* factor = dropout_factors(p.dropout, i, p.d, factors);
    const Statistics s{Centered ? p.mean[i] : 0.0f, p.rstd[i]};
    T *dx = output<T>(p.dx, p.d, i), *dresidual = output<T>(p.dresidual, p.d, i);
    Projection projection;
    sweep(p.d, [&](auto at, int64_t j, int unit) __attribute__((always_inline)) {
      if (dresidual) prepare<Stream>(dresidual + j);
      if (dx) prepare<Stream>(dx + j);
      V value;
      if constexpr (HasZ) {
        value = at.load(z + j);
        if (x) __builtin_prefetch(x + j);
        if (dz) __builtin_prefetch(dz + j);
      } else {
        value = edited(at, j, x, residual, scale, bias, factor);
        at.template store<false>(held + j, value);
      }
      const V normed = at.valid(normalised<Centered>(value, s)), gradient = at.load(dy + j);
      projection.add<Centered>(unit, gradient * at.load(p.weight + j), normed);
      if (sums.dweight) accumulate(sums.dweight, at, j, gradient * normed);
      if (sums.dnorm_bias) accumulate(sums.dnorm_bias, at, j, gradient);
    });
    projection.finish<Centered>(p.d);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T *next_dy = row<T>(p.dy, next), *next_z = HasZ ? row<T>(p.z, next) : row<T>(p.x, next);
    sweep(p.d, [&](auto at, int64_t j, int) __attribute__((always_inline)) {
      __builtin_prefetch(next_dy + j);
      __builtin_prefetch(next_z + j);
      const V normed = normalised<Centered>(HasZ ? at.load(z + j) : at.load(held + j), s);
      V g = projection.apply<Centered>(at.load(dy + j) * at.load(p.weight + j), normed, s);
      if (dz) g += at.load(dz + j);
      if (dresidual) at.template store<Stream>(dresidual + j, g);
      edit_gradient<T, Stream>(at, j, g, x, scale, factor, dx, sums);
    });
  }
  if (Stream) fence();
}

template <class T, bool Centered>
void edit_norm_backward(const EditNormBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  if (p.z)
    (p.stream ? edit_norm_backward_rows<T, Centered, true, true> : edit_norm_backward_rows<T, Centered, false, true>)(
        p, chunk, sums, scratch);
  else
    (p.stream ? edit_norm_backward_rows<T, Centered, true, false> : edit_norm_backward_rows<T, Centered, false, false>)(
        p, chunk, sums, scratch);
}

}  // namespace RED_ISA
}  // namespace red
