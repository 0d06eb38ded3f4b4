// SPDX-License-Identifier: Apache-2.0
// Maps n dimensions to a norm's three: channels keep their own, the others must merge into two (for
// a group norm: samples are one, the others merge into one).
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

constexpr int kMaxNormArrays = 4;

// Fills `views`, and for layer and RMS norm the strides of the statistics, which are dense in the
// order of arrays[0]'s dimensions. Raises ValueError if the dimensions do not merge.
void norm_geometry(const Array* const* arrays, int count, int axis, revk_norm& norm,
                   revk_view* views);

}  // namespace revk::python
