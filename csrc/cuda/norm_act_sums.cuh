// SPDX-License-Identifier: Apache-2.0
// Reduces a thread's sums to a block's, and writes them to the workspace, in float64.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/norm_act_plan.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// Reduces two sums per channel over the lanes of one x. For rows each element of a packet is a
// channel; otherwise the packet is summed first. Lane y = 0 gets the result.
template <int kSize>
__device__ void sum_over_y(const Lanes& lanes, double (&a)[kSize], double (&b)[kSize],
                           double (*memory)[kThreads]) {
  if (!lanes.rows)
#pragma unroll
    for (int e = 1; e < kSize; ++e) a[0] += a[e], b[0] += b[e];
  const int thread = int(threadIdx.x), columns = lanes.rows ? kSize : 1;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (e < columns) memory[2 * e][thread] = a[e], memory[2 * e + 1][thread] = b[e];
  // Folds up to 16 lanes per step, with all threads taking part. A task is (sum, x, remaining y).
  // All lane counts are powers of two; a shift costs a twentieth of a division.
  for (int log_left = lanes.log_ys(); log_left > 0;) {
    const int log_fold = log_left < 4 ? log_left : 4;
    log_left -= log_fold;
    __syncthreads();
    const int log_cells = kLogThreads - lanes.log_ys() + log_left;
    const int step = lanes.y_stride() << log_left;
    for (int task = thread; task < 2 * columns << log_cells; task += kThreads) {
      const int cell = task & ((1 << log_cells) - 1);
      const int x = cell >> log_left, y = cell & ((1 << log_left) - 1);
      double* const at = memory[task >> log_cells] +
                         (lanes.rows ? cell : x * lanes.x_stride() + y * lanes.y_stride());
      double sum = at[0];
      for (int m = 1; m < 1 << log_fold; ++m) sum += at[m * step];
      at[0] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (e < columns) a[e] = memory[2 * e][thread], b[e] = memory[2 * e + 1][thread];
}

// partial[row][channel] <- (a, b), written by lane y = 0.
template <int kSize>
__device__ void leave(double* partial, int64_t row, int64_t channels, const Lanes& lanes,
                      int64_t channel, const double (&a)[kSize], const double (&b)[kSize]) {
  if (lanes.y() != 0 || channel >= channels) return;
  double* const to = partial + 2 * (row * channels + channel);
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (lanes.rows || e == 0) to[2 * e] = a[e], to[2 * e + 1] = b[e];
}

}  // namespace revk::cuda
