// The mean and the variance of a row that lies in the registers of its threads.
#pragma once

#include "group.h"

namespace red {
namespace cuda {

// A term of the sum that row_moments begins with.
template <bool CENTERED>
RED_DEVICE float first_sum(float v, float sum) {
  return CENTERED ? sum + v : multiply_add(v, v, sum);
}

// `s` is the sum over the row of its values, without CENTERED of their squares: `variance` is then their mean.
template <class T, int N, bool CENTERED, class G, class C>
RED_DEVICE void row_moments(G& group, const C& column, int d, const float (&v)[N][kVector<T>], float (&s)[1],
                            float& mean, float& variance) {
  constexpr int kSize = kVector<T>;
  const float width = static_cast<float>(d);
  if constexpr (CENTERED) {
    float first = s[0] / width;
    Moments found;
    for (bool again = false;; again = true) {
      float spread[2] = {0.0f, 0.0f};
      RED_UNROLL for (int k = 0; k < N; ++k) {
        if (!column.has(k, d)) continue;
        RED_UNROLL for (int i = 0; i < kSize; ++i) {
          const float away = v[k][i] - first;
          spread[0] += away;
          spread[1] = multiply_add(away, away, spread[1]);
        }
      }
      group.sum(spread);
      found = moments(first, spread[0], spread[1], width);
      if (found.sound || again) break;
      // Seldom, and for all threads of the row.
      s[0] = group.first() ? v[0][0] : 0.0f;
      group.sum(s);
      const float origin = s[0];
      s[0] = 0.0f;
      RED_UNROLL for (int k = 0; k < N; ++k) {
        if (!column.has(k, d)) continue;
        RED_UNROLL for (int i = 0; i < kSize; ++i) s[0] += half_distance(v[k][i], origin, 1.0f / width);
      }
      group.sum(s);
      first = mean_from(origin, s[0]);
    }
    mean = found.mean;
    variance = found.variance;
  } else {
    variance = s[0] / width;
  }
}

// What a norm needs of a row, and is written for its backward: `s` as in row_moments, `a` a NormForward.
struct Statistics {
  float mean, rstd;
};
template <class T, int N, bool CENTERED, class G, class C, class A>
RED_DEVICE Statistics row_statistics(G& group, const C& column, const A& a, int64_t row, const float (&v)[N][kVector<T>],
                                     float (&s)[1]) {
  float mean = 0.0f, variance;
  row_moments<T, N, CENTERED>(group, column, static_cast<int>(a.d), v, s, mean, variance);
  const float rstd = reciprocal_root(variance + a.eps);
  if (group.first()) {
    if constexpr (CENTERED) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  return {mean, rstd};
}

}  // namespace cuda
}  // namespace red
