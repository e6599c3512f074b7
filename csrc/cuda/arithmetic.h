// The plain arithmetic of the kernels: no threads, no memory. Compiled by nvcc for a GPU, and by a C++ compiler for the
// tests, which hold it to the fp64 reference (red_kernels/backends/reference.py).
#pragma once

#include <cfloat>
#include <cmath>

#include "../types.h"

#if defined(__CUDACC__)
#define RED_BOTH __host__ __device__ __forceinline__
#else
#define RED_BOTH inline __attribute__((always_inline))
#endif

namespace red {
namespace cuda {

// 16 bytes, as they lie in memory.
struct alignas(16) Raw {
  uint32_t w[4];
};

struct Words {
  uint32_t w[4];
};

RED_BOTH uint32_t high_word(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// Philox4x32-10 (Salmon et al., SC 2011): the words of columns 4 * quad to 4 * quad + 3 of a row.
RED_BOTH Words philox(int64_t seed, int64_t row, uint32_t quad) {
  uint32_t c0 = quad, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  uint32_t c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_word(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_word(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

RED_BOTH float dropped(uint32_t word, uint32_t threshold, float factor) { return word >= threshold ? factor : 0.0f; }

// The mean of d values: `first` of their plain sum, corrected by `lost`, the sum of the distances from it. The variance
// about that mean, from the squared distances from `first`, and never negative. Not sound where the sum overflowed, or lost
// more than the values vary by, as it may of equal values: the variance is then what its terms were rounded by.
struct Moments {
  float mean, variance;
  bool sound;
};
RED_BOTH Moments moments(float first, float lost, float squares, float d) {
  const float shift = lost / d, spread = squares / d, correction = shift * shift;
  const float mean = shift >= -FLT_MAX && shift <= FLT_MAX ? first + shift : first;
  if (!(correction <= FLT_MAX)) return {mean, spread, false};
  const float variance = spread - correction;
  return {mean, variance < 0.0f ? 0.0f : variance, correction <= 0.5f * spread};
}

// For a sum that was not sound: the mean by way of one of the values, `origin`, from which equal values do not differ.
// Halves of the distances are divided before they are summed, so that they do not overflow.
RED_BOTH float half_distance(float v, float origin, float share) { return (0.5f * v - 0.5f * origin) * share; }
RED_BOTH float mean_from(float origin, float half_distances) { return origin + half_distances + half_distances; }

// 1 / sqrt(v), correctly rounded.
RED_BOTH float reciprocal_root(float v) {
#if defined(__CUDA_ARCH__)
  return __frsqrt_rn(v);
#else
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v)));
#endif
}

// a * b, rounded: never part of a multiply-add. What is subtracted from itself later has to be the same number both times.
RED_BOTH float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float v = a * b;
  asm("" : "+m"(v));
  return v;
#endif
}

// a * b + c, rounded once.
RED_BOTH float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// normed * weight + norm_bias, rounded once; -0 for a norm_bias adds nothing.
RED_BOTH float affine(float normed, float weight, float norm_bias) { return multiply_add(normed, weight, norm_bias); }

// The gradient of what was normed: `weighted` is that of the result times the weight; c1 and c2 are the averages over the
// row of weighted * normed and of weighted (0 for RMSNorm).
RED_BOTH float norm_gradient(float normed, float weighted, float rstd, float c1, float c2) {
  return product(rstd, multiply_add(-normed, c1, weighted) - c2);
}

}  // namespace cuda
}  // namespace red
