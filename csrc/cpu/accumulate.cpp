// SPDX-License-Identifier: Apache-2.0
// Gradient accumulation on the host: a list of additions in one parallel region.
#include <vector>

#include "core/backends.h"
#include "core/views.h"
#include "cpu/loops.h"

namespace revk::cpu {

void accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                const revk_where& where) {
  std::vector<Job> jobs;
  jobs.reserve(size_t(count));
  Extras none;
  for (int64_t i = 0; i < count; ++i)
    if (!is_empty(totals[i]))
      jobs.push_back(make_job(totals[i], totals[i], parts[i], false, nullptr, none));
  run_jobs(jobs.data(), int64_t(jobs.size()), where.threads);
}

}  // namespace revk::cpu
