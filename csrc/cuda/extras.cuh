// SPDX-License-Identifier: Apache-2.0
// A coupling's options in a kernel: scales and grid of the branch, checksum and amax of the result.
// A kernel is compiled for Plain, which is empty, or for Extras<A>, which tests each field at run
// time.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/scalar.h"
#include "cuda/divider.cuh"
#include "cuda/packet.cuh"
#include "cuda/reduce.cuh"
#include "ops/coupling.h"
#include "revkernels/revkernels.h"

namespace revk::cuda {

struct Plain {};

template <class A>
struct Extras {
  const A* channel_scale;
  const A* sample_scale;
  Divider inner, channels;  // the channel of element i is (i / inner) % channels
  Divider per_sample;       // its sample is i / per_sample
  ops::Grid<A> grid;
  bool on_grid;
  uint64_t* checksum;
  float* amax;

  Extras(const revk_view& view, const revk_coupling& coupling)
      : channel_scale(static_cast<const A*>(coupling.channel_scale)),
        sample_scale(static_cast<const A*>(coupling.sample_scale)),
        inner(view.inner),
        channels(view.channels),
        per_sample(coupling.rows_per_sample * view.channels * view.inner),
        grid{A(1), A(1)},
        on_grid(coupling.grid_exponent != REVK_NO_GRID),
        checksum(coupling.checksum),
        amax(coupling.amax) {
    if (on_grid)
      grid = {std::ldexp(A(1), coupling.grid_exponent), std::ldexp(A(1), -coupling.grid_exponent)};
  }
};

// Minimum resident blocks per multiprocessor for __launch_bounds__. By default ptxas stops at about
// 64 registers per thread and spills the extras on sm_100; with two blocks it may use 128.
template <class AnyExtras>
inline constexpr int kBlocksAtOnce = 2;
template <>
inline constexpr int kBlocksAtOnce<Plain> = 0;  // no bound

// A thread's state during its walk: begin() at the first element of an item, then branch() and
// result() once per element.
template <class Extras>
class Walk;

template <>
class Walk<Plain> {
 public:
  static constexpr bool kPlain = true;
  __device__ explicit Walk(const Plain&) {}
  __device__ void begin(int64_t) {}
  template <class A>
  __device__ A branch(A f) {
    return f;
  }
  template <class T>
  __device__ void result(T) {}
  __device__ void finish() {}
};

template <class A>
class Walk<Extras<A>> {
 public:
  static constexpr bool kPlain = false;
  __device__ explicit Walk(const Extras<A>& extras) : extras_(extras) {}

  __device__ void begin(int64_t index) {
    index_ = index;
    if (extras_.channel_scale) {
      const int64_t row = extras_.inner.divide(index);
      channel_ = row - extras_.channels.divide(row) * extras_.channels.divisor;
      left_in_channel_ = (row + 1) * extras_.inner.divisor - index;
    }
    if (extras_.sample_scale) {
      sample_ = extras_.per_sample.divide(index);
      left_in_sample_ = (sample_ + 1) * extras_.per_sample.divisor - index;
    }
  }

  __device__ A branch(A f) {
    f = scaled(f);
    return extras_.on_grid ? extras_.grid(f) : f;
  }

  // f scaled, without the grid.
  __device__ A scaled(A f) {
    A channel_scale = 1, sample_scale = 1;
    if (extras_.channel_scale) {
      channel_scale = extras_.channel_scale[channel_];
      if (--left_in_channel_ == 0) {
        left_in_channel_ = extras_.inner.divisor;
        if (++channel_ == extras_.channels.divisor) channel_ = 0;
      }
    }
    if (extras_.sample_scale) {
      sample_scale = extras_.sample_scale[sample_];
      if (--left_in_sample_ == 0) left_in_sample_ = extras_.per_sample.divisor, ++sample_;
    }
    return ops::scaled(f, channel_scale, sample_scale);
  }

  template <class T>
  __device__ void result(T stored) {
    result(stored, float(widen(stored)));
  }
  // For an amax that is not that of the stored value.
  template <class T>
  __device__ void result(T stored, float number) {
    checksum_ += ops::checksum_term(stored_bits(stored), uint64_t(index_++));
    // With the sign cleared, floats order like their bits, NaN on top.
    amax_ = Max{}(amax_, bits_as<uint32_t>(number) & 0x7fffffffu);
  }

  __device__ void finish() {
    if (extras_.checksum) {
      const uint64_t sum = reduce_block(checksum_, Sum{});
      if (threadIdx.x == 0) add_to(extras_.checksum, sum);
    }
    if (extras_.amax) {
      const uint32_t amax = reduce_block(amax_, Max{});
      if (threadIdx.x == 0) raise_to(extras_.amax, amax);
    }
  }

 private:
  const Extras<A>& extras_;
  int64_t index_ = 0, channel_ = 0, sample_ = 0, left_in_channel_ = 0, left_in_sample_ = 0;
  uint64_t checksum_ = 0;
  uint32_t amax_ = 0;
};

}  // namespace revk::cuda
