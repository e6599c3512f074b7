// The nodes of autograd: a forward's saved tensors, and its backward. The same as red_kernels/ops/passes.py and
// handover.py in Python, which have the reasons; there it costs the host several times as much.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <map>
#include <memory>
#include <type_traits>

#include "operators.h"

namespace red {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// A backward's data beside its tensors.
struct Facts {
  std::optional<at::ScalarType> scale, bias, weight, norm_bias;  // the dtypes of the vectors
  double p = 0.0, eps = 0.0, offset = 0.0;
  int64_t edits = 1;
  bool centered = false, dropped = false;
};

Facts facts_of(const Edit* edit, const Norm* norm);

// A node whose backward runs here, unless it is recorded or takes tangents: then in Python.
struct FusedNode : Node {
  variable_list apply(variable_list&& grads) override;
  void release_variables() override;

  const Operators* operators = nullptr;
  Facts facts;

 protected:
  virtual variable_list backward(const variable_list& grads) = 0;
  virtual const char* kind() const = 0;  // its name in Python
  virtual std::vector<SavedVariable*> saved() = 0;

  bool needs(size_t input) { return task_should_compute_output(input); }

 private:
  variable_list backward_in_python(const variable_list& grads);
};

// The norm's gradients for the backward of the sum, which runs both in one pass.
struct Handed {
  double offset = 0.0;
  Tensor dy, z, weight, mean, rstd;
};

// `residual + dropout(edit(x))`, which another node may norm; inputs x, residual, scale, bias.
struct EditNode : FusedNode {
  SavedVariable x, scale, ids, seed;
  std::string name() const override { return "EditAddFunctionBackward"; }
  void release_variables() override;
  // Takes over the backward of a norm in the running pass, unless it has one already.
  bool take_over(const Handed& norm);

 protected:
  variable_list backward(const variable_list& grads) override;
  const char* kind() const override { return "edit"; }
  std::vector<SavedVariable*> saved() override { return {&x, &scale, &ids, &seed}; }

 private:
  std::map<int, Handed> handed;  // by the number of the pass: several threads may run one graph
};

// The sum of an edit and its norm; inputs x, residual, scale, bias, weight, norm_bias; outputs y, z.
struct EditNormNode : FusedNode {
  SavedVariable z, x, residual, scale, bias, weight, ids, seed, mean, rstd;
  std::string name() const override {
    return facts.centered ? "EditAddLayerNormFunctionBackward" : "EditAddRMSNormFunctionBackward";
  }

 protected:
  variable_list backward(const variable_list& grads) override;
  const char* kind() const override { return "edit_norm"; }
  std::vector<SavedVariable*> saved() override {
    return {&z, &x, &residual, &scale, &bias, &weight, &ids, &seed, &mean, &rstd};
  }
};

// The norm of a sum; inputs z, weight, norm_bias.
struct NormOfSumNode : FusedNode {
  SavedVariable z, weight, mean, rstd;
  EditNode* sum = nullptr;  // the node of the first edge, which keeps it
  std::string name() const override { return facts.centered ? "LayerNormOfSumBackward" : "RMSNormOfSumBackward"; }

 protected:
  variable_list backward(const variable_list& grads) override;
  const char* kind() const override { return "norm_of_sum"; }
  std::vector<SavedVariable*> saved() override { return {&z, &weight, &mean, &rstd}; }

 private:
  bool nobody_asks_for_the_sum();
};

// An edit behind a norm; inputs x, weight, norm_bias, scale, bias.
struct NormEditNode : FusedNode {
  SavedVariable x, weight, norm_bias, scale, ids, mean, rstd;
  std::string name() const override {
    return facts.centered ? "LayerNormEditFunctionBackward" : "RMSNormEditFunctionBackward";
  }

 protected:
  variable_list backward(const variable_list& grads) override;
  const char* kind() const override { return "norm_edit"; }
  std::vector<SavedVariable*> saved() override { return {&x, &weight, &norm_bias, &scale, &ids, &mean, &rstd}; }
};

// Later releases of torch count references in the node, earlier ones by a shared pointer.
template <class T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return c10::make_intrusive<T>();
  else
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
}

// Called with the GIL, as `(kind, backend, saved, needs, facts, grads) -> gradients`, all of them Python tuples.
void set_python_backward(PyObject* function);

}  // namespace red
