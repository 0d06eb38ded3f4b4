// SPDX-License-Identifier: Apache-2.0
// Reads and checks a revkernels.Norm.
#include "bindings/norm_options.h"

#include <algorithm>
#include <cmath>

#include "bindings/checks.h"
#include "bindings/python.h"

namespace revk::python {
namespace {

// Attributes of a revkernels.Norm.

struct Names {
  PyObject* kind = PyUnicode_InternFromString("kind");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* eps = PyUnicode_InternFromString("eps");
  PyObject* activation = PyUnicode_InternFromString("activation");
  PyObject* groups = PyUnicode_InternFromString("groups");
  PyObject* channel_dim = PyUnicode_InternFromString("channel_dim");
  PyObject* running_mean = PyUnicode_InternFromString("running_mean");
  PyObject* running_var = PyUnicode_InternFromString("running_var");
  PyObject* momentum = PyUnicode_InternFromString("momentum");
};
const Names& names() {
  static const Names* const interned = new Names;
  return *interned;
}

py::object field(py::handle norm, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(norm.ptr(), name);
  if (value == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
    type_error("norm is a " + std::string(Py_TYPE(norm.ptr())->tp_name) +
               "; it must be a revkernels.Norm");
  }
  return py::reinterpret_steal<py::object>(value);
}

// The index of an attribute's value in a NULL-terminated list of words.
int32_t choice(py::handle norm, PyObject* name, const char* label, const char* const* words) {
  const py::object value = field(norm, name);
  for (int32_t i = 0; words[i] != nullptr; ++i)
    if (PyUnicode_Check(value.ptr()) &&
        PyUnicode_CompareWithASCIIString(value.ptr(), words[i]) == 0)
      return i;
  std::string all;
  for (int32_t i = 0; words[i] != nullptr; ++i) all += (i > 0 ? ", " : "") + std::string(words[i]);
  value_error(std::string(label) + " is " + py::repr(value).cast<std::string>() +
              "; it must be one of " + all);
}

double number(py::handle norm, PyObject* name, const char* label) {
  const py::object value = field(norm, name);
  if (PyBool_Check(value.ptr()) || !(PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())))
    type_error(std::string(label) + " is a " + Py_TYPE(value.ptr())->tp_name +
               "; it must be a float");
  const double result = PyFloat_AsDouble(value.ptr());
  const bool beyond = result == -1.0 && PyErr_Occurred();  // an integer too large for a float
  if (beyond) PyErr_Clear();
  if (beyond || !(result >= 0.0) || std::isinf(result))
    value_error(std::string(label) + " is " + py::repr(value).cast<std::string>() +
                "; it must be finite and not negative");
  return result;
}

}  // namespace

int64_t integer(py::handle value, const char* label, const char* needs) {
  if (PyBool_Check(value.ptr()) || !PyLong_Check(value.ptr()))
    type_error(std::string(label) + " is a " + Py_TYPE(value.ptr())->tp_name + "; it must be " +
               needs);
  const int64_t result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    value_error(std::string(label) + " is " + text_of(value) + "; it must fit in 64 bits");
  }
  return result;
}

bool truth(py::handle value) {
  const int result = PyObject_IsTrue(value.ptr());
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

void check_dtype(const Array& array, int32_t dtype) {
  if (array.dtype != dtype)
    type_error(std::string(array.name) + " is " + dtype_name(array.dtype) + "; it must be " +
               dtype_name(dtype) + ", the type this norm is computed in");
}

// Arrays beside the operands

const Array* NormArrays::add(const char* name, py::handle object, const Array& x,
                             const int64_t* sizes, int rank, bool written) {
  Array& array = arrays_[count_];
  read_array(array, name, object);
  check_together(x, array);
  bool same = array.rank == rank;
  for (int k = 0; same && k < rank; ++k) same = array.sizes[k] == sizes[k];
  if (!same) {
    Array wanted = array;
    wanted.rank = rank;
    std::copy(sizes, sizes + rank, wanted.sizes);
    value_error(std::string(name) + " has shape " + array.shape() + "; it must be " +
                wanted.shape() + " for this " + x.name);
  }
  int64_t expected = 1;
  for (int k = rank - 1; k >= 0; --k) {
    if (sizes[k] > 1 && array.strides[k] != expected && array.count() > 0)
      value_error(std::string(name) + " has stride " + std::to_string(array.strides[k]) +
                  " in dimension " + std::to_string(k) + "; it must be dense");
    expected *= sizes[k];
  }
  if (written) check_writable(array);
  written_[count_++] = written;
  return &array;
}
void NormArrays::check_among() const {
  for (int i = 0; i < count_; ++i)
    for (int k = 0; k < count_; ++k)
      if (written_[i] && k != i && !(written_[k] && k < i)) check_apart(arrays_[i], arrays_[k]);
}
void NormArrays::check_against(const Array& operand, bool operand_written) const {
  for (int i = 0; i < count_; ++i) {
    if (operand_written)
      check_apart(operand, arrays_[i]);
    else if (written_[i])
      check_apart(arrays_[i], operand);
  }
}

// The norm

template <class Pointer>
void NormOptions::read_pair(py::handle object, PyObject* first_name, const char* first_label,
                            PyObject* second_name, const char* second_label, const Array& x,
                            bool written, NormArrays& sides, Pointer& first, Pointer& second,
                            int32_t& dtype) {
  const py::object a = field(object, first_name), b = field(object, second_name);
  const Array* one = nullptr;
  if (!a.is_none()) {
    one = sides.add(first_label, a, x, &channels, 1, written);
    first = one->data;
    dtype = one->dtype;
  }
  if (b.is_none()) return;
  const Array* const other = sides.add(second_label, b, x, &channels, 1, written);
  if (one != nullptr && one->dtype != other->dtype)
    type_error(std::string(second_label) + " is " + dtype_name(other->dtype) + "; it must be " +
               dtype_name(one->dtype) + " as " + first_label);
  second = other->data;
  dtype = other->dtype;
}

NormOptions::NormOptions(py::handle object, const Array& x, int32_t dtype, py::handle mean,
                         py::handle rstd, bool given, NormArrays& sides) {
  const Names& of = names();
  static const char* const kinds[] = {"batch", "layer", "rms", "group", nullptr};
  static const char* const activations[] = {"none", "relu", "gelu", "gelu_tanh", "silu", nullptr};
  norm.struct_size = int32_t(sizeof(revk_norm));
  norm.kind = choice(object, of.kind, "kind", kinds);
  norm.activation = choice(object, of.activation, "activation", activations);
  norm.eps = number(object, of.eps, "eps");
  norm.momentum = number(object, of.momentum, "momentum");
  norm.statistics_given = given ? 1 : 0;
  find_channels(object, x, kinds[norm.kind]);
  read_pair(object, of.weight, "weight", of.bias, "bias", x, false, sides, norm.weight, norm.bias,
            norm.parameter_dtype);
  read_running(object, x, kinds[norm.kind], given, sides);
  read_statistics(x, dtype, mean, rstd, given, sides);
}

void NormOptions::find_channels(py::handle object, const Array& x, const char* kind) {
  const bool grouped = norm.kind == REVK_GROUP_NORM;
  const bool second = grouped || norm.kind == REVK_BATCH_NORM;
  const int64_t groups = integer(field(object, names().groups), "groups", "an int");
  const py::object dim = field(object, names().channel_dim);
  const int needs = grouped || (second && dim.is_none()) ? 2 : 1;
  if (x.rank < needs)
    value_error(std::string(x.name) + " has shape " + x.shape() + "; a " + kind + " norm needs " +
                std::to_string(needs) + " dimensions or more");
  const int64_t from =
      dim.is_none() ? (second ? 1 : -1) : integer(dim, "channel_dim", "an int or None");
  if (from < -x.rank || from >= x.rank)
    value_error("channel_dim is " + std::to_string(from) + "; " + x.name + " has " +
                std::to_string(x.rank) + " dimensions");
  axis = int(from < 0 ? from + x.rank : from);
  channels = x.sizes[axis];
  if (!grouped) {
    if (groups != 1)
      value_error("groups is " + std::to_string(groups) + "; it must be 1 for a " + kind + " norm");
    return;
  }
  if (axis == 0)
    value_error(
        "channel_dim is 0; a group norm's samples lie there, so it must be another dimension");
  if (groups < 1 || groups > INT32_MAX || channels % groups != 0)
    value_error("groups is " + std::to_string(groups) + "; it must divide " + x.name + "'s " +
                std::to_string(channels) + " channels");
  norm.groups = int32_t(groups);
}

void NormOptions::read_running(py::handle object, const Array& x, const char* kind, bool given,
                               NormArrays& sides) {
  const Names& of = names();
  const bool absent = field(object, of.running_mean).is_none();
  if (absent != field(object, of.running_var).is_none())
    value_error("running_mean and running_var must both be arrays, or both None");
  if (absent) return;
  if (norm.kind != REVK_BATCH_NORM)
    value_error(std::string("running_mean is given; it must be None for a ") + kind + " norm");
  read_pair(object, of.running_mean, "running_mean", of.running_var, "running_var", x, !given,
            sides, norm.running_mean, norm.running_var, norm.running_dtype);
}

void NormOptions::read_statistics(const Array& x, int32_t dtype, py::handle mean, py::handle rstd,
                                  bool given, NormArrays& sides) {
  int64_t sizes[kMaxRank];
  int rank = 0;
  if (norm.kind == REVK_BATCH_NORM) {
    sizes[rank++] = channels;
  } else if (norm.kind == REVK_GROUP_NORM) {
    sizes[rank++] = x.sizes[0];
    sizes[rank++] = norm.groups;
  } else {
    for (int k = 0; k < x.rank; ++k)
      if (k != axis) sizes[rank++] = x.sizes[k];
  }
  const bool rms = norm.kind == REVK_RMS_NORM;
  if (mean.is_none() != rms)
    type_error("mean is a " + std::string(Py_TYPE(mean.ptr())->tp_name) + "; it must be " +
               (rms ? "None for an rms norm" : "an array"));
  if (!rms) {
    const Array* const array = sides.add("mean", mean, x, sizes, rank, !given);
    check_dtype(*array, dtype);
    norm.mean = array->data;
  }
  const Array* const array = sides.add("rstd", rstd, x, sizes, rank, !given);
  check_dtype(*array, dtype);
  norm.rstd = array->data;
}

}  // namespace revk::python
