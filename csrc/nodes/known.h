// The Python classes and objects of the fast paths; red_kernels/fusion/quick.py names them.
#pragma once

#include <Python.h>

#include <ATen/ATen.h>
#include <torch/csrc/Exceptions.h>

#include <utility>

namespace red {

// A reference to a Python object, released at the end; or nothing.
class Ref {
 public:
  explicit Ref(PyObject* object = nullptr) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  operator PyObject*() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// A slot of a Python class, read and written where it is in memory.
class Slot {
 public:
  PyObject* get(PyObject* of) const { return *at(of); }  // borrowed; null if it is not set
  bool is_true(PyObject* of) const { return get(of) == Py_True; }
  bool is_none(PyObject* of) const { return get(of) == nullptr || get(of) == Py_None; }
  void set(PyObject* of, PyObject* value) const {
    Py_INCREF(value);
    PyObject* before = *at(of);
    *at(of) = value;
    Py_XDECREF(before);
  }
  void find(PyObject* type, const char* name);

 private:
  PyObject** at(PyObject* of) const { return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(of) + offset_); }
  Py_ssize_t offset_ = 0;
};

// Interned names of attributes and keys.
struct Names {
  PyObject *edit, *record, *residual, *h, *done, *base, *after, *others, *differentiable, *scale, *first, *training, *modules,
      *parameters, *forward, *compiled, *forward_hooks, *forward_pre_hooks, *backward_hooks,
      *backward_pre_hooks, *next_id, *selection, *chosen, *open, *varied, *watched, *scopes, *own_edit,
      *carrier, *records, *note, *spec, *close, *end, *unseen, *nodes, *empty, *p, *in_place, *dropout,
      *compiling, *edit_norm, *sum_norm, *sites, *scope, *own, *inside;
};

struct Known {
  bool ready = false;
  PyTypeObject *tensor, *waiting, *note_type, *scope_type, *edit, *dropout, *handover_type;
  PyObject *handles;          // torch's class that numbers all hooks
  PyObject *here;             // its `scopes` are those of this thread
  PyObject *streams, *held;   // the `with` blocks that choose an edit
  PyObject *add, *radd;       // of torch's tensors
  PyObject* device_context;         // torch's mode of a default device, which does not affect additions
  PyObject *compiler, *functional;  // entries of torch.compiler and torch.nn.functional
  PyObject *dropout_function;       // torch's own
  PyObject *check_layer;      // checks whether the edits of a layer have run
  PyObject *choose;           // the backend for a tensor and an operation
  PyObject *collects;         // whether a stack returns the values between its blocks
  struct { Slot modes, plans, alone; } records;
  struct { Slot edit, record, hooks, chosen, vectors, modules, dtype, device; } plan;
  struct { Slot link, alone, lazy, proven, at_once, astray, what, by; } record;
  struct { Slot norm, across, hooks, free, passed, kept, said; } link;
  struct {
    Slot handover, holder, hooks, norm, normed, record, recorded, scope, source, stack, total, version, weight;
  } note;
  struct { Slot module, verdict, stack, collects, made, left, undecided, recorded, compiled; } scope;
  struct { Slot hooks, clean, inside, sites, stack, tree; } verdict;
  struct { Slot edit, handed, nodes, norm, normed, total, value; } handover;
};

extern Known known;
extern Names names;

// Whether no compilation or export is running.
bool is_eager();
// Whether the fast paths may run: no mode may intercept torch's functions either.
bool is_ready();

// Borrowed; null if there is none, or no dict.
inline PyObject* item(PyObject* dict, PyObject* key) {
  return dict != nullptr && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
}
inline bool is_none(PyObject* object) { return object == nullptr || object == Py_None; }
// A strong reference, so that another thread may replace the object.
inline Ref kept(PyObject* object) {
  Py_XINCREF(object);
  return Ref(object);
}
// A new reference.
inline Ref dict_of(PyObject* object) {
  Ref found(PyObject_GenericGetDict(object, nullptr));
  if (!found) throw python_error();
  return found;
}

// The scopes that run in this thread.
Ref running();
inline PyObject* last(PyObject* list) {
  const Py_ssize_t size = PyList_GET_SIZE(list);
  return size ? PyList_GET_ITEM(list, size - 1) : nullptr;
}
// Whether no hook was registered since a number was stored.
bool is_latest(PyObject* kept);
PyObject* latest_hook();
// Whether a module's call is only its class's `forward`, neither replaced nor compiled.
bool is_unhooked(PyObject* fields);
bool is_own_forward(PyObject* fields);

// know(objects): reads all of `Known` from a Python dict.
PyObject* know(PyObject*, PyObject* objects);

}  // namespace red
