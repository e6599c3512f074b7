#include <Python.h>

#include "nodes.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

namespace red {
namespace {

PyObject* python_backward = nullptr;

Maybe maybe(const Tensor& t) { return t.defined() ? Maybe(t) : Maybe(); }

Tensor as(Tensor gradient, const std::optional<at::ScalarType>& dtype) {
  return gradient.defined() && dtype && gradient.scalar_type() != *dtype ? gradient.to(*dtype) : gradient;
}

int64_t bits(std::initializer_list<bool> needs) {
  int64_t found = 0, place = 1;
  for (const bool need : needs) found |= need ? place : 0, place <<= 1;
  return found;
}

// The requested gradients: of x, the residual, the edit's vectors, and the norm's.
struct Needs {
  bool x = false, residual = false, scale = false, bias = false, weight = false, norm_bias = false;
};

// A backward's data of an edit.
struct Saved {
  Tensor x, scale, ids, seed;
};

std::array<Tensor, 3> edit_gradients(const Operators& run, const Facts& facts, const Tensor& dz, const Saved& edit,
                                     const Needs& needs) {
  const bool unchanged = needs.x && !facts.dropped && !facts.scale;  // then dx is dz, and needs no write
  const int64_t asked = bits({needs.x && !unchanged, needs.scale, needs.bias});
  Tensor dx, dscale, dbias;
  if (asked)
    std::tie(dx, dscale, dbias) = run.edit_backward.call(dz, maybe(edit.x), maybe(edit.scale), maybe(edit.ids),
                                                         maybe(edit.seed), facts.p, facts.edits, asked);
  return {unchanged ? dz : dx, as(dscale, facts.scale), as(dbias, facts.bias)};
}

struct SavedNorm {
  Tensor z, weight, mean, rstd;
  double offset;
};

// The gradients of x, residual, scale, bias, weight, norm_bias. Without z the edit is computed again, from the residual
// and the edit's bias.
variable_list edit_norm_gradients(const Operators& run, const Facts& facts, const Tensor& dy, const Tensor& dz,
                                  const Saved& edit, const Tensor& residual, const Tensor& bias, const SavedNorm& norm,
                                  const Needs& needs) {
  const bool unchanged = needs.x && !facts.dropped && !facts.scale;  // dx and dresidual are one tensor
  const int64_t asked = bits({needs.x && !unchanged, needs.residual || unchanged, needs.scale, needs.bias, needs.weight,
                              needs.norm_bias});
  if (!asked) return variable_list(6);
  auto [dx, dresidual, dscale, dbias, dweight, dnorm_bias] = run.edit_norm_backward.call(
      dy, maybe(dz), maybe(norm.z), maybe(edit.x), maybe(residual), maybe(edit.scale), maybe(bias), maybe(norm.weight),
      maybe(edit.ids), maybe(edit.seed), maybe(norm.mean), norm.rstd, facts.p, norm.offset, facts.edits, asked);
  return {unchanged ? dresidual : dx,      needs.residual ? dresidual : Tensor(), as(dscale, facts.scale),
          as(dbias, facts.bias),           as(dweight, facts.weight),             as(dnorm_bias, facts.norm_bias)};
}

bool takes_tangents() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

template <class Value>
PyObject* number(const std::optional<Value>& dtype) {
  return PyLong_FromLong(dtype ? static_cast<long>(*dtype) : -1);
}

}  // namespace

void set_python_backward(PyObject* function) {
  Py_INCREF(function);
  Py_XDECREF(python_backward);
  python_backward = function;
}

Facts facts_of(const Edit* edit, const Norm* norm) {
  Facts facts;
  const auto dtype = [](const Maybe& t) { return t ? std::optional(t->scalar_type()) : std::nullopt; };
  if (edit) {
    facts.scale = dtype(edit->scale), facts.bias = dtype(edit->bias);
    facts.p = edit->p, facts.dropped = edit->seed.has_value(), facts.edits = edit->count();
  }
  if (norm) {
    facts.weight = dtype(norm->weight), facts.norm_bias = dtype(norm->bias);
    facts.eps = norm->eps, facts.offset = norm->offset, facts.centered = norm->centered;
  }
  return facts;
}

variable_list FusedNode::apply(variable_list&& grads) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (at::GradMode::is_enabled() || takes_tangents()) return backward_in_python(grads);
  return backward(grads);
}

void FusedNode::release_variables() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable* one : saved()) one->reset_data();
}

variable_list FusedNode::backward_in_python(const variable_list& grads) {
  variable_list values;
  for (SavedVariable* one : saved()) values.push_back(one->unpack(getptr()));
  pybind11::gil_scoped_acquire gil;
  const auto list = [](const variable_list& tensors) {
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
    for (size_t at = 0; at < tensors.size(); ++at) PyTuple_SET_ITEM(tuple, at, THPVariable_Wrap(tensors[at]));
    return tuple;
  };
  PyObject* asked = PyTuple_New(num_outputs());
  for (size_t at = 0; at < num_outputs(); ++at)
    PyTuple_SET_ITEM(asked, at, PyBool_FromLong(next_edge(at).is_valid() && needs(at)));
  PyObject* said = Py_BuildValue("(NNNNdLddN)", number(facts.scale), number(facts.bias), number(facts.weight),
                                 number(facts.norm_bias), facts.p, static_cast<long long>(facts.edits), facts.eps,
                                 facts.offset, PyBool_FromLong(facts.centered));
  THPObjectPtr found(PyObject_CallFunction(python_backward, "ssNNNN", kind(), operators->backend.c_str(), list(values),
                                           asked, said, list(grads)));
  if (!found) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
  variable_list result;
  for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(found.get()); ++at) {
    PyObject* one = PyTuple_GET_ITEM(found.get(), at);
    result.push_back(one == Py_None ? Tensor() : THPVariable_Unpack(one));
  }
  return result;
}

variable_list EditNormNode::backward(const variable_list& grads) {
  const Tensor &dy = grads[0], &dz = grads[1];
  const Needs asked{needs(0), needs(1), needs(2), needs(3), needs(4), needs(5)};
  const Saved edit{x.unpack(), scale.unpack(), ids.unpack(), seed.unpack()};
  if (!dy.defined()) {  // only z was used: the norm takes no part
    if (!dz.defined()) return variable_list(6);
    auto found = edit_gradients(*operators, facts, dz, edit, asked);
    return {found[0], asked.residual ? dz : Tensor(), found[1], found[2], Tensor(), Tensor()};
  }
  return edit_norm_gradients(*operators, facts, dy, dz, edit, residual.unpack(), bias.unpack(),
                             {z.unpack(getptr()), weight.unpack(), mean.unpack(), rstd.unpack(), facts.offset}, asked);
}

bool EditNode::take_over(const Handed& norm) {
  std::lock_guard<std::mutex> lock(mutex_);
  return handed.emplace(torch::autograd::get_current_graph_task_id(), norm).second;
}

void EditNode::release_variables() {
  FusedNode::release_variables();
  std::lock_guard<std::mutex> lock(mutex_);
  handed.clear();
}

variable_list EditNode::backward(const variable_list& grads) {
  const Tensor& dz = grads[0];
  const auto found = handed.find(torch::autograd::get_current_graph_task_id());
  if (!dz.defined() && found == handed.end()) return variable_list(4);
  Needs asked;
  asked.x = needs(0), asked.residual = needs(1), asked.scale = needs(2), asked.bias = needs(3);
  const Saved edit{x.unpack(), scale.unpack(), ids.unpack(), seed.unpack()};
  if (found == handed.end()) {
    auto gradients = edit_gradients(*operators, facts, dz, edit, asked);
    return {gradients[0], asked.residual ? dz : Tensor(), gradients[1], gradients[2]};
  }
  const Handed norm = std::move(found->second);
  handed.erase(found);
  auto gradients = edit_norm_gradients(*operators, facts, norm.dy, dz, edit, Tensor(), Tensor(),
                                       {norm.z, norm.weight, norm.mean, norm.rstd, norm.offset}, asked);
  gradients.resize(4);
  return gradients;
}

variable_list NormOfSumNode::backward(const variable_list& grads) {
  const Tensor& dy = grads[0];
  if (!dy.defined()) return variable_list(3);
  const SavedNorm norm{z.unpack(), weight.unpack(), mean.unpack(), rstd.unpack(), facts.offset};
  Needs asked;
  asked.x = needs(0), asked.weight = needs(1), asked.norm_bias = needs(2);
  if (asked.x && nobody_asks_for_the_sum())
    asked.x = !sum->take_over({norm.offset, dy, norm.z, norm.weight, norm.mean, norm.rstd});
  auto found = edit_norm_gradients(*operators, facts, dy, Tensor(), {}, Tensor(), Tensor(), norm, asked);
  return {found[0], found[4], found[5]};
}

// Whether the running backward pass returns nobody the gradient of the sum: it is for all leaves, so it reaches the
// sum's node, and no hook is there.
bool NormOfSumNode::nobody_asks_for_the_sum() {
  const auto* only = torch::autograd::get_current_graph_task_exec_info();
  return sum && (!only || only->empty()) && sum->tensor_pre_hooks().empty() && sum->retains_grad_hooks().empty() &&
         sum->pre_hooks().empty() && sum->post_hooks().empty();
}

variable_list NormEditNode::backward(const variable_list& grads) {
  const Tensor& dy = grads[0];
  const int64_t asked = bits({needs(0), needs(1), needs(2), needs(3), needs(4)});
  if (!dy.defined() || !asked) return variable_list(5);
  auto [dx, dweight, dnorm_bias, dscale, dbias] = operators->norm_edit_backward.call(
      dy, x.unpack(), maybe(weight.unpack()), maybe(norm_bias.unpack()), maybe(scale.unpack()), maybe(ids.unpack()),
      maybe(mean.unpack()), rstd.unpack(), facts.offset, facts.edits, asked);
  return {dx, as(dweight, facts.weight), as(dnorm_bias, facts.norm_bias), as(dscale, facts.scale),
          as(dbias, facts.bias)};
}

}  // namespace red
