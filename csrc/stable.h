// Tensors of LibTorch's stable ABI, for the libraries of the kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <vector>

namespace red {

using torch::headeronly::ScalarType;
using TensorDevice = torch::stable::Device;
using torch::stable::Tensor;

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t k = static_cast<int64_t>(sizes.size()) - 2; k >= 0; --k)
    strides[k] = strides[k + 1] * std::max<int64_t>(sizes[k + 1], 1);
  return strides;
}

// An uninitialised contiguous tensor. torch::stable::empty looks up aten::empty in the dispatcher by name, which costs
// as much as a small kernel, for every output of every call.
inline Tensor make_empty(Sizes sizes, ScalarType dtype, TensorDevice device) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  AtenTensorHandle made = nullptr;
  // A check that exists in the oldest torch too.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  to<int32_t>(from(dtype)), to<int32_t>(from(device.type())),
                                                  device.index(), &made));
  return Tensor(made);
}

// torch::stable::contiguous looks up the dispatcher by name, too.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A contiguous tensor of memory that `release` frees.
inline Tensor tensor_of(void* block, Sizes sizes, ScalarType dtype, TensorDevice device, void (*release)(void*)) {
  return torch::stable::from_blob(block, sizes, contiguous_strides(sizes), device, dtype, release);
}

}  // namespace red
