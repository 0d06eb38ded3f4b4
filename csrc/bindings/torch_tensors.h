// SPDX-License-Identifier: Apache-2.0
// torch's tensors, read without torch's headers.
//
// torch 2.10 and later hand out a table of C functions (DLPack's exchange API) that describes a
// tensor in some 50 ns. Older ones, subclasses of Tensor, and tensors that the table does not
// describe are asked through their attributes, which takes ten times as long and words the errors.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

// Whether the object is a tensor. False as long as nobody has imported torch.
bool is_tensor(py::handle object);
void read_tensor(Array& array, py::handle tensor, Takes takes);

int32_t torch_threads();
void* torch_stream(int32_t device);  // the current one

}  // namespace revk::python
