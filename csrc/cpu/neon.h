// NEON's conversions between fp32 and the two half precisions: vectors of four, and eight halves with their two vectors.
// Without vec.h, so that a test can call them directly.
#pragma once

#include <arm_neon.h>

#include "../types.h"

#if !defined(RED_INLINE)
#define RED_INLINE inline __attribute__((always_inline))
#endif

namespace red {
namespace RED_ISA {

typedef float F4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));
typedef uint16_t H8 __attribute__((vector_size(16)));

// ---- bf16 is the upper half of fp32

RED_INLINE F4 widen(BFloat16, H4 h) { return (F4)vshll_n_u16((uint16x4_t)h, 16); }
RED_INLINE void widen2(BFloat16, H8 h, F4& low, F4& high) {
  low = (F4)vshll_n_u16(vget_low_u16((uint16x8_t)h), 16);
  high = (F4)vshll_high_n_u16((uint16x8_t)h, 16);
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
RED_INLINE H4 narrow(BFloat16, F4 v) { return (H4)vcvt_bf16_f32((float32x4_t)v); }
RED_INLINE H8 narrow2(BFloat16, F4 low, F4 high) {
  return (H8)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
}
#else
// The addend of the narrowing addition, which adds half of the last bit and truncates, so that ties go to even: minus
// one if the last kept bit is even.
RED_INLINE uint32x4_t less_if_even(F4 v) { return vceqzq_u32(vandq_u32((uint32x4_t)v, vdupq_n_u32(0x10000))); }
// The sum of a NaN could round up to infinity or zero: all bits set is a NaN too.
RED_INLINE H4 narrow(BFloat16, F4 v) {
  const uint16x4_t nearest = vraddhn_u32((uint32x4_t)v, less_if_even(v));
  return (H4)vorn_u16(nearest, vmovn_u32(vceqq_f32((float32x4_t)v, (float32x4_t)v)));
}
RED_INLINE H8 narrow2(BFloat16, F4 low, F4 high) {
  const uint16x4_t first = vraddhn_u32((uint32x4_t)low, less_if_even(low));
  const uint16x8_t nearest = vraddhn_high_u32(first, (uint32x4_t)high, less_if_even(high));
  const uint16x8_t numbers = vuzp1q_u16((uint16x8_t)vceqq_f32((float32x4_t)low, (float32x4_t)low),
                                        (uint16x8_t)vceqq_f32((float32x4_t)high, (float32x4_t)high));
  return (H8)vornq_u16(nearest, numbers);
}
#endif

// ---- fp16: every AArch64 processor converts it

RED_INLINE F4 widen(Float16, H4 h) { return (F4)vcvt_f32_f16((float16x4_t)h); }
RED_INLINE void widen2(Float16, H8 h, F4& low, F4& high) {
  low = (F4)vcvt_f32_f16(vget_low_f16((float16x8_t)h));
  high = (F4)vcvt_high_f32_f16((float16x8_t)h);
}
RED_INLINE H4 narrow(Float16, F4 v) { return (H4)vcvt_f16_f32((float32x4_t)v); }
RED_INLINE H8 narrow2(Float16, F4 low, F4 high) {
  return (H8)vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)low), (float32x4_t)high);
}

}  // namespace RED_ISA
}  // namespace red
