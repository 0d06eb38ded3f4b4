// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set's norm passes.
#pragma once

#include "cpu/norm_backward_loops.h"
#include "cpu/norm_loops.h"

namespace revk::cpu::REVK_ISA {
namespace {

// One function for both compute types.
#define REVK_PASS(name)                                                                        \
  [](const NormJob& job, int64_t begin, int64_t end, char* scratch) {                          \
    job.wide ? name<double>(job, begin, end, scratch) : name<float>(job, begin, end, scratch); \
  }

}  // namespace

const NormLoops kNormLoops = {REVK_PASS(measure),  REVK_PASS(apply),
                              REVK_PASS(rows),     REVK_PASS(gradient_sums),
                              REVK_PASS(gradient), REVK_PASS(gradient_rows)};

#undef REVK_PASS

}  // namespace revk::cpu::REVK_ISA
