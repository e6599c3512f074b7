// The operators of one namespace, called from C++. Their results: red_kernels/backends/reference.py.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string>
#include <tuple>

#include "../ops.h"

namespace red {

using Maybe = OptionalTensor;

inline c10::DispatchKeySet keys_of(const Tensor& t) { return t.key_set(); }
inline c10::DispatchKeySet keys_of(const Maybe& t) { return t ? t->key_set() : c10::DispatchKeySet(); }
template <class Number>
c10::DispatchKeySet keys_of(Number) { return {}; }

// Whether torch's dispatcher would only call the CPU kernels for tensors of these keys: no Python mode, no torch.func,
// no tensor of another type; and no profiler.
inline bool is_plain(c10::DispatchKeySet keys) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  keys = (keys | local.included_) - local.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView -
         c10::autocast_dispatch_keyset - c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  return keys.highestPriorityTypeId() == c10::DispatchKey::CPU && !at::hasCallbacks();
}

// One operator: as registered, or, for plain tensors, as compiled into this library.
template <class Signature>
class Operator;
template <class Result, class... Given>
class Operator<Result(Given...)> {
 public:
  using Direct = Result (*)(std::decay_t<Given>...);
  Operator(const std::string& space, const char* name, Direct direct)
      : registered_(c10::Dispatcher::singleton().findSchemaOrThrow((space + "::" + name).c_str(), "")
                        .template typed<Result(Given...)>()),
        direct_(direct) {}

  // Below autograd.
  Result call(Given... given) const {
    if (direct_ != nullptr && is_plain((keys_of(given) | ...))) return direct_(given...);
    return registered_.call(given...);
  }

 private:
  c10::TypedOperatorHandle<Result(Given...)> registered_;
  Direct direct_;
};

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

  // `backend` is the name of the implementation in Python; `direct`: whether the CPU kernels run it.
  Operators(const std::string& space, std::string backend, bool direct)
      : backend(std::move(backend)),
        edit_forward(space, "edit_forward", direct ? cpu::edit_forward : nullptr),
        edit_backward(space, "edit_backward", direct ? cpu::edit_backward : nullptr),
        edit_norm_forward(space, "edit_norm_forward", direct ? cpu::edit_norm_forward : nullptr),
        edit_norm_backward(space, "edit_norm_backward", direct ? cpu::edit_norm_backward : nullptr),
        norm_edit_forward(space, "norm_edit_forward", direct ? cpu::norm_edit_forward : nullptr),
        norm_edit_backward(space, "norm_edit_backward", direct ? cpu::norm_edit_backward : nullptr) {}

  const std::string backend;
  const Operator<EditForward> edit_forward;
  const Operator<EditBackward> edit_backward;
  const Operator<EditNormForward> edit_norm_forward;
  const Operator<EditNormBackward> edit_norm_backward;
  const Operator<NormEditForward> norm_edit_forward;
  const Operator<NormEditBackward> norm_edit_backward;
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

// Takes the kernels lent by their library; whether it was compiled with the same structs.
bool borrow(const void* lent);

}  // namespace red
