// SPDX-License-Identifier: Apache-2.0
// A torch module's layers, and whether they are still what they were.
#pragma once

#include <pybind11/pybind11.h>

namespace revk::python {

void bind_module_tree(pybind11::module_& m);

}  // namespace revk::python
