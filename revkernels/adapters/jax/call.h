// SPDX-License-Identifier: Apache-2.0
// One custom call as the handlers see it: arrays, attributes, the place where it runs, and failures
// that become XLA's errors.
#pragma once

#include <revkernels/revkernels.h>

#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace revk_jax {

namespace ffi = xla::ffi;

struct Failure {
  ffi::ErrorCode code;
  std::string reason;
};

inline void check(revk_status status) {
  if (status == REVK_OK) return;
  const ffi::ErrorCode code = status == REVK_INVALID_ARGUMENT ? ffi::ErrorCode::kInvalidArgument
                              : status == REVK_UNSUPPORTED    ? ffi::ErrorCode::kUnimplemented
                                                              : ffi::ErrorCode::kInternal;
  throw Failure{code, std::string("revkernels: ") + revk_last_error()};
}

inline int32_t dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F64:
      return REVK_FLOAT64;
    case ffi::DataType::F32:
      return REVK_FLOAT32;
    case ffi::DataType::BF16:
      return REVK_BFLOAT16;
    case ffi::DataType::F16:
      return REVK_FLOAT16;
    case ffi::DataType::S16:
      return REVK_INT16;
    default:
      return -1;  // a checksum, which no view describes
  }
}

// A dense array in row-major order.
struct Array {
  explicit Array(const ffi::AnyBuffer& buffer)
      : data(static_cast<char*>(buffer.untyped_data())),
        count(int64_t(buffer.element_count())),
        item(int64_t(ffi::ByteWidth(buffer.element_type()))),
        dtype(dtype_of(buffer.element_type())) {}

  void* at(int64_t first) const { return data + first * item; }
  // The elements from `begin` to `end`, as one row.
  revk_view row(int64_t begin, int64_t end) const {
    const int64_t length = end - begin;
    return {int32_t(sizeof(revk_view)), dtype, at(begin), 1, 1, length, length, length, 1};
  }

  char* data;
  int64_t count;
  int64_t item;  // bytes of an element
  int32_t dtype;
};

// Where a call runs; `pool` is the host's, `scratch` a device's.
struct Place {
  revk_where where;
  ffi::ThreadPool* pool = nullptr;
  ffi::ScratchAllocator* scratch = nullptr;
};

class Call {
 public:
  Call(Place& where, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
       const ffi::Dictionary& attributes)
      : place(where), attributes_(attributes) {
    for (size_t k = 0; k < args.size(); ++k) in.emplace_back(value_of(args.get<ffi::AnyBuffer>(k)));
    for (size_t k = 0; k < rets.size(); ++k)
      out.emplace_back(*value_of(rets.get<ffi::AnyBuffer>(k)));
  }

  int64_t integer(const char* name) const { return value_of(attributes_.get<int64_t>(name)); }
  double number(const char* name) const { return value_of(attributes_.get<double>(name)); }

  // XLA was told that the result lies in the operand's memory.
  void expect_in_place(size_t operand, size_t result) const {
    if (in[operand].data != out[result].data && out[result].count != 0)
      throw Failure{ffi::ErrorCode::kInternal, "revkernels: XLA did not alias operand " +
                                                   std::to_string(operand) + " to result " +
                                                   std::to_string(result)};
  }

  Place& place;
  std::vector<Array> in, out;

 private:
  template <class T>
  static T value_of(ffi::ErrorOr<T> got) {
    if (!got.has_value()) throw Failure{ffi::ErrorCode::kInternal, got.error().message()};
    return *got;
  }

  const ffi::Dictionary& attributes_;
};

}  // namespace revk_jax
