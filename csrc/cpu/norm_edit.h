// The norm with an edit behind it (norm_edit_forward, norm_edit_backward in reference.py).
#pragma once

#include "norm.h"

namespace red {
namespace RED_ISA {

// The norm's weight and bias with an edit behind them: scale * (weight * normed + norm_bias) + bias is one
// multiplication and one addition for each element. The folded vectors are kept from an edit's second consecutive row
// on: rows may alternate. The bits are the same either way. Infinity times zero is NaN: an edit that does not fold into
// finite numbers is applied to the norm's own result.
class FoldedEdit {
 public:
  FoldedEdit(const NormEditForward& p, float* scale, float* bias) : p_(p), kept_scale_(scale), kept_bias_(bias) {}

  // write(value) writes a row by value(at, j, normed).
  template <class Write>
  RED_INLINE void apply(int64_t i, const Write& write) {
    const float *scale = p_.scale.row(i), *bias = p_.bias.row(i);
    const bool again = scale == scale_ && bias == bias_;
    scale_ = scale, bias_ = bias;
    if (again && !kept_) keep();
    kept_ = again;
    if (!kept_) {
      V nothing = {};
      write([&](auto at, int64_t j, V normed) __attribute__((always_inline)) {
        const Folded f = folded(at, j);
        nothing += (f.scale * 0.0f + f.bias) * 0.0f;
        return normed * f.scale + f.bias;
      });
      finite_ = Sum<1>{{nothing}}.total() == 0.0f;
    } else if (finite_) {
      write([&](auto at, int64_t j, V normed) __attribute__((always_inline)) {
        return normed * at.load(kept_scale_ + j) + at.load(kept_bias_ + j);
      });
    }
    if (!finite_)
      write([&](auto at, int64_t j, V normed) __attribute__((always_inline)) {
        const V h = normed * at.load(p_.weight + j) + at.load(p_.norm_bias + j);
        return h * at.load(scale_ + j) + at.load(bias_ + j);
      });
  }

 private:
  struct Folded {
    V scale, bias;
  };
  template <class At>
  RED_INLINE Folded folded(At at, int64_t j) const {
    const V factor = at.load(scale_ + j);
    return {factor * at.load(p_.weight + j), factor * at.load(p_.norm_bias + j) + at.load(bias_ + j)};
  }
  RED_INLINE void keep() {
    sweep(p_.d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      const Folded f = folded(at, j);
      at.template store<false>(kept_scale_ + j, f.scale);
      at.template store<false>(kept_bias_ + j, f.bias);
    });
  }

  const NormEditForward& p_;
  float *kept_scale_, *kept_bias_;
  const float *scale_ = nullptr, *bias_ = nullptr;
  bool kept_ = false, finite_ = true;
};

template <class T, bool Centered, bool Stream>
void norm_edit_forward_rows(const NormEditForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = p.d;
  float* held = scratch;
  FoldedEdit edit(p, scratch + padded(d), scratch + 2 * padded(d));
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(p.x, i);
    T* y = output<T>(p.y, d, i);
    RowSums<T, Centered> sums(d, [&](auto at, int64_t j) __attribute__((always_inline)) { return at.load(x + j); });
    sweep_sums<sums.kParts>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      prepare(std::bool_constant<Stream>{}, y + j);
      const V value = at.load(x + j);
      at.template store<false>(held + j, value);
      sums.add(at, k, value);
    });
    const Statistics s = sums.statistics(held, d, p.eps);
    if (Centered) p.mean[i] = s.mean;
    p.rstd[i] = s.rstd;
    const T* next_x = row<T>(p.x, i + 1 < end ? i + 1 : i);
    edit.apply(i, [&](const auto& value) __attribute__((always_inline)) {
      sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
        // This pass reads nothing from memory, so the next row can be prefetched.
        prefetch(next_x + j);
        at.template store<Stream>(y + j, value(at, j, normalised<Centered>(at.load(held + j), s)));
      });
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
void norm_edit_backward_rows(const NormEditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  const int64_t d = p.d;
  const float *weight = p.weight, *norm_bias = p.norm_bias;
  const float* scale = p.scale.row(chunk.row(chunk.begin));  // a chunk's rows have one edit
  float* folded = scratch;
  V nothing = {};
  sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
    const V factor = at.load(scale + j) * at.load(weight + j);
    at.template store<false>(folded + j, factor);
    nothing += factor * 0.0f;
  });
  // As in the forward: vectors that do not fold into finite numbers are multiplied separately.
  const bool finite = Sum<1>{{nothing}}.total() == 0.0f;
  const auto through = [&](auto at, int64_t j, V gradient, auto folds) __attribute__((always_inline)) {
    return folds ? gradient * at.load(folded + j) : gradient * at.load(scale + j) * at.load(weight + j);
  };
  // The norm's vectors are the same in all rows. So dscale, the sum of gradient * (weight * normed + norm_bias),
  // follows from the sums of gradient * normed and of gradient, which is dbias.
  float* gradients = sums.dbias;
  if (sums.dscale && !gradients) {
    gradients = scratch + padded(d);
    __builtin_memset(gradients, 0, d * sizeof(float));
  }
  const bool usual = finite && p.dx && sums.dscale && !sums.dweight && !sums.dnorm_bias;
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dy = row<T>(p.dy, i), *x = row<T>(p.x, i);
    const Statistics s{Centered ? p.mean[i] : 0.0f, p.rstd[i]};
    T* dx = output<T>(p.dx, d, i);
    Projection projection;
    const auto first = [&](auto edit_only, auto folds) __attribute__((always_inline)) {
      Projection found;
      sweep_sums<Projection::kParts>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
        if (edit_only || dx) prepare(std::bool_constant<Stream>{}, dx + j);
        const V normed = at.valid(normalised<Centered>(at.load(x + j), s)), gradient = at.load(dy + j);
        found.add<Centered>(k, through(at, j, gradient, folds), normed);
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
    if (usual)
      first(std::true_type{}, std::true_type{});
    else
      decide([&](auto folds) __attribute__((always_inline)) { first(std::false_type{}, folds); }, finite);
    if (!dx) continue;
    projection.finish<Centered>(d);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T *next_dy = row<T>(p.dy, next), *next_x = row<T>(p.x, next);
    const auto second = [&](auto folds) __attribute__((always_inline)) {
      sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
        prefetch(next_dy + j);
        prefetch(next_x + j);
        const V normed = normalised<Centered>(at.load(x + j), s);
        const V gradient = through(at, j, at.load(dy + j), folds);
        at.template store<Stream>(dx + j, projection.apply<Centered>(gradient, normed, s));
      });
    };
    decide(second, finite);
  }
  if (sums.dscale)
    sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      const V added = at.load(norm_bias + j);
      V of_bias = at.load(gradients + j) * added;  // no term without a bias, also for an infinite gradient
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
