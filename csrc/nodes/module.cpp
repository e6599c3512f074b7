// The Python module: the operations on bundles, with a node of autograd for each. Compiled for one Python and one torch.
#include <Python.h>

#include "nodes.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

namespace red {
namespace {

using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::set_history;

struct Nodes {
  PyObject_HEAD
  const Operators* operators;  // never freed: a graph may outlive whoever made it
};

PyObject *scale_key, *bias_key;

const Tensor& tensor(PyObject* object, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), name, " must be a tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

Maybe maybe(PyObject* object, const char* name) {
  return object == nullptr || object == Py_None ? Maybe() : Maybe(tensor(object, name));
}

bool is_tuple(PyObject* object, Py_ssize_t size) { return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == size; }

double real(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw python_error();
  return value;
}

// Of the tuples of red_kernels/backends/arguments.py.
Edit edit_of(PyObject* object) {
  TORCH_CHECK_TYPE(is_tuple(object, 4) && PyDict_Check(PyTuple_GET_ITEM(object, 1)), "edit must be an Edit, got ",
                   Py_TYPE(object)->tp_name);
  PyObject *vectors = PyTuple_GET_ITEM(object, 1), *dropout = PyTuple_GET_ITEM(object, 3);
  Edit edit;
  edit.scale = maybe(PyDict_GetItemWithError(vectors, scale_key), "scale");
  edit.bias = maybe(PyDict_GetItemWithError(vectors, bias_key), "bias");
  edit.ids = maybe(PyTuple_GET_ITEM(object, 2), "edit_ids");
  if (dropout != Py_None) {
    TORCH_CHECK_TYPE(is_tuple(dropout, 2), "dropout must be a Dropout, got ", Py_TYPE(dropout)->tp_name);
    edit.p = real(PyTuple_GET_ITEM(dropout, 0));
    edit.seed = tensor(PyTuple_GET_ITEM(dropout, 1), "seed");
  }
  return edit;
}

Norm norm_of(PyObject* object) {
  TORCH_CHECK_TYPE(is_tuple(object, 5), "norm must be a Norm, got ", Py_TYPE(object)->tp_name);
  return {maybe(PyTuple_GET_ITEM(object, 0), "weight"), maybe(PyTuple_GET_ITEM(object, 1), "norm_bias"),
          real(PyTuple_GET_ITEM(object, 2)), real(PyTuple_GET_ITEM(object, 3)),
          PyObject_IsTrue(PyTuple_GET_ITEM(object, 4)) == 1};
}

void expect(Py_ssize_t given, Py_ssize_t expected, const char* name) {
  TORCH_CHECK_TYPE(given == expected, name, " takes ", expected, " arguments, got ", given);
}

SavedVariable saved(const Maybe& tensor) { return SavedVariable(tensor.value_or(Tensor()), false); }
SavedVariable saved(bool needed, const Maybe& tensor) { return needed ? saved(tensor) : SavedVariable(); }

bool asks(const Maybe& tensor) { return tensor && tensor->requires_grad(); }

PyObject* pair(const Tensor& first, const Tensor& second) {
  PyObject* found = PyTuple_New(2);
  PyTuple_SET_ITEM(found, 0, THPVariable_Wrap(first));
  PyTuple_SET_ITEM(found, 1, THPVariable_Wrap(second));
  return found;
}

// Whether a kernel can read them side by side; where not, a sum is left to the caller.
bool fits(const Tensor& x, const Maybe& residual) {
  return x.layout() == at::kStrided &&
         (!residual || (residual->layout() == at::kStrided && residual->scalar_type() == x.scalar_type() &&
                        residual->device() == x.device() && residual->sizes() == x.sizes()));
}

// What all of these begin with: without the GIL, and below autograd.
struct Computing {
  pybind11::gil_scoped_release no_gil;
  at::AutoDispatchBelowADInplaceOrView guard;
};

using NormedSum = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, z, mean, rstd

NormedSum normed_sum(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e, const Norm& n,
                     bool keep_z) {
  Computing computing;
  return run.edit_norm_forward.call(x, residual, e.scale, e.bias, n.weight, n.bias, e.ids, e.seed, e.p, n.eps, n.offset,
                                    n.centered, keep_z);
}

EditNode* node_of_sum(const Operators& run, const Tensor& z, const Tensor& x, const Maybe& residual, const Edit& e) {
  if (!compute_requires_grad(x, residual, e.scale, e.bias)) return nullptr;
  auto node = make_node<EditNode>();
  node->set_next_edges(collect_next_edges(x, residual, e.scale, e.bias));
  node->operators = &run;
  node->facts = facts_of(&e, nullptr);
  node->x = saved(asks(e.scale), x);
  node->scale = saved(x.requires_grad(), e.scale);
  node->ids = saved(e.ids), node->seed = saved(e.seed);
  set_history(z, node);
  return node.get();
}

// edit(x, residual, edit) -> z, whose norm `norm_of` computes
PyObject* edit(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3, "edit");
  const Tensor& x = tensor(given[0], "x");
  const Maybe residual = maybe(given[1], "residual");
  const Edit e = edit_of(given[2]);
  const Operators& run = *self->operators;
  Tensor z;
  {
    Computing computing;
    z = run.edit_forward.call(x, residual, e.scale, e.bias, e.ids, e.seed, e.p);
  }
  node_of_sum(run, z, x, residual, e);
  return THPVariable_Wrap(z);
  END_HANDLE_TH_ERRORS
}

// edit_norm(x, residual, edit, norm, need_z) -> (y, z); None where the residual is not like x
PyObject* edit_norm(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 5, "edit_norm");
  const Tensor& x = tensor(given[0], "x");
  const Maybe residual = maybe(given[1], "residual");
  if (!fits(x, residual)) Py_RETURN_NONE;
  const Edit e = edit_of(given[2]);
  const Norm n = norm_of(given[3]);
  const bool need_z = PyObject_IsTrue(given[4]) == 1;
  const Operators& run = *self->operators;
  const auto [y, z, mean, rstd] = normed_sum(run, x, residual, e, n, need_z);
  if (compute_requires_grad(x, residual, e.scale, e.bias, n.weight, n.bias)) {
    auto node = make_node<EditNormNode>();
    node->set_next_edges(collect_next_edges(x, residual, e.scale, e.bias, n.weight, n.bias));
    node->operators = &run;
    node->facts = facts_of(&e, &n);
    set_history(y, node);
    set_history(z, node);
    const bool again = !need_z;  // without z, the edit is done again from what it was made of
    if (need_z) node->z = SavedVariable(z, true);
    node->x = saved(asks(e.scale) || again, x);
    node->residual = saved(again, residual);
    node->scale = saved(x.requires_grad() || again, e.scale);
    node->bias = saved(again, e.bias);
    node->weight = saved(n.weight), node->ids = saved(e.ids), node->seed = saved(e.seed);
    node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
  }
  return pair(y, z);
  END_HANDLE_TH_ERRORS
}

void node_of_norm(const Operators& run, EditNode* sum, const Tensor& y, const Tensor& z, const Norm& n,
                  const Tensor& mean, const Tensor& rstd) {
  if (!compute_requires_grad(z, n.weight, n.bias)) return;
  auto node = make_node<NormOfSumNode>();
  node->set_next_edges(collect_next_edges(z, n.weight, n.bias));
  node->operators = &run;
  node->facts = facts_of(nullptr, &n);
  node->z = SavedVariable(z, false), node->weight = saved(n.weight);
  node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
  node->sum = sum;
  set_history(y, node);
}

// norm_of(z, norm) -> y, of what `edit` or `sum_norm` has returned
PyObject* norm_of_sum(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "norm_of");
  const Tensor& z = tensor(given[0], "z");
  const Norm n = norm_of(given[1]);
  const Operators& run = *self->operators;
  // Of the sum itself: what it was made of may have been changed in place since.
  const auto [y, none, mean, rstd] = normed_sum(run, z, Maybe(), Edit(), n, false);
  node_of_norm(run, dynamic_cast<EditNode*>(z.grad_fn().get()), y, z, n, mean, rstd);
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// sum_norm(x, residual, edit, norm) -> (z, y): both of these in one pass; None where the residual is not like x
PyObject* sum_norm(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4, "sum_norm");
  const Tensor& x = tensor(given[0], "x");
  const Maybe residual = maybe(given[1], "residual");
  if (!fits(x, residual)) Py_RETURN_NONE;
  const Edit e = edit_of(given[2]);
  const Norm n = norm_of(given[3]);
  const Operators& run = *self->operators;
  const auto [y, z, mean, rstd] = normed_sum(run, x, residual, e, n, true);
  node_of_norm(run, node_of_sum(run, z, x, residual, e), y, z, n, mean, rstd);
  return pair(z, y);
  END_HANDLE_TH_ERRORS
}

// norm_edit(x, norm, edit) -> y
PyObject* norm_edit(Nodes* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3, "norm_edit");
  const Tensor& x = tensor(given[0], "x");
  const Norm n = norm_of(given[1]);
  const Edit e = edit_of(given[2]);
  const Operators& run = *self->operators;
  Tensor y, mean, rstd;
  {
    Computing computing;
    std::tie(y, mean, rstd) =
        run.norm_edit_forward.call(x, n.weight, n.bias, e.scale, e.bias, e.ids, n.eps, n.offset, n.centered);
  }
  if (compute_requires_grad(x, n.weight, n.bias, e.scale, e.bias)) {
    auto node = make_node<NormEditNode>();
    node->set_next_edges(collect_next_edges(x, n.weight, n.bias, e.scale, e.bias));
    node->operators = &run;
    node->facts = facts_of(&e, &n);
    node->x = saved(x), node->weight = saved(n.weight), node->norm_bias = saved(asks(e.scale), n.bias);
    node->scale = saved(e.scale), node->ids = saved(e.ids);
    node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
    set_history(y, node);
  }
  return THPVariable_Wrap(y);
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

template <class Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"edit", as_method(&edit), METH_FASTCALL, "edit(x, residual, edit) -> z"},
    {"edit_norm", as_method(&edit_norm), METH_FASTCALL, "edit_norm(x, residual, edit, norm, need_z) -> (y, z)"},
    {"norm_of", as_method(&norm_of_sum), METH_FASTCALL, "norm_of(z, norm) -> y"},
    {"sum_norm", as_method(&sum_norm), METH_FASTCALL, "sum_norm(x, residual, edit, norm) -> (z, y)"},
    {"norm_edit", as_method(&norm_edit), METH_FASTCALL, "norm_edit(x, norm, edit) -> y"},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject nodes_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyObject* python_backward(PyObject*, PyObject* function) {
  set_python_backward(function);
  Py_RETURN_NONE;
}

// What holds in this thread, a bit for each; red_kernels/ops/ambient.py names them.
PyObject* ambient(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  using c10::DispatchKey;
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  const bool bits[] = {
      at::GradMode::is_enabled(),
      c10::InferenceMode::is_enabled(),
      at::autocast::is_autocast_enabled(at::kCPU),
      at::autocast::is_autocast_enabled(at::kCUDA),
      !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(),
      torch::autograd::get_current_graph_task_id() != -1,
      included.has(DispatchKey::FuncTorchDynamicLayerFrontMode) || included.has(DispatchKey::FuncTorchDynamicLayerBackMode),
      torch::jit::tracer::isTracing(),
      torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr,
  };
  long found = 0;
  for (size_t at = 0; at < std::size(bits); ++at) found |= static_cast<long>(bits[at]) << at;
  return PyLong_FromLong(found);
  END_HANDLE_TH_ERRORS
}

PyObject *lost_gradient, *h_name, *edit_name, *record_name, *residual_name, *differentiable_name;

// A gradient that comes to a value that waits would be lost: Python raises.
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
  if (needs_grad) made.set_requires_grad(true);
  return made;
}

// wait(type, h, edit, record, residual) -> a value that waits, of the class of red_kernels/fusion/waiting.py
PyObject* wait(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 5, "wait");
  const Tensor& h = tensor(given[1], "h");
  TORCH_CHECK_TYPE(is_tuple(given[2], 4) && PyDict_Check(PyTuple_GET_ITEM(given[2], 1)), "edit must be an Edit");
  bool needs = false;
  if (at::GradMode::is_enabled()) {
    needs = h.requires_grad() || (given[4] != Py_None && tensor(given[4], "residual").requires_grad());
    PyObject *key, *vector;
    for (Py_ssize_t at = 0; !needs && PyDict_Next(PyTuple_GET_ITEM(given[2], 1), &at, &key, &vector);)
      needs = vector != Py_None && tensor(vector, "vector").requires_grad();
  }
  const Tensor like = wrapper_like(h, needs);
  if (needs) torch::autograd::impl::add_hook(like, std::make_unique<Lost>());
  THPObjectPtr made(THPVariable_Wrap(like, reinterpret_cast<PyTypeObject*>(given[0])));
  THPObjectPtr fields(made ? PyObject_GenericGetDict(made, nullptr) : nullptr);
  if (!fields || PyDict_SetItem(fields, h_name, given[1]) || PyDict_SetItem(fields, edit_name, given[2]) ||
      PyDict_SetItem(fields, record_name, given[3]) ||
      PyDict_SetItem(fields, differentiable_name, needs ? Py_True : Py_False) ||
      (given[4] != Py_None && PyDict_SetItem(fields, residual_name, given[4])))
    throw python_error();
  return made.release();
  END_HANDLE_TH_ERRORS
}

PyObject* set_lost_gradient(PyObject*, PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(lost_gradient, function);
  Py_RETURN_NONE;
}

// seed(like) -> what torch.randint(0, 2**62, (1,)) draws on the device of a tensor
PyObject* seed(PyObject*, PyObject* like) {
  HANDLE_TH_ERRORS
  const auto options = at::TensorOptions().dtype(at::kLong).device(tensor(like, "like").device());
  return THPVariable_Wrap(at::randint(0, int64_t{1} << 62, {1}, options));
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"wait", as_method(&wait), METH_FASTCALL, "wait(type, h, edit, record, residual) -> a value that waits"},
    {"set_lost_gradient", set_lost_gradient, METH_O, "what raises for a gradient that comes to a value that waits"},
    {"seed", seed, METH_O, "a seed as torch.randint draws it on the device of a tensor"},
    {"ambient", ambient, METH_NOARGS, "what holds in this thread, a bit for each"},
    {"set_python_backward", python_backward, METH_O, "what runs a backward that is recorded, or takes tangents"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "nodes", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace red

// The Python and the torch that all of this was compiled for; asked for by ctypes before the module is made.
extern "C" __attribute__((visibility("default"))) const char* red_kernels_nodes_built_for() { return RED_BUILT_FOR; }

PyMODINIT_FUNC PyInit_nodes() {
  using namespace red;
  scale_key = PyUnicode_InternFromString("scale");
  bias_key = PyUnicode_InternFromString("bias");
  h_name = PyUnicode_InternFromString("h"), edit_name = PyUnicode_InternFromString("edit");
  record_name = PyUnicode_InternFromString("record"), residual_name = PyUnicode_InternFromString("residual");
  differentiable_name = PyUnicode_InternFromString("differentiable");
  nodes_type.tp_name = "red_kernels.lib.nodes.Nodes";
  nodes_type.tp_doc = "Nodes(namespace, backend, lent=0): the operators of a namespace, with nodes of autograd.";
  nodes_type.tp_basicsize = sizeof(Nodes);
  nodes_type.tp_flags = Py_TPFLAGS_DEFAULT;
  nodes_type.tp_methods = methods;
  nodes_type.tp_new = make;
  if (PyType_Ready(&nodes_type) < 0) return nullptr;
  PyObject* module = PyModule_Create(&definition);
#if defined(Py_GIL_DISABLED)
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  if (module && PyModule_AddObjectRef(module, "Nodes", reinterpret_cast<PyObject*>(&nodes_type)) < 0) Py_CLEAR(module);
  return module;
}
