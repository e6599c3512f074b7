// The sweep over the columns of a row: whole units and the rest, sums, and flags that are decided once for a row.
#pragma once

#include <type_traits>

#include "halves.h"

namespace red {
namespace RED_ISA {

// Streamed stores are weakly ordered: the threads that read them must not overtake them.
RED_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Prefetches the lines of a unit.
template <class T>
RED_INLINE void prefetch(const T* p) {
  for (int i = 0; i < L; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}
// The same for lines to be written, as this core's own; outputs past the cache need none.
template <class Flag, class T>
RED_INLINE void prepare(Flag stream, const T* p) {
  if (!stream)
    for (int i = 0; i < L; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 1);
}

// Checking a flag in each unit costs little, and code for each case is long: kernels decide which flags are constants
// (std::bool_constant) and which are checked (bool).

// How a body loads and stores its columns: a whole unit, or its first n (the rest reads as zero and is not written).
struct Full {
  template <class T>
  RED_INLINE V load(const T* p) const {
    return RED_ISA::load(p);
  }
  template <bool Stream, class T>
  RED_INLINE void store(T* p, V v) const {
    RED_ISA::store<Stream>(p, v);
  }
  template <class Flag, class T>
  RED_INLINE void store(Flag stream, T* p, V v) const {
    if (stream)
      RED_ISA::store<true>(p, v);
    else
      RED_ISA::store<false>(p, v);
  }
  template <class Flag, class T>
  RED_INLINE V store_rounded(Flag stream, T* p, V v) const {
    return stream ? RED_ISA::store_rounded<true>(p, v) : RED_ISA::store_rounded<false>(p, v);
  }
  template <bool Stream, class T>
  RED_INLINE V store_rounded(T* p, V v) const {
    return RED_ISA::store_rounded<Stream>(p, v);
  }
  RED_INLINE V valid(V v) const { return v; }
};

struct Part {
  int n;
  template <class T>
  RED_INLINE V load(const T* p) const {
    T t[L] = {};
    __builtin_memcpy(t, p, n * sizeof(T));
    return RED_ISA::load(t);
  }
  template <bool Stream, class T>
  RED_INLINE void store(T* p, V v) const {
    store_rounded<Stream>(p, v);
  }
  template <class Flag, class T>
  RED_INLINE void store(Flag, T* p, V v) const {
    store_rounded<false>(p, v);
  }
  template <class Flag, class T>
  RED_INLINE V store_rounded(Flag, T* p, V v) const {
    return store_rounded<false>(p, v);
  }
  template <bool Stream, class T>
  RED_INLINE V store_rounded(T* p, V v) const {
    T t[L];
    const V held = RED_ISA::store_rounded<false>(t, v);
    __builtin_memcpy(p, t, n * sizeof(T));
    return held;
  }
  RED_INLINE V valid(V v) const {
    I lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return {bits<N>(bits<I>(v.a) & (lane < n)), bits<N>(bits<I>(v.b) & (lane + W < n))};
  }
};

// Parallel sums hide the latency of an addition and lose fewer digits; `add` takes the index given by sweep_sums.
template <int Parts>
struct Sum {
  V part[Parts] = {};
  RED_INLINE void add(int k, V v) { part[k] += v; }
  RED_INLINE float total() const {
    V all = part[0];
    for (int k = 1; k < Parts; ++k) all += part[k];
    float t[W];
    const N both = all.a + all.b;
    __builtin_memcpy(t, &both, sizeof t);
#pragma GCC unroll 8
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
  }
};

// The same number, opaque to the compiler: it would infer from one sweep whether the next has whole units, and generate
// separate code for rows without any.
RED_INLINE int64_t unknown(int64_t d) {
  asm("" : "+r"(d));
  return d;
}

// body(at, j) for the columns j of a row: `at` loads and stores a whole unit or the tail. With `Whole` there is no
// tail.
template <bool Whole = false, class Body>
RED_INLINE void sweep(int64_t columns, const Body& body) {
  const int64_t d = unknown(columns);
  int64_t j = 0;
  for (; j + L <= d; j += L) body(Full{}, j);
  if (!Whole && j < d) body(Part{static_cast<int>(d - j)}, j);
}

// The same for a body that adds up along the row: body(at, j, k), where k is the part of a Sum for the unit.
template <int Parts, bool Whole = false, class Body>
RED_INLINE void sweep_sums(int64_t columns, const Body& body) {
  const int64_t d = unknown(columns);
  int64_t j = 0;
  if constexpr (Parts == 2) {
    for (; j + 2 * L <= d; j += 2 * L) {
      body(Full{}, j, 0);
      body(Full{}, j + L, 1);
    }
    if (j + L <= d) {
      body(Full{}, j, 0);
      j += L;
    }
  } else {
    for (; j + L <= d; j += L) body(Full{}, j, 0);
  }
  if (!Whole && j < d) body(Part{static_cast<int>(d - j)}, j, 0);
}

template <class At>
RED_INLINE void accumulate(At at, float* sums, V v) {
  at.template store<false>(sums, at.load(sums) + v);
}

// body(flags...) with each flag as std::true_type or std::false_type: a flag is decided once for a row.
template <class Body>
RED_INLINE void decide(const Body& body) {
  body();
}
template <class Body, class... Flags>
RED_INLINE void decide(const Body& body, bool flag, Flags... others) {
  if (flag)
    decide([&](auto... known) __attribute__((always_inline)) { body(std::true_type{}, known...); }, others...);
  else
    decide([&](auto... known) __attribute__((always_inline)) { body(std::false_type{}, known...); }, others...);
}

template <class T>
RED_INLINE const T* row(const Rows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

// The same, or `instead` if the activation is absent.
template <class T>
RED_INLINE const T* row(const Rows& rows, int64_t i, const T* instead) {
  return rows ? row<T>(rows, i) : instead;
}

template <class T>
RED_INLINE T* output(void* data, int64_t d, int64_t i) {
  return data ? static_cast<T*>(data) + i * d : nullptr;
}

}  // namespace RED_ISA
}  // namespace red
