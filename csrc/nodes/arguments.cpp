#include "arguments.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace red {
namespace {

double real(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw python_error();
  return value;
}

}  // namespace

const Tensor& tensor(PyObject* object, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), name, " must be a tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

Maybe maybe(PyObject* object, const char* name) {
  return object == nullptr || object == Py_None ? Maybe() : Maybe(tensor(object, name));
}

bool is_tuple(PyObject* object, Py_ssize_t size) { return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == size; }

Edit edit_of(PyObject* object) {
  TORCH_CHECK_TYPE(is_tuple(object, 4) && PyDict_Check(PyTuple_GET_ITEM(object, 1)), "edit must be an Edit, got ",
                   Py_TYPE(object)->tp_name);
  PyObject *vectors = PyTuple_GET_ITEM(object, 1), *dropout = PyTuple_GET_ITEM(object, 3);
  static PyObject* const scale_key = PyUnicode_InternFromString("scale");
  static PyObject* const bias_key = PyUnicode_InternFromString("bias");
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

PyObject* pair(const Tensor& first, const Tensor& second) {
  PyObject* found = PyTuple_New(2);
  PyTuple_SET_ITEM(found, 0, THPVariable_Wrap(first));
  PyTuple_SET_ITEM(found, 1, THPVariable_Wrap(second));
  return found;
}

}  // namespace red
