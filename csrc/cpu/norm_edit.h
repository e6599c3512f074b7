// The norm with an edit behind it (norm_edit_forward, norm_edit_backward in reference.py).
#pragma once

#include "norm.h"

namespace red {
namespace RED_ISA {

template <class T, bool Centered, bool Stream>
void norm_edit_forward_rows(const NormEditForward& p, int64_t begin, int64_t end, float* held) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(p.x, i);
    const float *scale = p.scale.row(i), *bias = p.bias.row(i);
    T* y = output<T>(p.y, p.d, i);
    Sum first;
    sweep(p.d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      prepare<Stream>(y + j);
      const V value = at.load(x + j);
      at.template store<false>(held + j, value);
      first.add(k, first_term<Centered>(value));
    });
    const Statistics s = statistics<Centered>(held, p.d, first, p.eps);
    if (Centered) p.mean[i] = s.mean;
    p.rstd[i] = s.rstd;
    const T* next_x = row<T>(p.x, i + 1 < end ? i + 1 : i);
    sweep(p.d, [&](auto at, int64_t j, int) __attribute__((always_inline)) {
      // This pass reads nothing from memory, so the next row can come in meanwhile.
      __builtin_prefetch(next_x + j);
      const V normed = normalised<Centered>(at.load(held + j), s);
      const V h = normed * at.load(p.weight + j) + at.load(p.norm_bias + j);
      at.template store<Stream>(y + j, h * at.load(scale + j) + at.load(bias + j));
    });
  }
  if (Stream) fence();
}

template <class T, bool Centered>
void norm_edit_forward(const NormEditForward& p, int64_t begin, int64_t end, float* scratch) {
  (p.stream ? norm_edit_forward_rows<T, Centered, true> : norm_edit_forward_rows<T, Centered, false>)(p, begin, end,
                                                                                                     scratch);
}

template <class T, bool Centered, bool Stream>
void norm_edit_backward_rows(const NormEditBackward& p, const Chunk& chunk, const Columns& sums, float*) {
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dy = row<T>(p.dy, i), *x = row<T>(p.x, i);
    const float* scale = p.scale.row(i);
    const Statistics s{Centered ? p.mean[i] : 0.0f, p.rstd[i]};
    T* dx = output<T>(p.dx, p.d, i);
    Projection projection;
    sweep(p.d, [&](auto at, int64_t j, int unit) __attribute__((always_inline)) {
      if (dx) prepare<Stream>(dx + j);
      const V normed = at.valid(normalised<Centered>(at.load(x + j), s)), gradient = at.load(dy + j);
      const V of_norm = gradient * at.load(scale + j);
      projection.add<Centered>(unit, of_norm * at.load(p.weight + j), normed);
      if (sums.dscale) {
        const V h = normed * at.load(p.weight + j) + at.load(p.norm_bias + j);
        accumulate(sums.dscale, at, j, gradient * h);
      }
      if (sums.dbias) accumulate(sums.dbias, at, j, gradient);
      if (sums.dweight) accumulate(sums.dweight, at, j, of_norm * normed);
      if (sums.dnorm_bias) accumulate(sums.dnorm_bias, at, j, of_norm);
    });
    if (!dx) continue;
    projection.finish<Centered>(p.d);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T *next_dy = row<T>(p.dy, next), *next_x = row<T>(p.x, next);
    sweep(p.d, [&](auto at, int64_t j, int) __attribute__((always_inline)) {
      __builtin_prefetch(next_dy + j);
      __builtin_prefetch(next_x + j);
      const V normed = normalised<Centered>(at.load(x + j), s);
      const V gradient = at.load(dy + j) * at.load(scale + j) * at.load(p.weight + j);
      at.template store<Stream>(dx + j, projection.apply<Centered>(gradient, normed, s));
    });
  }
  if (Stream) fence();
}

template <class T, bool Centered>
void norm_edit_backward(const NormEditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  (p.stream ? norm_edit_backward_rows<T, Centered, true> : norm_edit_backward_rows<T, Centered, false>)(p, chunk, sums,
                                                                                                       scratch);
}

}  // namespace RED_ISA
}  // namespace red
