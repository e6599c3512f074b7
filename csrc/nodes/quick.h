// The fast paths of an edited site, an addition, a dropout, a norm and a block, under the conditions of an earlier
// call. They read the same Python objects as red_kernels/fusion, which decides in all other cases: each returns None on
// any difference. A call takes a tenth of the interpreter's time for the same checks.
#pragma once

#include <Python.h>

#include <cstdint>

namespace red {

extern PyMethodDef quick_functions[];
extern PyMethodDef value_methods[];  // of a waiting value

// Whether a value of a site may wait in a running block; `now` is the result of ambient().
bool lets_wait(PyObject* scope, PyObject* own, int64_t now);

// run_scope(module, base, verdict, args, kwargs): `base.forward` of a block or stack, run as a scope.
PyObject* run_scope(PyObject*, PyObject* const* given, Py_ssize_t count);

// in_place(model, layers): whether the watched layers of a model are in their places.
PyObject* in_place(PyObject*, PyObject* const* given, Py_ssize_t count);

}  // namespace red
