// SPDX-License-Identifier: Apache-2.0
// Layer and RMS norm in one pass: a team of threads has one position and all of its channels. Up to
// 256 packets of channels stay in registers; what is longer is read again, from the cache.
//
// Packets are rows' alone here: away from rows, where neighbours in memory belong to other
// statistics, a packet of 8 would need 8 times the registers for sums, and spill.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/norm_act_element.cuh"
#include "cuda/norm_act_packet.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/norm_act_slices.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// Sums over a team, of two values; all of its threads get the result, the same to the bit. All
// threads of the block must come here.
template <class A>
__device__ void sum_over_team(const Lanes& lanes, A& a, A& b, A* shared) {
  const int near = lanes.near_lanes();
  if (lanes.rows) {
    for (int away = (near < kWarp ? near : kWarp) / 2; away > 0; away /= 2) {
      a += __shfl_xor_sync(~0u, a, away);
      b += __shfl_xor_sync(~0u, b, away);
    }
    if (near <= kWarp) return;
  }
  // One cell a warp for rows, which the team's warps have in a row; otherwise one a thread.
  const int cell = int(threadIdx.x) / (lanes.rows ? kWarp : 1);
  const int count = lanes.rows ? near / kWarp : lanes.xs();
  const int first = lanes.rows ? cell / count * count : lanes.y();
  const int step = lanes.rows ? 1 : lanes.x_stride();
  __syncthreads();  // the last sum has been read
  if (!lanes.rows || threadIdx.x % kWarp == 0) shared[2 * cell] = a, shared[2 * cell + 1] = b;
  __syncthreads();
  a = b = A(0);
  for (int x = 0; x < count; ++x)
    a += shared[2 * (first + x * step)], b += shared[2 * (first + x * step) + 1];
}

// One team's unit.
struct Turn {
  int64_t o, i;
  bool inside;

  __device__ static Turn of(const Teams& plan, int64_t round) {
    const int64_t unit = round * plan.lanes.ys() + plan.lanes.y();
    Turn turn;
    turn.inside = unit < plan.units;
    turn.o = plan.line_units.divide(unit);
    turn.i = unit - turn.o * plan.line_units.divisor;
    return turn;
  }
};

// Calls body(c) at each of this thread's packets of channels.
template <int kSize, class Body>
__device__ void for_each_chunk(const Teams& plan, const Turn& turn, Body&& body) {
  if (!turn.inside) return;
#pragma unroll 1
  for (int64_t c = plan.lanes.x() * kSize; c < plan.channels; c += plan.lanes.xs() * kSize) body(c);
}

template <class A, int kSize>
__device__ void set_all(A (&values)[kSize], A to) {
#pragma unroll
  for (int e = 0; e < kSize; ++e) values[e] = to;
}

// s = x +- f where there is a coupling, the statistics of each position, h.
//
// The mean is found in two steps, the second being the mean of the deviations from the first: it
// takes away what the sum of large numbers lost.
template <class A, int kSize>
__global__ void __launch_bounds__(kThreads, 2)
    norm_teams(const __grid_constant__ Teams plan, const __grid_constant__ Stream stream,
               const __grid_constant__ Field h, const __grid_constant__ Scaling<A> scaling, A eps) {
  __shared__ A memory[2 * kThreads];
  const bool kept = plan.chunks == 1, rms = scaling.mean == nullptr;
  const A channels = A(plan.channels);
  const Stream again{stream.x, stream.f, stream.s, NormActCall::kNone};
  const int64_t first_channel = plan.lanes.x() * kSize;
  Normals<A, kSize> normals;
  if (kept && first_channel < plan.channels) normals.read_parameters(scaling, true, first_channel);
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Turn turn = Turn::of(plan, round);
    A values[kSize], sum = 0, squares = 0, mean = 0, variance;
    for_each_chunk<kSize>(plan, turn, [&](int64_t c) {
      stream.read(turn.o, c, turn.i, values);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += values[e], squares += values[e] * values[e];
    });
    sum_over_team(plan.lanes, sum, squares, memory);
    variance = squares / channels;
    if (!rms) {
      mean = sum / channels;
      sum = squares = 0;
      for_each_chunk<kSize>(plan, turn, [&](int64_t c) {
        if (!kept) again.read(turn.o, c, turn.i, values);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A away = values[e] - mean;
          sum += away, squares += away * away;
        }
      });
      sum_over_team(plan.lanes, sum, squares, memory);
      const A offset = sum / channels;
      mean += offset;
      variance = (squares - sum * offset) / channels;
      if (variance < A(0)) variance = A(0);  // a NaN stays
    }
    const A rstd = A(1) / std::sqrt(variance + eps);
    set_all(normals.mean, mean), set_all(normals.rstd, rstd);
    if (turn.inside && plan.lanes.x() == 0) {
      const int64_t at = scaling.place(turn.o, 0, turn.i);
      if (!rms) scaling.mean[at] = mean;
      scaling.rstd[at] = rstd;
    }
    for_each_chunk<kSize>(plan, turn, [&](int64_t c) {
      if (!kept) {
        again.read(turn.o, c, turn.i, values);
        normals.read_parameters(scaling, true, c);
      }
      activate(normals, scaling.activation, values);
      store_rounded(h, h.offset(turn.o, c, turn.i), values);
    });
  }
}

// dx = base + gradient. If `partial` is given, where every thread keeps to its channels, the sums
// of dz and dz * xhat over the block's positions besides.
template <class A, int kSize>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradient_teams(const __grid_constant__ Teams plan, const __grid_constant__ Field dx,
                        const __grid_constant__ Field base, const __grid_constant__ Field dh,
                        const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                        double* partial) {
  __shared__ double memory[2 * kSize][kThreads];
  A* const team_memory = reinterpret_cast<A*>(memory);
  const bool kept = plan.chunks == 1, rms = scaling.mean == nullptr;
  const A channels = A(plan.channels);
  const int64_t first_channel = plan.lanes.x() * kSize;
  Normals<A, kSize> normals;
  if (kept && first_channel < plan.channels) normals.read_parameters(scaling, true, first_channel);
  A dbias[kSize], dweight[kSize];
  set_all(dbias, A(0)), set_all(dweight, A(0));
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Turn turn = Turn::of(plan, round);
    A xhat[kSize], g[kSize], mean_g = 0, mean_gx = 0, rstd = 0;
    const auto read = [&](int64_t c) {  // xhat, and dz in g
      Raw<A, kSize> raw_x, raw_dh;
      raw_x.load(x, x.offset(turn.o, c, turn.i));
      raw_dh.load(dh, dh.offset(turn.o, c, turn.i));
      if (!kept) normals.read_parameters(scaling, true, c);
      raw_x.unpack(xhat, x);
      raw_dh.unpack(g, dh);
      deactivate(normals, scaling.activation, xhat, g);
    };
    if (turn.inside) {
      const int64_t at = scaling.place(turn.o, 0, turn.i);
      rstd = scaling.rstd[at];
      set_all(normals.mean, rms ? A(0) : scaling.mean[at]), set_all(normals.rstd, rstd);
    }
    for_each_chunk<kSize>(plan, turn, [&](int64_t c) {
      read(c);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        dbias[e] += g[e];
        dweight[e] += g[e] * xhat[e];
        g[e] = g[e] * normals.weight[e];
        mean_g += g[e];
        mean_gx += g[e] * xhat[e];
      }
    });
    sum_over_team(plan.lanes, mean_g, mean_gx, team_memory);
    mean_g = rms ? A(0) : mean_g / channels, mean_gx = mean_gx / channels;
    for_each_chunk<kSize>(plan, turn, [&](int64_t c) {
      Raw<A, kSize> raw_base;
      A before[kSize];
      if (base.data) raw_base.load(base, base.offset(turn.o, c, turn.i));
      if (!kept) {
        read(c);
#pragma unroll
        for (int e = 0; e < kSize; ++e) g[e] = g[e] * normals.weight[e];
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        g[e] = ops::RowGradient<A>{rstd, mean_g, mean_gx}(g[e], xhat[e]);
      if (base.data) {
        raw_base.unpack(before, base);
#pragma unroll
        for (int e = 0; e < kSize; ++e) g[e] = before[e] + g[e];
      }
      store_rounded(dx, dx.offset(turn.o, c, turn.i), g);
    });
  }
  if (partial == nullptr) return;
  double total_dbias[kSize], total_dweight[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) total_dbias[e] = dbias[e], total_dweight[e] = dweight[e];
  sum_over_y(plan.lanes, total_dbias, total_dweight, memory);
  leave(partial, blockIdx.x, plan.channels, plan.lanes, first_channel, total_dbias, total_dweight);
}

}  // namespace revk::cuda
