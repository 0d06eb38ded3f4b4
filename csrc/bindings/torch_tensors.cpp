// SPDX-License-Identifier: Apache-2.0
// Reads torch tensors through DLPack's exchange API, or through Python attributes.
#include "bindings/torch_tensors.h"

#include "bindings/dlpack.h"
#include "bindings/python.h"

namespace revk::python {
namespace {

// Objects of an imported torch. They live as long as the process, so nothing is released.
struct Torch {
  PyObject *tensor = nullptr, *parameter, *strided, *dtypes[5], *int64, *uint64, *threads, *stream;
  const dlpack::ExchangeApi* exchange = nullptr;  // nullptr before torch 2.10
  PyObject* const torch = intern("torch");
  PyObject* const dtype = intern("dtype");
  PyObject* const layout = intern("layout");
  PyObject* const is_cpu = intern("is_cpu");
  PyObject* const is_cuda = intern("is_cuda");
  PyObject* const is_neg = intern("is_neg");
  PyObject* const shape = intern("shape");
  PyObject* const stride = intern("stride");
  PyObject* const data_ptr = intern("data_ptr");
  PyObject* const get_device = intern("get_device");

  bool found() {
    if (tensor != nullptr) return true;
    const py::object module = imported(torch);
    if (!module || !py::hasattr(module, "Tensor") || !py::hasattr(module, "nn") ||
        !py::hasattr(module, "get_num_threads"))
      return false;  // not imported, or still importing
    const char* const names[] = {"float64", "float32", "bfloat16", "float16", "int16"};
    for (int i = 0; i < 5; ++i) dtypes[i] = keep(module, names[i]);
    int64 = keep(module, "int64");
    uint64 = py::hasattr(module, "uint64") ? keep(module, "uint64") : int64;
    strided = keep(module, "strided");
    threads = keep(module, "get_num_threads");
    stream = keep(py::module_::import("revkernels.native"), "_torch_stream");
    parameter = keep(module.attr("nn"), "Parameter");
    const py::object type = module.attr("Tensor");
    exchange = dlpack::exchange_of(type.ptr());
    tensor = type.inc_ref().ptr();
    return true;
  }
};

Torch& torch() {
  static Torch* const state = new Torch;
  return *state;
}

bool truth(py::handle object, PyObject* name) { return attribute(object, name).ptr() == Py_True; }

// The revk_dtype code; -1 for other types.
int32_t code_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return -1;
  switch (type.code << 8 | type.bits) {
    case dlpack::kFloat << 8 | 64:
      return REVK_FLOAT64;
    case dlpack::kFloat << 8 | 32:
      return REVK_FLOAT32;
    case dlpack::kFloat << 8 | 16:
      return REVK_FLOAT16;
    case dlpack::kBfloat << 8 | 16:
      return REVK_BFLOAT16;
    case dlpack::kInt << 8 | 16:
      return REVK_INT16;
    case dlpack::kInt << 8 | 64:
    case dlpack::kUInt << 8 | 64:
      return kWordDtype;
    default:
      return -1;
  }
}

// Reads the tensor through the exchange API. Returns false if the API cannot describe it, or if a
// call does not accept it; read_attributes then raises the error.
bool read_exchanged(Array& array, py::handle object, Takes takes) {
  const Torch& names = torch();
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (names.exchange == nullptr || (type != names.tensor && type != names.parameter)) return false;
  dlpack::Tensor tensor;
  if (names.exchange->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  array.dtype = code_of(tensor.dtype);
  if (array.dtype < 0 || !takes_dtype(takes, array.dtype) || tensor.ndim > kMaxRank) return false;
  if (tensor.device.type == dlpack::kCpu)
    array.device = -1;
  else if (tensor.device.type == dlpack::kCuda)
    array.device = tensor.device.id;
  else
    return false;
  array.rank = tensor.ndim;
  for (int k = 0; k < array.rank; ++k) {
    array.sizes[k] = tensor.shape[k];
    array.strides[k] = tensor.strides[k];
  }
  array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

void read_attributes(Array& array, py::handle tensor, Takes takes) {
  const Torch& names = torch();
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
  if (array.dtype < 0) wrong_dtype(array, text_of(dtype), takes);

  const py::object layout = attribute(tensor, names.layout);
  if (layout.ptr() != names.strided)
    type_error(std::string(array.name) + " has layout " + text_of(layout) +
               "; it must be a dense (strided) tensor");
  if (truth(tensor, names.is_cpu)) {
    array.device = -1;
  } else if (truth(tensor, names.is_cuda)) {
    array.device = call(tensor, names.get_device).cast<int32_t>();
  } else {
    value_error(std::string(array.name) + " is on " + text_of(tensor.attr("device")) +
                "; it must be on the CPU or a CUDA device");
  }
  array.rank = read_tuple(array, attribute(tensor, names.shape), array.sizes);
  if (read_tuple(array, call(tensor, names.stride), array.strides) != array.rank)
    type_error(std::string(array.name) + " has no plain shape and strides");
  array.data = handle_of(call(tensor, names.data_ptr));
}

}  // namespace

bool is_tensor(py::handle object) {
  Torch& names = torch();
  return names.found() &&
         PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(names.tensor));
}

void read_tensor(Array& array, py::handle tensor, Takes takes) {
  array.library = Library::kTorch;
  array.frozen = nullptr;
  if (!read_exchanged(array, tensor, takes)) read_attributes(array, tensor, takes);
  if (array.data == nullptr) check_has_memory(array);  // freed storage, such as an FSDP shard's
  if (call(tensor, torch().is_neg).ptr() == Py_True)
    value_error(std::string(array.name) +
                " is a negated view (its memory holds -values); it must be resolved, "
                "with .resolve_neg()");
}

int32_t torch_threads() {
  return py::reinterpret_borrow<py::object>(torch().threads)().cast<int32_t>();
}

// Not from the exchange API: a torch built without CUDA reports success and stream NULL, which is
// the legacy default stream. Only torch itself knows its current stream.
void* torch_stream(int32_t device) {
  return handle_of(py::reinterpret_borrow<py::object>(torch().stream)(device));
}

}  // namespace revk::python
