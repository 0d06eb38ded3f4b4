// SPDX-License-Identifier: Apache-2.0
// The loops for avx2; cmake/CpuKernels.cmake gives this file its compiler flags.
#define REVK_ISA avx2
#include "cpu/norm_table.h"
#include "cpu/tiles.h"
