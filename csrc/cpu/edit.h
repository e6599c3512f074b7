// The edit with its dropout and residual add, forward and backward (edit_forward, edit_backward in reference.py).
// With dropout, whose random words cost more than all else, loops look at their flags in each column; without, they are
// compiled for each case.
#pragma once

#include "philox.h"
#include "sweep.h"

namespace red {
namespace RED_ISA {

// The places of a row that an edit reads; absent residuals and factors are null.
template <class T>
struct Edited {
  const T *x, *residual;
  const float *scale, *bias, *factor;

  // residual + dropout(scale * x + bias) at columns j.
  template <class At, class Flag>
  RED_INLINE V value(At at, int64_t j, Flag has_residual) const {
    V h = at.load(x + j) * at.load(scale + j) + at.load(bias + j);
    if constexpr (std::is_same_v<Flag, bool>)
      if (factor) h *= at.load(factor + j);
    if (has_residual) h += at.load(residual + j);
    return h;
  }

  // pass(has_residual, flag) for the case at hand; without dropout both are known when pass is compiled.
  template <class Pass>
  RED_INLINE void each_case(const Pass& pass, bool flag) const {
    if (factor)
      pass(residual != nullptr, flag);
    else
      decide(pass, residual != nullptr, flag);
  }
};

template <class T, bool Stream>
void edit_forward_rows(const EditForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = p.d;
  for (int64_t i = begin; i < end; ++i) {
    const Edited<T> edited{row<T>(p.x, i), row<T>(p.residual, i, static_cast<const T*>(nullptr)), p.scale.row(i),
                           p.bias.row(i), dropout_factors(p.dropout, i, d, scratch)};
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

// The part of every backward behind the gradient g of z: the dropout, dx, and the two column sums.
template <class T, bool Stream>
struct EditGradient {
  const T* x;
  const float *scale, *factor;
  T* dx;
  float *dscale, *dbias;

  // With `all`, dx and both sums are asked for and nothing is dropped.
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
};

template <class T, bool Stream>
void edit_backward_rows(const EditBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  const int64_t d = p.d;
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T* dz = row<T>(p.dz, i);
    const EditGradient<T, Stream> edit{row<T>(p.x, i, dz), p.scale.row(i), dropout_factors(p.dropout, i, d, scratch),
                                       output<T>(p.dx, d, i), sums.dscale, sums.dbias};
    const auto pass = [&](auto all) __attribute__((always_inline)) {
      sweep(d, [&](auto at, int64_t j) __attribute__((always_inline)) { edit.put(at, j, at.load(dz + j), all); });
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
