// SPDX-License-Identifier: Apache-2.0
// Reads an array of any library: pointer, dtype, shape, strides, device. No framework header is
// used: tensors are read through Python attributes, and torch and CuPy are never imported, only
// looked up if already imported. The first reader that fits is used:
//
//     torch.Tensor    its C functions, or its attributes (torch_tensors.h)
//     numpy.ndarray   its C struct
//     cupy.ndarray    its attributes
//     __dlpack__      DLPack (dlpack.h)
//     a buffer        Python's buffer protocol (buffer.h)
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "core/overlap.h"
#include "core/views.h"
#include "revkernels/revkernels.h"

namespace revk::python {

namespace py = pybind11;

constexpr int kMaxRank = 64;        // NumPy's and torch's own limit
constexpr int32_t kWordDtype = 64;  // int64 or uint64, for a checksum; outside the revk_dtype codes
constexpr int32_t kByteDtype = 65;  // uint8, for a workspace
enum class Library { kNumpy, kTorch, kCupy, kDlpack, kBuffer };
// The dtypes that an argument accepts: floating-point; also int16; 64-bit integers only; all of
// these; bytes only.
enum class Takes { kFloats, kStream, kWords, kKnown, kBytes };

// One argument of a call. Large and short-lived: on the stack, not initialised.
struct Array {
  const char* name;
  Library library;
  void* data;
  int32_t dtype;
  int32_t device;      // -1: host
  const char* frozen;  // why it is read-only, to follow its name; nullptr: writable
  int rank;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];    // in elements
  std::shared_ptr<void> owner;  // borrowed from a library, released with the last copy

  int64_t item() const {
    return dtype == kWordDtype ? 8 : dtype == kByteDtype ? 1 : item_size(dtype);
  }
  Layout layout() const {
    return {reinterpret_cast<uintptr_t>(data), item(), rank, sizes, strides};
  }
  int64_t count() const {
    int64_t elements = 1;
    for (int k = 0; k < rank; ++k) elements *= sizes[k];
    return elements;
  }
  std::string shape() const;
};

constexpr const char* kReadOnly = " is read-only";

// Fills `array` from `object`. Raises TypeError for non-arrays and wrong dtypes, ValueError for
// memory that the kernels cannot address.
void read_array(Array& array, const char* name, py::handle object, Takes takes = Takes::kFloats);

// Shared by the readers of several libraries.
int32_t numpy_dtype(const Array& array, py::handle descr, Takes takes);
bool takes_dtype(Takes takes, int32_t dtype);
void check_rank(const Array& array, int64_t rank);
void check_aligned(const Array& array);
void check_has_memory(const Array& array);
// Converts an array's strides from bytes to elements.
void strides_from_bytes(Array& array);
[[noreturn]] void refuse_negative_stride(const Array& array, int dimension);
int read_tuple(const Array& array, py::handle tuple, int64_t* to);
[[noreturn]] void wrong_dtype(const Array& array, const std::string& dtype, Takes takes);
// Converts a library's exception to a ValueError with the argument's name.
[[noreturn]] void rethrow(const Array& array, py::handle object, const char* what,
                          const py::error_already_set& error);

void* current_stream(Library library, int32_t device);  // of torch or CuPy

std::string device_text(int32_t device);
[[noreturn]] void value_error(const std::string& text);
[[noreturn]] void type_error(const std::string& text);

}  // namespace revk::python
