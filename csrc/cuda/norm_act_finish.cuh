// SPDX-License-Identifier: Apache-2.0
// Reduces the slices' partial results to statistics and sums, in float64 throughout.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/norm_act_packet.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/norm_act_sums.cuh"
#include "cuda/packet.cuh"

namespace revk::cuda {

// The partial results of each statistic: `slices` slices of `channels_each` channels.
struct Entries {
  Lanes lanes;  // x: statistics, y: their entries
  int64_t statistics, slices, channels;
  Divider groups, channels_each;
  const double* partial;

  int64_t blocks() const { return divided_up(statistics, lanes.xs()); }

  // Calls body(row, channel, pair) for each of this thread's entries. `statistic` must exist.
  template <class Body>
  __device__ void for_each(int64_t statistic, Body&& body) const {
    const int64_t o = groups.divide(statistic), g = statistic - o * groups.divisor;
    const int64_t count = slices * channels_each.divisor;
#pragma unroll 4  // several loads in flight
    for (int64_t k = lanes.y(); k < count; k += lanes.ys()) {
      const int64_t s = channels_each.divide(k);
      const int64_t row = o * slices + s;
      const int64_t channel = g * channels_each.divisor + k - s * channels_each.divisor;
      body(row, channel, partial + 2 * (row * channels + channel));
    }
  }
  __device__ int64_t statistic() const { return int64_t(blockIdx.x) * lanes.xs() + lanes.x(); }
};

// The entries of every channel, over all slices.
inline Entries entries_of_channels(const double* partial, int64_t slices, int64_t channels) {
  Entries entries{};
  entries.lanes = {false, log_of_power(divided_up(slices, 4), kLogThreads)};
  entries.statistics = channels, entries.slices = slices, entries.channels = channels;
  entries.groups = Divider(channels), entries.channels_each = Divider(1);
  entries.partial = partial;
  return entries;
}

// The entries of every (outer, group), which has `slices` consecutive slices.
inline Entries entries_of_groups(const double* partial, int64_t outer, int64_t slices,
                                 int64_t channels, int64_t groups) {
  Entries entries = entries_of_channels(partial, slices, channels);
  entries.lanes.log_near = log_of_power(divided_up(slices * (channels / groups), 4), kLogThreads);
  entries.statistics = outer * groups;
  entries.groups = Divider(groups), entries.channels_each = Divider(channels / groups);
  return entries;
}

template <class A>
struct Statistics {
  A *mean, *rstd;
  double count;  // elements per statistic
  double eps;
  void *running_mean, *running_var;
  double momentum;
  int32_t running_dtype;
};

// to[at] <- (1 - momentum) * before + momentum * value
__device__ inline void run(void* to, int64_t at, int32_t dtype, double momentum, double before,
                           double value) {
  double blend[1] = {(1.0 - momentum) * before + momentum * value};
  store_rounded(int64_t(reinterpret_cast<intptr_t>(to)) + at * element_size(dtype), dtype, blend);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    norm_finish_statistics(const __grid_constant__ Entries entries,
                           const __grid_constant__ Slicing plan,
                           const __grid_constant__ Statistics<A> to) {
  __shared__ double memory[2][kThreads];
  const int64_t statistic = entries.statistic();
  double sum[1] = {0}, squares[1] = {0}, shift = 0;
  double mean_before = 0, var_before = 0;
  const bool runs = to.running_mean != nullptr;
  if (statistic < entries.statistics) {
    if (runs && entries.lanes.y() == 0) {  // load early, to overlap with the reduction
      mean_before = load_any<double>(to.running_mean, statistic, to.running_dtype);
      var_before = load_any<double>(to.running_var, statistic, to.running_dtype);
    }
    // The slices' means are close: relative to the first one, sums of squares lose nothing.
    const int64_t o = entries.groups.divide(statistic);
    const int64_t first = (statistic - o * entries.groups.divisor) * entries.channels_each.divisor;
    shift = entries.partial[2 * (o * entries.slices * entries.channels + first)];
    entries.for_each(statistic, [&](int64_t row, int64_t, const double* moments) {
      const int64_t across = plan.inner_slices.divide(row);
      const int64_t outers = plan.outer - across * plan.outer_per_slice;
      const int64_t inners =
          plan.inner - (row - across * plan.inner_slices.divisor) * plan.inner_per_slice;
      const double count = double((outers < plan.outer_per_slice ? outers : plan.outer_per_slice) *
                                  (inners < plan.inner_per_slice ? inners : plan.inner_per_slice));
      const double away = moments[0] - shift;
      sum[0] += count * away;
      squares[0] += moments[1] + count * away * away;
    });
  }
  sum_over_y(entries.lanes, sum, squares, memory);
  if (statistic >= entries.statistics || entries.lanes.y() != 0) return;
  const double offset = sum[0] / to.count;
  double deviations = squares[0] - sum[0] * offset;
  if (deviations < 0) deviations = 0;  // a NaN stays
  to.mean[statistic] = narrow<A>(shift + offset);
  to.rstd[statistic] = narrow<A>(1.0 / std::sqrt(deviations / to.count + to.eps));
  if (!runs) return;
  run(to.running_mean, statistic, to.running_dtype, to.momentum, mean_before, shift + offset);
  const double freedom = to.count > 1.0 ? to.count - 1.0 : 1.0;
  run(to.running_var, statistic, to.running_dtype, to.momentum, var_before, deviations / freedom);
}

// a[statistic] and b[statistic] <- the sums of the pairs, each times its channel's weight, divided
// by `count`. a or b may be nullptr.
template <class A>
__global__ void __launch_bounds__(kThreads)
    norm_finish_sums(const __grid_constant__ Entries entries, const void* weight,
                     int32_t weight_dtype, double count, A* a, A* b) {
  __shared__ double memory[2][kThreads];
  const int64_t statistic = entries.statistic();
  double first[1] = {0}, second[1] = {0};
  if (statistic < entries.statistics)
    entries.for_each(statistic, [&](int64_t, int64_t channel, const double* sums) {
      const double by = weight ? load_any<double>(weight, channel, weight_dtype) : 1.0;
      first[0] += by * sums[0];
      second[0] += by * sums[1];
    });
  sum_over_y(entries.lanes, first, second, memory);
  if (statistic >= entries.statistics || entries.lanes.y() != 0) return;
  if (a) a[statistic] = narrow<A>(first[0] / count);
  if (b) b[statistic] = narrow<A>(second[0] / count);
}

}  // namespace revk::cuda
