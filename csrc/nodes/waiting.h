// Waiting values: red_kernels/fusion/waiting.py.
#pragma once

#include "arguments.h"

namespace red {

// A new one, of a Python class; `residual` may be None.
PyObject* make_waiting(PyTypeObject* type, PyObject* h, PyObject* edit, PyObject* record, PyObject* residual);
// The function that raises for a gradient of a waiting value.
void set_lost_gradient(PyObject* function);

}  // namespace red
