// SPDX-License-Identifier: Apache-2.0
// Layer and RMS norm in one pass: a team of threads processes all channels of one position. A team
// is a warp, which needs no barrier, if a few packets per thread suffice; longer rows take two
// warps or the whole block. Up to 256 packets of channels stay in registers while those of the
// team's next position are prefetched; longer rows are read again, from the cache.
//
// Packets are used for rows only: elsewhere adjacent elements belong to different statistics, and a
// packet of 8 would need 8 times the registers for sums, and spill.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/norm_act_ahead.cuh"
#include "cuda/norm_act_element.cuh"
#include "cuda/norm_act_packet.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/norm_act_sums.cuh"
#include "cuda/norm_act_team_walk.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// Minimum resident blocks per multiprocessor.
template <class A, int kSize, int kChunks, class X>
constexpr int kTeamBlocksOf = kSize > 1 && kChunks > 0 && sizeof(A) == 4 && !std::is_same_v<X, Any>
                                  ? 3
                                  : 2;

// With a coupling s = x +- f; then each position's statistics, and h. X is the type of x and s, F
// that of f and h.
//
// The mean is computed in two steps: the second adds the mean of the deviations from the first,
// which recovers what the sum of large numbers lost.
template <class A, int kSize, int kChunks, class X, class F>
__global__ void __launch_bounds__(kThreads, kTeamBlocksOf<A, kSize, kChunks, X>)
    norm_teams(const __grid_constant__ Teams plan, const __grid_constant__ Stream stream,
               const __grid_constant__ Field h, const __grid_constant__ Scaling<A> scaling, A eps) {
  using Parameters = TeamParameters<A, kSize, kChunks>;
  using NextX = NextPackets<A, kSize, kChunks, X>;
  // Shared memory does not suffice for three packets of four words.
  constexpr bool kNextF = kChunks * kWordsOfAll<A, kSize, X, F> <= 9;
  using NextF = NextPackets<A, kSize, kNextF ? kChunks : 0, F>;
  constexpr int kKept = kChunks > 0 ? kChunks : 1, kCells = NextX::kCells + NextF::kCells;
  __shared__ A memory[2 * kThreads];
  __shared__ typename Parameters::Table table;
  __shared__ Word under_way[kCells > 0 ? kCells : 1][kThreads];
  const bool rms = scaling.mean == nullptr, coupled = stream.coupling != NormActCall::kNone;
  const A part = A(1) / A(plan.channels);
  const Stream again = Stream::of(stream.s);
  Normals<A, kSize> normals;
  const int lane = opaque(plan.lanes.x());
  NextX next_x{under_way};
  NextF next_f{under_way + NextX::kCells};
  const auto start = [&](const Turn& turn) {
    if constexpr (kChunks > 0)
      for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
        const int64_t x = place_of<X, kSize>(plan, stream.x, turn, c);
        const int64_t f = place_of<F, kSize>(plan, stream.f, turn, c);
        next_x.load(NextX::stage(j), x, stream.x.dtype);
        if (kNextF && coupled) next_f.load(NextF::stage(j), f, stream.f.dtype);
      });
    close_copies();
  };
  Turn turn = Turn::of(plan, blockIdx.x);
  start(turn);
  Parameters parameters{normals, table};
  parameters.begin(plan, scaling);
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    A values[kKept][kSize], sum = 0, squares = 0, mean = 0, variance;
    wait_for_copies<0>();
    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
      if constexpr (kChunks == 0) {
        stream.read(turn.o(plan), c, turn.i(plan), values[j]);
      } else {
        next_x.unpack(NextX::stage(j), values[j], stream.x.dtype);
        if (coupled) {
          A added[kSize];
          if constexpr (kNextF) {
            next_f.unpack(NextF::stage(j), added, stream.f.dtype);
          } else {
            Raw<A, kSize, F> raw;
            raw.load(place_of<F, kSize>(plan, stream.f, turn, c), stream.f.dtype);
            raw.unpack(added, stream.f.dtype);
          }
          const int64_t s = place_of<X, kSize>(plan, stream.s, turn, c);
          stream.join<X>(values[j], added, s);
        }
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += values[j][e];
      if (rms)
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          squares = ops::detail::fused(values[j][e], values[j][e], squares);
    });
    const Turn here = turn;
    turn = Turn::of(plan, round + gridDim.x);
    start(turn);
    if (rms) {
      sum_over_team(plan.lanes, memory, squares);
      variance = squares * part;
    } else {
      sum_over_team(plan.lanes, memory, sum);
      mean = sum * part;
      sum = squares = 0;
      for_each_chunk<kSize, kChunks>(plan, here, [&](int j, int64_t c) {
        if (kChunks == 0) again.read(here.o(plan), c, here.i(plan), values[j]);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A away = values[j][e] - mean;
          sum += away, squares = ops::detail::fused(away, away, squares);
        }
      });
      sum_over_team(plan.lanes, memory, sum, squares);
      const A offset = sum * part;
      mean += offset;
      variance = (squares - sum * offset) * part;
      if (variance < A(0)) variance = A(0);  // a NaN stays
    }
    const A rstd = A(1) / std::sqrt(variance + eps);
    if (here.inside && plan.lanes.x() == 0) {
      const int64_t at = statistic_of<A, kSize>(plan, scaling, here);
      if (!rms) scaling.mean[at] = mean;
      scaling.rstd[at] = rstd;
    }
    for_each_chunk<kSize, kChunks>(plan, here, [&](int j, int64_t c) {
      if (kChunks == 0) again.read(here.o(plan), c, here.i(plan), values[j]);
      parameters.read(scaling, c);
      with_activation(scaling.activation, [&](auto kind) {
        typename Parameters::Numbers::Group read_w, read_b;
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A w = parameters.weight(lane, j, e, read_w);
          const ops::Normal<A> normal{mean, rstd, w, parameters.bias(lane, j, e, read_b)};
          values[j][e] = decltype(kind)::value(normal.z(normal.xhat(values[j][e])));
        }
      });
      store_as<F>(place_of<F, kSize>(plan, h, here, c), h.dtype, values[j]);
    });
  }
}

// dx = base + gradient. X is the type of x, base and dx, D that of dh. If `partial` is given (every
// thread then keeps its channels), also the sums of dz and dz * xhat over the block's positions.
template <class A, int kSize, int kChunks, class X, class D>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradient_teams(const __grid_constant__ Teams plan, const __grid_constant__ Field dx,
                        const __grid_constant__ Field base, const __grid_constant__ Field dh,
                        const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                        double* partial) {
  using Parameters = TeamParameters<A, kSize, kChunks>;
  using NextX = NextPackets<A, kSize, kChunks, X>;
  using NextD = NextPackets<A, kSize, kChunks, D>;
  constexpr int kKept = kChunks > 0 ? kChunks : 1, kCells = NextX::kCells + NextD::kCells;
  // Pipeline stages first, then the sums.
  __shared__ union {
    Word under_way[kCells > 0 ? kCells : 1][kThreads];
    double sums[2 * kSize][kThreads];
  } shared;
  __shared__ A memory[2 * kThreads];
  __shared__ typename Parameters::Table table;
  const bool rms = scaling.mean == nullptr;
  const A part = A(1) / A(plan.channels);
  Normals<A, kSize> normals;
  A dbias[kKept][kSize], dweight[kKept][kSize];
#pragma unroll
  for (int j = 0; j < kKept; ++j) set_all(dbias[j], A(0)), set_all(dweight[j], A(0));
  const int lane = opaque(plan.lanes.x());
  NextX next_x{shared.under_way};
  NextD next_dh{shared.under_way + NextX::kCells};
  A next_mean = 0, next_rstd = 0;
  const auto start = [&](const Turn& turn) {
    if constexpr (kChunks > 0)
      for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
        next_x.load(NextX::stage(j), place_of<X, kSize>(plan, x, turn, c), x.dtype);
        next_dh.load(NextD::stage(j), place_of<D, kSize>(plan, dh, turn, c), dh.dtype);
      });
    close_copies();
    if (turn.inside) {
      const int64_t at = statistic_of<A, kSize>(plan, scaling, turn);
      next_rstd = scaling.rstd[at];
      if (!rms) next_mean = scaling.mean[at];
    }
  };
  Turn turn = Turn::of(plan, blockIdx.x);
  start(turn);
  Parameters parameters{normals, table};
  parameters.begin(plan, scaling);
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    Raw<A, kSize, X> raw_base[kKept];
    A xhat[kKept][kSize], g[kKept][kSize], mean_g = 0, mean_gx = 0;
    const A mean = next_mean, rstd = next_rstd;
    // Replaces x and dh by xhat and g = dz * weight; calls use(e, dz, xhat) for each element.
    const auto normalise = [&](int j, int64_t c, auto&& use) {
      parameters.read(scaling, c);
      with_activation(scaling.activation, [&](auto kind) {
        typename Parameters::Numbers::Group read_w, read_b;
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A w = parameters.weight(lane, j, e, read_w);
          const ops::Normal<A> normal{mean, rstd, w, parameters.bias(lane, j, e, read_b)};
          xhat[j][e] = normal.xhat(xhat[j][e]);
          const A dz = decltype(kind)::gradient(normal.z(xhat[j][e]), g[j][e]);
          use(e, dz, xhat[j][e]);
          g[j][e] = dz * w;
          one_by_one<decltype(kind)>();
        }
      });
    };
    const auto read = [&](const Turn& at, int j, int64_t c) {
      Raw<A, kSize, X> raw_x;
      Raw<A, kSize, D> raw_dh;
      raw_x.load(x.at(at.o(plan), c, at.i(plan)), x.dtype);
      raw_dh.load(dh.at(at.o(plan), c, at.i(plan)), dh.dtype);
      raw_x.unpack(xhat[j], x.dtype), raw_dh.unpack(g[j], dh.dtype);
    };
    wait_for_copies<0>();
    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {
      if constexpr (kChunks == 0) {
        read(turn, j, c);
      } else {
        next_x.unpack(NextX::stage(j), xhat[j], x.dtype);
        next_dh.unpack(NextD::stage(j), g[j], dh.dtype);
      }
      normalise(j, c, [&](int e, A dz, A xhat) {
        dbias[j][e] += dz;
        dweight[j][e] = ops::detail::fused(dz, xhat, dweight[j][e]);
      });
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        mean_g += g[j][e];
        mean_gx = ops::detail::fused(g[j][e], xhat[j][e], mean_gx);
      }
    });
    const Turn here = turn;
    if (kChunks > 0 && base.data)
      for_each_chunk<kSize, kChunks>(plan, here, [&](int j, int64_t c) {
        raw_base[j].load(place_of<X, kSize>(plan, base, here, c), base.dtype);
      });
    turn = Turn::of(plan, round + gridDim.x);
    start(turn);
    sum_over_team(plan.lanes, memory, mean_g, mean_gx);
    mean_g = rms ? A(0) : mean_g * part, mean_gx = mean_gx * part;
    for_each_chunk<kSize, kChunks>(plan, here, [&](int j, int64_t c) {
      A before[kSize];
      if constexpr (kChunks == 0) {
        if (base.data) raw_base[j].load(base.at(here.o(plan), c, here.i(plan)), base.dtype);
        read(here, j, c);
        normalise(j, c, [](int, A, A) {});
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        g[j][e] = ops::MeansGradient<A>{rstd, mean_g, mean_gx}(g[j][e], xhat[j][e]);
      if (base.data) {
        raw_base[j].unpack(before, base.dtype);
#pragma unroll
        for (int e = 0; e < kSize; ++e) g[j][e] = before[e] + g[j][e];
      }
      store_as<X>(place_of<X, kSize>(plan, dx, here, c), dx.dtype, g[j]);
    });
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    double total_dbias[kSize], total_dweight[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) total_dbias[e] = dbias[j][e], total_dweight[e] = dweight[j][e];
    sum_over_y(plan.lanes, total_dbias, total_dweight, shared.sums);
    leave(partial, blockIdx.x, plan.channels, plan.lanes,
          (plan.lanes.x() + j * plan.lanes.xs()) * kSize, total_dbias, total_dweight);
  }
}

// Number of blocks where it changes no result. Each block fills its parameter table once; six is a
// multiple of the two or three that are resident per multiprocessor.
inline int64_t team_blocks(const Teams& plan, const revk_where& where) {
  const int64_t each = plan.keeps() ? 6 : kBlocksPerMultiprocessor;
  return std::min(plan.rounds, multiprocessors(where.device) * each);
}

// Calls body(std::integral_constant<int, n>{}), where a thread keeps n packets in registers, at
// most kMost; n = 0: none.
template <int kSize, int kMost, class Body>
void with_chunks(const Teams& plan, Body&& body) {
  static_assert(kMost == 2 || kMost == 3, "below is a line for each");
  if constexpr (kSize > 1)
    if (plan.keeps()) {
      if (plan.chunks == 2) return body(std::integral_constant<int, 2>{});
      if constexpr (kMost == 3) return body(std::integral_constant<int, 3>{});
    }
  if (plan.chunks == 1) return body(std::integral_constant<int, 1>{});
  return body(std::integral_constant<int, 0>{});
}

}  // namespace revk::cuda
