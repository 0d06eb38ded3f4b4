// SPDX-License-Identifier: Apache-2.0
// Reads arrays: NumPy and CuPy here, the other libraries in files of their own.
#include "bindings/arrays.h"

#include <algorithm>

#include "bindings/buffer.h"
#include "bindings/dlpack.h"
#include "bindings/python.h"
#include "bindings/torch_tensors.h"

namespace revk::python {
namespace {

constexpr int kAligned = 0x0100, kWriteable = 0x0400;  // NumPy's array flags, part of its ABI

// NumPy

// The mask would be ignored on reading and wrong after writing.
void refuse_masked(const Array& array, py::handle object) {
  static PyObject* const module_name = intern("numpy.ma");
  const py::object masked = imported(module_name);
  if (masked && py::isinstance(object, masked.attr("MaskedArray")))
    type_error(std::string(array.name) +
               " is a MaskedArray; it must be a plain array, such as its .data or .filled()");
}

void read_ndarray(Array& array, py::handle object, Takes takes) {
  const auto* const proxy = py::detail::array_proxy(object.ptr());
  array.library = Library::kNumpy;
  if (Py_TYPE(object.ptr()) != py::detail::npy_api::get().PyArray_Type_)
    refuse_masked(array, object);
  array.device = -1;
  array.frozen = (proxy->flags & kWriteable) != 0 ? nullptr : kReadOnly;
  array.dtype = numpy_dtype(array, proxy->descr, takes);
  array.data = proxy->data;
  check_rank(array, proxy->nd);
  array.rank = proxy->nd;
  if ((proxy->flags & kAligned) == 0)
    value_error(std::string(array.name) + " is not aligned to its dtype; it must be");
  std::copy(proxy->dimensions, proxy->dimensions + array.rank, array.sizes);
  std::copy(proxy->strides, proxy->strides + array.rank, array.strides);
  strides_from_bytes(array);
}

// CuPy

struct Cupy {
  PyObject *ndarray = nullptr, *stream = nullptr;
  PyObject* const cupy = intern("cupy");
  PyObject* const dtype = intern("dtype");
  PyObject* const shape = intern("shape");
  PyObject* const strides = intern("strides");
  PyObject* const data = intern("data");
  PyObject* const ptr = intern("ptr");
  PyObject* const device = intern("device");
  PyObject* const id = intern("id");

  // False until someone has imported CuPy.
  bool owns(py::handle object) {
    if (ndarray == nullptr) {
      const py::object module = imported(cupy);
      if (!module || !py::hasattr(module, "ndarray")) return false;
      stream = keep(py::module_::import("revkernels.native"), "_cupy_stream");
      ndarray = keep(module, "ndarray");
    }
    return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(ndarray));
  }
};

Cupy& cupy() {
  static Cupy* const state = new Cupy;
  return *state;
}

// Device memory, ordered on CuPy's current stream, which the kernels also use.
void read_cupy(Array& array, py::handle object, Takes takes) {
  const Cupy& names = cupy();
  array.library = Library::kCupy;
  array.frozen = nullptr;
  array.dtype = numpy_dtype(array, attribute(object, names.dtype), takes);
  array.device = attribute(attribute(object, names.device), names.id).cast<int32_t>();
  array.data = handle_of(attribute(attribute(object, names.data), names.ptr));
  array.rank = read_tuple(array, attribute(object, names.shape), array.sizes);
  if (read_tuple(array, attribute(object, names.strides), array.strides) != array.rank)
    type_error(std::string(array.name) + " has no plain shape and strides");
  strides_from_bytes(array);
}

// A foreign array's sizes may be anything; with stride 0 their product may overflow.
bool is_addressable(const Array& array) {
  const int64_t most = INT64_MAX / 16;
  int64_t elements = 1;
  for (int k = 0; k < array.rank; ++k) {
    const int64_t size = array.sizes[k] > 0 ? array.sizes[k] : 1;
    if (size > most / elements) return false;
    elements *= size;
  }
  const Layout layout = array.layout();
  return layout.address + uintptr_t(layout.span()) >= layout.address;
}

}  // namespace

bool takes_dtype(Takes takes, int32_t dtype) {
  switch (takes) {
    case Takes::kFloats:
      return dtype <= REVK_FLOAT16;
    case Takes::kStream:
      return dtype <= REVK_INT16;
    case Takes::kWords:
      return dtype == kWordDtype;
    case Takes::kKnown:
      return dtype <= REVK_INT16 || dtype == kWordDtype;
    case Takes::kBytes:
      return dtype == kByteDtype;
  }
  return false;
}

void wrong_dtype(const Array& array, const std::string& dtype, Takes takes) {
  type_error(std::string(array.name) + " is " + dtype + "; it must be " +
             (takes == Takes::kWords   ? "int64 or uint64"
              : takes == Takes::kBytes ? "uint8"
                                       : "float64, float32, bfloat16 or float16"));
}

int32_t numpy_dtype(const Array& array, py::handle descr, Takes takes) {
  struct Known {
    PyObject *float64, *float32, *float16;
  };
  static const Known* const known =
      new Known{py::dtype("float64").release().ptr(), py::dtype("float32").release().ptr(),
                py::dtype("float16").release().ptr()};
  if (takes == Takes::kFloats || takes == Takes::kStream) {  // usually one of three cached objects
    if (descr.ptr() == known->float32) return REVK_FLOAT32;
    if (descr.ptr() == known->float64) return REVK_FLOAT64;
    if (descr.ptr() == known->float16) return REVK_FLOAT16;
  }
  if (!descr.attr("isnative").cast<bool>())
    type_error(std::string(array.name) + " is byte-swapped (" + text_of(descr) +
               "); it must be in the machine's byte order");
  const auto name = descr.attr("name").cast<std::string>();
  int32_t dtype = -1;
  if (name == "int64" || name == "uint64") dtype = kWordDtype;
  if (name == "uint8") dtype = kByteDtype;
  for (int32_t code = REVK_FLOAT64; code <= REVK_INT16; ++code)
    if (name == dtype_name(code)) dtype = code;  // bfloat16 is from ml_dtypes, known by its name
  if (dtype < 0 || !takes_dtype(takes, dtype)) wrong_dtype(array, text_of(descr), takes);
  return dtype;
}

void check_rank(const Array& array, int64_t rank) {
  if (rank > kMaxRank)
    value_error(std::string(array.name) + " has " + std::to_string(rank) +
                " dimensions; it must have at most 64");
}

void check_aligned(const Array& array) {
  const Layout layout = array.layout();
  if (!layout.empty() && layout.address % uintptr_t(layout.item) != 0)
    value_error(std::string(array.name) + " is not aligned to its dtype; it must be");
}

void check_has_memory(const Array& array) {
  if (array.data == nullptr && !array.layout().empty())
    value_error(std::string(array.name) + " has shape " + array.shape() +
                " and no memory (NULL); it must have some");
}

// Reads a tuple of integers into `to`; returns its length.
int read_tuple(const Array& array, py::handle tuple, int64_t* to) {
  if (!PyTuple_Check(tuple.ptr()))
    type_error(std::string(array.name) + " has no plain shape and strides");
  const Py_ssize_t rank = PyTuple_GET_SIZE(tuple.ptr());
  check_rank(array, rank);
  for (Py_ssize_t k = 0; k < rank; ++k) {
    to[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), k));
    if (to[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return int(rank);
}

void strides_from_bytes(Array& array) {
  const int64_t item = array.item();
  for (int k = 0; k < array.rank; ++k) {
    // The stride of a dimension of size 1 may be anything.
    const int64_t stride = array.sizes[k] > 1 ? array.strides[k] : item;
    if (stride < 0) refuse_negative_stride(array, k);
    if (stride % item != 0)
      value_error(std::string(array.name) + " has a stride of " + std::to_string(stride) +
                  " bytes in dimension " + std::to_string(k) +
                  "; it must be a multiple of the element's size");
    array.strides[k] = stride / item;
  }
}

void refuse_negative_stride(const Array& array, int dimension) {
  value_error(std::string(array.name) + " has a negative stride in dimension " +
              std::to_string(dimension) + "; it must be copied first");
}

std::string Array::shape() const {
  std::string text = "(";
  for (int k = 0; k < rank; ++k) text += (k > 0 ? ", " : "") + std::to_string(sizes[k]);
  return text + (rank == 1 ? ",)" : ")");
}

void read_array(Array& array, const char* name, py::handle object, Takes takes) {
  array.name = name;
  if (is_tensor(object))
    read_tensor(array, object, takes);
  else if (py::isinstance<py::array>(object))
    read_ndarray(array, object, takes);
  else if (cupy().owns(object))
    read_cupy(array, object, takes);
  else if (exports_dlpack(object))
    read_dlpack(array, object, takes);
  else if (PyObject_CheckBuffer(object.ptr()))
    read_buffer(array, object, takes);
  else
    type_error(std::string(name) + " is a " + type_name(object) +
               "; it must be a torch.Tensor or a numpy.ndarray, or export DLPack or a buffer" +
               (PyCapsule_CheckExact(object.ptr())
                    ? ": a capsule serves once, so pass the array that makes it"
                    : ""));
  const bool foreign = array.library == Library::kDlpack || array.library == Library::kBuffer;
  if (array.layout().span() < 0 || (foreign && !is_addressable(array)))
    value_error(std::string(name) + " with shape " + array.shape() +
                " reaches past the end of the address space");
}

void* current_stream(Library library, int32_t device) {
  if (library == Library::kTorch) return torch_stream(device);
  return handle_of(py::reinterpret_borrow<py::object>(cupy().stream)(device));
}

void rethrow(const Array& array, py::handle object, const char* what,
             const py::error_already_set& error) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  const std::string text = std::string(array.name) + " is a " + type_name(object) + " whose " +
                           what + " failed: " + type_name(error.value()) + ": " +
                           text_of(error.value());
  py::error_already_set cause = error;
  py::raise_from(cause, PyExc_ValueError, text.c_str());
  throw py::error_already_set();
}

std::string device_text(int32_t device) {
  return device < 0 ? "cpu" : "cuda:" + std::to_string(device);
}
void value_error(const std::string& text) { throw py::value_error(text); }
void type_error(const std::string& text) { throw py::type_error(text); }

}  // namespace revk::python
