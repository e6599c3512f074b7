// Half precision to fp32 and back, for the instruction set of this compilation.
#pragma once

#include "vec.h"

#if defined(__aarch64__)
#include "neon.h"
#endif

namespace red {
namespace RED_ISA {

#if defined(__aarch64__)  // NEON: both registers together, by the conversions of neon.h

template <class T>
RED_INLINE V load(const T* p) {
  V v;
  widen2(T{}, get<H8>(p), v.a, v.b);
  return v;
}
template <bool Stream, class T>
RED_INLINE void store(T* p, V v) {
  put<Stream>(p, narrow2(T{}, v.a, v.b));
}
template <bool Stream, class T>
RED_INLINE V store_rounded(T* p, V v) {
  const H8 h = narrow2(T{}, v.a, v.b);
  put<Stream>(p, h);
  widen2(T{}, h, v.a, v.b);
  return v;
}
template <class T>
RED_INLINE V rounded(T, V v) {
  widen2(T{}, narrow2(T{}, v.a, v.b), v.a, v.b);
  return v;
}

#else

typedef uint16_t H __attribute__((vector_size(W * 2)));   // one register of fp32 as halves
typedef uint16_t HH __attribute__((vector_size(W * 4)));  // both

struct Halves {
  H a, b;
};

// ---- bf16 is the upper half of fp32

#if RED_LANES == 4 && defined(__x86_64__)
// Unpacking puts zeros below.
RED_INLINE V load(const BFloat16* p) {
  const __m128i h = get<__m128i>(p);
  const __m128i zero = _mm_setzero_si128();
  return {bits<N>(_mm_unpacklo_epi16(zero, h)), bits<N>(_mm_unpackhi_epi16(zero, h))};
}
#elif RED_LANES == 8
RED_INLINE V load(const BFloat16* p) {  // unpacking works on each 16 bytes separately
  const __m256i h = _mm256_permute4x64_epi64(get<__m256i>(p), 0xd8);
  const __m256i zero = _mm256_setzero_si256();
  return {bits<N>(_mm256_unpacklo_epi16(zero, h)), bits<N>(_mm256_unpackhi_epi16(zero, h))};
}
#else
RED_INLINE U words_of(H h) {  // the compiler would split these conversions into half vectors
#if RED_LANES == 16
  return bits<U>(_mm512_cvtepu16_epi32(bits<__m256i>(h)));
#else
  return __builtin_convertvector(h, U);
#endif
}
RED_INLINE V load(const BFloat16* p) {
  return {bits<N>(words_of(get<H>(p)) << 16), bits<N>(words_of(get<H>(p + W)) << 16)};
}
#endif

RED_INLINE N without_lower(U u) { return bits<N>(u & 0xffff0000u); }

// fp32 words whose upper halves are the bf16 nearest to v, ties to even. A NaN is truncated: rounding could make it
// infinite or zero. Arithmetic gives only quiet NaNs, so the upper half is a NaN too.
RED_INLINE U nearest_bfloat16(N v) {
  const U u = bits<U>(v);
  const I odd = bits<I>(u << 15) >> 31;  // -1 if the last kept bit is odd
  return u + bits<U>((0x7fff - odd) & (v == v));
}

#if RED_LANES == 16
RED_INLINE H upper_halves(U u) { return bits<H>(_mm512_cvtepi32_epi16(bits<__m512i>(u >> 16))); }
RED_INLINE H narrow(BFloat16, N v) {
#if defined(__AVX512BF16__)
  return bits<H>(_mm512_cvtneps_pbh(v));
#else
  return upper_halves(nearest_bfloat16(v));
#endif
}
#else
// The upper halves of two registers, in order. Packing saturates, which has no effect after an arithmetic shift.
RED_INLINE HH upper_halves(U a, U b) {
#if RED_LANES == 8
  const __m256i packed = _mm256_packs_epi32(_mm256_srai_epi32(bits<__m256i>(a), 16), _mm256_srai_epi32(bits<__m256i>(b), 16));
  return bits<HH>(_mm256_permute4x64_epi64(packed, 0xd8));
#elif defined(__x86_64__)
  return bits<HH>(_mm_packs_epi32(_mm_srai_epi32(bits<__m128i>(a), 16), _mm_srai_epi32(bits<__m128i>(b), 16)));
#else
  return bits<HH>(Halves{__builtin_convertvector(a >> 16, H), __builtin_convertvector(b >> 16, H)});
#endif
}
#endif

#if RED_LANES == 16
template <bool Stream>
RED_INLINE void store(BFloat16* p, V v) {
  put<Stream>(p, narrow(BFloat16{}, v.a));
  put<Stream>(p + W, narrow(BFloat16{}, v.b));
}
template <bool Stream>
RED_INLINE V store_rounded(BFloat16* p, V v) {
  const H a = narrow(BFloat16{}, v.a), b = narrow(BFloat16{}, v.b);
  put<Stream>(p, a);
  put<Stream>(p + W, b);
  return {bits<N>(words_of(a) << 16), bits<N>(words_of(b) << 16)};
}
RED_INLINE V rounded(BFloat16, V v) {
#if defined(__AVX512BF16__)  // to the same number as the stored one, subnormals included
  const H a = narrow(BFloat16{}, v.a), b = narrow(BFloat16{}, v.b);
  return {bits<N>(words_of(a) << 16), bits<N>(words_of(b) << 16)};
#else
  return {without_lower(nearest_bfloat16(v.a)), without_lower(nearest_bfloat16(v.b))};
#endif
}
#elif RED_LANES == 8
// The bf16 nearest to 16 columns, ties to even: word i has column i in its lower half and column i + 8 in its upper
// one. Both registers are rounded together, in lanes of 16 bits. No NaN becomes infinite or zero: `subs` saturates at
// the largest positive value, and a negative value that wrapped is less than before.
RED_INLINE __m256i nearest_bfloat16(V v) {
  const __m256i a = bits<__m256i>(v.a), b = bits<__m256i>(v.b), one = _mm256_set1_epi16(1);
  const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
  const __m256i lower = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  // Above one half, or exactly one half after an odd last bit.
  const __m256i beyond = _mm256_subs_epu16(_mm256_or_si256(lower, _mm256_and_si256(upper, one)), one);
  return _mm256_max_epu16(_mm256_subs_epi16(upper, _mm256_srai_epi16(beyond, 15)), upper);
}
template <bool Stream>
RED_INLINE void put_in_order(BFloat16* p, __m256i words) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  put<Stream>(p, _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, order), 0xd8));
}
template <bool Stream>
RED_INLINE void store(BFloat16* p, V v) {
  put_in_order<Stream>(p, nearest_bfloat16(v));
}
RED_INLINE V widened(__m256i words) {
  return {bits<N>(_mm256_slli_epi32(words, 16)), bits<N>(_mm256_blend_epi16(words, _mm256_setzero_si256(), 0x55))};
}
template <bool Stream>
RED_INLINE V store_rounded(BFloat16* p, V v) {
  const __m256i words = nearest_bfloat16(v);
  put_in_order<Stream>(p, words);
  return widened(words);
}
RED_INLINE V rounded(BFloat16, V v) { return widened(nearest_bfloat16(v)); }
#else
template <bool Stream>
RED_INLINE void store(BFloat16* p, V v) {
  put<Stream>(p, upper_halves(nearest_bfloat16(v.a), nearest_bfloat16(v.b)));
}
template <bool Stream>
RED_INLINE V store_rounded(BFloat16* p, V v) {
  const U a = nearest_bfloat16(v.a), b = nearest_bfloat16(v.b);
  put<Stream>(p, upper_halves(a, b));
  return {without_lower(a), without_lower(b)};
}
RED_INLINE V rounded(BFloat16, V v) {
  return {without_lower(nearest_bfloat16(v.a)), without_lower(nearest_bfloat16(v.b))};
}
#endif

// ---- fp16

#if defined(__F16C__)
RED_INLINE N widen(Float16, H h) {
#if RED_LANES == 16
  return _mm512_cvtph_ps(bits<__m256i>(h));
#else
  return _mm256_cvtph_ps(bits<__m128i>(h));
#endif
}
RED_INLINE H narrow(Float16, N v) {
#if RED_LANES == 16
  return bits<H>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return bits<H>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
}
RED_INLINE V load(const Float16* p) {
  return {widen(Float16{}, get<H>(p)), widen(Float16{}, get<H>(p + W))};
}
template <bool Stream>
RED_INLINE V store_rounded(Float16* p, V v) {
  const H a = narrow(Float16{}, v.a), b = narrow(Float16{}, v.b);
  put<Stream>(p, a);
  put<Stream>(p + W, b);
  return {widen(Float16{}, a), widen(Float16{}, b)};
}
RED_INLINE V rounded(Float16, V v) {
  return {widen(Float16{}, narrow(Float16{}, v.a)), widen(Float16{}, narrow(Float16{}, v.b))};
}
#else
// Words with an fp16 in their upper halves and zeros below. A multiplication by a power of two moves the exponent, also
// of subnormals; infinities and NaNs get their exponent.
RED_INLINE N widen_upper(U u) {
  const I rest = bits<I>((u & 0x7fff0000u) >> 3);
  const I special = (rest > 0x0f7fffff) & 0x7f800000;
  return bits<N>(bits<I>(bits<N>(rest) * 0x1p112f) | special | bits<I>(u & 0x80000000u));
}
// Words whose upper halves are the fp16 nearest to v, ties to even; a NaN stays one.
RED_INLINE U nearest_float16(N v) {
  const I u = bits<I>(v), magnitude = u & 0x7fffffff;
  // Normal results: rebias, then round to nearest in the integer.
  const I normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 lets the fp32 adder round at fp16's last place (2^-24).
  const I subnormal = bits<I>(bits<N>(magnitude) + 0.5f) - 0x3f000000;
  const I large = 0x7c00 | ((magnitude > 0x7f800000) & 0x0200);
  const I small = magnitude < 0x38800000, huge = magnitude > 0x477fefff;
  const I finite = (small & subnormal) | (~small & normal);
  return bits<U>(((huge & large) | (~huge & finite)) << 16 | (u & static_cast<int32_t>(0x80000000u)));
}
RED_INLINE V load(const Float16* p) {
#if defined(__x86_64__)
  const __m128i h = get<__m128i>(p);
  const __m128i zero = _mm_setzero_si128();
  return {widen_upper(bits<U>(_mm_unpacklo_epi16(zero, h))), widen_upper(bits<U>(_mm_unpackhi_epi16(zero, h)))};
#else
  return {widen_upper(words_of(get<H>(p)) << 16), widen_upper(words_of(get<H>(p + W)) << 16)};
#endif
}
template <bool Stream>
RED_INLINE V store_rounded(Float16* p, V v) {
  const U a = nearest_float16(v.a), b = nearest_float16(v.b);
  put<Stream>(p, upper_halves(a, b));
  return {widen_upper(a), widen_upper(b)};
}
RED_INLINE V rounded(Float16, V v) {
  return {widen_upper(nearest_float16(v.a)), widen_upper(nearest_float16(v.b))};
}
#endif
template <bool Stream>
RED_INLINE void store(Float16* p, V v) {
  store_rounded<Stream>(p, v);
}

#endif  // not AArch64

}  // namespace RED_ISA
}  // namespace red
