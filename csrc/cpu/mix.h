// Mixes with their dropout and residual add, forward and backward (mix_forward, mix_backward in reference.py): formulas and
// gradients for the loops over rows of edit.h and edit_norm.h.
#pragma once

#include "edit.h"

namespace red {
namespace RED_ISA {

// The row of a vector that may be absent.
template <class P>
RED_INLINE const float* second_of(const P& p, int64_t i) {
  return p.second.data ? p.second.row(i) : nullptr;
}

constexpr int64_t kPair = 32;  // columns between the two of a pair: both are whole units
static_assert(kPair % L == 0, "a unit has no pair inside");

// The unit behind j, in the lower half of each pair of 2 * kPair columns.
RED_INLINE int64_t next_in_pairs(int64_t j) { return (j + L + kPair) & ~kPair; }

// Dots along a block. What is lost of one is lost of a whole block's gradient, and rows may be few: each part adds up few
// units, and what they come to is added up in fp64.
template <int Count>
class Dots {
 public:
  // body(at, j, add) calls add(n, v) with what the n-th dot gets at columns j.
  template <class Body>
  RED_INLINE Dots(int64_t width, const Body& body) {
    for (int64_t from = 0; from < width; from += kColumns) {
      Sum<kParts> few[Count];
      sweep_sums<kParts>(width - from < kColumns ? width - from : kColumns,
                         [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
                           body(at, from + j, [&](int n, V v) __attribute__((always_inline)) { few[n].add(k, v); });
                         });
      for (int n = 0; n < Count; ++n) {
        V all = few[n].part[0];
        if (kParts == 2) all += few[n].part[kParts - 1];
        sums_[n] += widened(all.a + all.b);
      }
    }
  }
  RED_INLINE float total(int n) const {
    double all = 0.0;
    for (int i = 0; i < W / 2; ++i) all += sums_[n][i];
    return static_cast<float>(all);
  }

 private:
  static constexpr int kParts = kRegisters == 32 ? 2 : 1;
  static constexpr int64_t kColumns = 8 * kParts * L;

  typedef double D __attribute__((vector_size(W * 4)));
  typedef float Half __attribute__((vector_size(W * 2)));
  struct Halves {
    Half low, high;
  };
  static RED_INLINE D widened(N v) {
    const Halves halves = bits<Halves>(v);
    return __builtin_convertvector(halves.low, D) + __builtin_convertvector(halves.high, D);
  }

  D sums_[Count] = {};
};

// What a mix makes of a row: reflections of blocks, with a second vector or without (null).
template <class T, bool Reflects>
struct Mixed : Added<T> {
  using Element = T;
  static constexpr bool kKeepsZ = true;
  const T* x;
  const float *first, *second, *bias;
  int64_t width;                    // of a block
  float along_first, along_second;  // the block at hand times the vectors

  template <class P>
  RED_INLINE Mixed(const P& p, int64_t i, const float* factor)
      : Added<T>(p, i, factor), x(row<T>(p.x, i)), first(p.scale.row(i)), second(second_of(p, i)), bias(p.bias.row(i)),
        width(p.d / p.blocks) {}

  RED_INLINE void start(int64_t from = 0) {
    const T* residual = this->residual ? this->residual : x;
    const Dots<2> dots(width, [&](auto at, int64_t j, const auto& add) __attribute__((always_inline)) {
      const V h = at.load(x + from + j);
      prefetch(residual + from + j);
      add(0, at.load(first + from + j) * h);
      if (second) add(1, at.load(second + from + j) * h);
    });
    along_first = dots.total(0);
    along_second = dots.total(1);
  }
  template <class At, class Flag>
  RED_INLINE V value(At at, int64_t j, Flag has_residual) const {
    V h = at.load(x + j) - at.load(first + j) * along_first;
    if (second) h += at.load(second + j) * along_second;
    return this->to(at, j, h + at.load(bias + j), has_residual);
  }
  RED_INLINE int64_t start_width(int64_t) const { return width; }
  template <class At, class Flag>
  RED_INLINE V start_value(At at, Flag has_residual) const {
    return value(at, 0, has_residual);
  }
  template <int Parts, class Body>
  RED_INLINE void sweep_values(int64_t d, const Body& body) {
    for (int64_t from = 0; from < d; from += width) {
      if (from > 0) start(from);
      sweep_sums<Parts>(width, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
        body(at, from + j, k,
             [&](auto has_residual) __attribute__((always_inline)) { return value(at, from + j, has_residual); });
      });
    }
  }
};

// A rotation, two columns at a time.
template <class T>
struct Mixed<T, false> : Added<T> {
  using Element = T;
  static constexpr bool kKeepsZ = true;
  const T* x;
  const float *first, *second, *bias;

  template <class P>
  RED_INLINE Mixed(const P& p, int64_t i, const float* factor)
      : Added<T>(p, i, factor), x(row<T>(p.x, i)), first(p.scale.row(i)), second(p.second.row(i)), bias(p.bias.row(i)) {}

  template <class At, class Flag>
  RED_INLINE V value(At at, int64_t j, V own, V partner, Flag has_residual) const {
    V h = own * at.load(first + j) + at.load(bias + j);
    h += partner * at.load(second + j);
    return this->to(at, j, h, has_residual);
  }
  RED_INLINE void start() const {}
  RED_INLINE int64_t start_width(int64_t d) const { return d; }
  template <class At, class Flag>
  RED_INLINE V start_value(At at, Flag has_residual) const {
    return value(at, 0, at.load(x), at.load(x + kPair), has_residual);
  }
  template <int Parts, class Body>
  RED_INLINE void sweep_values(int64_t d, const Body& body) const {
    for (int64_t j = 0; j < d; j = next_in_pairs(j)) {
      const V low = load(x + j), high = load(x + j + kPair);
      body(Full{}, j, 0,
           [&](auto has_residual) __attribute__((always_inline)) { return value(Full{}, j, low, high, has_residual); });
      body(Full{}, j + kPair, Parts - 1, [&](auto has_residual) __attribute__((always_inline)) {
        return value(Full{}, j + kPair, high, low, has_residual);
      });
    }
  }
};

template <class T, bool Stream, bool Reflects>
void mix_forward_rows(const MixForward& p, int64_t begin, int64_t end, float* scratch) {
  forward_of_rows<Mixed<T, Reflects>, Stream>(p, begin, end, scratch);
}

template <class T>
void mix_forward(const MixForward& p, int64_t begin, int64_t end, float* scratch) {
  if (p.blocks)
    (p.stream ? mix_forward_rows<T, true, true> : mix_forward_rows<T, false, true>)(p, begin, end, scratch);
  else
    (p.stream ? mix_forward_rows<T, true, false> : mix_forward_rows<T, false, false>)(p, begin, end, scratch);
}

// The part of a backward behind the gradient of z, as EditGradient. With `Hold`, that gradient costs more than to keep it.
template <class T, bool Stream>
struct MixedGradient {
  using Element = T;
  const T* x;
  const float *first, *second, *factor;
  T* dx;
  float *dfirst, *dsecond, *dbias, *held;
  int64_t blocks;

  template <class P>
  RED_INLINE MixedGradient(const P& p, int64_t i, const T* x, const float* factor, const Columns& sums, float* held)
      : x(x), first(p.scale.row(i)), second(second_of(p, i)), factor(factor), dx(output<T>(p.dx, p.d, i)),
        dfirst(sums.dscale), dsecond(sums.dsecond), dbias(sums.dbias), held(held), blocks(p.blocks) {}

  // The gradient behind the dropout, which does not go with `all`.
  template <class At, class Flag>
  RED_INLINE V dropped(At at, int64_t j, V g, Flag all) const {
    if constexpr (std::is_same_v<Flag, std::false_type>)
      if (factor) g *= at.load(factor + j);
    return g;
  }
};

template <class T, bool Stream, bool Hold, bool Reflects>
struct MixGradient : MixedGradient<T, Stream> {
  using Base = MixedGradient<T, Stream>;
  using Base::Base;
  using Base::x, Base::first, Base::second, Base::dx, Base::dfirst, Base::dsecond, Base::dbias;

  bool all() const { return dx && dfirst && (dsecond || !second) && dbias && !this->factor; }

  template <class Gradient, class Flag>
  RED_INLINE void behind(int64_t d, const Gradient& gradient, Flag all) const {
    const int64_t width = d / this->blocks;
    for (int64_t from = 0; from < d; from += width) behind_block(from, width, gradient, all);
  }

 private:
  template <class Gradient, class Flag>
  RED_INLINE void behind_block(int64_t from, int64_t width, const Gradient& gradient, Flag all) const {
    float* held = this->held;
    // The vectors times the gradient, and times x.
    const Dots<4> dots(width, [&](auto at, int64_t j, const auto& add) __attribute__((always_inline)) {
      const V g = at.valid(this->dropped(at, from + j, gradient(at, from + j), all)), h = at.load(x + from + j);
      if (Hold) at.template store<false>(held + j, g);
      const V u = at.load(first + from + j);
      add(0, u * g);
      add(1, u * h);
      if (second) {
        const V v = at.load(second + from + j);
        add(2, v * g);
        add(3, v * h);
      }
    });
    const float first_g = dots.total(0), first_x = dots.total(1), second_g = dots.total(2), second_x = dots.total(3);
    sweep(width, [&](auto at, int64_t j_of_block) __attribute__((always_inline)) {
      const int64_t j = from + j_of_block;
      V g;
      if constexpr (Hold)
        g = at.load(held + j_of_block);
      else
        g = this->dropped(at, j, gradient(at, j), all);
      const V h = at.load(x + j);
      if (all || dbias) accumulate(at, dbias + j, g);
      if (all || dfirst) at.template store<false>(dfirst + j, at.load(dfirst + j) - g * first_x - h * first_g);
      V through = g - at.load(first + j) * first_g;
      if (second) {
        if (all || dsecond) at.template store<false>(dsecond + j, at.load(dsecond + j) + g * second_x + h * second_g);
        through += at.load(second + j) * second_g;
      }
      if (all || dx) at.template store<Stream>(dx + j, through);
    });
  }
};

template <class T, bool Stream, bool Hold>
struct MixGradient<T, Stream, Hold, false> : MixedGradient<T, Stream> {
  using Base = MixedGradient<T, Stream>;
  using Base::Base;
  using Base::x, Base::first, Base::second, Base::dx, Base::dfirst, Base::dsecond, Base::dbias;

  bool all() const { return dx && dfirst && dsecond && dbias && !this->factor; }

  template <class Gradient, class Flag>
  RED_INLINE void behind(int64_t d, const Gradient& gradient, Flag all) const {
    const Full at;
    for (int64_t j = 0; j < d; j = next_in_pairs(j)) {
      const V low = this->dropped(at, j, gradient(at, j), all);
      const V high = this->dropped(at, j + kPair, gradient(at, j + kPair), all);
      if (all || dfirst || dsecond) {
        const V low_x = load(x + j), high_x = load(x + j + kPair);
        sum(j, low, low_x, high_x, all);
        sum(j + kPair, high, high_x, low_x, all);
      }
      if (all || dbias) {
        accumulate(at, dbias + j, low);
        accumulate(at, dbias + j + kPair, high);
      }
      if (all || dx) {
        store<Stream>(dx + j, fused(low, load(first + j), high * load(second + j + kPair)));
        store<Stream>(dx + j + kPair, fused(high, load(first + j + kPair), low * load(second + j)));
      }
    }
  }

 private:
  template <class Flag>
  RED_INLINE void sum(int64_t j, V g, V own, V partner, Flag all) const {
    if (all || dfirst) accumulate(Full{}, dfirst + j, g * own);
    if (all || dsecond) accumulate(Full{}, dsecond + j, g * partner);
  }
};

template <class T, bool Stream, bool Reflects>
void mix_backward_rows(const MixBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  backward_of_rows<MixGradient<T, Stream, false, Reflects>>(p, chunk, sums, scratch);
  if (Stream) fence();
}

template <class T>
void mix_backward(const MixBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  if (p.blocks)
    (p.stream ? mix_backward_rows<T, true, true> : mix_backward_rows<T, false, true>)(p, chunk, sums, scratch);
  else
    (p.stream ? mix_backward_rows<T, true, false> : mix_backward_rows<T, false, false>)(p, chunk, sums, scratch);
}

}  // namespace RED_ISA
}  // namespace red
