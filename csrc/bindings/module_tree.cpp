// SPDX-License-Identifier: Apache-2.0
// Compares a torch module's tree with the rows that a branch's cache recorded for it.
#include "bindings/module_tree.h"

#include <unordered_set>
#include <vector>

#include "bindings/python.h"

namespace revk::python {
namespace {

// How to compare one attribute of a module with its cached value.
enum class Ask : char {
  kIsSame = 0,
  kIsEmpty = 1,       // a dictionary without items: hooks
  kHasNames = 2,      // a dictionary with these keys: parameters
  kHoldsModules = 3,  // likewise: child modules
  kIsOfClass = 4,
};

bool has_keys(PyObject* dict, PyObject* keys) {
  if (!PyDict_CheckExact(dict) || PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(keys)) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0, k = 0; PyDict_Next(dict, &at, &key, &value); ++k)
    if (key != PyTuple_GET_ITEM(keys, k)) return false;
  return true;
}

// Whether `kind` is the cached class `known`, or the target of the weak reference `known`.
bool is_class(PyTypeObject* kind, PyObject* known) {
  PyObject* const own = reinterpret_cast<PyObject*>(kind);
  if (!PyWeakref_CheckRef(known)) return own == known;
  return checked(PyObject_CallNoArgs(known)).ptr() == own;
}

// A branch's modules, each once, and their registered children, including None.
class Tree {
 public:
  explicit Tree(PyObject* root) { add(root); }

  size_t size() const { return modules_.size(); }
  PyObject* operator[](size_t k) const { return modules_[k].ptr(); }

  void look_into(PyObject* registry) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(registry, &at, &key, &value);) {
      children_.push_back(py::reinterpret_borrow<py::object>(value));
      if (value != Py_None) add(value);
    }
  }
  py::tuple lists() const { return py::make_tuple(list_of(modules_), list_of(children_)); }
  bool is(const py::list& modules, const py::list& children) const {
    return are(modules_, modules) && are(children_, children);
  }

 private:
  void add(PyObject* module) {
    if (seen_.insert(module).second) modules_.push_back(py::reinterpret_borrow<py::object>(module));
  }
  static py::list list_of(const std::vector<py::object>& items) {
    py::list list(items.size());
    for (size_t k = 0; k < items.size(); ++k) list[k] = items[k];
    return list;
  }
  static bool are(const std::vector<py::object>& items, const py::list& list) {
    if (items.size() != list.size()) return false;
    for (size_t k = 0; k < items.size(); ++k)
      if (items[k].ptr() != PyList_GET_ITEM(list.ptr(), Py_ssize_t(k))) return false;
    return true;
  }

  std::vector<py::object> modules_, children_;  // owned: an allocation may collect garbage
  std::unordered_set<PyObject*> seen_;
};

// Compares an attribute's value with its cached value, as `ask` demands.
bool hangs(PyObject* value, PyObject* known, Ask ask, Tree& tree) {
  if (ask == Ask::kIsSame) return value == known;
  if (ask == Ask::kIsOfClass) return is_class(Py_TYPE(value), known);
  if (ask == Ask::kIsEmpty) return PyDict_Check(value) && PyDict_GET_SIZE(value) == 0;
  if (!PyTuple_CheckExact(known) || !has_keys(value, known)) return false;
  if (ask == Ask::kHoldsModules) tree.look_into(value);
  return true;
}

// One module's cached row: its class, attribute names (None: all attributes, in their order),
// cached values, and how to compare each.
struct Row {
  explicit Row(PyObject* row) {
    if (!PyTuple_CheckExact(row)) throw py::type_error("rows must be tuples");
    if (!PyArg_ParseTuple(row, "OOO!S", &kind, &names, &PyTuple_Type, &known, &asked))
      throw py::error_already_set();
    if (names != Py_None && !PyTuple_CheckExact(names))
      throw py::type_error("names must be a tuple");
    const Py_ssize_t count = PyTuple_GET_SIZE(known);
    if (PyBytes_GET_SIZE(asked) != count || (names != Py_None && PyTuple_GET_SIZE(names) != count))
      throw py::value_error("a row must ask for each of the things that are known");
  }

  bool is_of(PyObject* table, Tree& tree) const {
    const Py_ssize_t count = PyTuple_GET_SIZE(known);
    PyObject *name, *value;
    if (names == Py_None) {
      if (PyDict_GET_SIZE(table) != count) return false;
      for (Py_ssize_t at = 0, k = 0; PyDict_Next(table, &at, &name, &value); ++k)
        if (!is(value, k, tree)) return false;
      return true;
    }
    for (Py_ssize_t k = 0; k < count; ++k) {
      value = PyDict_GetItemWithError(table, PyTuple_GET_ITEM(names, k));
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (value == nullptr || !is(value, k, tree)) return false;
    }
    return true;
  }

  PyObject *kind, *names, *known, *asked;

 private:
  bool is(PyObject* value, Py_ssize_t k, Tree& tree) const {
    return hangs(value, PyTuple_GET_ITEM(known, k), Ask(PyBytes_AS_STRING(asked)[k]), tree);
  }
};

// Whether the branch (the tree's first module) matches the rows; adds its descendants to the tree.
bool grow(Tree& tree, const py::list& rows) {
  for (size_t k = 0; k < tree.size(); ++k) {
    if (k >= rows.size()) return false;
    const Row row(PyList_GET_ITEM(rows.ptr(), Py_ssize_t(k)));
    if (!is_class(Py_TYPE(tree[k]), row.kind)) return false;
    const py::object table = checked(PyObject_GenericGetDict(tree[k], nullptr));
    if (!PyDict_CheckExact(table.ptr()) || !row.is_of(table.ptr(), tree)) return false;
  }
  return tree.size() == rows.size();
}

// The tree of a branch that matches these rows, else None.
py::object module_tree(py::handle branch, const py::list& rows) {
  Tree tree(branch.ptr());
  return grow(tree, rows) ? py::object(tree.lists()) : py::none();
}

// Whether the tree is unchanged, without making its lists.
bool is_module_tree(py::handle branch, const py::list& rows, const py::list& modules,
                    const py::list& children) {
  Tree tree(branch.ptr());
  return grow(tree, rows) && tree.is(modules, children);
}

}  // namespace

void bind_module_tree(py::module_& m) {
  m.def("module_tree", &module_tree, py::arg("branch"), py::arg("rows"));
  m.def("is_module_tree", &is_module_tree, py::arg("branch"), py::arg("rows"), py::arg("modules"),
        py::arg("children"));
}

}  // namespace revk::python
