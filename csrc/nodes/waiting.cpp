#include "waiting.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/object_ptr.h>

namespace red {
namespace {

using torch::autograd::variable_list;

PyObject* lost_gradient = nullptr;

// A gradient for a waiting value would be lost: Python raises.
struct Lost : torch::autograd::FunctionPreHook {
  variable_list operator()(const variable_list& grads) override {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr gradient(THPVariable_Wrap(grads[0]));
    THPObjectPtr nothing(PyObject_CallOneArg(lost_gradient, gradient));
    python_error error;
    error.persist();
    throw std::move(error);
  }
};

// A tensor of a class with __torch_dispatch__, without memory, like h.
Tensor wrapper_like(const Tensor& h, bool needs_grad) {
  at::AutoDispatchBelowADInplaceOrView guard;
  c10::Storage storage(c10::Storage::use_byte_size_t{}, static_cast<size_t>(h.numel()) * h.element_size(),
                       c10::GetAllocator(c10::kMeta), true);
  storage.set_data_ptr_noswap(at::DataPtr(nullptr, h.device()));
  Tensor made = at::detail::make_tensor<at::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(h.options().computeDispatchKey()), h.dtype());
  made.unsafeGetTensorImpl()->set_sizes_contiguous(h.sizes());
  // Callers that do not dispatch to __torch_function__ reach __torch_dispatch__.
  made.unsafeGetTensorImpl()->set_python_dispatch(true);
  if (needs_grad) made.set_requires_grad(true);
  return made;
}

}  // namespace

void set_lost_gradient(PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(lost_gradient, function);
}

PyObject* make_waiting(PyTypeObject* type, PyObject* given, PyObject* edit, PyObject* record, PyObject* residual) {
  static PyObject* const h_name = PyUnicode_InternFromString("h");
  static PyObject* const edit_name = PyUnicode_InternFromString("edit");
  static PyObject* const record_name = PyUnicode_InternFromString("record");
  static PyObject* const residual_name = PyUnicode_InternFromString("residual");
  static PyObject* const differentiable_name = PyUnicode_InternFromString("differentiable");
  const Tensor& h = tensor(given, "h");
  TORCH_CHECK_TYPE(is_tuple(edit, 4) && PyDict_Check(PyTuple_GET_ITEM(edit, 1)), "edit must be an Edit");
  bool needs = false;
  if (at::GradMode::is_enabled()) {
    needs = h.requires_grad() || (residual != Py_None && tensor(residual, "residual").requires_grad());
    PyObject *key, *vector;
    for (Py_ssize_t at = 0; !needs && PyDict_Next(PyTuple_GET_ITEM(edit, 1), &at, &key, &vector);)
      needs = vector != Py_None && tensor(vector, "vector").requires_grad();
  }
  const Tensor like = wrapper_like(h, needs);
  if (needs) torch::autograd::impl::add_hook(like, std::make_unique<Lost>());
  THPObjectPtr made(THPVariable_Wrap(like, type));
  THPObjectPtr fields(made ? PyObject_GenericGetDict(made, nullptr) : nullptr);
  if (!fields || PyDict_SetItem(fields, h_name, given) || PyDict_SetItem(fields, edit_name, edit) ||
      PyDict_SetItem(fields, record_name, record) ||
      PyDict_SetItem(fields, differentiable_name, needs ? Py_True : Py_False) ||
      (residual != Py_None && PyDict_SetItem(fields, residual_name, residual)))
    throw python_error();
  return made.release();
}

}  // namespace red
