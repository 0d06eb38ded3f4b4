// SPDX-License-Identifier: Apache-2.0
// The Python face of the norms with an activation behind them.
#pragma once

#include <pybind11/pybind11.h>

namespace revk::python {

void bind_norm_act(pybind11::module_& m);

}  // namespace revk::python
