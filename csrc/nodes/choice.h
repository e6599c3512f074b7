// The backend of a tensor, kept from an earlier choice.
#pragma once

#include "known.h"

namespace red {

// The `nodes` of the backend that Python's `choose` gives for a tensor and an operation; None where it has none.
Ref nodes_for(const at::Tensor& x, PyObject* object, PyObject* operation);

// forget_choices(fixed): whether what is chosen from now on may be kept; not where a thread asks for a backend itself.
PyObject* forget_choices(PyObject*, PyObject* fixed);

}  // namespace red
