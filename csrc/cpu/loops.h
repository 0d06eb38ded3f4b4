// SPDX-License-Identifier: Apache-2.0
// Makes jobs from views and runs jobs on threads.
#pragma once

#include "cpu/job.h"
#include "cpu/norm_job.h"
#include "revkernels/revkernels.h"

namespace revk::cpu {

// The number of threads for `shares` shares of work; `threads` as in revk_where.
int team_size(int32_t threads, int64_t shares);

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerial = 32 * 1024;

// The loops of one instruction set.
struct Loops {
  RunTiles run_tiles;
  const NormLoops& norm;
};
const Loops& loops_in_use();

// out = x + f, or x - f. No view may be empty. Fills `extras` from `coupling`; it must outlive the
// job.
Job make_job(const revk_view& out, const revk_view& x, const revk_view& f, bool subtract,
             const revk_coupling* coupling, Extras& extras);

// Runs all tiles of all jobs on up to `threads` threads (0: the OpenMP default), in one parallel
// region. Each thread takes one contiguous share, so that it walks memory in order.
Report run_jobs(const Job* jobs, int64_t count, int32_t threads);

}  // namespace revk::cpu
