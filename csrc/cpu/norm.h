// Row statistics of the norm kernels. RMSNorm is the case without a mean.
#pragma once

#include "sweep.h"

namespace red {
namespace RED_ISA {

struct Statistics {
  float mean, rstd;
};

// For a row kept in fp32 whose plain sum is inaccurate: it overflowed, or its error exceeds the row's variation, as in
// a row of equal values. In fp64, and relative to the first value, so that equal values have no distance from their
// mean.
__attribute__((noinline, cold)) inline Statistics careful_statistics(const float* z, int64_t d, float eps) {
  const double first = z[0];
  double sum = 0.0, squares = 0.0;
  for (int64_t j = 0; j < d; ++j) sum += z[j] - first;
  const double mean = first + sum / static_cast<double>(d);
  for (int64_t j = 0; j < d; ++j) squares += (z[j] - mean) * (z[j] - mean);
  const float variance = static_cast<float>(squares / static_cast<double>(d));
  return {static_cast<float>(mean), 1.0f / __builtin_sqrtf(variance + eps)};
}

// The sums of a row, from the pass that writes it to `held`, and its statistics. A variance needs the mean or a value
// near it. Rows of halves take the mean of their first unit, which usually suffices. Otherwise, and for fp32, a second
// pass takes the mean itself and also corrects the first pass's error of a large mean: it costs no digits.
template <class T, bool Centered>
class RowSums {
 public:
  static constexpr bool kOnePass = Centered && sizeof(T) == 2;
  static constexpr int kParts = kOnePass && kRegisters == 16 ? 1 : 2;

  // value(at, j) is the row's value.
  template <class Value>
  RED_INLINE RowSums(int64_t d, const Value& value) {
    if constexpr (kOnePass) {
      const Part few{static_cast<int>(d < L ? d : L)};
      const V unit = d < L ? few.valid(value(few, 0)) : value(Full{}, 0);
      near_ = Sum<1>{{unit}}.total() / static_cast<float>(few.n);
    }
  }
  template <class At>
  RED_INLINE void add(At at, int k, V z) {
    if constexpr (kOnePass) {
      const V centred = at.valid(z - near_);
      sum_.add(k, centred);
      squares_.add(k, centred * centred);
    } else if constexpr (Centered) {
      sum_.add(k, z);
    } else {
      squares_.add(k, z * z);
    }
  }
  RED_INLINE Statistics statistics(const float* held, int64_t d, float eps) const {
    if constexpr (!Centered) return {0.0f, 1.0f / __builtin_sqrtf(squares_.total() / static_cast<float>(d) + eps)};
    const About first{near_, sum_.total(), squares_.total(), static_cast<float>(d)};
    if (kOnePass && first.holds()) return first.statistics(eps);
    Sum<kParts> rest, squares;
    sweep_sums<kParts>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      const V centred = at.valid(at.load(held + j) - first.mean());
      squares.add(k, centred * centred);
      rest.add(k, centred);
    });
    const About second{first.mean(), rest.total(), squares.total(), static_cast<float>(d)};
    return second.holds() ? second.statistics(eps) : careful_statistics(held, d, eps);
  }

 private:
  // The sums of d values' distances from `near`, and of their squares.
  struct About {
    float near, sum, squares, d;
    RED_INLINE float lost() const { return sum / d; }
    RED_INLINE float mean() const { return near + lost(); }
    // Up to half of the squares the difference is accurate, and not negative. The form makes the condition false for
    // NaN.
    RED_INLINE bool holds() const {
      const float correction = lost() * lost();
      return correction <= 0.5f * (squares / d) && correction <= __FLT_MAX__;
    }
    RED_INLINE Statistics statistics(float eps) const {
      return {mean(), 1.0f / __builtin_sqrtf(squares / d - lost() * lost() + eps)};
    }
  };

  float near_ = 0.0f;
  Sum<kParts> sum_, squares_;
};

// The same for a row that is kept already.
template <class T, bool Centered>
__attribute__((noinline)) RowSums<T, Centered> sums_of_row(const float* held, int64_t d) {
  RowSums<T, Centered> sums(d, [&](auto at, int64_t j) __attribute__((always_inline)) { return at.load(held + j); });
  sweep_sums<sums.kParts>(
      d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) { sums.add(at, k, at.load(held + j)); });
  return sums;
}

template <bool Centered>
RED_INLINE V normalised(V z, Statistics s) {
  return Centered ? (z - s.mean) * s.rstd : z * s.rstd;
}

// dz = rstd * (g - normed * mean(g * normed) - mean(g)), the last term for LayerNorm only.
struct Projection {
  static constexpr int kParts = kRegisters == 32 ? 2 : 1;  // two sums, and many further values
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
