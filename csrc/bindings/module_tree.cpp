// SPDX-License-Identifier: Apache-2.0
#include "bindings/module_tree.h"

#include <unordered_set>
#include <vector>

#include "bindings/python.h"

namespace revk::python {
namespace {

// What is to be asked of a thing that hangs on a module.
enum class Ask : char {
  kIsSame = 0,
  kIsEmpty = 1,       // a dictionary without items: of hooks
  kHasNames = 2,      // a dictionary with these keys: the parameters
  kHoldsModules = 3,  // likewise: the modules below
  kIsOfClass = 4,
};

bool has_keys(PyObject* dict, PyObject* keys) {
  if (!PyDict_CheckExact(dict) || PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(keys)) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0, k = 0; PyDict_Next(dict, &at, &key, &value); ++k)
    if (key != PyTuple_GET_ITEM(keys, k)) return false;
  return true;
}

// A branch's modules, each once, and what is registered in them, None included.
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

 private:
  void add(PyObject* module) {
    if (seen_.insert(module).second) modules_.push_back(py::reinterpret_borrow<py::object>(module));
  }
  static py::list list_of(const std::vector<py::object>& items) {
    py::list list(items.size());
    for (size_t k = 0; k < items.size(); ++k) list[k] = items[k];
    return list;
  }

  std::vector<py::object> modules_, children_;  // held: whoever allocates may collect garbage
  std::unordered_set<PyObject*> seen_;
};

// Whether the things on a module are those `then`, in their order, as far as is `asked`.
bool hang(PyObject* table, PyObject* then, PyObject* asked, Tree& tree) {
  const Py_ssize_t count = PyDict_GET_SIZE(table);
  if (count != PyTuple_GET_SIZE(then) || count != PyBytes_GET_SIZE(asked)) return false;
  PyObject *name, *value;
  for (Py_ssize_t at = 0, k = 0; PyDict_Next(table, &at, &name, &value); ++k) {
    PyObject* const known = PyTuple_GET_ITEM(then, k);
    const Ask ask = Ask(PyBytes_AS_STRING(asked)[k]);
    if (ask == Ask::kIsSame) {
      if (value != known) return false;
    } else if (ask == Ask::kIsOfClass) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != known) return false;
    } else if (ask == Ask::kIsEmpty) {
      if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != 0) return false;
    } else {
      if (!PyTuple_CheckExact(known) || !has_keys(value, known)) return false;
      if (ask == Ask::kHoldsModules) tree.look_into(value);
    }
  }
  return true;
}

// The tree of a branch whose modules are known by rows of (class, what hangs on it, what to ask of
// each of these); None if it is another one now.
py::object module_tree(py::handle branch, const py::list& rows) {
  Tree tree(branch.ptr());
  for (size_t k = 0; k < tree.size(); ++k) {
    if (k >= rows.size()) return py::none();
    PyObject *const module = tree[k], *const row = PyList_GET_ITEM(rows.ptr(), Py_ssize_t(k));
    PyObject *kind, *then, *asked;
    if (!PyTuple_CheckExact(row)) throw py::type_error("rows must be tuples");
    if (!PyArg_ParseTuple(row, "OO!S", &kind, &PyTuple_Type, &then, &asked))
      throw py::error_already_set();
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return py::none();
    const py::object table = checked(PyObject_GenericGetDict(module, nullptr));
    if (!PyDict_CheckExact(table.ptr()) || !hang(table.ptr(), then, asked, tree)) return py::none();
  }
  if (tree.size() != rows.size()) return py::none();
  return tree.lists();
}

}  // namespace

void bind_module_tree(py::module_& m) {
  m.def("module_tree", &module_tree, py::arg("branch"), py::arg("rows"));
}

}  // namespace revk::python
