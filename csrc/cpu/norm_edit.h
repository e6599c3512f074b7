// The norm with an edit behind it (norm_edit_forward, norm_edit_backward in reference.py).
#pragma once

#include "norm.h"

namespace red {
namespace RED_ISA {

// The norm's weight and bias with an edit behind them: scale * (weight * normed + norm_bias) + bias is one multiplication and
// one addition for each element. Made anew only where the edit is another one than the row's before.
class FoldedEdit {
 public:
  FoldedEdit(const NormEditForward& p, float* scale, float* bias) : p_(p), folded_scale_(scale), folded_bias_(bias) {}

  RED_INLINE void take(int64_t i) {
    const float *scale = p_.scale.row(i), *bias = p_.bias.row(i);
    if (scale == scale_ && bias == bias_) return;
    scale_ = scale, bias_ = bias;
    Sum<1> nothing;
    sweep_sums<1>(p_.d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      const V factor = at.load(scale + j), folded_scale = factor * at.load(p_.weight + j);
      const V folded_bias = factor * at.load(p_.norm_bias + j) + at.load(bias + j);
      at.template store<false>(folded_scale_ + j, folded_scale);
      at.template store<false>(folded_bias_ + j, folded_bias);
      nothing.add(k, (folded_scale - folded_scale) + (folded_bias - folded_bias));
    });
    finite_ = nothing.total() == 0.0f;
  }
  // Infinity times zero is no number: an edit that is not finite is applied to the norm's own result.
  bool finite() const { return finite_; }

  template <class At, class Flag>
  RED_INLINE V value(At at, int64_t j, V normed, Flag finite) const {
    if (finite) return normed * at.load(folded_scale_ + j) + at.load(folded_bias_ + j);
    const V h = normed * at.load(p_.weight + j) + at.load(p_.norm_bias + j);
    return h * at.load(scale_ + j) + at.load(bias_ + j);
  }

 private:
  const NormEditForward& p_;
  float *folded_scale_, *folded_bias_;
  const float *scale_ = nullptr, *bias_ = nullptr;
  bool finite_ = true;
};

template <class T, bool Centered, bool Stream>
void norm_edit_forward_rows(const NormEditForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = p.d;
  float* held = scratch;
  FoldedEdit edit(p, scratch + padded(d), scratch + 2 * padded(d));
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(p.x, i);
    T* y = output<T>(p.y, d, i);
    edit.take(i);
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
    const auto last = [&](auto finite) __attribute__((always_inline)) {
      sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
        // This pass reads nothing from memory, so the next row can come in meanwhile.
        prefetch(next_x + j);
        at.template store<Stream>(y + j, edit.value(at, j, normalised<Centered>(at.load(held + j), s), finite));
      });
    };
    decide(last, edit.finite());
  }
  if (Stream) fence();
}

template <class T, bool Centered>
void norm_edit_forward(const NormEditForward& p, int64_t begin, int64_t end, float* scratch) {
  (p.stream ? norm_edit_forward_rows<T, Centered, true> : norm_edit_forward_rows<T, Centered, false>)(p, begin, end,
                                                                                                     scratch);
}

template <class T, bool Centered, bool Stream>
void norm_edit_backward_rows(const NormEditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  const int64_t d = p.d;
  const float *weight = p.weight, *norm_bias = p.norm_bias;
  const float* scale = p.scale.row(chunk.row(chunk.begin));  // a chunk's rows have one edit
  float* folded = scratch;
  sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
    at.template store<false>(folded + j, at.load(scale + j) * at.load(weight + j));
  });
  // The norm's vectors are the same in all rows. So dscale, the sum of gradient * (weight * normed + norm_bias), is made of
  // the sums of gradient * normed and of gradient, which is dbias.
  float* gradients = sums.dbias;
  if (sums.dscale && !gradients) {
    gradients = scratch + padded(d);
    __builtin_memset(gradients, 0, d * sizeof(float));
  }
  const bool usual = p.dx && sums.dscale && !sums.dweight && !sums.dnorm_bias;
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dy = row<T>(p.dy, i), *x = row<T>(p.x, i);
    const Statistics s{Centered ? p.mean[i] : 0.0f, p.rstd[i]};
    T* dx = output<T>(p.dx, d, i);
    Projection projection;
    const auto first = [&](auto edit_only) __attribute__((always_inline)) {
      Projection found;
      sweep_sums<Projection::kParts>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
        if (edit_only || dx) prepare<Stream>(dx + j);
        const V normed = at.valid(normalised<Centered>(at.load(x + j), s)), gradient = at.load(dy + j);
        found.add<Centered>(k, gradient * at.load(folded + j), normed);
        if (edit_only || gradients) accumulate(at, gradients + j, gradient);
        if (edit_only || sums.dscale) accumulate(at, sums.dscale + j, gradient * normed);
        if constexpr (!edit_only) {
          const V of_norm = gradient * at.load(scale + j);
          if (sums.dweight) accumulate(at, sums.dweight + j, of_norm * normed);
          if (sums.dnorm_bias) accumulate(at, sums.dnorm_bias + j, of_norm);
        }
      });
      projection = found;
    };
    decide(first, usual);
    if (!dx) continue;
    projection.finish<Centered>(d);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T *next_dy = row<T>(p.dy, next), *next_x = row<T>(p.x, next);
    sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      prefetch(next_dy + j);
      prefetch(next_x + j);
      const V normed = normalised<Centered>(at.load(x + j), s);
      at.template store<Stream>(dx + j, projection.apply<Centered>(at.load(dy + j) * at.load(folded + j), normed, s));
    });
  }
  if (sums.dscale)
    sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      const V added = at.load(norm_bias + j);
      V of_bias = at.load(gradients + j) * added;  // nothing without a bias, also of an infinite gradient
      of_bias.a = bits<N>(bits<I>(of_bias.a) & (added.a != 0.0f));
      of_bias.b = bits<N>(bits<I>(of_bias.b) & (added.b != 0.0f));
      at.template store<false>(sums.dscale + j, at.load(sums.dscale + j) * at.load(weight + j) + of_bias);
    });
  if (Stream) fence();
}

template <class T, bool Centered>
void norm_edit_backward(const NormEditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  (p.stream ? norm_edit_backward_rows<T, Centered, true> : norm_edit_backward_rows<T, Centered, false>)(p, chunk, sums,
                                                                                                       scratch);
}

}  // namespace RED_ISA
}  // namespace red
