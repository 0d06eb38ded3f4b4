// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the additive coupling, element by element (Gomez et al. 2017, eq. 6, eq. 7 and
// Algorithm 1), in the compute type A (float or double). Loops, dtypes and memory are left to
// the backends, which all share this file.
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

// f on its way into the coupling: scaled, then put on the grid of multiples of 2^-k.
template <class A>
struct Grid {
  A up, down;  // 2^k, 2^-k
  REVK_HD A operator()(A f) const { return rint(f * up) * down; }
};

// The factor of f from layer scale (a channel's) and stochastic depth (a sample's); each operation
// rounds, in the order written.
template <class A>
REVK_HD A scaled(A f, A channel_scale, A sample_scale) {
  return (channel_scale * sample_scale) * f;
}

// One element's share of the checksum: a swap of two elements, or a change in one, changes the sum.
REVK_HD uint64_t checksum_term(uint64_t bits, uint64_t index) { return bits * (2 * index + 1); }

}  // namespace revk::ops
