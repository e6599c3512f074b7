// The edit, the residual add and the norm behind it in one pass (edit_norm_forward, edit_norm_backward in reference.py).
#pragma once

#include "edit.h"
#include "norm.h"

namespace red {
namespace RED_ISA {

template <class Formula, bool Centered, class Flag, class P>
RED_INLINE void norm_forward_of_rows(Flag stream, const P& p, int64_t begin, int64_t end, float* scratch) {
  using T = typename Formula::Element;
  const int64_t d = p.d;
  const float *weight = p.weight, *norm_bias = p.norm_bias;
  float *held = scratch, *factors = scratch + padded(d);
  for (int64_t i = begin; i < end; ++i) {
    Formula formula(p, i, dropout_factors(p.dropout, i, d, factors));
    T *y = output<T>(p.y, d, i), *z = output<T>(p.z, d, i);
    Statistics s;
    formula.start();
    const auto pass = [&](auto has_residual, auto keeps_z) __attribute__((always_inline)) {
      RowSums<T, Centered> sums(d, [&](auto at, int64_t) __attribute__((always_inline)) {
        return rounded(T{}, formula.start_value(at, has_residual));
      });
      formula.template sweep_values<sums.kParts>(
          d, [&](auto at, int64_t j, int k, const auto& value) __attribute__((always_inline)) {
            prepare(stream, y + j);
            // The norm reads z as rounded, kept or not.
            const V h = Formula::kKeepsZ || keeps_z ? at.store_rounded(stream, z + j, value(has_residual))
                                                    : rounded(T{}, value(has_residual));
            at.template store<false>(held + j, h);
            if (formula.in_order()) sums.add(at, k, h);
          });
      if (!formula.in_order()) sums = sums_of_row<T, Centered>(held, d);
      s = sums.statistics(held, d, p.eps);
    };
    formula.each_case(pass, Formula::kKeepsZ || z);
    if (Centered) p.mean[i] = s.mean;
    p.rstd[i] = s.rstd;
    const int64_t next = i + 1 < end ? i + 1 : i;
    const T *next_x = row<T>(p.x, next), *next_residual = row<T>(p.residual, next, next_x);
    sweep<Formula::kWhole>(d, [&](auto at, int64_t j) __attribute__((always_inline)) {
      // This pass reads nothing from memory, so the next row can be prefetched.
      prefetch(next_x + j);
      prefetch(next_residual + j);
      const V normed = normalised<Centered>(at.load(held + j), s);
      at.store(stream, y + j, normed * at.load(weight + j) + at.load(norm_bias + j));
    });
  }
  if (stream) fence();
}

template <class T, bool Centered, bool Stream>
void edit_norm_forward_rows(const EditNormForward& p, int64_t begin, int64_t end, float* scratch) {
  norm_forward_of_rows<Edited<T>, Centered>(std::bool_constant<Stream>{}, p, begin, end, scratch);
}

template <class T, bool Centered>
void edit_norm_forward(const EditNormForward& p, int64_t begin, int64_t end, float* scratch) {
  (p.stream ? edit_norm_forward_rows<T, Centered, true> : edit_norm_forward_rows<T, Centered, false>)(p, begin, end,
                                                                                                     scratch);
}

template <class Gradient, bool Centered, bool HasZ, class Flag, class P>
RED_INLINE void norm_backward_of_rows(Flag stream, const P& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  using T = typename Gradient::Element;
  const int64_t d = p.d;
  const float* weight = p.weight;
  float *held = scratch, *factors = scratch + padded(d);
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const int64_t i = chunk.row(k);
    const T *dy = row<T>(p.dy, i), *z = row<T>(p.z, i, dy), *x = row<T>(p.x, i, z), *dz = row<T>(p.dz, i, z);
    const float* factor = dropout_factors(p.dropout, i, d, factors);
    const Edited<T> edited(p, i, factor);
    const Statistics s{Centered ? p.mean[i] : 0.0f, p.rstd[i]};
    const Gradient edit(p, i, x, factor, sums, held);
    T* dresidual = output<T>(p.dresidual, d, i);
    // Unrequested outputs are replaced by the row, which is read anyway.
    const T *first_out = dresidual ? dresidual : dy, *second_out = edit.dx ? edit.dx : dy;
    Projection projection;
    const auto first = [&](auto has_residual, auto norm_sums) __attribute__((always_inline)) {
      Projection found;
      sweep_sums<Projection::kParts, Gradient::kWhole>(d, [&](auto at, int64_t j, int k) __attribute__((always_inline)) {
        prepare(stream, first_out + j);
        prepare(stream, second_out + j);
        V value;
        if constexpr (HasZ) {
          value = at.load(z + j);
          prefetch(x + j);
          prefetch(dz + j);
        } else {
          value = rounded(T{}, edited.value(at, j, has_residual));
          at.template store<false>(held + j, value);
        }
        const V normed = at.valid(normalised<Centered>(value, s)), gradient = at.load(dy + j);
        found.add<Centered>(k, gradient * at.load(weight + j), normed);
        if (norm_sums) {
          if (sums.dweight) accumulate(at, sums.dweight + j, gradient * normed);
          if (sums.dnorm_bias) accumulate(at, sums.dnorm_bias + j, gradient);
        }
      });
      projection = found;
    };
    const bool norm_sums = sums.dweight || sums.dnorm_bias;
    if constexpr (HasZ)
      Gradient::each_case([&](auto known) __attribute__((always_inline)) { first(std::false_type{}, known); }, norm_sums);
    else
      edited.each_case(first, norm_sums);
    projection.finish<Centered>(d);
    const int64_t next = chunk.row(k + 1 < chunk.end ? k + 1 : k);
    const T *next_dy = row<T>(p.dy, next), *next_z = row<T>(HasZ ? p.z : p.x, next);
    const auto second = [&](auto all, auto has_dz) __attribute__((always_inline)) {
      const auto gradient = [&](auto at, int64_t j) __attribute__((always_inline)) {
        prefetch(next_dy + j);
        prefetch(next_z + j);
        const V normed = normalised<Centered>(HasZ ? at.load(z + j) : at.load(held + j), s);
        V g = projection.apply<Centered>(at.load(dy + j) * at.load(weight + j), normed, s);
        if (has_dz) g += at.load(dz + j);
        if (all || dresidual) at.store(stream, dresidual + j, g);
        return g;
      };
      edit.behind(d, gradient, all);
    };
    Gradient::each_case(second, edit.all() && dresidual, static_cast<bool>(p.dz));
  }
  if (stream) fence();
}

template <class T, bool Centered, bool Stream, bool HasZ>
void edit_norm_backward_rows(const EditNormBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  norm_backward_of_rows<EditGradient<T, Stream>, Centered, HasZ>(std::bool_constant<Stream>{}, p, chunk, sums, scratch);
}

template <class T, bool Centered>
void edit_norm_backward(const EditNormBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  if (p.z)
    (p.stream ? edit_norm_backward_rows<T, Centered, true, true> : edit_norm_backward_rows<T, Centered, false, true>)(
        p, chunk, sums, scratch);
  else
    (p.stream ? edit_norm_backward_rows<T, Centered, true, false> : edit_norm_backward_rows<T, Centered, false, false>)(
        p, chunk, sums, scratch);
}

}  // namespace RED_ISA
}  // namespace red
