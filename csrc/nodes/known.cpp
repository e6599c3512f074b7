#include "known.h"

#include "quick.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <structmember.h>
#include <torch/csrc/PyInterpreter.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <initializer_list>
#include <utility>

namespace red {

Known known;
Names names;

void Slot::find(PyObject* type, const char* name) {
  Ref found(PyObject_GetAttrString(type, name));
  TORCH_CHECK_TYPE(found && Py_IS_TYPE(found.get(), &PyMemberDescr_Type), name, " is no slot");
  offset_ = reinterpret_cast<PyMemberDescrObject*>(found.get())->d_member->offset;
}

namespace {

using Slots = std::initializer_list<std::pair<const char*, Slot*>>;

PyObject* named(PyObject* objects, const char* name) {
  PyObject* found = PyDict_GetItemString(objects, name);
  TORCH_CHECK_TYPE(found != nullptr, "there is no ", name);
  Py_INCREF(found);  // for good
  return found;
}

PyTypeObject* type_with(PyObject* objects, const char* name, Slots slots) {
  PyObject* type = named(objects, name);
  TORCH_CHECK_TYPE(PyType_Check(type), name, " is no class");
  for (const auto& [slot, place] : slots) place->find(type, slot);
  return reinterpret_cast<PyTypeObject*>(type);
}

void name_all() {
  const std::initializer_list<std::pair<PyObject**, const char*>> all = {
      {&names.edit, "edit"}, {&names.record, "record"}, {&names.residual, "residual"}, {&names.h, "h"},
      {&names.done, "done"}, {&names.base, "base"}, {&names.after, "after"}, {&names.others, "others"},
      {&names.differentiable, "differentiable"}, {&names.scale, "scale"}, {&names.first, "first"}, {&names.training, "training"},
      {&names.modules, "_modules"}, {&names.parameters, "_parameters"}, {&names.forward, "forward"},
      {&names.compiled, "_compiled_call_impl"}, {&names.forward_hooks, "_forward_hooks"},
      {&names.forward_pre_hooks, "_forward_pre_hooks"}, {&names.backward_hooks, "_backward_hooks"},
      {&names.backward_pre_hooks, "_backward_pre_hooks"}, {&names.next_id, "next_id"},
      {&names.selection, "selection"}, {&names.chosen, "chosen"}, {&names.open, "open"}, {&names.varied, "varied"},
      {&names.watched, "watched"}, {&names.scopes, "scopes"}, {&names.close, "close"}, {&names.end, "end"},
      {&names.unseen, "unseen"}, {&names.nodes, "nodes"}, {&names.empty, ""}, {&names.p, "p"},
      {&names.in_place, "inplace"}, {&names.dropout, "dropout"}, {&names.compiling, "_is_compiling_flag"},
      {&names.edit_norm, "edit_norm"}, {&names.sum_norm, "sum_norm"}, {&names.own, "own"}, {&names.inside, "inside"}
  };
  for (const auto& [place, text] : all) *place = PyUnicode_InternFromString(text);
}

}  // namespace

PyObject* know(PyObject*, PyObject* objects) {
  HANDLE_TH_ERRORS
  name_all();
  auto& k = known;
  k.tensor = reinterpret_cast<PyTypeObject*>(THPVariableClass);
  k.waiting = type_with(objects, "Waiting", {});
  k.edit = type_with(objects, "Edit", {});
  k.dropout = type_with(objects, "Dropout", {});
  type_with(objects, "Records",
            {{"modes", &k.records.modes}, {"plans", &k.records.plans}, {"alone", &k.records.alone}});
  type_with(objects, "SitePlan",
            {{"edit", &k.plan.edit}, {"record", &k.plan.record}, {"hooks", &k.plan.hooks}, {"chosen", &k.plan.chosen},
             {"vectors", &k.plan.vectors}, {"modules", &k.plan.modules}, {"dtype", &k.plan.dtype},
             {"device", &k.plan.device}});
  type_with(objects, "Record",
            {{"link", &k.record.link}, {"alone", &k.record.alone}, {"lazy", &k.record.lazy},
             {"proven", &k.record.proven}, {"at_once", &k.record.at_once}, {"astray", &k.record.astray},
             {"what", &k.record.what}, {"by", &k.record.by}});
  type_with(objects, "Link",
            {{"_norm", &k.link.norm}, {"across", &k.link.across}, {"hooks", &k.link.hooks}, {"free", &k.link.free},
             {"_passed", &k.link.passed}, {"_kept", &k.link.kept}, {"said", &k.link.said}});
  k.note_type = type_with(
      objects, "Note",
      {{"handover", &k.note.handover}, {"holder", &k.note.holder}, {"hooks", &k.note.hooks}, {"norm", &k.note.norm},
       {"normed", &k.note.normed}, {"record", &k.note.record}, {"recorded", &k.note.recorded}, {"scope", &k.note.scope},
       {"source", &k.note.source}, {"stack", &k.note.stack}, {"total", &k.note.total}, {"version", &k.note.version},
       {"weight", &k.note.weight}});
  k.scope_type = type_with(
      objects, "Scope",
      {{"module", &k.scope.module}, {"verdict", &k.scope.verdict}, {"stack", &k.scope.stack},
       {"collects", &k.scope.collects}, {"made", &k.scope.made}, {"left", &k.scope.left},
       {"undecided", &k.scope.undecided}, {"recorded", &k.scope.recorded}, {"compiled", &k.scope.compiled}});
  type_with(objects, "Verdict",
            {{"hooks", &k.verdict.hooks}, {"clean", &k.verdict.clean}, {"inside", &k.verdict.inside},
             {"sites", &k.verdict.sites}, {"stack", &k.verdict.stack}, {"tree", &k.verdict.tree}});
  k.handover_type = type_with(
      objects, "Handover",
      {{"edit", &k.handover.edit}, {"handed", &k.handover.handed}, {"nodes", &k.handover.nodes},
       {"norm", &k.handover.norm}, {"normed", &k.handover.normed}, {"total", &k.handover.total},
       {"value", &k.handover.value}});
  names.own_edit = named(objects, "own_edit"), names.carrier = named(objects, "carrier");
  names.records = named(objects, "records"), names.note = named(objects, "note");
  names.spec = named(objects, "spec"), names.sites = named(objects, "sites"), names.scope = named(objects, "scope");
  k.handles = named(objects, "RemovableHandle");
  k.here = named(objects, "here"), k.streams = named(objects, "streams"), k.held = named(objects, "held");
  k.check_layer = named(objects, "check_layer"), k.choose = named(objects, "choose");
  k.collects = named(objects, "collects");
  k.device_context = named(objects, "device_context"), k.compiler = named(objects, "compiler");
  k.functional = named(objects, "functional");
  k.dropout_function = named(objects, "dropout_function");
  TORCH_CHECK_TYPE(PyContextVar_CheckExact(k.held) && PyDict_Check(k.streams), "held and streams are of other types");
  k.add = PyObject_GetAttrString(THPVariableClass, "__add__");
  k.radd = PyObject_GetAttrString(THPVariableClass, "__radd__");
  if (k.add == nullptr || k.radd == nullptr) throw python_error();
  for (PyMethodDef* method = value_methods; method->ml_name != nullptr; ++method) {
    const Ref made(PyDescr_NewMethod(k.waiting, method));
    if (!made || PyObject_SetAttrString(reinterpret_cast<PyObject*>(k.waiting), method->ml_name, made) < 0)
      throw python_error();
  }
  k.ready = true;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

bool is_eager() { return known.ready && item(known.compiler, names.compiling) != Py_True; }

bool is_ready() {
  if (!is_eager()) return false;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t at = Modes::stack_len(); at-- > 0;) {
    PyObject* mode = Modes::get_stack_at(at)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != known.device_context) return false;
  }
  return true;
}

Ref running() {
  Ref found(PyObject_GetAttr(known.here, names.scopes));
  if (!found) throw python_error();
  return found;
}

PyObject* latest_hook() {
  return item(reinterpret_cast<PyTypeObject*>(known.handles)->tp_dict, names.next_id);
}

bool is_latest(PyObject* kept) {
  PyObject* now = latest_hook();
  if (kept == now) return true;
  return kept != nullptr && now != nullptr && PyObject_RichCompareBool(kept, now, Py_EQ) == 1;
}

bool is_own_forward(PyObject* fields) {
  return item(fields, names.forward) == nullptr && is_none(item(fields, names.compiled));
}

bool is_unhooked(PyObject* fields) {
  for (PyObject* name :
       {names.forward_hooks, names.forward_pre_hooks, names.backward_hooks, names.backward_pre_hooks}) {
    PyObject* hooks = item(fields, name);
    if (hooks == nullptr || PyObject_Size(hooks) != 0) return false;
  }
  return is_own_forward(fields);
}

}  // namespace red
