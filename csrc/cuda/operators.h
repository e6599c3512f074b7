// What the operators on a GPU share.
#pragma once

#include "call.h"

namespace red {
namespace cuda {

inline Edit edit_of(const Call& call, const Parameter& scale, const Parameter& bias, const Ids& ids, int64_t edits,
                    const Dropout& dropout) {
  return {scale.vectors, bias.vectors, ids.data, edits, call.shape.d, dropout};
}

// The vectors that a model has: an edit in fp32, a norm in the type of the activations.
inline bool usual_scale(const Edit& edit) { return edit.scale.data != nullptr && edit.scale.wide && edit.ids == nullptr; }
inline bool usual_bias(const Edit& edit) { return edit.bias.data != nullptr && edit.bias.wide; }
inline bool usual_edit(const Edit& edit) { return usual_scale(edit) && edit.dropout.seed == nullptr; }
inline bool usual_weight(const Call& call, const Vectors& weight) {
  return weight.data != nullptr && weight.wide == (call.shape.type == kFloat32);
}

// What is added to a weight; nothing is -0, which changes no number that it is added to.
inline float offset_of(double weight_offset) {
  return weight_offset == 0.0 ? -0.0f : static_cast<float>(weight_offset);
}

// How many blocks a backward has: enough for its rows, and `blocks` at most.
inline int64_t programs(const Call& call, int64_t rows_of_block, int64_t blocks, bool sorted) {
  const int64_t rows = call.shape.rows, least = sorted ? ColumnSums::kLeastLength : 1;
  return std::max<int64_t>(1, std::min(blocks, divide_up(rows, rows_of_block * least)));
}

// Both backwards with a norm.
void norm_backward(const Call& call, NormBackward a, ColumnSums& sums);

}  // namespace cuda
}  // namespace red
