// From tensors to the arguments of the kernels: the device and its stream, vectors, column sums, launches.
#pragma once

#define RED_TARGET cuda
#include "../tensors.h"
#include "kernels.h"

#include <array>

#include <torch/csrc/stable/accelerator.h>

// In torch's own CUDA library, which a torch without CUDA lacks. Weak: the kernels' library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace red {
namespace cuda {

// Makes the device of a tensor the current one, if it is not, and goes back at the end.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
#if defined(RED_EMULATED)
    (void)x;
    device = &device_of(0);
#else
    const int index = x.get_device_index();
    int current = -1;
    const cudaError_t status = cudaGetDevice(&current);
    STD_TORCH_CHECK(status == cudaSuccess, "red_kernels: ", cudaGetErrorString(status));
    if (current != index) guard_.emplace(index);
    device = &device_of(index);
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                        aoti_torch_get_current_cuda_stream(index, &stream) == AOTI_TORCH_SUCCESS,
                    "red_kernels: torch has no current stream on device ", index);
#endif
  }
  OnDevice(const OnDevice&) = delete;

  const Device* device = nullptr;
  void* stream = nullptr;

#if !defined(RED_EMULATED)
 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// One call of an operator: the shape of its activations, and where it runs. Where vectors of 16 bytes fill a row, all rows
// are aligned: inputs that are not are copied. Otherwise no 16 bytes are taken to lie anywhere.
struct Call {
  explicit Call(const Tensor& x) : shape(x), on(x), aligned(shape.d % vector_size(shape.type) == 0) {}

  Launch launch(const char* name, Grid grid, int threads_x, int threads_y = 1) const {
    Launch l;
    l.name = name;
    l.type = shape.type;
    l.rows = shape.rows;
    l.d = shape.d;
    l.device = on.device;
    l.stream = on.stream;
    l.grid = grid;
    l.threads_x = threads_x;
    l.threads_y = threads_y;
    return l;
  }
  bool must_copy(const void* data, int64_t stride_bytes = 0) const {
    return aligned && (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride_bytes % 16 != 0);
  }
  Tensor make_like() const {
    return make_empty(shape.like.sizes(), shape.like.scalar_type(), shape.like.device());
  }
  Tensor make_floats(Sizes sizes) const {
    return make_empty(sizes, ScalarType::Float, shape.like.device());
  }
  Tensor make_statistic() const {
    const auto sizes = shape.like.sizes();
    return make_floats({sizes.data(), sizes.size() - 1});
  }
  // Runs f with a value of the type of the activations.
  template <class F>
  void dispatch(const F& f) const {
    if (shape.type == kFloat32)
      f(float{});
    else if (shape.type == kBFloat16)
      f(BFloat16{});
    else
      f(Float16{});
  }

  Shape shape;
  OnDevice on;
  const bool aligned;
};

inline Tensor copied(const Tensor& t) {
  Tensor copy = make_empty(t.sizes(), t.scalar_type(), t.device());
  return torch::stable::copy_(copy, t);
}

// The rows of an activation, or none.
class Input : public Activation {
 public:
  Input(const Call& call, const OptionalTensor& tensor, const char* name) : Activation(call.shape, tensor, name) {
    if (!rows || !call.must_copy(rows.data, rows.stride * static_cast<int64_t>(call.shape.like.element_size()))) return;
    copy_ = copied(*tensor);
    rows = {copy_->const_data_ptr(), call.shape.d};
  }

 private:
  std::optional<Tensor> copy_;
};

// A parameter: `count` vectors in fp32 or the type of the activations, with `wide` in fp32 only; others are converted.
class Parameter {
 public:
  Parameter(const Call& call, const OptionalTensor& tensor, int64_t count, const char* name, bool wide = false) {
    if (!tensor.has_value()) return;
    const Shape& shape = call.shape;
    STD_TORCH_CHECK(tensor->device() == shape.like.device() && tensor->numel() == count * shape.d, "red_kernels: ", name,
                    " must be on the device of x with ", count, " x ", shape.d, " elements");
    kept_ = as_contiguous(*tensor);
    vectors.wide = kept_->scalar_type() == ScalarType::Float;
    if (!vectors.wide && (wide || kept_->scalar_type() != shape.like.scalar_type())) {
      kept_ = torch::stable::to(*kept_, ScalarType::Float);
      vectors.wide = true;
    }
    if (call.must_copy(kept_->const_data_ptr())) kept_ = copied(*kept_);
    vectors.data = kept_->const_data_ptr();
  }
  Parameter(const Parameter&) = delete;

  Vectors vectors;

 private:
  std::optional<Tensor> kept_;
};

// The ids of the rows' edits.
class Ids {
 public:
  Ids(const Call& call, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->device() == call.shape.like.device() && tensor->scalar_type() == ScalarType::Long &&
                        tensor->numel() == call.shape.rows,
                    "red_kernels: edit_ids must be int64 on the device of x, one for each row");
    kept_ = as_contiguous(*tensor);
    data = static_cast<const int64_t*>(kept_->const_data_ptr());
  }
  Ids(const Ids&) = delete;
  const std::optional<Tensor>& tensor() const { return kept_; }

  const int64_t* data = nullptr;

 private:
  std::optional<Tensor> kept_;
};

inline Dropout dropout_of(const Call& call, const OptionalTensor& seed, double p) {
  if (!seed.has_value()) return {};
  STD_TORCH_CHECK(seed->device() == call.shape.like.device() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "red_kernels: the seed must be one int64 on the device of x");
  return {static_cast<const int64_t*>(seed->const_data_ptr()), dropout_threshold(p), dropout_scale(p)};
}

inline const float* statistic(const Call& call, const OptionalTensor& t, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->device() == call.shape.like.device() && t->is_contiguous() && t->scalar_type() == ScalarType::Float &&
                      t->numel() == call.shape.rows,
                  "red_kernels: ", name, " must be contiguous fp32 on the device of x, one for each row");
  return static_cast<const float*>(t->const_data_ptr());
}

inline void* data_of(const Tensor& t, bool there = true) { return there ? t.mutable_data_ptr() : nullptr; }

// The column sums of a backward: the lines that its blocks leave, how its rows are dealt, and the end of it. See Deal.
class ColumnSums {
 public:
  static constexpr int kSums = 4;             // of dscale, dbias, dweight and dnorm_bias, or of a mix's vectors
  static constexpr int64_t kLeastLength = 16;  // rows of a worker when they are sorted, but for the last ones

  // The first `of_edits` sums are the edit's, with ids one for each edit; the others are the norm's.
  ColumnSums(const Call& call, const Ids& ids, int64_t edits, std::array<bool, kSums> wanted, int of_edits = 2);

  bool sorted() const { return order_.has_value(); }
  bool edit_wanted() const { return wanted_[0] && wanted_[1]; }
  bool norm_wanted() const { return wanted_[2] || wanted_[3]; }
  // Given the blocks and the workers that there will be: fills `deal` and the lines.
  void prepare(int64_t blocks, int64_t workers, Deal& deal, float* (&lines)[kSums]);
  // The sums; undefined where not wanted.
  std::array<Tensor, kSums> finish();

 private:
  bool of_edits(int k) const { return sorted() && k < edit_sums_; }

  const Call& call_;
  const int edit_sums_;
  int64_t edits_, lines_count_ = 0, edit_lines_count_ = 0;
  std::array<bool, kSums> wanted_;
  std::array<Tensor, kSums> outs_;
  std::optional<Tensor> buffer_, sorted_, order_, owners_;
  Deal deal_;
  float* lines_[kSums] = {};
};

}  // namespace cuda
}  // namespace red
