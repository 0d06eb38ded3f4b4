// SPDX-License-Identifier: Apache-2.0
// Checks of a view before anything is written. Every error names the argument, what it got and what
// it needs.
#pragma once

#include <string>
#include <utility>

#include "core/error.h"
#include "core/overlap.h"
#include "core/structs.h"
#include "revkernels/revkernels.h"

namespace revk {

inline int64_t item_size(int32_t dtype) {
  return dtype == REVK_FLOAT64 ? 8 : dtype == REVK_FLOAT32 ? 4 : 2;
}
inline const char* dtype_name(int32_t dtype) {
  static const char* const names[] = {"float64", "float32", "bfloat16", "float16", "int16"};
  return dtype >= REVK_FLOAT64 && dtype <= REVK_INT16 ? names[dtype] : "unknown";
}
// The compute type's dtype: float64 if either operand is float64.
inline int32_t compute_dtype(int32_t a, int32_t b) {
  return a == REVK_FLOAT64 || b == REVK_FLOAT64 ? REVK_FLOAT64 : REVK_FLOAT32;
}
inline bool is_empty(const revk_view& view) {  // not a product of sizes, which may overflow
  return view.outer == 0 || view.channels == 0 || view.inner == 0;
}
// The stride of a dimension of size 1 is never used. A huge one is dropped, so that no arithmetic
// on it overflows.
inline int64_t usable_stride(int64_t size, int64_t stride) {
  return size == 1 && stride > INT64_MAX / 64 ? 0 : stride;
}

// A view with its argument's name, in this library's version of the struct, and its dimensions as
// arrays for a Layout to point to.
class NamedView {
 public:
  enum Kind { kFloats, kStream };  // a stream may be int16
  NamedView(std::string called, const revk_view* given, Kind kind = kFloats)
      : name(std::move(called)) {
    if (given == nullptr) throw invalid(name + " is NULL, a revk_view is needed");
    view = read_struct<revk_view>(name, given);
    if (kind == kFloats && view.dtype == REVK_INT16)
      fail("dtype is int16, a floating-point revk_dtype (0..3) is needed");
    if (view.dtype < REVK_FLOAT64 || view.dtype > REVK_INT16)
      fail("dtype is " + std::to_string(view.dtype) + ", a revk_dtype (0.." +
           (kind == kFloats ? "3" : "4") + ") is needed");
    sizes[0] = view.outer, sizes[1] = view.channels, sizes[2] = view.inner;
    view.outer_stride = strides[0] = usable_stride(view.outer, view.outer_stride);
    view.channel_stride = strides[1] = usable_stride(view.channels, view.channel_stride);
    view.inner_stride = strides[2] = usable_stride(view.inner, view.inner_stride);
    for (int k = 0; k < 3; ++k) {
      if (sizes[k] < 0) fail("size " + shape() + " is negative");
      if (strides[k] < 0)
        fail("stride " + std::to_string(strides[k]) +
             " is negative; copy the array to dense memory");
    }
    layout = {reinterpret_cast<uintptr_t>(view.data), item_size(view.dtype), 3, sizes, strides};
    const int64_t span = layout.span();
    if (span < 0 || layout.address + uintptr_t(span) < layout.address)
      fail("shape " + shape() + " with its strides reaches past the end of the address space");
    if (span == 0) return;
    // With strides of 0, a small memory may hold more elements than can be counted.
    if (sizes[0] > INT64_MAX / 64 / sizes[1] || sizes[0] * sizes[1] > INT64_MAX / 64 / sizes[2])
      fail("shape " + shape() + " has more elements than can be counted");
    if (view.data == nullptr) fail("data is NULL, but shape " + shape() + " has elements");
    if (layout.address % uintptr_t(layout.item) != 0)
      fail("data is not aligned to its dtype, " + std::string(dtype_name(view.dtype)));
  }
  NamedView(const NamedView&) = delete;  // layout points into the object
  NamedView& operator=(const NamedView&) = delete;

  std::string shape() const {
    return "(" + std::to_string(sizes[0]) + ", " + std::to_string(sizes[1]) + ", " +
           std::to_string(sizes[2]) + ")";
  }
  void same_shape_as(const NamedView& other) const {
    for (int k = 0; k < 3; ++k)
      if (sizes[k] != other.sizes[k])
        fail("shape is " + shape() + ", but " + other.name + " has " + other.shape() +
             "; equal shapes are needed");
  }
  // This view is written: `other` must not share its memory.
  void apart_from(const NamedView& other) const {
    if (overlaps(layout, other.layout))
      fail("is written and overlaps " + other.name + "; they need separate memory");
  }
  void apart_from_itself() const {
    if (overlaps_itself(layout))
      fail(
          "is written, but several of its indices share one element; a view without overlap is "
          "needed");
  }
  bool is(const NamedView& other) const {
    return view.dtype == other.view.dtype && same_memory(layout, other.layout);
  }
  [[noreturn]] void fail(const std::string& reason) const { throw invalid(name + ": " + reason); }

  revk_view view;
  std::string name;
  int64_t sizes[3], strides[3];
  Layout layout;
};

}  // namespace revk
