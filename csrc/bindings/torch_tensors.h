// SPDX-License-Identifier: Apache-2.0
// Reads torch tensors without torch's headers.
//
// torch 2.10 and later offer a table of C functions (DLPack's exchange API), one of which describes
// a tensor half a microsecond faster than its attributes do. Tensors of older torches, subclasses
// and tensors that the function does not describe are read through attributes, which also word the
// errors.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

// Whether the object is a tensor; false until someone has imported torch.
bool is_tensor(py::handle object);
void read_tensor(Array& array, py::handle tensor, Takes takes);

int32_t torch_threads();
void* torch_stream(int32_t device);  // the device's current stream

}  // namespace revk::python
