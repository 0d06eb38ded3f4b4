// SPDX-License-Identifier: Apache-2.0
// From a norm's views to a job.
#pragma once

#include "core/backends.h"
#include "cpu/norm_job.h"

namespace revk::cpu {

// Everything but the parameters: operands, the shape as the loops walk it, strips and blocks. No
// view is empty.
//
// How sums are cut up follows from the array that is summed (and dh) alone, so that a fused call
// and its parts, and the modes of a backward, agree in every bit.

// The pass that sums up the statistics; with the coupling's operands if they can be walked in s's
// own way, else without: then the coupling is done before.
NormJob plan_measure(const NormActCall& call);
// The pass that normalises, of a row norm the only one; with the coupling if `coupled`.
NormJob plan_apply(const NormActCall& call, bool coupled);
// The pass that sums up dz and dz * xhat, and the one that makes dx, of a row norm the only one.
NormJob plan_sums(const NormActBackwardCall& call);
NormJob plan_gradient(const NormActBackwardCall& call);

}  // namespace revk::cpu
