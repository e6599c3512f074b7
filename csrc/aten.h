// Tensors of torch's C++ API, for the library of autograd's nodes, which is built for one torch.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ATen.h>
#include <torch/csrc/stable/ops.h>

namespace red {

using TensorDevice = at::Device;
using at::ScalarType;
using at::Tensor;

using Sizes = at::IntArrayRef;

inline Tensor make_empty(Sizes sizes, ScalarType dtype, TensorDevice device) {
  return device.is_cpu() ? at::detail::empty_cpu(sizes, dtype)
                         : at::empty(sizes, at::TensorOptions(device).dtype(dtype));
}

inline Tensor as_contiguous(const Tensor& t) { return t.contiguous(); }

// A contiguous tensor of memory that `release` frees.
inline Tensor tensor_of(void* block, Sizes sizes, ScalarType dtype, TensorDevice device, void (*release)(void*)) {
  return at::from_blob(block, sizes, release, at::TensorOptions(device).dtype(dtype));
}

}  // namespace red
