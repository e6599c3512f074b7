#include "quick.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ambient.h"
#include "choice.h"
#include "forwards.h"
#include "known.h"
#include "module.h"
#include "reached.h"
#include "waiting.h"

namespace red {
namespace {

bool is_plain_tensor(PyObject* object) { return Py_IS_TYPE(object, known.tensor); }

bool is_dense(const Tensor& x) { return x.layout() == at::kStrided && !x.is_nested(); }

bool has_dtype(const Tensor& x, PyObject* dtype) {
  return x.scalar_type() == reinterpret_cast<THPDtype*>(dtype)->scalar_type;
}

bool is_on(const Tensor& x, PyObject* device) { return x.device() == reinterpret_cast<THPDevice*>(device)->device; }

// The site's report for Python's `add_as_before` and others: `fused` is the operations that share a pass with its edit.
void say_taken(PyObject* record, PyObject* fused) {
  known.record.proven.set(record, known.record.astray.is_true(record) ? Py_False : Py_True);
  known.record.what.set(record, fused);
  known.record.by.set(record, names.empty);
}

// Whether a `with` block that chooses an edit may be in force here.
bool in_block() {
  if (PyDict_GET_SIZE(known.streams) != 0) return true;
  PyObject* held = nullptr;
  if (PyContextVar_Get(known.held, nullptr, &held) < 0) throw python_error();
  const bool some = held != nullptr && PyObject_IsTrue(held) == 1;
  Py_XDECREF(held);
  return some;
}

// Whether the output of a site is edited as before, and waits.
bool holds(PyObject* plan, PyObject* fields, int64_t now, const Tensor& h) {
  const auto& p = known.plan;
  if (!is_latest(p.hooks.get(plan)) || !has_dtype(h, p.dtype.get(plan)) || !is_dense(h) ||
      !is_on(h, p.device.get(plan)))
    return false;
  if (item(fields, names.modules) != p.modules.get(plan) || !is_own_forward(fields) || in_block()) return false;
  PyObject* shared = item(fields, names.selection);
  if (shared == nullptr) return false;
  const Ref selection = dict_of(shared);
  PyObject *chosen = item(selection, names.chosen), *open = item(selection, names.open);
  if (chosen == nullptr || open == nullptr) return false;
  if (chosen != p.chosen.get(plan) && PyObject_RichCompareBool(chosen, p.chosen.get(plan), Py_EQ) != 1) return false;
  if (PyObject_IsTrue(open)) return false;
  // Without gradients it may be the first run of a checkpoint.
  if (item(selection, names.varied) != Py_False && !(now & (kGrad + kInference))) return false;
  PyObject* vectors = p.vectors.get(plan);
  for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(vectors); ++at) {
    PyObject* one = PyTuple_GET_ITEM(vectors, at);
    if (item(PyTuple_GET_ITEM(one, 0), PyTuple_GET_ITEM(one, 1)) != PyTuple_GET_ITEM(one, 2)) return false;
  }
  return true;
}

// A waiting value, registered in its scope.
PyObject* wait_in(PyObject* scope, PyObject* h, PyObject* edit, PyObject* record, PyObject* residual) {
  Ref made(make_waiting(known.waiting, h, edit, record, residual));
  const Ref reference(PyWeakref_NewRef(made, nullptr));
  if (!reference || PyList_Append(known.scope.made.get(scope), reference) < 0) throw python_error();
  return made.release();
}

// Stores a record as that of a site's last mode.
void ran_last(PyObject* records, PyObject* record) {
  static PyObject* const latest = PyLong_FromLong(-1);
  if (PyDict_SetItem(known.records.modes.get(records), latest, record) < 0) throw python_error();
}

// The edit of a site in its own pass, as before; null if it must be found again.
PyObject* alone_as_before(PyObject* records, PyObject* key, PyObject* own_fields, PyObject* h, int64_t now) {
  const Ref plan = kept(item(known.records.alone.get(records), key));
  if (!plan) return nullptr;
  const Ref record = kept(known.plan.record.get(plan)), edit_given = kept(known.plan.edit.get(plan));
  const Tensor& x = THPVariable_Unpack(h);
  if (!known.record.at_once.is_true(record) || !holds(plan, own_fields, now, x)) return nullptr;
  const Ref nodes = nodes_for(x, h, names.edit);
  if (nodes.get() == Py_None) return nullptr;
  ran_last(records, record);
  known.record.what.set(record, Py_None);
  if (!Py_IS_TYPE(nodes.get(), &nodes_type))
    return PyObject_CallMethodObjArgs(nodes, names.edit, h, Py_None, edit_given.get(), nullptr);
  return THPVariable_Wrap(edit(*reinterpret_cast<Nodes*>(nodes.get())->operators, x, Maybe(), edit_of(edit_given)));
}

// The output of a module with the edit `own`; `holder` has the site's records.
PyObject* as_before(PyObject* holder_fields, PyObject* own, PyObject* own_fields, PyObject* fields, PyObject* h) {
  PyObject* records = item(holder_fields, names.records);
  if (is_none(records)) return nullptr;
  const int64_t now = ambient();
  const Ref key(PyLong_FromLongLong(2 * now + (item(fields, names.training) == Py_True)));
  const Ref plan = kept(item(known.records.plans.get(records), key));
  if (!plan) return alone_as_before(records, key, own_fields, h, now);
  const Ref record = kept(known.plan.record.get(plan)), scopes = running();
  PyObject* scope = last(scopes);
  if (scope == nullptr || known.record.at_once.is_true(record) || !lets_wait(scope, own, now)) return nullptr;
  if (!holds(plan, own_fields, now, THPVariable_Unpack(h))) return nullptr;
  ran_last(records, record);
  return wait_in(scope, h, known.plan.edit.get(plan), record, Py_None);
}

// edited(module, h) -> the output of an edited module
PyObject* edited(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "edited");
  if (!is_ready() || !is_plain_tensor(given[1])) Py_RETURN_NONE;
  const Ref fields = dict_of(given[0]);
  PyObject* own = item(item(fields, names.modules), names.own_edit);
  if (is_none(own)) Py_RETURN_NONE;
  const Ref own_fields = dict_of(own);
  PyObject* value = as_before(own_fields, own, own_fields, fields, given[1]);
  if (value == nullptr) Py_RETURN_NONE;
  if (item(own_fields, names.watched) == Py_True) reach(own);
  return value;
  END_HANDLE_TH_ERRORS
}

// carried(module, h) -> the same for an unedited projection
PyObject* carried(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "carried");
  if (!is_ready() || !is_plain_tensor(given[1])) Py_RETURN_NONE;
  const Ref fields = dict_of(given[0]);
  PyObject* own = item(fields, names.carrier);
  if (own == nullptr) Py_RETURN_NONE;
  PyObject* value = as_before(fields, own, dict_of(own), fields, given[1]);
  if (value == nullptr) Py_RETURN_NONE;
  return value;
  END_HANDLE_TH_ERRORS
}

// The fields of a waiting value.
struct Value {
  explicit Value(PyObject* value) : fields(dict_of(value)) {
    h = item(fields, names.h), edit = item(fields, names.edit), record = item(fields, names.record);
    residual = item(fields, names.residual);
  }

  // Whether it waits, and is neither a view nor a term of another sum; as `waits` in Python.
  bool is_bare(int64_t now) const {
    if (!is_none(item(fields, names.done)) || !is_none(item(fields, names.base)) || !is_none(item(fields, names.after)))
      return false;
    PyObject* others = item(fields, names.others);
    if (others != nullptr && PyTuple_GET_SIZE(others) != 0) return false;
    if (item(PyTuple_GET_ITEM(edit, 1), names.first) != nullptr) return false;  // mixes have no nodes here
    return (now & kGrad) || item(fields, names.differentiable) != Py_True;
  }

  bool is_dropped() const { return PyTuple_GET_ITEM(edit, 3) != Py_None; }

  const Ref fields;
  PyObject *h, *edit, *record, *residual;
};

// The norm of a link; a new reference, null after its deletion.
Ref norm_of_link(PyObject* link) {
  PyObject* reference = known.link.norm.get(link);
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* norm = nullptr;
  if (PyWeakref_GetRef(reference, &norm) < 0) throw python_error();
  return Ref(norm);
#else
  PyObject* norm = PyWeakref_GetObject(reference);
  return Ref(norm == Py_None ? nullptr : Py_NewRef(norm));
#endif
}

// The arguments of a link's norm if they are unchanged; see `Link.keep`.
PyObject* arguments(PyObject* link, PyObject* norm, const Tensor& x, int64_t now) {
  PyObject* kept = known.link.kept.get(link);
  if (is_none(kept)) return nullptr;
  enum { kNow, kHooks, kDtype, kDevice, kFound, kWeight, kBias, kEps };
  const auto at = [&](int place) { return PyTuple_GET_ITEM(kept, place); };
  if (!is_latest(at(kHooks)) || PyLong_AsLongLong(at(kNow)) != now || !has_dtype(x, at(kDtype)) ||
      !is_on(x, at(kDevice)))
    return nullptr;
  const Ref fields = dict_of(norm);
  if (!is_own_forward(fields)) return nullptr;
  PyObject *found = at(kFound), *parameters = item(fields, names.parameters);
  for (const auto& [name, place] : {std::pair(at(kWeight), 0), std::pair(at(kBias), 1)}) {
    if (name == Py_None) continue;
    PyObject *vector = PyTuple_GET_ITEM(found, place), *here = item(parameters, name);
    if ((here == nullptr ? Py_None : here) != vector) return nullptr;
    if (vector != Py_None && THPVariable_Unpack(vector).scalar_type() != x.scalar_type()) return nullptr;
  }
  if (at(kEps) != Py_None) {
    const Ref eps(PyObject_GetAttr(norm, at(kEps)));
    if (!eps) throw python_error();
    PyObject* before = PyTuple_GET_ITEM(found, 2);
    if (eps.get() != before &&
        (Py_TYPE(eps.get()) != Py_TYPE(before) || PyObject_RichCompareBool(eps, before, Py_EQ) != 1))
      return nullptr;
  }
  return found;
}

// The stack in which a sum may be handed from block to block; null for none.
PyObject* open_stack(PyObject* scopes, int64_t now) {
  PyObject* stack = nullptr;
  for (Py_ssize_t at = PyList_GET_SIZE(scopes); at-- > 0 && stack == nullptr;)
    if (known.scope.stack.is_true(PyList_GET_ITEM(scopes, at))) stack = PyList_GET_ITEM(scopes, at);
  if (stack == nullptr || PyObject_IsTrue(known.scope.collects.get(stack)) || (now & kSaved)) return nullptr;
  // Reentrant checkpointing runs a training model without gradients first, and then block by block.
  if (!(now & kGrad) && item(dict_of(known.scope.module.get(stack)), names.training) == Py_True) return nullptr;
  return stack;
}

// Whether no hook observes a sum on its path; see `Link.unseen`.
bool is_unseen(PyObject* link) {
  const auto& l = known.link;
  const bool asks = l.across.is_true(link) && PyObject_IsTrue(l.passed.get(link));
  if (is_latest(l.hooks.get(link)) && l.free.is_true(link) && !asks) return true;
  const Ref found(PyObject_CallMethodNoArgs(link, names.unseen));
  if (!found) throw python_error();
  return PyObject_IsTrue(found) == 1;
}

// A sum and its norm, `(z, y)`; nothing if the residual is not like x.
Ref both(PyObject* nodes, const Value& value, PyObject* residual, PyObject* found) {
  if (!Py_IS_TYPE(nodes, &nodes_type))
    return Ref(PyObject_CallMethodObjArgs(nodes, names.sum_norm, value.h, residual, value.edit, found, nullptr));
  const Tensor& x = THPVariable_Unpack(value.h);
  const Maybe other = THPVariable_Unpack(residual);
  if (!fits(x, other)) return Ref(Py_NewRef(Py_None));
  const Operators& run = *reinterpret_cast<Nodes*>(nodes)->operators;
  const auto [z, y] = sum_norm(run, x, other, edit_of(value.edit), norm_of(found));
  return Ref(pair(z, y));
}

void leave_note(PyObject* z, PyObject* y, const Value& value, PyObject* scope, PyObject* stack, PyObject* norm,
                PyObject* found, PyObject* nodes, int64_t now) {
  const auto& h = known.handover;
  const Ref handover(known.handover_type->tp_alloc(known.handover_type, 0));
  const auto& n = known.note;
  const Ref note(known.note_type->tp_alloc(known.note_type, 0)), total(PyWeakref_NewRef(z, nullptr));
  const Tensor& sum = THPVariable_Unpack(z);
  const Ref version(PyLong_FromLongLong(sum.is_inference() ? -1 : sum._version()));
  if (!handover || !note || !total || !version) throw python_error();
  h.edit.set(handover, value.edit), h.norm.set(handover, found), h.nodes.set(handover, nodes);
  h.value.set(handover, Py_None), h.normed.set(handover, Py_None), h.total.set(handover, Py_None);
  PyObject* left = known.scope.left.get(scope);
  n.record.set(note, value.record), n.scope.set(note, scope), n.stack.set(note, stack == nullptr ? Py_None : stack);
  n.source.set(note, known.scope.module.get(scope)), n.handover.set(note, handover), n.normed.set(note, y);
  n.norm.set(note, norm), n.weight.set(note, PyTuple_GET_ITEM(found, 0)), n.total.set(note, total);
  n.version.set(note, version), n.recorded.set(note, now & kGrad ? Py_True : Py_False), n.hooks.set(note, Py_None);
  n.holder.set(note, left);
  if (PyDict_SetItem(dict_of(z), names.note, note) < 0 || PyList_Append(left, note) < 0) throw python_error();
}

// `residual + value`, with its norm in the same pass; null if it must be found again.
PyObject* sum_as_before(PyObject* object, PyObject* residual) {
  if (!is_ready() || !Py_IS_TYPE(object, known.waiting) || !is_plain_tensor(residual)) return nullptr;
  const int64_t now = ambient();
  const Value value(object);
  const auto& r = known.record;
  const Ref link = kept(r.link.get(value.record));
  if (is_none(link) || r.lazy.is_true(value.record) || (now & ~kQuiet) || !is_none(value.residual) ||
      !value.is_bare(now))
    return nullptr;
  const Ref norm = norm_of_link(link), scopes = running();
  PyObject* scope = last(scopes);
  if (!norm || scope == nullptr || known.scope.stack.is_true(scope) ||
      PyList_GET_SIZE(known.scope.undecided.get(scope)) != 0)
    return nullptr;
  const Tensor &x = THPVariable_Unpack(value.h), &other = THPVariable_Unpack(residual);
  const Ref said = kept(PyTuple_GET_ITEM(known.link.said.get(link), value.is_dropped()));
  if (r.alone.is_true(value.record)) {  // the norm takes the sum
    if (r.astray.is_true(value.record) || !is_dense(other) || !fits(x, other)) return nullptr;
    return wait_in(scope, value.h, value.edit, value.record, residual);
  }
  const Ref found = kept(arguments(link, norm, x, now));
  if (!found) return nullptr;
  PyObject* stack = nullptr;
  if (known.link.across.is_true(link) && (stack = open_stack(scopes, now)) == nullptr) return nullptr;
  if (!is_unseen(link)) return nullptr;
  const Ref nodes = nodes_for(x, value.h, names.edit_norm);
  if (nodes.get() == Py_None) return nullptr;
  Ref made;
  if (now & kInference) {  // torch counts no in-place changes of tensors made in inference mode
    c10::InferenceMode counted(false);
    at::NoGradGuard no_grad;
    made = both(nodes, value, residual, found);
  } else {
    made = both(nodes, value, residual, found);
  }
  if (!made) throw python_error();
  if (made.get() == Py_None) return nullptr;
  say_taken(value.record, said);
  PyObject *z = PyTuple_GET_ITEM(made.get(), 0), *y = PyTuple_GET_ITEM(made.get(), 1);
  leave_note(z, y, value, scope, stack, norm, found, nodes, now);
  return Py_NewRef(z);
}

// added(value, residual) -> residual + value, with its norm in the same pass
PyObject* added(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "added");
  PyObject* found = sum_as_before(given[0], given[1]);
  return found == nullptr ? Py_NewRef(Py_None) : found;
  END_HANDLE_TH_ERRORS
}

// The `+` of a waiting value, without torch's dispatch by class.
PyObject* value_add(PyObject* value, PyObject* other) {
  HANDLE_TH_ERRORS
  PyObject* found = sum_as_before(value, other);
  return found != nullptr ? found : PyObject_CallFunctionObjArgs(known.add, value, other, nullptr);
  END_HANDLE_TH_ERRORS
}

PyObject* value_radd(PyObject* value, PyObject* other) {
  HANDLE_TH_ERRORS
  PyObject* found = sum_as_before(value, other);
  if (found != nullptr) return found;
  if (is_plain_tensor(other)) Py_RETURN_NOTIMPLEMENTED;  // then its own `+` is used
  return PyObject_CallFunctionObjArgs(known.radd, value, other, nullptr);
  END_HANDLE_TH_ERRORS
}

// The result of a torch.nn.Dropout with these attributes for a waiting value.
PyObject* dropped_as_before(PyObject* object, PyObject* fields) {
  PyObject *probability = item(fields, names.p), *training = item(fields, names.training);
  if (probability == nullptr || !PyFloat_CheckExact(probability) || item(fields, names.in_place) != Py_False)
    return nullptr;
  const double p = PyFloat_AS_DOUBLE(probability);
  const Value value(object);
  if (!value.is_bare(ambient())) return nullptr;
  if (training == Py_False || p == 0.0) return Py_NewRef(object);
  const Ref scopes = running();
  PyObject* scope = last(scopes);
  if (training != Py_True || scope == nullptr || !(p > 0.0 && p < 1.0) || !is_none(value.residual) ||
      value.is_dropped() || !known.record.proven.is_true(value.record))
    return nullptr;
  Ref dropout(known.dropout->tp_alloc(known.dropout, 2)), edit(known.edit->tp_alloc(known.edit, 4));
  if (!dropout || !edit) throw python_error();
  PyTuple_SET_ITEM(dropout.get(), 0, Py_NewRef(probability));
  PyTuple_SET_ITEM(dropout.get(), 1, THPVariable_Wrap(drawn_seed(THPVariable_Unpack(value.h))));
  for (Py_ssize_t at = 0; at < 3; ++at) PyTuple_SET_ITEM(edit.get(), at, Py_NewRef(PyTuple_GET_ITEM(value.edit, at)));
  PyTuple_SET_ITEM(edit.get(), 3, dropout.release());
  return wait_in(scope, value.h, edit, value.record, Py_None);
}

// dropped(dropout, value) -> the module's result for a waiting value, or None
PyObject* dropped(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "dropped");
  if (!is_ready() || !Py_IS_TYPE(given[1], known.waiting)) Py_RETURN_NONE;
  if (item(known.functional, names.dropout) != known.dropout_function) Py_RETURN_NONE;  // it was replaced
  PyObject* found = dropped_as_before(given[1], dict_of(given[0]));
  return found == nullptr ? Py_NewRef(Py_None) : found;
  END_HANDLE_TH_ERRORS
}

// The value of a note on a sum for this norm; null if it must be found again.
PyObject* noted(PyObject* norm, PyObject* z) {
  const Ref fields = dict_of(z);
  PyObject* note = item(fields, names.note);
  if (note == nullptr) return nullptr;
  const int64_t now = ambient();
  const auto& n = known.note;
  if ((now & (kPlain + kSaved)) || n.norm.get(note) != norm || n.normed.is_none(note) || !n.hooks.is_none(note))
    return nullptr;
  const Ref scopes = running();
  PyObject *scope = last(scopes), *stack = n.stack.get(note);
  const bool within = scope != nullptr && scope == n.scope.get(note) && !known.scope.stack.is_true(scope);
  if (!within && (is_none(stack) || open_stack(scopes, now | kGrad) != stack)) return nullptr;
  const Tensor& sum = THPVariable_Unpack(z);
  const int64_t version = sum.is_inference() ? -1 : static_cast<int64_t>(sum._version());
  if (PyLong_AsLongLong(n.version.get(note)) != version || n.recorded.is_true(note) != ((now & kGrad) != 0) ||
      sum.retains_grad() || reinterpret_cast<THPVariable*>(z)->backward_hooks != nullptr)
    return nullptr;
  const Ref norm_fields = dict_of(norm);
  PyObject* spec = item(norm_fields, names.spec);
  if (spec == nullptr || !is_unhooked(norm_fields)) return nullptr;
  PyObject* name = PyTuple_GET_ITEM(spec, 3);  // of the weight
  PyObject* weight = item(item(norm_fields, names.parameters), name);
  if ((weight == nullptr ? Py_None : weight) != n.weight.get(note)) return nullptr;
  PyObject* holder = n.holder.get(note);
  for (Py_ssize_t at = PyList_GET_SIZE(holder); at-- > 0;)
    if (PyList_GET_ITEM(holder, at) == note) {
      PyObject* normed = Py_NewRef(n.normed.get(note));
      if (PyList_SetSlice(holder, at, at + 1, nullptr) < 0 || PyDict_DelItem(fields, names.note) < 0) {
        Py_DECREF(normed);
        throw python_error();
      }
      return normed;
    }
  return nullptr;
}

// The norm of a waiting sum with no other reader.
PyObject* norm_of_waiting(PyObject* norm, PyObject* object) {
  const Value value(object);
  const int64_t now = ambient();
  const Ref link = kept(known.record.link.get(value.record));
  if (is_none(link) || is_none(value.residual) || !known.record.alone.is_true(value.record) || (now & ~kQuiet) ||
      !value.is_bare(now) || norm_of_link(link).get() != norm)
    return nullptr;
  const Tensor& x = THPVariable_Unpack(value.h);
  const Maybe residual = tensor(value.residual, "residual");
  const Ref found = kept(fits(x, residual) ? arguments(link, norm, x, now) : nullptr);
  if (!found) return nullptr;
  const Ref nodes = nodes_for(x, value.h, names.edit_norm);
  if (nodes.get() == Py_None) return nullptr;
  // A sum that only its norm reads is kept for the backward instead of both of its terms; but the gradient of the scale
  // always needs the site's output.
  PyObject* scale = item(PyTuple_GET_ITEM(value.edit, 1), names.scale);
  const bool keeps = (now & kGrad) && (is_none(scale) || !THPVariable_Unpack(scale).requires_grad());
  PyObject* y = nullptr;
  if (Py_IS_TYPE(nodes.get(), &nodes_type)) {
    const auto& run = *reinterpret_cast<Nodes*>(nodes.get())->operators;
    y = THPVariable_Wrap(std::get<0>(edit_norm(run, x, residual, edit_of(value.edit), norm_of(found), keeps)));
  } else {
    const Ref made(PyObject_CallMethodObjArgs(nodes, names.edit_norm, value.h, value.residual, value.edit, found.get(),
                                                       keeps ? Py_True : Py_False, nullptr));
    if (!made) throw python_error();
    y = Py_NewRef(PyTuple_GET_ITEM(made.get(), 0));
  }
  say_taken(value.record, PyTuple_GET_ITEM(known.link.said.get(link), value.is_dropped()));
  return y;
}

// normed(norm, x) -> the norm of a sum: of a waiting one, or from its note
PyObject* normed(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2, "normed");
  PyObject* found = nullptr;
  if (!is_ready()) Py_RETURN_NONE;
  if (is_plain_tensor(given[1]))
    found = noted(given[0], given[1]);
  else if (Py_IS_TYPE(given[1], known.waiting))
    found = norm_of_waiting(given[0], given[1]);
  return found == nullptr ? Py_NewRef(Py_None) : found;
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef value_methods[] = {
    {"__add__", value_add, METH_O, "value + other"},
    {"__radd__", value_radd, METH_O, "other + value"},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef quick_functions[] = {
    {"know", know, METH_O, "know(objects): the classes and objects of Python that these functions read"},
    {"edited", as_method(&edited), METH_FASTCALL, "edited(module, h) -> a value that waits, or None"},
    {"carried", as_method(&carried), METH_FASTCALL, "carried(module, h) -> a value that waits, or None"},
    {"added", as_method(&added), METH_FASTCALL, "added(value, residual) -> the sum, or None"},
    {"dropped", as_method(&dropped), METH_FASTCALL, "dropped(dropout, value) -> a value that waits, or None"},
    {"normed", as_method(&normed), METH_FASTCALL, "normed(norm, x) -> the norm's output, or None"},
    {"run_scope", as_method(&run_scope), METH_FASTCALL, "run_scope(module, base, verdict, args, kwargs) -> the output"},
    {"reach", py_reach, METH_O, "reach(own): this edit has run in this thread"},
    {"take_reached", py_take_reached, METH_O, "take_reached(own) -> whether it has since this was asked before"},
    {"in_place", as_method(&in_place), METH_FASTCALL, "in_place(model, layers) -> whether they are where they were"},
    {"forget_choices", forget_choices, METH_O, "forget_choices(fixed): whether a backend once chosen stays so"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace red
