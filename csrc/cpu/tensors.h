// From tensors to the plain arguments of the CPU kernels: fp32 vectors, scratch, outputs.
#pragma once

#include "../tensors.h"
#include "dispatch.h"
#include "memory.h"

namespace red {
namespace cpu {

// A vector, or one for each edit, as fp32: used directly if it is fp32, else converted; filled with `neutral` if it is
// absent (-0 for an addition: +0 would lose the sign of a zero).
class Vector {
 public:
  Vector(const Shape& shape, const OptionalTensor& tensor, int64_t count, float neutral, float offset,
         const char* name) {
    if (!tensor.has_value()) {
      values_.assign(shape.d, neutral);
      data = values_.data();
      return;
    }
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->numel() == count * shape.d, "red_kernels: ", name, " must be on the CPU with ",
                    count, " x ", shape.d, " elements");
    stride = shape.d;
    source_ = as_contiguous(*tensor);
    const void* from = source_->const_data_ptr();
    if (source_->scalar_type() == ScalarType::Float && offset == 0.0f) {
      data = static_cast<const float*>(from);
      return;
    }
    values_.resize(count * shape.d);
    switch (source_->scalar_type()) {
      case ScalarType::Float:
        convert(static_cast<const float*>(from), offset);
        break;
      case ScalarType::Double:
        convert(static_cast<const double*>(from), offset);
        break;
      case ScalarType::BFloat16:
        convert(static_cast<const torch::headeronly::BFloat16*>(from), offset);
        break;
      case ScalarType::Half:
        convert(static_cast<const torch::headeronly::Half*>(from), offset);
        break;
      default:
        STD_TORCH_CHECK(false, "red_kernels: ", name, " has an unsupported dtype, expected a floating one");
    }
    data = values_.data();
  }
  Vector(const Vector&) = delete;

  const float* data = nullptr;
  int64_t stride = 0;

 private:
  template <class T>
  void convert(const T* from, float offset) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = static_cast<float>(from[i]) + offset;
  }

  std::vector<float> values_;
  std::optional<Tensor> source_;
};

// The edit of each row.
class EditIds {
 public:
  EditIds(const Shape& shape, const OptionalTensor& tensor, int64_t edits) : edits_(edits) {
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Long && tensor->numel() == shape.rows,
                    "red_kernels: edit_ids must be int64 on the CPU, one for each row of x");
    source_ = as_contiguous(*tensor);
    data = static_cast<const int64_t*>(source_->const_data_ptr());
    // A tensor without elements may have no memory; null means absent.
    if (data == nullptr) data = &edits_;
    for (int64_t i = 0; i < shape.rows; ++i)
      STD_TORCH_CHECK(data[i] >= 0 && data[i] < edits, "red_kernels: edit_ids has the value ", data[i],
                      ", expected 0 to ", edits - 1);
  }
  EditIds(const EditIds&) = delete;
  Vectors vectors(const Vector& vector) const { return {vector.data, vector.stride, data}; }
  int64_t edits() const { return edits_; }

  const int64_t* data = nullptr;

 private:
  int64_t edits_;
  std::optional<Tensor> source_;
};

inline Dropout dropout_of(const OptionalTensor& seed, double p) {
  if (!seed.has_value()) return {};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "red_kernels: the seed must be one int64 on the CPU");
  Dropout dropout;
  dropout.on = true;
  dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  dropout.threshold = dropout_threshold(p);
  dropout.factor = dropout_scale(p);
  return dropout;
}

// An uninitialised contiguous tensor, from the pool if it is large.
inline Tensor make(Sizes sizes, ScalarType dtype, size_t element) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const size_t bytes = static_cast<size_t>(count) * element;
  const TensorDevice device(torch::headeronly::DeviceType::CPU);
  if (bytes < kPooledBytes || !pool_in_use()) return make_empty(sizes, dtype, device);
  void* block = acquire(bytes);
  STD_TORCH_CHECK(block != nullptr, "red_kernels: out of memory for an output of ", bytes, " bytes");
  return tensor_of(block, sizes, dtype, device, &release);
}

inline Tensor make_like(const Shape& shape) {
  return make(shape.like.sizes(), shape.like.scalar_type(), shape.like.element_size());
}

// One fp32 value for each row.
inline Tensor make_statistic(const Shape& shape) {
  const auto sizes = shape.like.sizes();
  return make({sizes.data(), sizes.size() - 1}, ScalarType::Float, 4);
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline const float* statistic(const Shape& shape, const OptionalTensor& t, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Float && t->numel() == shape.rows,
                  "red_kernels: ", name, " must be contiguous fp32, one for each row of x");
  return static_cast<const float*>(t->const_data_ptr());
}

// Scratch rows start on a cache line; the allocation has 16 floats more for that.
inline float* align(float* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

// Outputs of at least this many bytes go past the cache: they would have left it before they are read.
bool streams(const Shape& shape, int outputs);

// Runs body(begin, end) over a range, on torch's threads if it is too long for one.
template <class Body>
void in_parallel(int64_t end, int64_t grain, const Body& body) {
  if (end > grain)
    torch::stable::parallel_for(0, end, grain, body);
  else if (end > 0)
    body(0, end);
}

// Runs body(begin, end, scratch) over the rows, on torch's threads.
template <class Body>
void for_rows(const Shape& shape, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / shape.d);
  in_parallel(shape.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_floats(shape.d) + 16);
    body(begin, end, align(scratch.data()));
  });
}

}  // namespace cpu
}  // namespace red
