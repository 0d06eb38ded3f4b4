// SPDX-License-Identifier: Apache-2.0
// The CUDA backend of a build without nvcc. api.cpp checks missing() first, so the kernels are
// never reached.
#include "core/backends.h"
#include "core/error.h"

namespace revk::cuda {
namespace {
constexpr char kReason[] =
    "this build has no CUDA kernels: it was made without nvcc, or with REVK_CUDA=OFF";
}  // namespace

const char* missing() { return kReason; }
const char* archs() { return ""; }

void couple(const revk_view&, const revk_view&, const revk_view&, const revk_coupling*,
            const revk_where&) {
  throw unsupported(kReason);
}
void uncouple(const revk_view&, const revk_view&, const revk_view&, const revk_coupling*,
              const revk_where&) {
  throw unsupported(kReason);
}
void reverse_step(const revk_view&, const revk_view&, const revk_view&, const revk_view&,
                  const revk_coupling*, const revk_where&) {
  throw unsupported(kReason);
}
void accumulate(const revk_view*, const revk_view*, int64_t, const revk_where&) {
  throw unsupported(kReason);
}
void norm_act(const NormActCall&, const revk_where&) { throw unsupported(kReason); }
void norm_act_backward(const NormActBackwardCall&, const revk_where&) {
  throw unsupported(kReason);
}
void synchronize(const revk_where&) { throw unsupported(kReason); }
int64_t norm_workspace(const revk_view&, const revk_norm&, const revk_where&) {
  throw unsupported(kReason);
}

}  // namespace revk::cuda
