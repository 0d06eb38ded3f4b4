// SPDX-License-Identifier: Apache-2.0
// The coupling, its inverse and the reverse step on the host.
#include <cmath>
#include <limits>

#include "core/backends.h"
#include "core/scalar.h"
#include "cpu/loops.h"

namespace revk::cpu {
namespace {

// The amax as a float. For an int16 stream `bits` is a compute-type number, in steps of 2^-k.
float magnitude(uint64_t bits, const Job& job) {
  switch (job.out.dtype) {
    case REVK_INT16:
      return job.wide ? float(std::ldexp(bits_as<double>(bits), -job.extras->grid_exponent))
                      : std::ldexp(bits_as<float>(uint32_t(bits)), -job.extras->grid_exponent);
    case REVK_FLOAT64:
      return float(bits_as<double>(bits));
    case REVK_FLOAT32:
      return bits_as<float>(uint32_t(bits));
    case REVK_BFLOAT16:
      return widen(bfloat16{uint16_t(bits)});
    default:
      return widen(float16{uint16_t(bits)});
  }
}

void deliver(const Report& report, const Job& job, const revk_coupling* coupling) {
  if (coupling == nullptr) return;
  if (coupling->checksum != nullptr) *coupling->checksum += report.checksum;
  if (coupling->amax != nullptr) {
    const float before = *coupling->amax, seen = magnitude(report.amax_bits, job);
    if (std::isnan(before) || std::isnan(seen))
      *coupling->amax = std::numeric_limits<float>::quiet_NaN();
    else if (seen > before)
      *coupling->amax = seen;
  }
}

void couple_one(const revk_view& out, const revk_view& x, const revk_view& f, bool subtract,
                const revk_coupling* coupling, const revk_where& where) {
  Extras extras;
  const Job job = make_job(out, x, f, subtract, coupling, extras);
  deliver(run_jobs(&job, 1, where.threads), job, coupling);
}

}  // namespace

void couple(const revk_view& out, const revk_view& x, const revk_view& f,
            const revk_coupling* coupling, const revk_where& where) {
  couple_one(out, x, f, false, coupling, where);
}

void uncouple(const revk_view& out, const revk_view& y, const revk_view& f,
              const revk_coupling* coupling, const revk_where& where) {
  couple_one(out, y, f, true, coupling, where);
}

// Two jobs in one parallel region. The two pairs share no memory, so running one after the other
// costs nothing and halves the number of streams for the prefetcher.
void reverse_step(const revk_view& y, const revk_view& f, const revk_view& dy, const revk_view& df,
                  const revk_coupling* coupling, const revk_where& where) {
  Extras extras, none;
  const Job jobs[2] = {make_job(y, y, f, true, coupling, extras),
                       make_job(dy, dy, df, false, nullptr, none)};
  deliver(run_jobs(jobs, 2, where.threads), jobs[0], coupling);
}

}  // namespace revk::cpu
