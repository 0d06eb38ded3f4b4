// SPDX-License-Identifier: Apache-2.0
// A coupling of int16 (fixed-point) streams.
#pragma once

#include "revkernels/revkernels.h"

namespace revk::cuda {

// out = x + f, or x - f; also writes the coupling's value if there is one.
void couple_int16(const char* name, bool subtract, const revk_view& out, const revk_view& x,
                  const revk_view& f, const revk_coupling& coupling, const revk_where& where);

}  // namespace revk::cuda
