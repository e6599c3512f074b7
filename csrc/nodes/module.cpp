// The Python module: the operations on bundles, and the fast paths. Compiled for one Python and one torch.
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ambient.h"
#include "arguments.h"
#include "forwards.h"
#include "module.h"
#include "quick.h"
#include "waiting.h"

namespace red {
namespace {

// edit(x, residual, edit) -> z, whose norm `norm_of` computes
PyObject* py_edit(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3, "edit");
  const Maybe residual = maybe(given[1], "residual");
  return THPVariable_Wrap(edit(*self->operators, tensor(given[0], "x"), residual, edit_of(given[2])));
  END_HANDLE_TH_ERRORS
}

// edit_norm(x, residual, edit, norm, need_z) -> (y, z); None if the residual is not like x
PyObject* py_edit_norm(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 5, "edit_norm");
  const Tensor& x = tensor(given[0], "x");
  const Maybe residual = maybe(given[1], "residual");
  if (!fits(x, residual)) Py_RETURN_NONE;
  const bool need_z = PyObject_IsTrue(given[4]) == 1;
  const auto [y, z] = edit_norm(*self->operators, x, residual, edit_of(given[2]), norm_of(given[3]), need_z);
  return pair(y, z);
  END_HANDLE_TH_ERRORS
}

// norm_of(z, norm) -> y, for a result of `edit` or `sum_norm`
PyObject* py_norm_of(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "norm_of");
  return THPVariable_Wrap(norm_of_sum(*self->operators, tensor(given[0], "z"), norm_of(given[1])));
  END_HANDLE_TH_ERRORS
}

// sum_norm(x, residual, edit, norm) -> (z, y): both in one pass; None if the residual is not like x
PyObject* py_sum_norm(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4, "sum_norm");
  const Tensor& x = tensor(given[0], "x");
  const Maybe residual = maybe(given[1], "residual");
  if (!fits(x, residual)) Py_RETURN_NONE;
  const auto [z, y] = sum_norm(*self->operators, x, residual, edit_of(given[2]), norm_of(given[3]));
  return pair(z, y);
  END_HANDLE_TH_ERRORS
}

// norm_edit(x, norm, edit) -> y
PyObject* py_norm_edit(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3, "norm_edit");
  return THPVariable_Wrap(norm_edit(*self->operators, tensor(given[0], "x"), norm_of(given[1]), edit_of(given[2])));
  END_HANDLE_TH_ERRORS
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const char *space, *backend;
  Py_ssize_t lent = 0;
  if (!PyArg_ParseTuple(args, "ss|n", &space, &backend, &lent)) return nullptr;
  const bool direct = lent != 0 && borrow(reinterpret_cast<const void*>(lent));
  const Operators* operators = new Operators(space, backend, direct);
  auto* self = reinterpret_cast<Nodes*>(type->tp_alloc(type, 0));
  if (self) self->operators = operators;
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"edit", as_method(&py_edit), METH_FASTCALL, "edit(x, residual, edit) -> z"},
    {"edit_norm", as_method(&py_edit_norm), METH_FASTCALL, "edit_norm(x, residual, edit, norm, need_z) -> (y, z)"},
    {"norm_of", as_method(&py_norm_of), METH_FASTCALL, "norm_of(z, norm) -> y"},
    {"sum_norm", as_method(&py_sum_norm), METH_FASTCALL, "sum_norm(x, residual, edit, norm) -> (z, y)"},
    {"norm_edit", as_method(&py_norm_edit), METH_FASTCALL, "norm_edit(x, norm, edit) -> y"},
    {nullptr, nullptr, 0, nullptr},
};

PyObject* py_python_backward(PyObject*, PyObject* function) {
  set_python_backward(function);
  Py_RETURN_NONE;
}

PyObject* py_ambient(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  return PyLong_FromLongLong(ambient());
  END_HANDLE_TH_ERRORS
}

// seed(like) -> the result of torch.randint(0, 2**62, (1,)) on the device of a tensor
PyObject* py_seed(PyObject*, PyObject* like) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(drawn_seed(tensor(like, "like")));
  END_HANDLE_TH_ERRORS
}

PyObject* py_lost_gradient(PyObject*, PyObject* function) {
  set_lost_gradient(function);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"set_lost_gradient", py_lost_gradient, METH_O, "what raises for a gradient that comes to a value that waits"},
    {"seed", py_seed, METH_O, "a seed as torch.randint draws it on the device of a tensor"},
    {"ambient", py_ambient, METH_NOARGS, "what holds in this thread, a bit for each"},
    {"set_python_backward", py_python_backward, METH_O, "what runs a backward that is recorded, or takes tangents"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "nodes", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyTypeObject nodes_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

Tensor drawn_seed(const Tensor& like) {
  if (like.is_cpu() && is_plain(like.key_set())) {  // the computation of randint, without its dispatch
    auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
    Tensor seed = at::detail::empty_cpu({1}, at::kLong);
    const std::lock_guard<std::mutex> lock(generator->mutex_);
    *seed.mutable_data_ptr<int64_t>() = static_cast<int64_t>(generator->random64() & ((uint64_t{1} << 62) - 1));
    return seed;
  }
  return at::randint(0, int64_t{1} << 62, {1}, at::TensorOptions().dtype(at::kLong).device(like.device()));
}

}  // namespace red

// The Python and the torch of this compilation; ctypes reads it before the module is created.
extern "C" __attribute__((visibility("default"))) const char* red_kernels_nodes_built_for() { return RED_BUILT_FOR; }

PyMODINIT_FUNC PyInit_nodes() {
  using namespace red;
  nodes_type.tp_name = "red_kernels.lib.nodes.Nodes";
  nodes_type.tp_doc = "Nodes(namespace, backend, lent=0): the operators of a namespace, with nodes of autograd.";
  nodes_type.tp_basicsize = sizeof(Nodes);
  nodes_type.tp_flags = Py_TPFLAGS_DEFAULT;
  nodes_type.tp_methods = methods;
  nodes_type.tp_new = make;
  if (PyType_Ready(&nodes_type) < 0) return nullptr;
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddObjectRef(module, "Nodes", reinterpret_cast<PyObject*>(&nodes_type)) < 0) Py_CLEAR(module);
#if defined(Py_GIL_DISABLED)
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#else
  if (module && PyModule_AddFunctions(module, quick_functions) < 0) Py_CLEAR(module);
#endif
  return module;
}
