// SPDX-License-Identifier: Apache-2.0
#include "bindings/arrays.h"

namespace revk::python {
namespace {

constexpr int kAligned = 0x0100, kWriteable = 0x0400;  // NumPy's array flags, part of its ABI

PyObject* intern(const char* text) {
  PyObject* const name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

py::object attribute(py::handle object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle object, PyObject* method) {
  PyObject* const value = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// An attribute for the life of the process.
PyObject* keep(const py::object& module, const char* name) {
  return py::object(module.attr(name)).release().ptr();
}

bool truth(py::handle object, PyObject* name) { return attribute(object, name).ptr() == Py_True; }

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void wrong_dtype(const Array& array, py::handle dtype, Takes takes) {
  type_error(
      std::string(array.name) + " is " + py::str(dtype).cast<std::string>() + "; it must be " +
      (takes == Takes::kWords ? "int64 or uint64" : "float64, float32, bfloat16 or float16"));
}

// torch

// The objects of an imported torch. They live as long as the process, so nothing is released.
struct Torch {
  PyObject *tensor = nullptr, *strided, *dtypes[5], *int64, *uint64, *threads, *stream;
  PyObject* const dtype = intern("dtype");
  PyObject* const layout = intern("layout");
  PyObject* const is_cpu = intern("is_cpu");
  PyObject* const is_cuda = intern("is_cuda");
  PyObject* const is_neg = intern("is_neg");
  PyObject* const shape = intern("shape");
  PyObject* const stride = intern("stride");
  PyObject* const data_ptr = intern("data_ptr");
  PyObject* const get_device = intern("get_device");

  // False as long as nobody has imported torch.
  bool found() {
    if (tensor != nullptr) return true;
    const auto module =
        py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()));
    if (!module) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return false;
    }
    if (!py::hasattr(module, "Tensor") || !py::hasattr(module, "get_num_threads"))
      return false;  // torch is in the middle of its own import
    const char* const names[] = {"float64", "float32", "bfloat16", "float16", "int16"};
    for (int i = 0; i < 5; ++i) dtypes[i] = keep(module, names[i]);
    int64 = keep(module, "int64");
    uint64 = py::hasattr(module, "uint64") ? keep(module, "uint64") : int64;
    strided = keep(module, "strided");
    threads = keep(module, "get_num_threads");
    stream = keep(py::module_::import("revkernels.native"), "_torch_stream");
    tensor = keep(module, "Tensor");
    return true;
  }
  bool owns(py::handle object) {
    return found() && PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(tensor));
  }
};

Torch& torch() {
  static Torch* const state = new Torch;
  return *state;
}

// A tuple of integers into `to`; returns its length.
int read_tuple(const Array& array, py::handle tuple, int64_t* to) {
  if (!PyTuple_Check(tuple.ptr()))
    type_error(std::string(array.name) + " has no plain shape and strides");
  const Py_ssize_t rank = PyTuple_GET_SIZE(tuple.ptr());
  if (rank > kMaxRank)
    value_error(std::string(array.name) + " has " + std::to_string(rank) +
                " dimensions; it must have at most 64");
  for (Py_ssize_t k = 0; k < rank; ++k) {
    to[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), k));
    if (to[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return int(rank);
}

void read_tensor(Array& array, py::handle tensor, Takes takes) {
  Torch& names = torch();
  array.library = Library::kTorch;
  array.writable = true;

  const py::object dtype = attribute(tensor, names.dtype);
  array.dtype = -1;
  if (takes == Takes::kWords) {
    if (dtype.ptr() == names.int64 || dtype.ptr() == names.uint64) array.dtype = kWordDtype;
  } else {
    const int known = takes == Takes::kStream ? 5 : 4;
    for (int i = 0; i < known; ++i)
      if (dtype.ptr() == names.dtypes[i])
        array.dtype = i;  // the codes of revk_dtype, in their order
  }
  if (array.dtype < 0) wrong_dtype(array, dtype, takes);

  const py::object layout = attribute(tensor, names.layout);
  if (layout.ptr() != names.strided)
    type_error(std::string(array.name) + " has layout " + py::str(layout).cast<std::string>() +
               "; it must be a dense (strided) tensor");
  if (truth(tensor, names.is_cpu)) {
    array.device = -1;
  } else if (truth(tensor, names.is_cuda)) {
    array.device = call(tensor, names.get_device).cast<int32_t>();
  } else {
    value_error(std::string(array.name) + " is on " +
                py::str(tensor.attr("device")).cast<std::string>() +
                "; it must be on the CPU or a CUDA device");
  }
  if (call(tensor, names.is_neg).ptr() == Py_True)
    value_error(std::string(array.name) +
                " is a negated view (its memory holds -values); it must be resolved, "
                "with .resolve_neg()");
  array.rank = read_tuple(array, attribute(tensor, names.shape), array.sizes);
  if (read_tuple(array, call(tensor, names.stride), array.strides) != array.rank)
    type_error(std::string(array.name) + " has no plain shape and strides");
  array.data = PyLong_AsVoidPtr(call(tensor, names.data_ptr).ptr());
  if (array.data == nullptr && PyErr_Occurred()) throw py::error_already_set();
}

// NumPy

int32_t numpy_dtype(const Array& array, py::handle descr, Takes takes) {
  struct Known {
    PyObject *float64, *float32, *float16;
  };
  static const Known* const known =
      new Known{py::dtype("float64").release().ptr(), py::dtype("float32").release().ptr(),
                py::dtype("float16").release().ptr()};
  if (takes != Takes::kWords) {  // the usual case is one of three objects
    if (descr.ptr() == known->float32) return REVK_FLOAT32;
    if (descr.ptr() == known->float64) return REVK_FLOAT64;
    if (descr.ptr() == known->float16) return REVK_FLOAT16;
  }
  if (!descr.attr("isnative").cast<bool>())
    type_error(std::string(array.name) + " is byte-swapped (" + py::str(descr).cast<std::string>() +
               "); it must be in the machine's byte order");
  const auto name = descr.attr("name").cast<std::string>();
  if (takes == Takes::kWords) {
    if (name == "int64" || name == "uint64") return kWordDtype;
  } else {
    const int32_t last = takes == Takes::kStream ? REVK_INT16 : REVK_FLOAT16;
    for (int32_t code = REVK_FLOAT64; code <= last; ++code)
      if (name == dtype_name(code)) return code;  // bfloat16 is ml_dtypes', known by its name
  }
  wrong_dtype(array, descr, takes);
}

void read_ndarray(Array& array, py::handle object, Takes takes) {
  const auto* const proxy = py::detail::array_proxy(object.ptr());
  array.library = Library::kNumpy;
  array.device = -1;
  array.writable = (proxy->flags & kWriteable) != 0;
  array.dtype = numpy_dtype(array, proxy->descr, takes);
  array.data = proxy->data;
  array.rank = proxy->nd;
  if (array.rank > kMaxRank)
    value_error(std::string(array.name) + " has " + std::to_string(array.rank) +
                " dimensions; it must have at most 64");
  const int64_t item = array.layout().item;
  if ((proxy->flags & kAligned) == 0)
    value_error(std::string(array.name) + " is not aligned to its dtype; it must be");
  for (int k = 0; k < array.rank; ++k) {
    array.sizes[k] = proxy->dimensions[k];
    // The stride of a dimension of size 1 is free to be anything.
    const int64_t stride = array.sizes[k] > 1 ? proxy->strides[k] : item;
    if (stride < 0)
      value_error(std::string(array.name) + " has a negative stride in dimension " +
                  std::to_string(k) + "; it must be copied first");
    if (stride % item != 0)
      value_error(std::string(array.name) + " has a stride of " + std::to_string(stride) +
                  " bytes in dimension " + std::to_string(k) +
                  "; it must be a multiple of the element's size");
    array.strides[k] = stride / item;
  }
}

}  // namespace

std::string Array::shape() const {
  std::string text = "(";
  for (int k = 0; k < rank; ++k) text += (k > 0 ? ", " : "") + std::to_string(sizes[k]);
  return text + (rank == 1 ? ",)" : ")");
}

void read_array(Array& array, const char* name, py::handle object, Takes takes) {
  array.name = name;
  if (torch().owns(object))
    read_tensor(array, object, takes);
  else if (py::isinstance<py::array>(object))
    read_ndarray(array, object, takes);
  else
    type_error(std::string(name) + " is a " + type_name(object) +
               "; it must be a torch.Tensor or a numpy.ndarray");
  if (array.layout().span() < 0)
    value_error(std::string(name) + " with shape " + array.shape() +
                " reaches past the end of the address space");
}

int32_t torch_threads() {
  return py::reinterpret_borrow<py::object>(torch().threads)().cast<int32_t>();
}

void* torch_stream(int32_t device) {
  const py::object stream = py::reinterpret_borrow<py::object>(torch().stream)(device);
  void* const handle = PyLong_AsVoidPtr(stream.ptr());
  if (handle == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return handle;
}

std::string device_text(int32_t device) {
  return device < 0 ? "cpu" : "cuda:" + std::to_string(device);
}
void value_error(const std::string& text) { throw py::value_error(text); }
void type_error(const std::string& text) { throw py::type_error(text); }

}  // namespace revk::python
