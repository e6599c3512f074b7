// Mixes with their dropout and residual add, forward and backward (mix_forward, mix_backward in reference.py). Formula
// and gradient have the form of those of edits, for the loops of edit_norm.h. Flags are checked in each unit: there are
// three formulas, and code for each case of each would be a megabyte for every instruction set.
#pragma once

#include "edit.h"

namespace red {
namespace RED_ISA {

constexpr int64_t kPair = 32;  // distance between the columns of a pair
static_assert(kPair % L == 0, "a unit has no pair inside");
constexpr int kGroup = 2 * kPair / L;  // units of a group of pairs

// The unit after j, in the lower half of each pair of kPair columns.
RED_INLINE int64_t next_in_pairs(int64_t j) { return (j + L + kPair) & ~kPair; }

// Dot products along a block. Their rounding error affects a whole block's gradient, and rows may be few: so in fp32
// only few units are added up, and their sums in fp64.
template <int Count>
class Dots {
 public:
  // body(at, j, add) calls add(n, v) with the terms of the n-th dot product at columns j.
  template <class Body>
  RED_INLINE Dots(int64_t columns, const Body& body) {
    const int64_t width = unknown(columns), whole = width / L * L;
    int64_t j = 0;
    while (j < whole) {
      V few[Count] = {};
      const auto add = [&](int n, V v) __attribute__((always_inline)) { few[n] += v; };
      for (const int64_t end = j + 8 * L < whole ? j + 8 * L : whole; j < end; j += L) body(Full{}, j, add);
#pragma GCC unroll 4
      for (int n = 0; n < Count; ++n) add_up(n, few[n]);
    }
    if (j < width)
      body(Part{static_cast<int>(width - j)}, j, [&](int n, V v) __attribute__((always_inline)) { add_up(n, v); });
  }
  RED_INLINE float total(int n) const {
    double all = 0.0;
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) all += sums_[n][i];
    return static_cast<float>(all);
  }

 private:
  typedef float Half __attribute__((vector_size(W * 2)));
  typedef double D __attribute__((vector_size(W * 4)));
  struct Two {
    Half low, high;
  };
  RED_INLINE void add_up(int n, V v) {
    const Two both = bits<Two>(v.a + v.b);
    sums_[n] += __builtin_convertvector(both.low + both.high, D);
  }

  D sums_[Count] = {};
};

// A mix of a row: a number of reflections of each block, or a rotation (0), whose one block is the row.
template <class T, int Reflections>
struct Mixed : Added<T> {
  using Element = T;
  static constexpr bool kKeepsZ = true;
  static constexpr bool kWhole = Reflections == 0;
  const T* x;
  const float *first, *second, *bias;
  int64_t width;                                  // of a block
  float along_first = 0.0f, along_second = 0.0f;  // the present block times the vectors

  template <class P>
  RED_INLINE Mixed(const P& p, int64_t i, const float* factor)
      : Added<T>(p, i, factor), x(row<T>(p.x, i)), first(p.scale.row(i)), second(p.second.row(i)),
        bias(p.bias.data ? p.bias.row(i) : nullptr), width(Reflections ? p.d / p.blocks : p.d) {}

  // Called before the values of a block. `Fetch` prefetches its residual.
  template <bool Fetch = false>
  RED_INLINE void start(int64_t from = 0) {
    if constexpr (Reflections > 0) {
      const T* residual = this->residual ? this->residual : x;
      const Dots<Reflections> dots(width, [&](auto at, int64_t j, const auto& add) __attribute__((always_inline)) {
        const V h = at.load(x + from + j);
        if (Fetch) prefetch(residual + from + j);
        add(0, at.load(first + from + j) * h);
        if constexpr (Reflections == 2) add(1, at.load(second + from + j) * h);
      });
      along_first = dots.total(0);
      if constexpr (Reflections == 2) along_second = dots.total(1);
    }
  }
  template <class Pass>
  RED_INLINE void each_case(const Pass& pass, bool flag) const {
    if (this->residual && !this->factor)
      pass(std::true_type{}, flag);
    else
      pass(this->residual != nullptr, flag);
  }
  template <class At, class Flag>
  RED_INLINE V value(At at, int64_t j, Flag has_residual) const {
    V h = at.load(x + j);
    if constexpr (Reflections > 0) {
      h = h - at.load(first + j) * along_first;
      if constexpr (Reflections == 2) h += at.load(second + j) * along_second;
      if (bias) h += at.load(bias + j);
      return this->to(at, j, h, has_residual);
    } else {
      return turned(at, j, h, at.load(x + (j ^ kPair)), has_residual);
    }
  }
  // Whether sweep_values visits the units of a row in order: a norm then adds up the same sums as a norm alone.
  RED_INLINE bool in_order() const { return Reflections == 0 || width % (2 * L) == 0; }
  template <class At, class Flag>
  RED_INLINE V start_value(At at, Flag has_residual) const {
    return value(at, 0, has_residual);
  }
  template <int Parts, class Body>
  RED_INLINE void sweep_values(int64_t d, const Body& body) {
    if constexpr (Reflections == 0 && sizeof(T) < sizeof(float) && kGroup <= 2 * Parts) {
      sweep_pairs<Parts>(d, body);
      return;
    }
    for (int64_t from = 0; from < d; from += width) {
      if (from > 0) start(from);
      sweep_sums<Parts, kWhole>(width, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
        body(at, from + j, k,
             [&](auto has_residual) __attribute__((always_inline)) { return value(at, from + j, has_residual); });
      });
    }
  }

 private:
  // A rotation's value, from h and its partner.
  template <class At, class Flag>
  RED_INLINE V turned(At at, int64_t j, V h, V partner, Flag has_residual) const {
    V z = h * at.load(first + j);
    if (bias) z += at.load(bias + j);
    z += partner * at.load(second + j);
    return this->to(at, j, z, has_residual);
  }
  // sweep_values of rows of halves, each converted once. Each part of a sum gets its units in order.
  template <int Parts, class Body>
  RED_INLINE void sweep_pairs(int64_t d, const Body& body) const {
    for (int64_t from = 0; from < d; from += 2 * kPair) {
#pragma GCC unroll 2
      for (int n = 0; n < kGroup / 2; ++n) {
        const int64_t low = from + n * L, high = low + kPair;
        const V low_h = load(x + low), high_h = load(x + high);
        body(Full{}, low, n % Parts, [&](auto has_residual) __attribute__((always_inline)) {
          return turned(Full{}, low, low_h, high_h, has_residual);
        });
        body(Full{}, high, (n + kGroup / 2) % Parts, [&](auto has_residual) __attribute__((always_inline)) {
          return turned(Full{}, high, high_h, low_h, has_residual);
        });
      }
    }
  }
};

// run(n) with the number of reflections, 0 for a rotation, as a constant.
template <class P, class Run>
RED_INLINE void by_reflections(const P& p, const Run& run) {
  if (p.blocks == 0)
    run(std::integral_constant<int, 0>{});
  else if (p.second.data == nullptr)
    run(std::integral_constant<int, 1>{});
  else
    run(std::integral_constant<int, 2>{});
}

template <class T, int Reflections>
void mix_forward_rows(const MixForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = p.d;
  const bool stream = p.stream;
  for (int64_t i = begin; i < end; ++i) {
    Mixed<T, Reflections> mixed(p, i, dropout_factors(p.dropout, i, d, scratch));
    T* z = output<T>(p.z, d, i);
    const auto pass = [&](auto has_residual, bool) __attribute__((always_inline)) {
      for (int64_t from = 0; from < d; from += mixed.width) {
        mixed.template start<true>(from);
        sweep<mixed.kWhole>(mixed.width, [&](auto at, int64_t j) __attribute__((always_inline)) {
          at.store(stream, z + from + j, mixed.value(at, from + j, has_residual));
        });
      }
    };
    mixed.each_case(pass, true);
  }
  if (stream) fence();
}

template <class T>
void mix_forward(const MixForward& p, int64_t begin, int64_t end, float* scratch) {
  by_reflections(p, [&](auto n) {
    mix_forward_rows<T, n()>(p, begin, end, scratch);
  });
}

// The part of a backward from the gradient of z, like EditGradient. With `Hold`, a gradient that costs more than a load
// and may be computed only once is kept for the present columns.
template <class T, bool Hold, int Reflections>
struct MixGradient {
  using Element = T;
  static constexpr bool kWhole = Reflections == 0;
  const T *x, *next_x = nullptr;  // the latter is prefetched without `Hold`
  const float *first, *second, *factor;
  T* dx;
  float *dfirst, *dsecond, *dbias, *held;
  int64_t blocks;
  bool stream;

  template <class P>
  RED_INLINE MixGradient(const P& p, int64_t i, const T* x, const float* factor, const Columns& sums, float* held)
      : x(x), first(p.scale.row(i)), second(p.second.row(i)), factor(factor), dx(output<T>(p.dx, p.d, i)),
        dfirst(sums.dscale), dsecond(sums.dsecond), dbias(sums.dbias), held(held), blocks(p.blocks),
        stream(p.stream) {}

  bool all() const { return false; }
  template <class Pass, class... Flags>
  RED_INLINE static void each_case(const Pass& pass, Flags... flags) {
    pass(flags...);
  }

  template <class Gradient>
  RED_INLINE void behind(int64_t d, const Gradient& gradient, bool) const {
    const int64_t width = Reflections ? d / blocks : 512;  // a rotation's is what fits into the first-level cache
    for (int64_t from = 0; from < d; from += width)
      behind_block(from, Reflections || d - from > width ? width : d - from, gradient);
  }

  // For one block, or for whole pairs.
  template <class Gradient>
  RED_INLINE void behind_block(int64_t from, int64_t width, const Gradient& gradient) const {
    const auto dropped = [&](auto at, int64_t j) __attribute__((always_inline)) {
      V g = gradient(at, j);
      if (factor) g *= at.load(factor + j);
      return g;
    };
    if constexpr (Reflections > 0)
      reflected(from, width, dropped);
    else
      turned(from, width, dropped);
  }

 private:
  template <class Gradient>
  RED_INLINE void reflected(int64_t from, int64_t width, const Gradient& gradient) const {
    const Dots<2 * Reflections> dots(width, [&](auto at, int64_t j, const auto& add) __attribute__((always_inline)) {
      const V g = at.valid(gradient(at, from + j)), h = at.load(x + from + j), u = at.load(first + from + j);
      if (Hold) at.template store<false>(held + j, g);
      add(0, u * g);
      add(1, u * h);
      if constexpr (Reflections == 2) {
        const V v = at.load(second + from + j);
        add(2, v * g);
        add(3, v * h);
      }
    });
    const float first_g = dots.total(0), first_x = dots.total(1);
    float second_g = 0.0f, second_x = 0.0f;
    if constexpr (Reflections == 2) second_g = dots.total(2), second_x = dots.total(3);
    sweep(width, [&](auto at, int64_t j_of_block) __attribute__((always_inline)) {
      const int64_t j = from + j_of_block;
      V g;
      if constexpr (Hold) {
        g = at.load(held + j_of_block);
      } else {
        prefetch(next_x + j);
        g = gradient(at, j);
      }
      const V h = at.load(x + j);
      if (dbias) accumulate(at, dbias + j, g);
      if (dfirst) at.template store<false>(dfirst + j, at.load(dfirst + j) - (g * first_x + h * first_g));
      V through = g - at.load(first + j) * first_g;
      if constexpr (Reflections == 2) {
        if (dsecond) at.template store<false>(dsecond + j, at.load(dsecond + j) + (g * second_x + h * second_g));
        through += at.load(second + j) * second_g;
      }
      if (dx) at.store(stream, dx + j, through);
    });
  }

  template <class Gradient>
  RED_INLINE void turned(int64_t from, int64_t width, const Gradient& gradient) const {
    const Full at;
    if (Hold)  // in order: other outputs fill line by line
      for (int64_t j = 0; j < width; j += L) store<false>(held + j, gradient(at, from + j));
    const int64_t to = from + width;
    for (int64_t low = from; low < to; low = next_in_pairs(low)) {
      const int64_t high = low + kPair;
      V low_g, high_g;
      if constexpr (Hold)
        low_g = load(held + (low - from)), high_g = load(held + (high - from));
      else
        low_g = gradient(at, low), high_g = gradient(at, high);
      const V low_x = load(x + low), high_x = load(x + high);
      if (dbias) {
        accumulate(at, dbias + low, low_g);
        accumulate(at, dbias + high, high_g);
      }
      if (dfirst) {
        accumulate(at, dfirst + low, low_g * low_x);
        accumulate(at, dfirst + high, high_g * high_x);
      }
      if (dsecond) {
        accumulate(at, dsecond + low, low_g * high_x);
        accumulate(at, dsecond + high, high_g * low_x);
      }
      if (dx) {
        at.store(stream, dx + low, fused(low_g, load(first + low), high_g * load(second + high)));
        at.store(stream, dx + high, fused(high_g, load(first + high), low_g * load(second + low)));
      }
    }
  }
};

// Reflections process some blocks of all rows and then others: their vectors and sums stay in the first-level cache.
// Dropout factors exist for one row at a time.
template <class T, int Reflections>
void mix_backward_rows(const MixBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  const int64_t d = p.d, width = Reflections ? d / p.blocks : d;
  const int64_t columns = width < 1024 ? 1024 / width * width : width;
  const int64_t rows = p.dropout.on ? 1 : chunk.end - chunk.begin;
  const auto columns_of_row = [&](int64_t k, int64_t from, int64_t to) __attribute__((always_inline)) {
    const int64_t i = chunk.row(k);
    const T* dz = row<T>(p.dz, i);
    MixGradient<T, false, Reflections> mix(p, i, row<T>(p.x, i, dz), p.dropout.on ? scratch : nullptr, sums,
                                                   nullptr);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T* next_dz = row<T>(p.dz, next);
    mix.next_x = row<T>(p.x, next, next_dz);
    const auto gradient = [&](auto at, int64_t j) __attribute__((always_inline)) {
      if (Reflections) prefetch(next_dz + j);
      return at.load(dz + j);
    };
    for (int64_t block = from; block < to; block += width) mix.behind_block(block, width, gradient);
  };
  for (int64_t top = chunk.begin; top < chunk.end; top += rows) {
    if (p.dropout.on) dropout_row(p.dropout, chunk.row(top), d, scratch);
    for (int64_t from = 0; from < d; from += columns)
      for (int64_t k = top; k < top + rows; ++k) columns_of_row(k, from, from + columns < d ? from + columns : d);
  }
  if (p.stream) fence();
}

template <class T>
void mix_backward(const MixBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  by_reflections(p, [&](auto n) {
    mix_backward_rows<T, n()>(p, chunk, sums, scratch);
  });
}

}  // namespace RED_ISA
}  // namespace red
