// SPDX-License-Identifier: Apache-2.0
// The loops for avx512; cmake/CpuKernels.cmake gives this file its compiler flags.
#define REVK_ISA avx512
#include "cpu/norm_table.h"
#include "cpu/tiles.h"
