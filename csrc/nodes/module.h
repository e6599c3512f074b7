// Common declarations of the parts of the Python module.
#pragma once

#include <Python.h>

#include "operators.h"

namespace red {

// The operations of a namespace, for Python.
struct Nodes {
  PyObject_HEAD
  const Operators* operators;  // never freed: a graph may outlive its creator
};
extern PyTypeObject nodes_type;

template <class Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

// The result of torch.randint(0, 2**62, (1,)) on the device of a tensor.
Tensor drawn_seed(const Tensor& like);

}  // namespace red
