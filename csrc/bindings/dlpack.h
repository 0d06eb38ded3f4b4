// SPDX-License-Identifier: Apache-2.0
// DLPack, the exchange of arrays between libraries (https://dmlc.github.io/dlpack): the structures
// of its C interface, versions 0.x and 1.x, and a reader of whatever has `__dlpack__`.
//
// A producer answers `__dlpack__` with a capsule named "dltensor" (0.x) or "dltensor_versioned"
// (1.x). Whoever takes the structure out renames the capsule to "used_..." and owes one call of the
// structure's deleter. Here that call comes when array.owner goes, at the end of the kernel's call
// or at the error that ends it. Nothing is copied.
//
// Streams. A producer on a CUDA device is asked with stream=1, the legacy default stream: it makes
// that stream wait for its own work. The kernels then go on that stream. DLPack has no way back, so
// the call ends only when that stream has finished (finish() in checks.h).
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
  void (*deleter)(Managed*);  // NULL: there is nothing to give back
};
// The fields up to `flags` stay in every version.
struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};
// The beginning of what a type's __dlpack_c_exchange_api__ points to: functions, of which one
// describes an object without taking it over. 0 is success; otherwise a Python exception is set.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;  // of an older version
  void *allocate, *managed_from_object, *managed_to_object;
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);  // the object keeps it alive
};
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, byte_offset) == 40, "DLPack's ABI");
static_assert(offsetof(Managed, deleter) == 56, "DLPack's ABI");
static_assert(offsetof(ManagedVersioned, tensor) == 32, "DLPack's ABI");
static_assert(offsetof(ExchangeApi, dltensor_from_py_object_no_sync) == 40, "DLPack's ABI");

// The exchange API of a type's objects, if it describes tensors; nullptr otherwise.
const ExchangeApi* exchange_of(PyObject* type);

}  // namespace revk::dlpack

namespace revk::python {

// Whether the object's type has __dlpack__ and __dlpack_device__.
bool exports_dlpack(py::handle object);
void read_dlpack(Array& array, py::handle object, Takes takes);

}  // namespace revk::python
