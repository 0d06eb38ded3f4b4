// SPDX-License-Identifier: Apache-2.0
// Reads a torch module's tree of layers, and tests whether it is still the cached one.
#pragma once

#include <pybind11/pybind11.h>

namespace revk::python {

void bind_module_tree(pybind11::module_& m);

}  // namespace revk::python
