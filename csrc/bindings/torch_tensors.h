// SPDX-License-Identifier: Apache-2.0
// torch's tensors, read without torch's headers.
//
// torch 2.10 and later hand out a table of C functions (DLPack's exchange API), one of which
// describes a tensor, half a microsecond sooner than its attributes do. Those are asked of older
// torches' tensors, of subclasses and of what the function does not describe; they word the errors.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

// Whether the object is a tensor. False as long as nobody has imported torch.
bool is_tensor(py::handle object);
void read_tensor(Array& array, py::handle tensor, Takes takes);

int32_t torch_threads();
void* torch_stream(int32_t device);  // the current one

}  // namespace revk::python
