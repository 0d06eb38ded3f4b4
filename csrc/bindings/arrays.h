// SPDX-License-Identifier: Apache-2.0
// Reads a torch tensor or a NumPy array: pointer, dtype, shape, strides, device. No framework
// header: tensors are asked through Python attributes, and torch is never imported, only found
// where it is imported already.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/overlap.h"
#include "core/views.h"
#include "revkernels/revkernels.h"

namespace revk::python {

namespace py = pybind11;

constexpr int kMaxRank = 64;        // NumPy's and torch's own limit
constexpr int32_t kWordDtype = 64;  // int64 or uint64, for a checksum; beyond the revk_dtype codes
enum class Library { kNumpy, kTorch };
// Which dtypes an argument may have: the floating-point ones; int16 too; the 64-bit integers alone.
enum class Takes { kFloats, kStream, kWords };

// One argument of a call. Big and short-lived: filled on the stack, not initialised.
struct Array {
  const char* name;
  Library library;
  void* data;
  int32_t dtype;
  int32_t device;  // -1: host
  bool writable;
  int rank;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];  // in elements

  Layout layout() const {
    const int64_t item = dtype == kWordDtype ? 8 : item_size(dtype);
    return {reinterpret_cast<uintptr_t>(data), item, rank, sizes, strides};
  }
  int64_t count() const {
    int64_t elements = 1;
    for (int k = 0; k < rank; ++k) elements *= sizes[k];
    return elements;
  }
  std::string shape() const;
};

// Fills `array` from `object`. Raises TypeError for what is no array and
// for dtypes, ValueError for memory that the kernels cannot address.
void read_array(Array& array, const char* name, py::handle object, Takes takes = Takes::kFloats);

// What a tensor's library says about the call's surroundings.
int32_t torch_threads();
void* torch_stream(int32_t device);

std::string device_text(int32_t device);
[[noreturn]] void value_error(const std::string& text);
[[noreturn]] void type_error(const std::string& text);

}  // namespace revk::python
