// SPDX-License-Identifier: Apache-2.0
// Attributes and methods by interned name, which saves pybind11's text lookup on every call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace revk::python {

namespace py = pybind11;

inline PyObject* intern(const char* text) {
  PyObject* const name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

// Takes a new reference; throws the pending Python error if it is null.
inline py::object checked(PyObject* value) {
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

inline py::object attribute(py::handle object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

inline py::object call(py::handle object, PyObject* method) {
  return checked(PyObject_CallMethodNoArgs(object.ptr(), method));
}

// A module's attribute, kept for the life of the process.
inline PyObject* keep(const py::object& module, const char* name) {
  return py::object(module.attr(name)).release().ptr();
}

// The module if it is already imported, otherwise null.
inline py::object imported(PyObject* name) {
  PyObject* const module = PyImport_GetModule(name);
  if (module == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(module);
}

// The address stored in a Python integer.
inline void* handle_of(py::handle integer) {
  void* const address = PyLong_AsVoidPtr(integer.ptr());
  if (address == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return address;
}

inline std::string text_of(py::handle object) { return py::str(object).cast<std::string>(); }
inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

}  // namespace revk::python
