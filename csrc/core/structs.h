// SPDX-License-Identifier: Apache-2.0
// Reads structs from callers with another version of the header. New fields are only appended,
// never placed in padding, and zero always means the behaviour before the field existed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "core/error.h"
#include "revkernels/revkernels.h"

namespace revk {

// The size of a struct's first version: the end of its last field. These never change.
// `inline`, for clang gives an explicit specialisation external linkage.
template <class Struct>
inline constexpr size_t kFirstSize = 0;
template <>
inline constexpr size_t kFirstSize<revk_view> = offsetof(revk_view, inner_stride) + sizeof(int64_t);
template <>
inline constexpr size_t kFirstSize<revk_where> = offsetof(revk_where, threads) + sizeof(int32_t);
template <>
inline constexpr size_t kFirstSize<revk_coupling> = offsetof(revk_coupling, amax) + sizeof(float*);
template <>
inline constexpr size_t kFirstSize<revk_norm> =
    offsetof(revk_norm, workspace_bytes) + sizeof(int64_t);
template <>
inline constexpr size_t kFirstSize<revk_norm_gradient> =
    offsetof(revk_norm_gradient, reserved) + sizeof(int32_t);

// A larger struct_size is garbage, and nothing beyond it is read.
constexpr int32_t kLargestStruct = 1024;

// The struct_size at `given`, which need not be aligned: an array's step may be any size.
inline int32_t size_of_struct(const void* given) {
  int32_t size;
  std::memcpy(&size, given, sizeof size);
  return size;
}

// The caller's struct in this library's version. Fields that the caller's version lacks are zero;
// fields that the library does not know must be zero.
template <class Struct>
Struct read_struct(const std::string& name, const void* given) {
  static_assert(kFirstSize<Struct> > 0 && sizeof(Struct) <= size_t(kLargestStruct),
                "the struct needs a first size");
  const int32_t size = size_of_struct(given);
  if (size < int32_t(kFirstSize<Struct>) || size > kLargestStruct)
    throw invalid(name + ": struct_size is " + std::to_string(size) + ", at least " +
                  std::to_string(kFirstSize<Struct>) + " and at most " +
                  std::to_string(kLargestStruct) +
                  " is needed (zero the struct, then set struct_size to its sizeof)");
  const char* const bytes = static_cast<const char*>(given);
  for (size_t at = sizeof(Struct); at < size_t(size); ++at)
    if (bytes[at] != 0)
      throw unsupported(name + ": sets a field that revkernels " + revk_version() +
                        " does not know (byte " + std::to_string(at) + " of " +
                        std::to_string(size) + "); a newer library is needed");
  // Sizes of versions are multiples of the alignment, so a size between two versions ends within a
  // field; that field counts as absent.
  const size_t whole =
      std::max(kFirstSize<Struct>, size_t(size) / alignof(Struct) * alignof(Struct));
  Struct own{};
  std::memcpy(&own, given, std::min(whole, sizeof(Struct)));
  own.struct_size = int32_t(sizeof(Struct));
  return own;
}

}  // namespace revk
