// SPDX-License-Identifier: Apache-2.0
// Makes a norm's job from its views.
#pragma once

#include "core/backends.h"
#include "cpu/norm_job.h"

namespace revk::cpu {

// Plans everything but the parameters: operands, the shape as the loops walk it, strips and blocks.
// No view is empty.
//
// The partition of sums depends only on the array that is summed (and dh). So a fused call and its
// parts, and the modes of a backward, agree bit for bit.

// The statistics pass. It includes the coupling if the coupling's operands can be walked like s
// alone; otherwise the coupling runs before it.
NormJob plan_measure(const NormActCall& call);
// The pass that normalises, with the coupling if `coupled`; a layer or RMS norm's only pass.
NormJob plan_apply(const NormActCall& call, bool coupled);
// The passes that sum dz and dz * xhat, and that write dx; a layer or RMS norm has only the latter.
NormJob plan_sums(const NormActBackwardCall& call);
NormJob plan_gradient(const NormActBackwardCall& call);

}  // namespace revk::cpu
