// SPDX-License-Identifier: Apache-2.0
// The loops for baseline; cmake/CpuKernels.cmake gives this file its compiler flags.
#define REVK_ISA baseline
#include "cpu/norm_table.h"
#include "cpu/tiles.h"
