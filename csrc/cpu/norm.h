// Row statistics that the norm kernels share. RMSNorm is the case without a mean.
#pragma once

#include "vec.h"

namespace red {
namespace RED_ISA {

struct Statistics {
  float mean, rstd;
};

// Of a row held in fp32. The variance is taken about the mean in a second pass, which also finds what the first pass lost
// of a large mean: it costs no digits.
template <bool Centered>
RED_INLINE Statistics statistics(const float* z, int64_t d, Sum first, float eps) {
  if constexpr (!Centered) return {0.0f, 1.0f / __builtin_sqrtf(first.total() / static_cast<float>(d) + eps)};
  const float mean = first.total() / static_cast<float>(d);
  Sum squares, rest;
  sweep(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
    const V centred = at.valid(at.load(z + j) - mean);
    squares.add(k, centred * centred);
    rest.add(k, centred);
  });
  const float lost = rest.total() / static_cast<float>(d);
  const float variance = squares.total() / static_cast<float>(d) - lost * lost;
  return {mean + lost, 1.0f / __builtin_sqrtf(variance + eps)};
}

// What `statistics` wants summed in the pass that writes the row: z for a mean, z * z for a mean square.
template <bool Centered>
RED_INLINE V first_term(V z) {
  return Centered ? z : z * z;
}

template <bool Centered>
RED_INLINE V normalised(V z, Statistics s) {
  return Centered ? (z - s.mean) * s.rstd : z * s.rstd;
}

// dz = rstd * (g - normed * mean(g * normed) - mean(g)), the last term for LayerNorm only.
struct Projection {
  Sum g_normed, g;
  float along = 0.0f, level = 0.0f;

  template <bool Centered>
  RED_INLINE void add(int k, V gradient, V normed) {
    g_normed.add(k, gradient * normed);
    if (Centered) g.add(k, gradient);
  }
  template <bool Centered>
  RED_INLINE void finish(int64_t d) {
    along = g_normed.total() / static_cast<float>(d);
    if (Centered) level = g.total() / static_cast<float>(d);
  }
  template <bool Centered>
  RED_INLINE V apply(V gradient, V normed, Statistics s) const {
    const V rest = gradient - normed * along;
    return s.rstd * (Centered ? rest - level : rest);
  }
};

RED_INLINE void accumulate(float* sums, Full at, int64_t j, V v) { at.store<false>(sums + j, at.load(sums + j) + v); }
RED_INLINE void accumulate(float* sums, Part at, int64_t j, V v) { at.store<false>(sums + j, at.load(sums + j) + v); }

}  // namespace RED_ISA
}  // namespace red
