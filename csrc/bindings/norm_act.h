// SPDX-License-Identifier: Apache-2.0
// Python bindings of the norms with activation.
#pragma once

#include <pybind11/pybind11.h>

namespace revk::python {

void bind_norm_act(pybind11::module_& m);

}  // namespace revk::python
