// SPDX-License-Identifier: Apache-2.0
// Division by a launch-time constant: a 64-bit divide costs a GPU about a hundred instructions,
// this a dozen.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace revk::cuda {

// floor(n / divisor) = (high64(magic * n) + n) >> shift for every 0 <= n < 2^63
// (Granlund and Montgomery 1994, fig. 4.1).
struct Divider {
  int64_t divisor = 1;
  uint64_t magic = 1;
  int32_t shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(by) {
    while ((uint64_t(1) << shift) < uint64_t(by)) ++shift;
    const unsigned __int128 gap = (uint64_t(1) << shift) - uint64_t(by);
    magic = uint64_t((gap << 64) / uint64_t(by)) + 1;
  }
  __device__ int64_t divide(int64_t n) const {
    return int64_t((__umul64hi(magic, uint64_t(n)) + uint64_t(n)) >> shift);
  }
};

}  // namespace revk::cuda
