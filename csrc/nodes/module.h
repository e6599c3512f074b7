// What the parts of the Python module share.
#pragma once

#include <Python.h>

#include "operators.h"

namespace red {

// The operations of a namespace, as Python has them.
struct Nodes {
  PyObject_HEAD
  const Operators* operators;  // never freed: a graph may outlive whoever made it
};
extern PyTypeObject nodes_type;

template <class Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

// What torch.randint(0, 2**62, (1,)) draws on the device of a tensor.
Tensor drawn_seed(const Tensor& like);

}  // namespace red
