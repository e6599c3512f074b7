// Row statistics that the norm kernels share. RMSNorm is the case without a mean.
#pragma once

#include "sweep.h"

namespace red {
namespace RED_ISA {

struct Statistics {
  float mean, rstd;
};

// Of a row held in fp32 whose plain sum does not do: it overflowed, or what it lost exceeds what the row varies by, as
// in a row of equal values. In fp64, and from the first value on, so that equal values differ by nothing from their mean.
__attribute__((noinline, cold)) inline Statistics careful_statistics(const float* z, int64_t d, float eps) {
  const double first = z[0];
  double sum = 0.0, squares = 0.0;
  for (int64_t j = 0; j < d; ++j) sum += z[j] - first;
  const double mean = first + sum / static_cast<double>(d);
  for (int64_t j = 0; j < d; ++j) squares += (z[j] - mean) * (z[j] - mean);
  const float variance = static_cast<float>(squares / static_cast<double>(d));
  return {static_cast<float>(mean), 1.0f / __builtin_sqrtf(variance + eps)};
}

// Of a row held in fp32. The variance is taken about the mean in a second pass, which also finds what the first pass lost
// of a large mean: it costs no digits.
template <bool Centered>
RED_INLINE Statistics statistics(const float* z, int64_t d, Sum<2> first, float eps) {
  if constexpr (!Centered) return {0.0f, 1.0f / __builtin_sqrtf(first.total() / static_cast<float>(d) + eps)};
  const float mean = first.total() / static_cast<float>(d);
  Sum<2> squares, rest;
  sweep_sums<2>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
    const V centred = at.valid(at.load(z + j) - mean);
    squares.add(k, centred * centred);
    rest.add(k, centred);
  });
  const float lost = rest.total() / static_cast<float>(d), spread = squares.total() / static_cast<float>(d);
  const float correction = lost * lost;
  // Up to half of the spread the difference is right, and not negative. Written so that a NaN is no "yes".
  if (!(correction <= 0.5f * spread && correction <= __FLT_MAX__)) return careful_statistics(z, d, eps);
  return {mean + lost, 1.0f / __builtin_sqrtf(spread - correction + eps)};
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
  static constexpr int kParts = kRegisters == 32 ? 2 : 1;  // two sums, and much else to keep at hand
  Sum<kParts> g_normed, g;
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
    return (Centered ? rest - level : rest) * s.rstd;
  }
};

}  // namespace RED_ISA
}  // namespace red
