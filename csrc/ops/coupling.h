// SPDX-License-Identifier: Apache-2.0
// Element-wise arithmetic of the additive coupling (Gomez et al. 2017, eq. 6, eq. 7 and Algorithm
// 1), in the compute type A (float or double). Loops, dtypes and memory access are the backends';
// all backends share this file.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace revk::ops {

// y = x + f
struct Couple {
  template <class A>
  REVK_HD A operator()(A x, A f) const {
    return x + f;
  }
};

// x = y - f
struct Uncouple {
  template <class A>
  REVK_HD A operator()(A y, A f) const {
    return y - f;
  }
};

// Rounds f to the grid of multiples of 2^-k before it enters the coupling.
template <class A>
struct Grid {
  A up, down;  // 2^k, 2^-k
  REVK_HD A steps(A f) const { return rint(f * up); }
  REVK_HD A operator()(A f) const { return steps(f) * down; }
};

// A fixed-point stream: the int16 q stands for q * 2^-k. To uncouple, `up` is -2^k: rint and the
// limits are odd functions, so a difference is the sum with the other sign.
template <class A>
struct FixedPoint {
  A up, down;  // 2^k or -2^k, 2^-k
  REVK_HD A steps(A f) const { return rint(f * up); }

  // q + n modulo 2^16, with n clamped to +-2^23. These limits are 0 modulo 2^16; NaN fails the
  // first comparison, becomes the limit and so counts as 0.
  REVK_HD int16_t sum(int16_t q, A n) const {
    constexpr A kMost = 8388608;
    A m = n < kMost ? n : kMost;
    m = m > -kMost ? m : -kMost;
    return int16_t(uint16_t(uint32_t(int32_t(q)) + uint32_t(int32_t(m))));
  }
  // The sum before wrapping, in steps.
  REVK_HD A unwrapped(int16_t q, A n) const { return A(q) + n; }
};

// The number that a stored q stands for, in W. float64 holds it exactly; float32 may overflow to
// infinity.
template <class W>
REVK_HD W fixed_value(int16_t q, W down) {
  return W(q) * down;
}

// f times layer scale (per channel) and stochastic depth (per sample). Each operation rounds, in
// the order written.
template <class A>
REVK_HD A scaled(A f, A channel_scale, A sample_scale) {
  return (channel_scale * sample_scale) * f;
}

// One element's term of the checksum, a sum modulo 2^64. Changing one element changes the sum: the
// factor is odd. So does swapping two that differ, of at most 32 bits and less than 2^31 apart.
REVK_HD uint64_t checksum_term(uint64_t bits, uint64_t index) { return bits * (2 * index + 1); }

}  // namespace revk::ops
