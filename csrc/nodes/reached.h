// The watched edits that have run in this thread.
#pragma once

#include <Python.h>

namespace red {

void reach(PyObject* own);
PyObject* py_reach(PyObject*, PyObject* own);
// Whether one has run since the last check.
PyObject* py_take_reached(PyObject*, PyObject* own);

}  // namespace red
