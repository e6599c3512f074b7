// The norm with an edit behind it (norm_edit_forward, norm_edit_backward in reference.py).
#pragma once

#include "norm.h"

namespace red {
namespace RED_ISA {

template <class T, bool Centered, bool Stream>
void norm_edit_forward_rows(const NormEditForward& p, int64_t begin, int64_t end, float* held) {
  const int64_t d = p.d;
  const float *weight = p.weight, *norm_bias = p.norm_bias;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(p.x, i);
    const float *scale = p.scale.row(i), *bias = p.bias.row(i);
    T* y = output<T>(p.y, d, i);
    Sum<2> first;
    sweep_sums<2>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      prepare<Stream>(y + j);
      const V value = at.load(x + j);
      at.template store<false>(held + j, value);
      first.add(k, first_term<Centered>(value));
    });
    const Statistics s = statistics<Centered>(held, d, first, p.eps);
    if (Centered) p.mean[i] = s.mean;
    p.rstd[i] = s.rstd;
    const T* next_x = row<T>(p.x, i + 1 < end ? i + 1 : i);
    sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      // This pass reads nothing from memory, so the next row can come in meanwhile.
      prefetch(next_x + j);
      const V normed = normalised<Centered>(at.load(held + j), s);
      const V h = normed * at.load(weight + j) + at.load(norm_bias + j);
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
  const int64_t d = p.d;
  const float *weight = p.weight, *norm_bias = p.norm_bias;
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dy = row<T>(p.dy, i), *x = row<T>(p.x, i);
    const float* scale = p.scale.row(i);
    const Statistics s{Centered ? p.mean[i] : 0.0f, p.rstd[i]};
    T* dx = output<T>(p.dx, d, i);
    Projection projection;
    const auto first = [&](auto edit_only) __attribute__((always_inline)) {
      Projection found;
      sweep_sums<Projection::kParts>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
        if (edit_only || dx) prepare<Stream>(dx + j);
        const V normed = at.valid(normalised<Centered>(at.load(x + j), s)), gradient = at.load(dy + j);
        const V of_norm = gradient * at.load(scale + j);
        found.add<Centered>(k, of_norm * at.load(weight + j), normed);
        if (edit_only || sums.dscale)
          accumulate(at, sums.dscale + j, gradient * (normed * at.load(weight + j) + at.load(norm_bias + j)));
        if (edit_only || sums.dbias) accumulate(at, sums.dbias + j, gradient);
        if constexpr (!edit_only) {
          if (sums.dweight) accumulate(at, sums.dweight + j, of_norm * normed);
          if (sums.dnorm_bias) accumulate(at, sums.dnorm_bias + j, of_norm);
        }
      });
      projection = found;
    };
    decide(first, dx && sums.dscale && sums.dbias && !sums.dweight && !sums.dnorm_bias);
    if (!dx) continue;
    projection.finish<Centered>(d);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T *next_dy = row<T>(p.dy, next), *next_x = row<T>(p.x, next);
    sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      prefetch(next_dy + j);
      prefetch(next_x + j);
      const V normed = normalised<Centered>(at.load(x + j), s);
      const V gradient = at.load(dy + j) * at.load(scale + j) * at.load(weight + j);
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
