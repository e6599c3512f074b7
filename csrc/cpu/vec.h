// fp32 vectors of the instruction set this file is compiled for, and loads and stores that convert to and from it.
// RED_ISA names the set and RED_LANES its width. Everything lies in a namespace of that name: see kernels.h.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define RED_INLINE inline __attribute__((always_inline))

namespace red {
namespace RED_ISA {

constexpr int W = RED_LANES;
typedef float V __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));

template <class To, class From>
RED_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

RED_INLINE V splat(float x) { return x - V{}; }

// ---- half precision to fp32 and back, one vector at a time

// The compiler would split these two conversions of whole vectors into halves.
RED_INLINE U words_of(H h) {
#if RED_LANES == 16
  return bits<U>(_mm512_cvtepu16_epi32(bits<__m256i>(h)));
#elif RED_LANES == 8
  return bits<U>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
#else
  return __builtin_convertvector(h, U);
#endif
}

RED_INLINE H halves_of(U u) {
#if RED_LANES == 16
  return bits<H>(_mm512_cvtepi32_epi16(bits<__m512i>(u)));
#else
  return __builtin_convertvector(u, H);
#endif
}

RED_INLINE V widen(BFloat16, H h) { return bits<V>(words_of(h) << 16); }

RED_INLINE H narrow(BFloat16, V v) {
#if defined(__AVX512BF16__)
  return bits<H>(_mm512_cvtneps_pbh(v));
#else
  const U u = bits<U>(v);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const U quiet = (u >> 16) | 0x40u;                         // a NaN must not round up to infinity
  return halves_of(v == v ? rounded : quiet);
#endif
}

#if defined(__F16C__)
RED_INLINE V widen(Float16, H h) {
#if RED_LANES == 16
  return _mm512_cvtph_ps(bits<__m256i>(h));
#else
  return _mm256_cvtph_ps(bits<__m128i>(h));
#endif
}

RED_INLINE H narrow(Float16, V v) {
#if RED_LANES == 16
  return bits<H>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return bits<H>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
}
#else
// Multiplying by a power of two moves the exponent, subnormals included; infinities and NaNs keep theirs.
RED_INLINE V widen(Float16, H h) {
  const U u = __builtin_convertvector(h, U);
  const U sign = (u & 0x8000u) << 16, rest = (u & 0x7fffu) << 13;
  const U finite = bits<U>(bits<V>(rest) * 0x1p112f);
  return bits<V>(((u & 0x7c00u) == 0x7c00u ? (rest | 0x7f800000u) : finite) | sign);
}

RED_INLINE H narrow(Float16, V v) {
  const U u = bits<U>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal results: rebias, then round to nearest, ties to even, in the integer.
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lets the fp32 adder round at fp16's last place (2^-24).
  const U subnormal = bits<U>(bits<V>(magnitude) + 0.5f) - 0x3f000000u;
  const U large = magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x1ffu) | 0x7e00u : U{} + 0x7c00u;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector((magnitude >= 0x477ff000u ? large : finite) | sign, H);
}
#endif

// ---- a whole vector, or the first n elements of one (the rest read as zero and are not written)

RED_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
RED_INLINE V load(const T* p) {
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(T{}, h);
}

RED_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T>
RED_INLINE void store(T* p, V v) {
  const H h = narrow(T{}, v);
  __builtin_memcpy(p, &h, sizeof h);
}

RED_INLINE void stream(float* p, V v) {
#if !defined(__x86_64__)
  store(p, v);
#elif RED_LANES == 16
  _mm512_stream_ps(p, v);
#elif RED_LANES == 8
  _mm256_stream_ps(p, v);
#else
  _mm_stream_ps(p, v);
#endif
}

template <class T>
RED_INLINE void stream(T* p, V v) {
#if !defined(__x86_64__)
  store(p, v);
#elif RED_LANES == 16
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(narrow(T{}, v)));
#elif RED_LANES == 8
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(narrow(T{}, v)));
#else
  _mm_stream_si64(reinterpret_cast<long long*>(p), bits<long long>(narrow(T{}, v)));
#endif
}

// Streamed stores are weakly ordered: the threads that read them must not overtake them.
RED_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Brings a line that will be written into the cache meanwhile, as this core's own; past the cache nothing is to be brought.
template <bool Stream, class T>
RED_INLINE void prepare(const T* p) {
  if constexpr (!Stream) __builtin_prefetch(p, 1);
}

struct Full {
  template <class T>
  RED_INLINE V load(const T* p) const {
    return RED_ISA::load(p);
  }
  template <bool Stream, class T>
  RED_INLINE void store(T* p, V v) const {
    if constexpr (Stream)
      RED_ISA::stream(p, v);
    else
      RED_ISA::store(p, v);
  }
  RED_INLINE V valid(V v) const { return v; }
};

struct Part {
  int n;
  template <class T>
  RED_INLINE V load(const T* p) const {
    T t[W] = {};
    __builtin_memcpy(t, p, n * sizeof(T));
    return RED_ISA::load(t);
  }
  template <bool Stream, class T>
  RED_INLINE void store(T* p, V v) const {
    T t[W];
    RED_ISA::store(t, v);
    __builtin_memcpy(p, t, n * sizeof(T));
  }
  RED_INLINE V valid(V v) const {
    float t[W];
    RED_ISA::store(t, v);
    for (int i = n; i < W; ++i) t[i] = 0.0f;
    return RED_ISA::load(t);
  }
};

// Four sums side by side hide the latency of one addition; `add` takes the index that sweep hands out.
struct Sum {
  V part[4] = {};
  RED_INLINE void add(int k, V v) { part[k] += v; }
  RED_INLINE float total() const {
    float t[W];
    RED_ISA::store(t, (part[0] + part[1]) + (part[2] + part[3]));
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
  }
};

// body(at, j, k) for the columns j of a row: `at` loads and stores a whole vector or the tail, k is 0 to 3 in turn.
template <class Body>
RED_INLINE void sweep(int64_t d, const Body& body) {
  int64_t j = 0;
  for (; j + 4 * W <= d; j += 4 * W) {
    body(Full{}, j, 0);
    body(Full{}, j + W, 1);
    body(Full{}, j + 2 * W, 2);
    body(Full{}, j + 3 * W, 3);
  }
  for (; j + W <= d; j += W) body(Full{}, j, 0);
  if (j < d) body(Part{static_cast<int>(d - j)}, j, 0);
}

// The value that an element of type T holds once v is stored in it.
RED_INLINE V rounded(float, V v) { return v; }
template <class T>
RED_INLINE V rounded(T t, V v) {
  return widen(t, narrow(t, v));
}

template <class T>
RED_INLINE const T* row(const Rows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

template <class T>
RED_INLINE T* output(void* data, int64_t d, int64_t i) {
  return data ? static_cast<T*>(data) + i * d : nullptr;
}

}  // namespace RED_ISA
}  // namespace red
