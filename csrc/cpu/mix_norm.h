// The mix, the residual add and the norm behind it in one pass (mix_norm_forward, mix_norm_backward in reference.py).
#pragma once

#include "edit_norm.h"
#include "mix.h"

namespace red {
namespace RED_ISA {

template <class T, bool Centered, int Reflections, bool Stream>
void mix_norm_forward_rows(const MixNormForward& p, int64_t begin, int64_t end, float* scratch) {
  norm_forward_of_rows<Mixed<T, Reflections>, Centered>(std::bool_constant<Stream>{}, p, begin, end, scratch);
}

template <class T, bool Centered>
void mix_norm_forward(const MixNormForward& p, int64_t begin, int64_t end, float* scratch) {
  by_reflections(p, [&](auto n) {
    (p.stream ? mix_norm_forward_rows<T, Centered, n(), true> : mix_norm_forward_rows<T, Centered, n(), false>)(
        p, begin, end, scratch);
  });
}

template <class T, bool Centered, int Reflections>
void mix_norm_backward_rows(const MixNormBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  norm_backward_of_rows<MixGradient<T, true, Reflections>, Centered, true>(p.stream, p, chunk, sums, scratch);
}

template <class T, bool Centered>
void mix_norm_backward(const MixNormBackward& p, const Chunk& chunk, const Columns& sums, float* scratch) {
  by_reflections(p, [&](auto n) { mix_norm_backward_rows<T, Centered, n()>(p, chunk, sums, scratch); });
}

}  // namespace RED_ISA
}  // namespace red
