// Values that wait: red_kernels/fusion/waiting.py.
#pragma once

#include "arguments.h"

namespace red {

// A new one, of a class of Python's; `residual` may be None.
PyObject* make_waiting(PyTypeObject* type, PyObject* h, PyObject* edit, PyObject* record, PyObject* residual);
// What raises for a gradient that comes to one.
void set_lost_gradient(PyObject* function);

}  // namespace red
