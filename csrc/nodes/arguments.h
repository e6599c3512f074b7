// From Python's tuples to the bundles of operators.h.
#pragma once

#include <Python.h>

#include "operators.h"

namespace red {

// From a Python object that must be a tensor; `name` is for the message.
const Tensor& tensor(PyObject* object, const char* name);
Maybe maybe(PyObject* object, const char* name);
bool is_tuple(PyObject* object, Py_ssize_t size);
// From the tuples of red_kernels/backends/arguments.py.
Edit edit_of(PyObject* object);
Norm norm_of(PyObject* object);
// Raises TypeError unless this many arguments were given.
void expect(Py_ssize_t given, Py_ssize_t expected, const char* name);
PyObject* pair(const Tensor& first, const Tensor& second);

}  // namespace red
