// SPDX-License-Identifier: Apache-2.0
// Converts a revkernels.Coupling to the C interface.
#pragma once

#include <initializer_list>
#include <memory>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/geometry.h"

namespace revk::python {

// On the stack, like the arrays.
class CouplingOptions {
 public:
  // `operands` are all arrays of the call: first the result, second the input stream.
  CouplingOptions(py::handle object, std::initializer_list<const Array*> operands, const Array& f);
  CouplingOptions(const CouplingOptions&) = delete;  // coupling_ may point into a call's views
  CouplingOptions& operator=(const CouplingOptions&) = delete;

  const Roles& roles() const { return roles_; }
  // To be walked with the operands; nullptr: none.
  const Array* value() const { return has_value_ ? &value_ : nullptr; }
  void set_rows_per_sample(int64_t rows) { coupling_.rows_per_sample = rows; }
  // The struct for one of the geometry's sub-arrays; `value` is the view of value() there.
  const revk_coupling* get(const revk_view* value) {
    if (!given_) return nullptr;
    if (has_value_) coupling_.value = value;
    return &coupling_;
  }

 private:
  void* scale(const char* name, py::handle object, int dim, int32_t dtype);
  void* cell(const char* name, py::handle object, int32_t dtype);
  void read_value(py::handle object, std::initializer_list<const Array*> operands);

  const Array& written_;
  Array value_;
  revk_coupling coupling_{};
  std::vector<std::shared_ptr<void>> owners_;  // of arrays borrowed for the call
  Roles roles_;
  bool given_ = false, has_value_ = false;
};

}  // namespace revk::python
