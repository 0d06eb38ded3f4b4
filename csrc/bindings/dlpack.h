// SPDX-License-Identifier: Apache-2.0
// DLPack, the exchange of arrays between libraries (https://dmlc.github.io/dlpack): the structures
// of its C interface, versions 0.x and 1.x, and a reader for any object with `__dlpack__`.
//
// `__dlpack__` returns a capsule named "dltensor" (0.x) or "dltensor_versioned" (1.x). A consumer
// that takes the structure renames the capsule to "used_..." and must call the structure's deleter
// once. Here array.owner does that, at the end of the call or on an error. Nothing is copied.
//
// Streams: a producer on a CUDA device gets stream=1, the legacy default stream, and makes that
// stream wait for its own work. The kernels run on that stream. DLPack has no way to signal back,
// so the call returns only when that stream has finished (finish() in checks.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "bindings/arrays.h"

namespace revk::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt, kUInt, kFloat, kHandle, kBfloat, kComplex, kBool };
enum Flags : uint64_t { kReadOnlyFlag = 1, kCopiedFlag = 2 };
constexpr uint32_t kMajor = 1;

struct Device {
  int32_t type;
  int32_t id;
};
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;      // in elements; NULL: dense, row-major
  uint64_t byte_offset;  // of the first element, from data
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);  // NULL: nothing to release
};
// The fields up to `flags` are the same in every version.
struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};
// The beginning of a type's __dlpack_c_exchange_api__: functions, one of which describes an object
// without taking ownership. It returns 0 on success; otherwise a Python exception is set.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;  // an older version
  void *allocate, *managed_from_object, *managed_to_object;
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);  // `object` keeps it alive
};
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, byte_offset) == 40, "DLPack's ABI");
static_assert(offsetof(Managed, deleter) == 56, "DLPack's ABI");
static_assert(offsetof(ManagedVersioned, tensor) == 32, "DLPack's ABI");
static_assert(offsetof(ExchangeApi, dltensor_from_py_object_no_sync) == 40, "DLPack's ABI");

// The exchange API of a type, if it can describe tensors; otherwise nullptr.
const ExchangeApi* exchange_of(PyObject* type);

}  // namespace revk::dlpack

namespace revk::python {

// Whether the object's type has __dlpack__ and __dlpack_device__.
bool exports_dlpack(py::handle object);
void read_dlpack(Array& array, py::handle object, Takes takes);

}  // namespace revk::python
