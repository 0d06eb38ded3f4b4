// SPDX-License-Identifier: Apache-2.0
// A coupling whose stream is int16, in fixed point.
#pragma once

#include "revkernels/revkernels.h"

namespace revk::cuda {

// out = x + f, or x - f, and the coupling's value if it asks for one.
void couple_int16(const char* name, bool subtract, const revk_view& out, const revk_view& x,
                  const revk_view& f, const revk_coupling& coupling, const revk_where& where);

}  // namespace revk::cuda
