// SPDX-License-Identifier: Apache-2.0
// The tile loops for avx2; CMakeLists.txt gives this file its compiler flags.
#define REVK_ISA avx2
#include "cpu/tiles.h"
