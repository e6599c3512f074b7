// What an edited site, an addition, a dropout, a norm and a block do where all is as it was in an earlier call.
//
// They read the same objects of Python as red_kernels/fusion does, which decides in all other cases: each returns None
// where anything differs. There a call takes a tenth of the time that the interpreter needs for the same questions.
#pragma once

#include <Python.h>

#include <cstdint>

namespace red {

extern PyMethodDef quick_functions[];
extern PyMethodDef value_methods[];  // of a value that waits

// Whether a value of a site may wait in a block that is running; `now` is what ambient() says.
bool lets_wait(PyObject* scope, PyObject* own, int64_t now);

// run_scope(module, base, verdict, args, kwargs): `base.forward` of a block or stack that runs as a scope.
PyObject* run_scope(PyObject*, PyObject* const* given, Py_ssize_t count);

// in_place(model, layers): whether the watched layers of a model are where they were.
PyObject* in_place(PyObject*, PyObject* const* given, Py_ssize_t count);

}  // namespace red
