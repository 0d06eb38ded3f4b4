// SPDX-License-Identifier: Apache-2.0
// Reads an array of any library: pointer, dtype, shape, strides, device. No framework header:
// tensors are asked through Python attributes, and torch and CuPy are never imported, only found
// where they are imported already. Who is asked how, the first that fits:
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
constexpr int32_t kWordDtype = 64;  // int64 or uint64, for a checksum; beyond the revk_dtype codes
constexpr int32_t kByteDtype = 65;  // uint8, for a workspace
enum class Library { kNumpy, kTorch, kCupy, kDlpack, kBuffer };
// Which dtypes an argument may have: the floating-point ones; int16 too; the 64-bit integers alone;
// all of these; bytes alone.
enum class Takes { kFloats, kStream, kWords, kKnown, kBytes };

// One argument of a call. Big and short-lived: filled on the stack, not initialised.
struct Array {
  const char* name;
  Library library;
  void* data;
  int32_t dtype;
  int32_t device;      // -1: host
  const char* frozen;  // why it must not be written, to follow its name; nullptr: it may be
  int rank;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];    // in elements
  std::shared_ptr<void> owner;  // what was borrowed from a library, given back with the last copy

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

// Fills `array` from `object`. Raises TypeError for what is no array and
// for dtypes, ValueError for memory that the kernels cannot address.
void read_array(Array& array, const char* name, py::handle object, Takes takes = Takes::kFloats);

// The parts that readers of several libraries share.
int32_t numpy_dtype(const Array& array, py::handle descr, Takes takes);
bool takes_dtype(Takes takes, int32_t dtype);
void check_rank(const Array& array, int64_t rank);
void check_aligned(const Array& array);
void check_has_memory(const Array& array);
// Turns an array's strides, so far in bytes, into strides in elements.
void strides_from_bytes(Array& array);
[[noreturn]] void refuse_negative_stride(const Array& array, int dimension);
int read_tuple(const Array& array, py::handle tuple, int64_t* to);
[[noreturn]] void wrong_dtype(const Array& array, const std::string& dtype, Takes takes);
// An exception of a library's own becomes a ValueError with the argument's name.
[[noreturn]] void rethrow(const Array& array, py::handle object, const char* what,
                          const py::error_already_set& error);

// What a library says about the call's surroundings.
void* current_stream(Library library, int32_t device);  // of torch or CuPy

std::string device_text(int32_t device);
[[noreturn]] void value_error(const std::string& text);
[[noreturn]] void type_error(const std::string& text);

}  // namespace revk::python
