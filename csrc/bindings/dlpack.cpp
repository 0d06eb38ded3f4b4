// SPDX-License-Identifier: Apache-2.0
// Reads arrays through DLPack.
#include "bindings/dlpack.h"

#include <cstring>
#include <initializer_list>

#include "bindings/python.h"

namespace revk::python {
namespace {

using namespace dlpack;

struct Names {
  PyObject* const dlpack = intern("__dlpack__");
  PyObject* const device = intern("__dlpack_device__");
  PyObject* const module = intern("__module__");
  PyObject* const versioned = py::make_tuple("max_version").release().ptr();
  PyObject* const streamed = py::make_tuple("stream").release().ptr();
  PyObject* const both = py::make_tuple("max_version", "stream").release().ptr();
  PyObject* const version = py::make_tuple(1, 0).release().ptr();
  PyObject* const legacy_stream = PyLong_FromLong(1);
};
const Names& names() {
  static const Names* const interned = new Names;
  return *interned;
}

// Why the object's array must not be written: arrays of these libraries are immutable values,
// possibly shared, and their exports do not always say so.
const char* why_immutable(py::handle object) {
  const py::object module =
      attribute(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), names().module);
  if (!PyUnicode_Check(module.ptr())) return nullptr;
  const auto text = module.cast<std::string>();
  const std::string root = text.substr(0, text.find('.'));
  if (root == "jax" || root == "jaxlib") return " is a JAX array, and these are immutable";
  if (root == "tensorflow") return " is a TensorFlow tensor, and these are immutable";
  if (root == "pyarrow") return " is an Arrow array, and these are immutable";
  return nullptr;
}

std::string device_words(const Device& device) {
  static const char* const kinds[] = {nullptr,  "cpu",       "cuda",    "cuda_host",    "opencl",
                                      nullptr,  nullptr,     "vulkan",  "metal",        "vpi",
                                      "rocm",   "rocm_host", "ext_dev", "cuda_managed", "oneapi",
                                      "webgpu", "hexagon",   "maia"};
  const bool known =
      device.type >= 0 && device.type < int32_t(std::size(kinds)) && kinds[device.type] != nullptr;
  return (known ? kinds[device.type] : "DLPack's device type " + std::to_string(device.type)) +
         ":" + std::to_string(device.id);
}

// -1 for the host, or the index of a CUDA device.
int32_t device_of(const Array& array, const Device& device) {
  if (device.type == kCpu || device.type == kCudaHost) return -1;
  if (device.type != kCuda && device.type != kCudaManaged)
    value_error(std::string(array.name) + " is on " + device_words(device) +
                "; it must be on the CPU or a CUDA device");
  if (device.id < 0)
    value_error(std::string(array.name) + " is on " + device_words(device) +
                "; a CUDA device's index must be 0 or more");
  return device.id;
}

// The device that the object declares before its export; it determines the stream to request.
int32_t declared_device(const Array& array, py::handle object) {
  py::object answer;
  try {
    answer = call(object, names().device);
  } catch (const py::error_already_set& error) {
    rethrow(array, object, "__dlpack_device__", error);
  }
  Device device{};
  int32_t* const fields[] = {&device.type, &device.id};
  bool pair = PyTuple_Check(answer.ptr()) && PyTuple_GET_SIZE(answer.ptr()) == 2;
  for (int k = 0; pair && k < 2; ++k) {
    const auto index = py::reinterpret_steal<py::object>(
        PyNumber_Index(PyTuple_GET_ITEM(answer.ptr(), k)));  // an enum's member will do
    const long value = index ? PyLong_AsLong(index.ptr()) : -1;
    pair = !PyErr_Occurred() && value == int32_t(value);
    *fields[k] = int32_t(value);
  }
  if (!pair) {
    PyErr_Clear();
    type_error(std::string(array.name) + " is a " + type_name(object) +
               " whose __dlpack_device__ returned " + py::repr(answer).cast<std::string>() +
               "; it must return a device's type and index");
  }
  return device_of(array, device);
}

PyObject* ask(py::handle object, std::initializer_list<PyObject*> values, PyObject* keywords) {
  PyObject* arguments[3] = {object.ptr()};
  std::copy(values.begin(), values.end(), arguments + 1);
  return PyObject_VectorcallMethod(names().dlpack, arguments, 1, keywords);
}

// The capsule. Producers older than DLPack 1.0 take no max_version.
py::object export_of(const Array& array, py::handle object, bool on_device) {
  const Names& of = names();
  PyObject* capsule = on_device ? ask(object, {of.version, of.legacy_stream}, of.both)
                                : ask(object, {of.version}, of.versioned);
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = on_device ? ask(object, {of.legacy_stream}, of.streamed) : ask(object, {}, nullptr);
  }
  if (capsule == nullptr) rethrow(array, object, "__dlpack__", py::error_already_set());
  return py::reinterpret_steal<py::object>(capsule);
}

// Takes ownership of the structure: its deleter runs exactly once, even on errors.
template <class Structure>
Structure* take(Array& array, py::handle capsule, const char* name, const char* used) {
  auto* const structure = static_cast<Structure*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (structure == nullptr || PyCapsule_SetName(capsule.ptr(), used) != 0)
    throw py::error_already_set();
  array.owner = std::shared_ptr<Structure>(structure, [](Structure* taken) {
    if (taken->deleter != nullptr) taken->deleter(taken);
  });
  return structure;
}

const Tensor& unwrap(Array& array, py::handle object, py::handle capsule) {
  const bool is_capsule = PyCapsule_CheckExact(capsule.ptr());
  const char* const name = is_capsule ? PyCapsule_GetName(capsule.ptr()) : nullptr;
  const std::string named = name != nullptr ? name : "";
  if (named == "dltensor")
    return take<Managed>(array, capsule, "dltensor", "used_dltensor")->tensor;
  if (named != "dltensor_versioned") {
    const std::string got = !is_capsule ? "a " + type_name(capsule)
                            : named.rfind("used_", 0) == 0
                                ? "a capsule that is used up ('" + named + "')"
                                : "a capsule named '" + named + "'";
    type_error(std::string(array.name) + " is a " + type_name(object) +
               " whose __dlpack__ returned " + got +
               "; it must return a new capsule named 'dltensor' or 'dltensor_versioned'");
  }
  const auto* const managed =
      take<ManagedVersioned>(array, capsule, "dltensor_versioned", "used_dltensor_versioned");
  if (managed->major != kMajor)  // of another version only the fields up to `flags` are known
    value_error(std::string(array.name) + " comes in DLPack " + std::to_string(managed->major) +
                "." + std::to_string(managed->minor) + "; it must be a version 1");
  if ((managed->flags & kCopiedFlag) != 0)
    array.frozen = " was copied for the call by its library, so that a result would be lost";
  if ((managed->flags & kReadOnlyFlag) != 0) array.frozen = kReadOnly;
  return managed->tensor;
}

int32_t dtype_of(const Array& array, const DataType& type, Takes takes) {
  static const char* const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex"};
  std::string text = type.code == kBool ? "bool"
                     : type.code < std::size(kinds)
                         ? kinds[type.code] + std::to_string(type.bits)
                         : "DLPack's type " + std::to_string(type.code) + " of " +
                               std::to_string(type.bits) + " bits";
  if (type.lanes != 1) text += " in vectors of " + std::to_string(type.lanes);
  int32_t dtype = -1;
  if (type.lanes == 1) {
    if (text == "int64" || text == "uint64") dtype = kWordDtype;
    if (text == "uint8") dtype = kByteDtype;
    for (int32_t code = REVK_FLOAT64; code <= REVK_INT16; ++code)
      if (text == dtype_name(code)) dtype = code;
  }
  if (dtype < 0 || !takes_dtype(takes, dtype)) wrong_dtype(array, text, takes);
  return dtype;
}

// Sizes and strides. NULL strides mean dense; strides of dimensions of size 0 or 1 are ignored.
void read_shape(Array& array, const Tensor& tensor) {
  if (tensor.ndim < 0)
    value_error(std::string(array.name) + " has " + std::to_string(tensor.ndim) +
                " dimensions; it must have none or more");
  check_rank(array, tensor.ndim);
  array.rank = tensor.ndim;
  if (array.rank > 0 && tensor.shape == nullptr)
    value_error(std::string(array.name) + " has " + std::to_string(array.rank) +
                " dimensions and no shape (NULL); it must have one");
  int64_t dense = 1;
  for (int k = array.rank - 1; k >= 0; --k) {
    const int64_t size = array.sizes[k] = tensor.shape[k];
    if (size < 0)
      value_error(std::string(array.name) + " has size " + std::to_string(size) + " in dimension " +
                  std::to_string(k) + "; it must be 0 or more");
    array.strides[k] = size <= 1 ? 1 : tensor.strides != nullptr ? tensor.strides[k] : dense;
    if (array.strides[k] < 0) refuse_negative_stride(array, k);
    // An overflow here is rejected with the shape: no address is that large.
    if (size > 1 && __builtin_mul_overflow(dense, size, &dense)) dense = INT64_MAX;
  }
}

void read_address(Array& array, const Tensor& tensor) {
  uintptr_t address = reinterpret_cast<uintptr_t>(array.data = tensor.data);
  if (array.layout().empty()) {
    array.data = nullptr;
    return;
  }
  check_has_memory(array);
  if (__builtin_add_overflow(address, tensor.byte_offset, &address))
    value_error(std::string(array.name) + " begins " + std::to_string(tensor.byte_offset) +
                " bytes behind its memory's start, which is past the end of the address space");
  array.data = reinterpret_cast<void*>(address);
  check_aligned(array);
}

}  // namespace

bool exports_dlpack(py::handle object) {
  const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  for (PyObject* name : {names().dlpack, names().device}) {
    if (!PyObject_HasAttr(type.ptr(), name)) return false;
  }
  return true;
}

void read_dlpack(Array& array, py::handle object, Takes takes) {
  array.library = Library::kDlpack;
  array.frozen = nullptr;
  const int32_t declared = declared_device(array, object);
  const py::object capsule = export_of(array, object, declared >= 0);
  const Tensor& tensor = unwrap(array, object, capsule);
  if (const char* const reason = why_immutable(object)) array.frozen = reason;
  array.device = device_of(array, tensor.device);
  if (array.device != declared)
    value_error(std::string(array.name) + " says that it is on " + device_text(declared) +
                ", and its memory is on " + device_text(array.device) + ": they must be one");
  array.dtype = dtype_of(array, tensor.dtype, takes);
  read_shape(array, tensor);
  read_address(array, tensor);
}

}  // namespace revk::python

namespace revk::dlpack {

const ExchangeApi* exchange_of(PyObject* type) {
  namespace py = pybind11;
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* const api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  const bool usable = api->major == kMajor && api->dltensor_from_py_object_no_sync != nullptr;
  return usable ? api : nullptr;  // lives as long as the process
}

}  // namespace revk::dlpack
