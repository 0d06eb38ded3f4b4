// SPDX-License-Identifier: Apache-2.0
// Python's buffer protocol: memoryview, array.array, mmap and ctypes arrays, cast to a floating
// type. What the protocol has no format for, bfloat16, comes by DLPack.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

// The buffer is held as long as array.owner, so that nobody resizes it meanwhile.
void read_buffer(Array& array, py::handle object, Takes takes);

}  // namespace revk::python
