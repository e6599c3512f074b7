// A call of a block or a stack, as in red_kernels/fusion/scopes.py.
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <vector>

#include "ambient.h"
#include "arguments.h"
#include "known.h"
#include "quick.h"
#include "reached.h"

namespace red {
namespace {

thread_local std::vector<PyObject*> reached;  // compared, never read

bool take_reached(PyObject* own) {
  const auto found = std::find(reached.begin(), reached.end(), own);
  if (found == reached.end()) return false;
  reached.erase(found);
  return true;
}

Ref new_scope(PyObject* module, PyObject* verdict, PyObject* kwargs, int64_t now) {
  const auto& s = known.scope;
  Ref scope(known.scope_type->tp_alloc(known.scope_type, 0));
  const Ref made(PyList_New(0)), left(PyList_New(0)), undecided(PyList_New(0));
  if (!scope || !made || !left || !undecided) throw python_error();
  PyObject* stack = known.verdict.stack.get(verdict);
  Ref collects(Py_NewRef(Py_False));
  if (stack == Py_True) {
    collects = Ref(PyObject_CallFunctionObjArgs(known.collects, module, kwargs, nullptr));
    if (!collects) throw python_error();
  }
  s.module.set(scope, module), s.verdict.set(scope, verdict), s.stack.set(scope, stack);
  s.collects.set(scope, collects), s.made.set(scope, made), s.left.set(scope, left), s.undecided.set(scope, undecided);
  s.recorded.set(scope, now & kGrad ? Py_True : Py_False), s.compiled.set(scope, Py_None);
  return scope;
}

bool is_alive(PyObject* reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* value = nullptr;
  const bool alive = PyWeakref_GetRef(reference, &value) == 1;
  Py_XDECREF(value);
  return alive;
#else
  return PyWeakref_GetObject(reference) != Py_None;
#endif
}

// Ends a scope whose values are all taken, and whose notes move to a stack; whether it was one.
bool leaves_nothing(PyObject* scope) {
  const auto& s = known.scope;
  PyObject *made = s.made.get(scope), *left = s.left.get(scope);
  if (PyList_GET_SIZE(s.undecided.get(scope)) != 0) return false;
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(made); ++at)
    if (is_alive(PyList_GET_ITEM(made, at))) return false;
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(left); ++at) {
    PyObject* stack = known.note.stack.get(PyList_GET_ITEM(left, at));
    if (is_none(stack) || stack == scope) return false;
  }
  const Ref notes(PyList_GetSlice(left, 0, PyList_GET_SIZE(left)));
  if (!notes || PyList_SetSlice(left, 0, PyList_GET_SIZE(left), nullptr) < 0) throw python_error();
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(notes.get()); ++at) {
    PyObject* note = PyList_GET_ITEM(notes.get(), at);
    PyObject* there = s.left.get(known.note.stack.get(note));
    known.note.holder.set(note, there);
    if (PyList_Append(there, note) < 0) throw python_error();
  }
  return true;
}

// The end of a scope in any case: a sum that is handed on still refers to it.
class Running {
 public:
  Running(PyObject* scopes, PyObject* scope) : scopes_(scopes), scope_(scope), depth_(PyList_GET_SIZE(scopes)) {
    if (PyList_Append(scopes, scope) < 0) throw python_error();
  }
  ~Running() {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    if (PyList_GET_SIZE(known.scope.left.get(scope_)) != 0 || PyList_GET_SIZE(known.scope.undecided.get(scope_)) != 0) {
      const Ref ended(PyObject_CallMethodNoArgs(scope_, names.end));
      if (!ended) PyErr_WriteUnraisable(scope_);
    }
    PyList_SetSlice(scopes_, depth_, PyList_GET_SIZE(scopes_), nullptr);
    PyErr_Restore(kind, value, trace);
  }
  Running(const Running&) = delete;

 private:
  PyObject *scopes_, *scope_;
  Py_ssize_t depth_;
};

// Whether all edits of a layer have run in this call; if not, or if more must be checked, Python decides.
void check_layer(PyObject* layer, PyObject* fields) {
  PyObject* sites = item(fields, names.sites);
  if (sites == nullptr || item(fields, names.forward) != nullptr) return;
  const auto own_of = [&](Py_ssize_t at) { return item(dict_of(PyList_GET_ITEM(sites, at)), names.own); };
  bool good = true;
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(sites) && good; ++at)
    good = std::find(reached.begin(), reached.end(), own_of(at)) != reached.end() &&
           item(dict_of(own_of(at)), names.inside) != Py_True;
  if (!good) {
    const Ref done(PyObject_CallOneArg(known.check_layer, layer));
    if (!done) throw python_error();
    return;
  }
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(sites); ++at) take_reached(own_of(at));
}

Ref run(PyObject* module, PyObject* forward, PyObject* args, PyObject* verdict, PyObject* kwargs) {
  const int64_t now = ambient();
  if (now & (kPlain + kTangents)) return Ref(PyObject_Call(forward, args, kwargs));  // no value waits there
  const Ref scopes = running(), scope = new_scope(module, verdict, kwargs, now);
  const Running here(scopes, scope);
  Ref output(PyObject_Call(forward, args, kwargs));
  if (!output || leaves_nothing(scope)) return output;
  return Ref(PyObject_CallMethodOneArg(scope, names.close, output));
}

// Whether modules were added to a block or removed; see `Verdict` in Python.
bool has_changed(PyObject* tree) {
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(tree); ++at) {
    PyObject *children = PyTuple_GET_ITEM(PyList_GET_ITEM(tree, at), 0), *key, *child;
    PyObject* before = PyTuple_GET_ITEM(PyList_GET_ITEM(tree, at), 1);
    if (PyDict_GET_SIZE(children) != PyTuple_GET_SIZE(before)) return true;
    for (Py_ssize_t next = 0, place = 0; PyDict_Next(children, &next, &key, &child);)
      if (child != PyTuple_GET_ITEM(before, place++)) return true;
  }
  return false;
}

}  // namespace

bool lets_wait(PyObject* scope, PyObject* own, int64_t now) {
  const auto& s = known.scope;
  PyObject* verdict = s.verdict.get(scope);
  if (!is_latest(known.verdict.hooks.get(verdict)) || !known.verdict.clean.is_true(verdict) || s.stack.is_true(scope) ||
      s.recorded.is_true(scope) != ((now & kGrad) != 0))
    return false;
  const Ref id(PyLong_FromVoidPtr(own));
  if (PySet_Contains(known.verdict.sites.get(verdict), id) != 1) return false;
  if (s.compiled.is_none(scope)) {
    if (has_changed(known.verdict.tree.get(verdict))) return false;
    bool compiled = false;
    PyObject* inside = known.verdict.inside.get(verdict);
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(inside) && !compiled; ++at)
      compiled = !is_none(item(dict_of(PyList_GET_ITEM(inside, at)), names.compiled));
    s.compiled.set(scope, compiled ? Py_True : Py_False);
  }
  return !s.compiled.is_true(scope);
}

void reach(PyObject* own) {
  if (std::find(reached.begin(), reached.end(), own) == reached.end()) reached.push_back(own);
}

PyObject* py_reach(PyObject*, PyObject* own) {
  reach(own);
  Py_RETURN_NONE;
}

PyObject* py_take_reached(PyObject*, PyObject* own) { return PyBool_FromLong(take_reached(own)); }

// in_place(model, layers) -> whether each `(path, layer)` is in the model, and checks its edits itself.
PyObject* in_place(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "in_place");
  if (!is_ready()) Py_RETURN_FALSE;
  for (Py_ssize_t at = 0; at < PyList_GET_SIZE(given[1]); ++at) {
    PyObject* one = PyList_GET_ITEM(given[1], at);
    PyObject *path = PyTuple_GET_ITEM(one, 0), *layer = PyTuple_GET_ITEM(one, 1), *found = given[0];
    for (Py_ssize_t part = 0; part < PyTuple_GET_SIZE(path); ++part) {
      found = item(item(dict_of(found), names.modules), PyTuple_GET_ITEM(path, part));
      if (is_none(found)) Py_RETURN_FALSE;
    }
    const Ref fields = dict_of(layer);
    if (found != layer || item(fields, names.scope) == nullptr || item(fields, names.forward) != nullptr)
      Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* run_scope(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 5, "run_scope");
  PyObject *module = given[0], *verdict = given[2], *args = given[3], *kwargs = given[4];
  const Ref forward(PyObject_GetAttr(given[1], names.forward));
  const Ref with_self(PyTuple_New(PyTuple_GET_SIZE(args) + 1));
  if (!forward || !with_self) throw python_error();
  PyTuple_SET_ITEM(with_self.get(), 0, Py_NewRef(module));
  for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(args); ++at)
    PyTuple_SET_ITEM(with_self.get(), at + 1, Py_NewRef(PyTuple_GET_ITEM(args, at)));
  if (!is_eager()) return PyObject_Call(forward, with_self, kwargs);
  Ref output = run(module, forward, with_self, verdict, kwargs);
  if (output) check_layer(module, dict_of(module));
  return output.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace red
