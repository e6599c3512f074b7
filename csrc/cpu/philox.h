// The dropout mask: Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed and counted by row and column, so that a
// mask is regenerated when needed and never stored. See philox_words in red_kernels/backends/reference.py.
#pragma once

#include "vec.h"

namespace red {
namespace RED_ISA {

RED_INLINE void multiply_words(U a, uint32_t b, U& high, U& low) {
#if RED_LANES == 16
  const __m512i x = bits<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  high = bits<U>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  low = bits<U>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#elif RED_LANES == 8
  const __m256i x = bits<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  high = bits<U>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = bits<U>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Writes the factor of each column of a row: 1 / (1 - p) if it is kept, 0 if it is dropped. `out` is padded.
// The rounds stay a loop: all ten keys at once would not fit into the registers.
__attribute__((noinline)) inline void dropout_row(const Dropout& dropout, int64_t row, int64_t d, float* out) {
  U lane;
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t quad = 0; quad * 4 < d; quad += W) {
    U c0 = lane + static_cast<uint32_t>(quad), c1 = U{} + static_cast<uint32_t>(row);
    U c2 = U{} + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), c3 = {};
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 1
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      U high0, low0, high1, low1;
      multiply_words(c0, 0xD2511F53u, high0, low0);
      multiply_words(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
    }
    const U words[4] = {c0, c1, c2, c3};
    float factors[4][W];
    for (int w = 0; w < 4; ++w) {
      const N kept = words[w] >= dropout.threshold ? N{} + dropout.factor : N{};
      __builtin_memcpy(factors[w], &kept, sizeof kept);
    }
    for (int i = 0; i < W; ++i)
      for (int w = 0; w < 4; ++w) out[4 * (quad + i) + w] = factors[w][i];
  }
}

// The dropout factors of a row, or null without dropout.
RED_INLINE const float* dropout_factors(const Dropout& dropout, int64_t row, int64_t d, float* out) {
  if (!dropout.on) return nullptr;
  dropout_row(dropout, row, d, out);
  return out;
}

}  // namespace RED_ISA
}  // namespace red
