// SPDX-License-Identifier: Apache-2.0
// Layer and RMS norm in one pass: a team of threads has one position and all of its channels. A
// warp is a team where three packets a thread are enough, and needs no barrier; longer rows take
// two warps, or the whole block. Up to 256 packets of channels stay in registers; what is longer is
// read again, from the cache.
//
// Packets are rows' alone here: away from rows, where neighbours in memory belong to other
// statistics, a packet of 8 would need 8 times the registers for sums, and spill.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
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

// Calls body(j, c) at each of this thread's packets of channels, c being its first and j its place
// in registers. kChunks is how many packets stay there; 0: none, and there may be any number of
// them.
template <int kSize, int kChunks, class Body>
__device__ void for_each_chunk(const Teams& plan, const Turn& turn, Body&& body) {
  if (!turn.inside) return;
  const int64_t first = plan.lanes.x() * kSize, span = plan.lanes.xs() * kSize;
  if constexpr (kChunks > 0) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      if (first + j * span < plan.channels) body(j, first + j * span);
  } else {
#pragma unroll 1
    for (int64_t c = first; c < plan.channels; c += span) body(0, c);
  }
}

template <class A, int kSize>
__device__ void set_all(A (&values)[kSize], A to) {
#pragma unroll
  for (int e = 0; e < kSize; ++e) values[e] = to;
}

// The norm's parameters of a thread's channels: in its registers if it has one packet, in shared
// memory for a few of them, else read where they are.
template <class A, int kSize, int kChunks>
struct TeamParameters {
  static constexpr int kTable = kChunks > 1 ? kChunks * (1 << kLogTable) * kSize : 1;

  // All threads of the block must come here.
  __device__ static void begin(const Teams& plan, const Scaling<A>& scaling,
                               Normals<A, kSize>& normals, A (*table)[kTable]) {
    const int64_t first = plan.lanes.x() * kSize;
    if (kChunks == 1 && first < plan.channels) normals.read_parameters(scaling, true, first);
    if constexpr (kChunks > 1) {
      for (int64_t c = threadIdx.x; c < plan.channels; c += kThreads) {
        Normals<A, 1> one;
        one.read_parameters(scaling, true, c);
        table[0][c] = one.weight[0], table[1][c] = one.bias[0];
      }
      __syncthreads();
    }
  }
  __device__ static void read(const Scaling<A>& scaling, int64_t c, Normals<A, kSize>& normals,
                              const A (*table)[kTable]) {
    if (kChunks == 0) normals.read_parameters(scaling, true, c);
    if constexpr (kChunks > 1)
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        normals.weight[e] = table[0][c + e], normals.bias[e] = table[1][c + e];
  }
};

// s = x +- f where there is a coupling, the statistics of each position, h.
//
// The mean is found in two steps, the second being the mean of the deviations from the first: it
// takes away what the sum of large numbers lost.
template <class A, int kSize, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    norm_teams(const __grid_constant__ Teams plan, const __grid_constant__ Stream stream,
               const __grid_constant__ Field h, const __grid_constant__ Scaling<A> scaling, A eps) {
  using Parameters = TeamParameters<A, kSize, kChunks>;
  constexpr int kKept = kChunks > 0 ? kChunks : 1;
  __shared__ A memory[2 * kThreads];
  __shared__ A table[2][Parameters::kTable];
  const bool rms = scaling.mean == nullptr;
  const A channels = A(plan.channels);
  const Stream again = Stream::of(stream.s);
  Normals<A, kSize> normals;
  Parameters::begin(plan, scaling, normals, table);
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Turn turn = Turn::of(plan, round);
    Stream::Loaded<A, kSize, Any, Any> loaded[kKept];
    A values[kKept][kSize], sum = 0, squares = 0, mean = 0, variance;
    const auto load = [&](int j, int64_t c) {
      stream.load(loaded[j], stream.x.offset(turn.o, c, turn.i),
                  stream.f.offset(turn.o, c, turn.i));
    };
    if (kChunks > 0) for_each_chunk<kSize, kChunks>(plan, turn, load);
    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
      if (kChunks == 0) load(j, c);
      stream.finish(loaded[j], stream.s.offset(turn.o, c, turn.i), values[j]);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += values[j][e], squares += values[j][e] * values[j][e];
    });
    sum_over_team(plan.lanes, sum, squares, memory);
    variance = squares / channels;
    if (!rms) {
      mean = sum / channels;
      sum = squares = 0;
      for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
        if (kChunks == 0) again.read(turn.o, c, turn.i, values[j]);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A away = values[j][e] - mean;
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
    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
      if (kChunks == 0) again.read(turn.o, c, turn.i, values[j]);
      Parameters::read(scaling, c, normals, table);
      activate(normals, scaling.activation, values[j]);
      store_rounded(h, h.offset(turn.o, c, turn.i), values[j]);
    });
  }
}

// dx = base + gradient. If `partial` is given, where every thread keeps to its channels, the sums
// of dz and dz * xhat over the block's positions besides.
template <class A, int kSize, int kChunks>
__global__ void __launch_bounds__(kThreads, kChunks > 1 ? 1 : 2)
    norm_gradient_teams(const __grid_constant__ Teams plan, const __grid_constant__ Field dx,
                        const __grid_constant__ Field base, const __grid_constant__ Field dh,
                        const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                        double* partial) {
  using Parameters = TeamParameters<A, kSize, kChunks>;
  constexpr int kKept = kChunks > 0 ? kChunks : 1;
  __shared__ double memory[2 * kSize][kThreads];
  __shared__ A table[2][Parameters::kTable];
  A* const team_memory = reinterpret_cast<A*>(memory);
  const bool rms = scaling.mean == nullptr;
  const A channels = A(plan.channels);
  Normals<A, kSize> normals;
  Parameters::begin(plan, scaling, normals, table);
  A dbias[kKept][kSize], dweight[kKept][kSize];
#pragma unroll
  for (int j = 0; j < kKept; ++j) set_all(dbias[j], A(0)), set_all(dweight[j], A(0));
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Turn turn = Turn::of(plan, round);
    Raw<A, kSize> raw_x[kKept], raw_dh[kKept], raw_base[kKept];
    A xhat[kKept][kSize], g[kKept][kSize], mean_g = 0, mean_gx = 0, rstd = 0;
    const auto load = [&](int j, int64_t c) {
      raw_x[j].load(x, x.offset(turn.o, c, turn.i));
      raw_dh[j].load(dh, dh.offset(turn.o, c, turn.i));
    };
    const auto load_base = [&](int j, int64_t c) {
      if (base.data) raw_base[j].load(base, base.offset(turn.o, c, turn.i));
    };
    const auto unpack = [&](int j, int64_t c) {  // xhat, and dz in g
      if (kChunks == 0) load(j, c);
      Parameters::read(scaling, c, normals, table);
      raw_x[j].unpack(xhat[j], x);
      raw_dh[j].unpack(g[j], dh);
      deactivate(normals, scaling.activation, xhat[j], g[j]);
    };
    if (kChunks > 0) for_each_chunk<kSize, kChunks>(plan, turn, load);
    if (turn.inside) {
      const int64_t at = scaling.place(turn.o, 0, turn.i);
      rstd = scaling.rstd[at];
      set_all(normals.mean, rms ? A(0) : scaling.mean[at]), set_all(normals.rstd, rstd);
    }
    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
      unpack(j, c);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        dbias[j][e] += g[j][e];
        dweight[j][e] += g[j][e] * xhat[j][e];
        g[j][e] = g[j][e] * normals.weight[e];
        mean_g += g[j][e];
        mean_gx += g[j][e] * xhat[j][e];
      }
    });
    if (kChunks > 0) for_each_chunk<kSize, kChunks>(plan, turn, load_base);
    sum_over_team(plan.lanes, mean_g, mean_gx, team_memory);
    mean_g = rms ? A(0) : mean_g / channels, mean_gx = mean_gx / channels;
    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
      A before[kSize];
      if (kChunks == 0) {
        load_base(j, c);
        unpack(j, c);
#pragma unroll
        for (int e = 0; e < kSize; ++e) g[j][e] = g[j][e] * normals.weight[e];
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        g[j][e] = ops::MeansGradient<A>{rstd, mean_g, mean_gx}(g[j][e], xhat[j][e]);
      if (base.data) {
        raw_base[j].unpack(before, base);
#pragma unroll
        for (int e = 0; e < kSize; ++e) g[j][e] = before[e] + g[j][e];
      }
      store_rounded(dx, dx.offset(turn.o, c, turn.i), g[j]);
    });
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    double total_dbias[kSize], total_dweight[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) total_dbias[e] = dbias[j][e], total_dweight[e] = dweight[j][e];
    sum_over_y(plan.lanes, total_dbias, total_dweight, memory);
    leave(partial, blockIdx.x, plan.channels, plan.lanes,
          (plan.lanes.x() + j * plan.lanes.xs()) * kSize, total_dbias, total_dweight);
  }
}

// Blocks for the teams, where their number changes no result: each fills its table once.
inline int64_t team_blocks(const Teams& plan, const revk_where& where) {
  const int64_t each = plan.keeps() ? 4 : kBlocksPerMultiprocessor;
  return std::min(plan.rounds, multiprocessors(where.device) * each);
}

// Calls body(std::integral_constant<int, n>{}), n being how many packets a thread keeps.
template <int kSize, class Body>
void with_chunks(const Teams& plan, Body&& body) {
  static_assert(kMostChunks == 3, "below is a line for each");
  if constexpr (kSize > 1)
    if (plan.keeps())
      return plan.chunks == 2 ? body(std::integral_constant<int, 2>{})
                              : body(std::integral_constant<int, 3>{});
  if (plan.chunks == 1) return body(std::integral_constant<int, 1>{});
  return body(std::integral_constant<int, 0>{});
}

}  // namespace revk::cuda
