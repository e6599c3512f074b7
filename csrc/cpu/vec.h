// fp32 vectors of the instruction set of this compilation.
// RED_ISA names the set and RED_LANES its width. All code is in a namespace of that name: see kernels.h.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define RED_INLINE inline __attribute__((always_inline))

namespace red {
namespace RED_ISA {

constexpr int W = RED_LANES;
typedef float N __attribute__((vector_size(W * 4)));  // the content of one register
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));

template <class To, class From>
RED_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// The unit of all kernels: two registers of adjacent columns. As halves they fill one register, so that sets without
// conversion instructions convert and pack both together.
struct V {
  N a, b;
};
constexpr int L = 2 * W;  // columns of a unit
#if RED_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

RED_INLINE V operator+(V x, V y) { return {x.a + y.a, x.b + y.b}; }
RED_INLINE V operator-(V x, V y) { return {x.a - y.a, x.b - y.b}; }
RED_INLINE V operator*(V x, V y) { return {x.a * y.a, x.b * y.b}; }
RED_INLINE V operator-(V x, float y) { return {x.a - y, x.b - y}; }
RED_INLINE V operator*(V x, float y) { return {x.a * y, x.b * y}; }
RED_INLINE V& operator+=(V& x, V y) { return x = x + y; }
RED_INLINE V& operator*=(V& x, V y) { return x = x * y; }

// x * y + z, with this product fused and not one inside z: the bits are the same in every compilation.
RED_INLINE N fused(N x, N y, N z) {
#if RED_LANES == 16
  return _mm512_fmadd_ps(x, y, z);
#elif RED_LANES == 8
  return _mm256_fmadd_ps(x, y, z);
#elif defined(__aarch64__)
  return (N)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  return x * y + z;
#endif
}
RED_INLINE V fused(V x, V y, V z) { return {fused(x.a, y.a, z.a), fused(x.b, y.b, z.b)}; }

// A register in memory, at any address. Copies of its bytes, or of a whole unit, might go through general registers or
// the stack.
template <class Register>
struct __attribute__((packed, may_alias)) Loose {
  Register r;
};

template <class Register>
RED_INLINE Register get(const void* p) {
  return static_cast<const Loose<Register>*>(p)->r;
}

RED_INLINE V load(const float* p) { return {get<N>(p), get<N>(p + W)}; }

// Writes one register, past the cache where `Stream`; p is then aligned to it.
template <bool Stream, class Register>
RED_INLINE void put(void* p, Register r) {
#if defined(__x86_64__)
#if RED_LANES == 16
  if constexpr (Stream && sizeof r == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bits<__m512i>(r));
#endif
#if RED_LANES >= 8
  if constexpr (Stream && sizeof r == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bits<__m256i>(r));
#endif
  if constexpr (Stream && sizeof r == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bits<__m128i>(r));
#endif
  static_cast<Loose<Register>*>(p)->r = r;
}

template <bool Stream>
RED_INLINE void store(float* p, V v) {
  put<Stream>(p, v.a);
  put<Stream>(p + W, v.b);
}

// Stores and returns the value of the stored elements.
template <bool Stream>
RED_INLINE V store_rounded(float* p, V v) {
  store<Stream>(p, v);
  return v;
}
// The same value without a store: elements of the type of the first argument.
RED_INLINE V rounded(float, V v) { return v; }

}  // namespace RED_ISA
}  // namespace red
