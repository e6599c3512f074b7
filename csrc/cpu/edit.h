// The edit with its dropout and residual add, forward and backward (edit_forward, edit_backward in reference.py).
// With dropout, whose random words dominate, loops check their flags in each column; without, they are compiled for
// each case.
#pragma once

#include "philox.h"
#include "sweep.h"

namespace red {
namespace RED_ISA {

// The terms behind a formula; absent residuals and factors are null.
template <class T>
struct Added {
  const T* residual;
  const float* factor;

  template <class P>
  RED_INLINE Added(const P& p, int64_t i, const float* factor)
      : residual(row<T>(p.residual, i, static_cast<const T*>(nullptr))), factor(factor) {}

  // residual + dropout(h) at columns j.
  template <class At, class Flag>
  RED_INLINE V to(At at, int64_t j, V h, Flag has_residual) const {
    if constexpr (std::is_same_v<Flag, bool>)
      if (factor) h *= at.load(factor + j);
    if (has_residual) h += at.load(residual + j);
    return h;
  }

  // pass(has_residual, flag) for the present case; without dropout both are compile-time constants.
  template <class Pass>
  RED_INLINE void each_case(const Pass& pass, bool flag) const {
    if (factor)
      pass(residual != nullptr, flag);
    else
      decide(pass, residual != nullptr, flag);
  }
};

// The edit of a row. A norm needs formulas of this form: `start`, then z of all columns by `sweep_values`; that of the
// first columns by `start_value` comes before.
template <class T>
struct Edited : Added<T> {
  using Element = T;
  static constexpr bool kKeepsZ = false;  // whether z always is kept
  static constexpr bool kWhole = false;   // whether rows consist of whole units
  const T* x;
  const float *scale, *bias;

  template <class P>
  RED_INLINE Edited(const P& p, int64_t i, const float* factor)
      : Added<T>(p, i, factor), x(row<T>(p.x, i)), scale(p.scale.row(i)), bias(p.bias.row(i)) {}

  template <class At, class Flag>
  RED_INLINE V value(At at, int64_t j, Flag has_residual) const {
    return this->to(at, j, at.load(x + j) * at.load(scale + j) + at.load(bias + j), has_residual);
  }
  RED_INLINE void start() const {}
  static constexpr bool in_order() { return true; }
  template <class At, class Flag>
  RED_INLINE V start_value(At at, Flag has_residual) const {
    return value(at, 0, has_residual);
  }
  // body(at, j, k, value) as in sweep_sums, where value(has_residual) is z at columns j.
  template <int Parts, class Body>
  RED_INLINE void sweep_values(int64_t d, const Body& body) const {
    sweep_sums<Parts>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
      body(at, j, k, [&](auto has_residual) __attribute__((always_inline)) { return value(at, j, has_residual); });
    });
  }
};

template <class T, bool Stream>
void edit_forward_rows(const EditForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = p.d;
  for (int64_t i = begin; i < end; ++i) {
    const Edited<T> edited(p, i, dropout_factors(p.dropout, i, d, scratch));
    T* z = output<T>(p.z, d, i);
    const auto pass = [&](auto has_residual, auto) __attribute__((always_inline)) {
      sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
        at.template store<Stream>(z + j, edited.value(at, j, has_residual));
      });
    };
    edited.each_case(pass, false);
  }
  if (Stream) fence();
}

template <class T>
void edit_forward(const EditForward& p, int64_t begin, int64_t end, float* scratch) {
  (p.stream ? edit_forward_rows<T, true> : edit_forward_rows<T, false>)(p, begin, end, scratch);
}

// The common part of every backward, from the gradient g of z: the dropout, dx, and the two column sums.
template <class T, bool Stream>
struct EditGradient {
  using Element = T;
  static constexpr bool kWhole = false;
  const T* x;
  const float *scale, *factor;
  T* dx;
  float *dscale, *dbias, *held;  // the last is null if the gradient is requested and no output is written with it

  template <class P>
  RED_INLINE EditGradient(const P& p, int64_t i, const T* x, const float* factor, const Columns& sums,
                          float* held = nullptr)
      : x(x), scale(p.scale.row(i)), factor(factor), dx(output<T>(p.dx, p.d, i)), dscale(sums.dscale),
        dbias(sums.dbias), held(held) {}

  template <class Pass, class... Flags>
  RED_INLINE static void each_case(const Pass& pass, Flags... flags) {
    decide(pass, flags...);
  }

  // With `all`, dx and both sums are requested and there is no dropout.
  template <class At, class Flag>
  RED_INLINE void put(At at, int64_t j, V g, Flag all) const {
    if constexpr (std::is_same_v<Flag, std::true_type>) {
      accumulate(at, dscale + j, g * at.load(x + j));
      accumulate(at, dbias + j, g);
      at.template store<Stream>(dx + j, g * at.load(scale + j));
    } else {
      if (factor) g *= at.load(factor + j);
      if (dscale) accumulate(at, dscale + j, g * at.load(x + j));
      if (dbias) accumulate(at, dbias + j, g);
      if (dx) at.template store<Stream>(dx + j, g * at.load(scale + j));
    }
  }
  bool all() const { return dx && dscale && dbias && !factor; }
  // gradient(at, j) is g at columns j, and is called once for each unit.
  template <class Gradient, class Flag>
  RED_INLINE void behind(int64_t d, const Gradient& gradient, Flag all) const {
    if (!Stream || !held) {
      sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) { put(at, j, gradient(at, j), all); });
      return;
    }
    // Stores past the cache fill line by line; alternating between two outputs leaves some lines half full. So each
    // output is written separately, for as many columns as fit into the first-level cache.
    constexpr int64_t columns = 512;
    for (int64_t from = 0; from < d; from += columns) {
      const int64_t width = d - from < columns ? d - from : columns;
      float* const g = held + from;
      sweep(width, [&](auto at, int64_t j) __attribute__((always_inline)) {
        at.template store<false>(g + j, gradient(at, from + j));
      });
      sweep(width, [&](auto at, int64_t j) __attribute__((always_inline)) { put(at, from + j, at.load(g + j), all); });
    }
  }
};

template <class T, bool Stream>
void edit_backward_rows(const EditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  const int64_t d = p.d;
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T* dz = row<T>(p.dz, i);
    const EditGradient<T, Stream> edit(p, i, row<T>(p.x, i, dz), dropout_factors(p.dropout, i, d, scratch), sums);
    const auto pass = [&](auto all) __attribute__((always_inline)) {
      edit.behind(d, [&](auto at, int64_t j) __attribute__((always_inline)) { return at.load(dz + j); }, all);
    };
    decide(pass, edit.all());
  }
  if (Stream) fence();
}

template <class T>
void edit_backward(const EditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  (p.stream ? edit_backward_rows<T, true> : edit_backward_rows<T, false>)(p, chunk, sums, scratch);
}

}  // namespace RED_ISA
}  // namespace red
