// SPDX-License-Identifier: Apache-2.0
// The tile loops for baseline; cmake/CpuKernels.cmake gives this file its compiler flags.
#define REVK_ISA baseline
#include "cpu/tiles.h"
