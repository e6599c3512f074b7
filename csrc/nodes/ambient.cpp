#include "ambient.h"

#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace red {

int64_t ambient() {
  using c10::DispatchKey;
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  const auto bit = [](bool holds, int64_t value) { return holds ? value : 0; };
  return bit(at::GradMode::is_enabled(), kGrad) | bit(c10::InferenceMode::is_enabled(), kInference) |
         bit(at::autocast::is_autocast_enabled(at::kCPU), 4) | bit(at::autocast::is_autocast_enabled(at::kCUDA), 8) |
         bit(!at::SavedTensorDefaultHooks::get_tls_state().stack.empty(), kSaved) |
         bit(torch::autograd::get_current_graph_task_id() != -1, kBackward) |
         bit(included.has(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
                 included.has(DispatchKey::FuncTorchDynamicLayerBackMode),
             kTransformed) |
         bit(torch::jit::tracer::isTracing(), kTraced) |
         bit(torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr, kTangents);
}

}  // namespace red
