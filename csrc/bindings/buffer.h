// SPDX-License-Identifier: Apache-2.0
// Python's buffer protocol: memoryview, array.array, mmap and ctypes arrays, cast to a floating
// type. bfloat16 has no buffer format and needs DLPack.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

// The buffer is held as long as array.owner, so that nobody can resize it during the call.
void read_buffer(Array& array, py::handle object, Takes takes);

}  // namespace revk::python
