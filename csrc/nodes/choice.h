// The backend of a tensor, kept from an earlier choice.
#pragma once

#include "known.h"

namespace red {

// The `nodes` of the backend that Python's `choose` returns for a tensor and an operation; None if it has none.
Ref nodes_for(const at::Tensor& x, PyObject* object, PyObject* operation);

// forget_choices(fixed): whether later choices may be kept; not while a thread chooses a backend itself.
PyObject* forget_choices(PyObject*, PyObject* fixed);

}  // namespace red
