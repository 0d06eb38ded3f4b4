// SPDX-License-Identifier: Apache-2.0
// Converts a revkernels.Norm, with a call's statistics and sums, to the C interface.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

// A call's arrays other than its operands, each [channels] or shaped like the statistics.
class NormArrays {
 public:
  // Reads and checks one array, which lives as long as this object.
  const Array* add(const char* name, py::handle object, const Array& x, const int64_t* sizes,
                   int rank, bool written);
  // Written arrays must not overlap each other or read arrays.
  void check_among() const;
  void check_against(const Array& operand, bool operand_written) const;

 private:
  Array arrays_[8];
  bool written_[8];
  int count_ = 0;
};

void check_dtype(const Array& array, int32_t dtype);
int64_t integer(py::handle value, const char* label, const char* needs);
bool truth(py::handle value);

// The norm for an array of x's shape. Its arrays are added to `sides`.
struct NormOptions {
  revk_norm norm{};
  int axis = 0;
  int64_t channels = 0;

  NormOptions(py::handle object, const Array& x, int32_t dtype, py::handle mean, py::handle rstd,
              bool given, NormArrays& sides);

 private:
  void find_channels(py::handle object, const Array& x, const char* kind);
  // Two arrays of [channels] with one dtype; either may be None.
  template <class Pointer>
  void read_pair(py::handle object, PyObject* first_name, const char* first_label,
                 PyObject* second_name, const char* second_label, const Array& x, bool written,
                 NormArrays& sides, Pointer& first, Pointer& second, int32_t& dtype);
  void read_running(py::handle object, const Array& x, const char* kind, bool given,
                    NormArrays& sides);
  void read_statistics(const Array& x, int32_t dtype, py::handle mean, py::handle rstd, bool given,
                       NormArrays& sides);
};

}  // namespace revk::python
