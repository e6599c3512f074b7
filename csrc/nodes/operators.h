// The registered operators of one namespace, called from C++. What each computes: red_kernels/backends/reference.py.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace red {

using at::Tensor;
using Maybe = std::optional<Tensor>;

struct Operators {
  using T = const Tensor&;
  using M = const Maybe&;
  using EditForward = Tensor(T, M, M, M, M, M, double);
  using EditBackward = std::tuple<Tensor, Tensor, Tensor>(T, M, M, M, M, double, int64_t, int64_t);
  using EditNormForward = std::tuple<Tensor, Tensor, Tensor, Tensor>(T, M, M, M, M, M, M, M, double, double, double,
                                                                     bool, bool);
  using EditNormBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      T, M, M, M, M, M, M, M, M, M, M, T, double, double, int64_t, int64_t);
  using NormEditForward = std::tuple<Tensor, Tensor, Tensor>(T, M, M, M, M, M, double, double, bool);
  using NormEditBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(T, T, M, M, M, M, M, T, double, int64_t,
                                                                              int64_t);

  // `backend` is the name by which Python knows the implementation.
  Operators(const std::string& space, std::string backend)
      : backend(std::move(backend)),
        edit_forward(find<EditForward>(space, "edit_forward")),
        edit_backward(find<EditBackward>(space, "edit_backward")),
        edit_norm_forward(find<EditNormForward>(space, "edit_norm_forward")),
        edit_norm_backward(find<EditNormBackward>(space, "edit_norm_backward")),
        norm_edit_forward(find<NormEditForward>(space, "norm_edit_forward")),
        norm_edit_backward(find<NormEditBackward>(space, "norm_edit_backward")) {}

  const std::string backend;
  const c10::TypedOperatorHandle<EditForward> edit_forward;
  const c10::TypedOperatorHandle<EditBackward> edit_backward;
  const c10::TypedOperatorHandle<EditNormForward> edit_norm_forward;
  const c10::TypedOperatorHandle<EditNormBackward> edit_norm_backward;
  const c10::TypedOperatorHandle<NormEditForward> norm_edit_forward;
  const c10::TypedOperatorHandle<NormEditBackward> norm_edit_backward;

 private:
  template <class Signature>
  static c10::TypedOperatorHandle<Signature> find(const std::string& space, const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow((space + "::" + name).c_str(), "").typed<Signature>();
  }
};

// An edit: its vectors, the edit of each row, and the dropout behind it.
struct Edit {
  Maybe scale, bias, ids, seed;
  double p = 0.0;

  int64_t count() const {
    if (!ids.has_value()) return 1;
    return scale.has_value() ? scale->size(0) : bias.has_value() ? bias->size(0) : 1;
  }
};

// A norm: `normed * (offset + weight) + bias`.
struct Norm {
  Maybe weight, bias;
  double eps = 0.0, offset = 0.0;
  bool centered = false;
};

}  // namespace red
