// SPDX-License-Identifier: Apache-2.0
// From views to jobs, and from jobs to threads.
#pragma once

#include "cpu/job.h"
#include "cpu/norm_job.h"
#include "revkernels/revkernels.h"

namespace revk::cpu {

// Threads for work in so many shares; `threads` as in revk_where.
int team_size(int32_t threads, int64_t shares);

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerial = 32 * 1024;

// The loops of one instruction set.
struct Loops {
  RunTiles run_tiles;
  const NormLoops& norm;
};
const Loops& loops_in_use();

// out = x + f, or x - f. Neither view may be empty.
// `extras` is filled from `coupling` and outlives the job.
Job make_job(const revk_view& out, const revk_view& x, const revk_view& f, bool subtract,
             const revk_coupling* coupling, Extras& extras);

// Runs all tiles of all jobs on up to `threads` threads (0: the OpenMP default). One parallel
// region for the lot; each thread takes one contiguous share, so that it walks memory in order.
Report run_jobs(const Job* jobs, int64_t count, int32_t threads);

}  // namespace revk::cpu
