// From tensors to the arguments of kernels, on any device: shapes, strides, checks. The public operations have checked
// their arguments already; these checks keep a direct call of an operator from reading past a tensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "types.h"

namespace red {

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "red_kernels: x has an unsupported dtype, expected float32, bfloat16 or float16");
  }
}

// The shape that all activations of a call share.
struct Shape {
  explicit Shape(const Tensor& x) : like(x), type(type_of(x)) {
    STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "red_kernels: x must be (..., d) with d >= 1");
    d = x.size(x.dim() - 1);
    rows = x.numel() / d;
  }
  int64_t bytes() const { return rows * d * static_cast<int64_t>(like.element_size()); }

  const Tensor& like;
  Type type;
  int64_t rows, d;
};

// The rows of an activation. Keeps a contiguous copy if the strides are not those of rows.
class Activation {
 public:
  Activation(const Shape& shape, const OptionalTensor& tensor, const char* name) {
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->device() == shape.like.device() && tensor->scalar_type() == shape.like.scalar_type(),
                    "red_kernels: ", name, " must be on the device of x with its dtype");
    STD_TORCH_CHECK(tensor->sizes().equals(shape.like.sizes()), "red_kernels: ", name, " must have the shape of x");
    int64_t stride = 0;
    if (!row_stride(*tensor, shape.d, stride)) {
      copy_ = as_contiguous(*tensor);
      stride = shape.d;
    }
    const Tensor& source = copy_.has_value() ? *copy_ : *tensor;
    rows = {source.const_data_ptr(), stride};
    // A tensor without elements may have no memory; null means absent.
    if (shape.rows == 0) rows.data = &rows;
  }
  Activation(const Activation&) = delete;

  Rows rows;

 private:
  static bool row_stride(const Tensor& t, int64_t d, int64_t& stride) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t last = t.dim() - 1;
    if (d > 1 && strides[last] != 1) return false;
    stride = d;
    bool set = false;
    int64_t expected = 0;
    for (int64_t k = last - 1; k >= 0; --k) {
      if (sizes[k] == 1) continue;
      if (!set)
        stride = strides[k], set = true;
      else if (strides[k] != expected)
        return false;
      expected = strides[k] * sizes[k];
    }
    return true;
  }

  std::optional<Tensor> copy_;
};

// The number of edits in the vectors of a forward.
inline int64_t count_edits(const OptionalTensor& scale, const OptionalTensor& bias) {
  for (const OptionalTensor* vector : {&scale, &bias})
    if (vector->has_value() && (*vector)->dim() == 2) return (*vector)->size(0);
  return 1;
}

// The least kept word, and the factor of kept elements.
inline uint32_t dropout_threshold(double p) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "red_kernels: dropout_p must be a probability");
  return static_cast<uint32_t>(std::min<long long>(std::llrint(p * 0x1p32), 0xffffffffLL));
}
inline float dropout_scale(double p) { return p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f; }

}  // namespace red
