// SPDX-License-Identifier: Apache-2.0
// Kernels whose blocks each process a slice of the positions for some channels: sums per channel,
// and element-wise passes with known statistics.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/norm_act_ahead.cuh"
#include "cuda/norm_act_element.cuh"
#include "cuda/norm_act_packet.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/norm_act_sums.cuh"
#include "cuda/norm_act_units.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

template <class F>
constexpr bool kCoupled = !std::is_same_v<F, None>;

// Mean and sum of squared deviations of each channel in each slice, into `partial`; with a
// coupling, s is computed and written on the way.
//
// A thread sums x - shift and its square, with its own first element as the shift. If the shift is
// at distance D from the mean, rounding n such squares gives an error of about n eps D^2; but that
// one element makes the channel's sum of squared deviations at least D^2, so the relative error is
// n eps, with n <= kMostUnits. All later sums are float64.
template <class A, int kSize, class X, class F>
__global__ void __launch_bounds__(kThreads, kSize == 1 ? 3 : kBlocksOf<4, A, kSize, X, F>)
    norm_moments(const __grid_constant__ Slicing plan, const __grid_constant__ Stream stream,
                 double* partial) {
  constexpr int kWords = kWordsOfAll<A, kSize, X, F>, kStages = kStagesOf<kSize, kWords>;
  // Pipeline stages first, then the sums.
  __shared__ union {
    Word under_way[kStages * kWords > 0 ? kStages * kWords : 1][kThreads];
    double sums[2 * kSize][kThreads];
  } shared;
  const Lanes& lanes = plan.lanes;
  const Place place = Place::of<kSize>(plan);
  A shift[kSize], sum[kSize], squares[kSize];
  bool first = true;
#pragma unroll
  for (int e = 0; e < kSize; ++e) shift[e] = sum[e] = squares[e] = A(0);
  Ahead<A, kSize, X, kStages> x{shared.under_way};
  Ahead<A, kSize, F, kStages> f{shared.under_way + kWordsOf<A, kSize, X>};
  const auto load = [&](Stage stage, const auto& at) {
    x.load(stage, at[0], stream.x.dtype);
    if constexpr (kCoupled<F>) f.load(stage, at[1], stream.f.dtype);
  };
  const auto use = [&](Stage stage, const auto& at, int32_t) {
    A value[kSize];
    x.unpack(stage, value, stream.x.dtype);
    if constexpr (kCoupled<F>) {
      A added[kSize];
      f.unpack(stage, added, stream.f.dtype);
      stream.join<X>(value, added, at[0]);
    }
    if (first)
#pragma unroll
      for (int e = 0; e < kSize; ++e) shift[e] = lanes.rows ? value[e] : value[0];
    first = false;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const A away = value[e] - shift[e];
      sum[e] += away;
      squares[e] = ops::detail::fused(away, away, squares[e]);
    }
  };
  const Field *const from[] = {&stream.x, &stream.f}, *const to[] = {&stream.s};
  constexpr int kOperands = kCoupled<F> ? 2 : 1;
  for_each_unit<kSize, kStages, kWords, kOperands, kOperands - 1>(
      plan, place, from, to, [] {}, load, use);
  __syncthreads();

  // All lanes of a channel move to the shift of lane y = 0, which has an element if any lane has.
  const int64_t in_slice = place.inside ? place.outers * place.units_in_line : 0;
  const double units = double((in_slice - lanes.y() + lanes.ys() - 1) / lanes.ys());
  double total[kSize], total_squares[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) shared.sums[e][threadIdx.x] = double(shift[e]);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    const double origin = shared.sums[e][lanes.x() * lanes.x_stride()];
    const double by = units > 0 ? double(shift[e]) - origin : 0.0;
    total[e] = double(sum[e]) + units * by;
    total_squares[e] = double(squares[e]) + by * (2.0 * double(sum[e]) + units * by);
    asm volatile("" ::: "memory");  // one element at a time: all at once would spill
  }
  sum_over_y(lanes, total, total_squares, shared.sums);
  const double part = 1.0 / place.elements<kSize>(plan);
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    const double offset = total[e] * part;
    total_squares[e] -= total[e] * offset;
    total[e] = double(shift[e]) + offset;  // for lane y = 0, which holds the result
  }
  leave(partial, place.slice, plan.channels, lanes, place.channel, total, total_squares);
}

// h = activation(norm(s)) with given statistics; with a coupling, s is computed and written on the
// way.
template <class A, int kSize, class X, class F, class H>
__global__ void __launch_bounds__(kThreads, kBlocksOf<4, A, kSize, X, F>)
    norm_apply(const __grid_constant__ Slicing plan, const __grid_constant__ Stream stream,
               const __grid_constant__ Field h, const __grid_constant__ Scaling<A> scaling) {
  constexpr int kWords = kWordsOfAll<A, kSize, X, F>, kStages = kStagesOf<kSize, kWords>;
  __shared__ Word under_way[kStages * kWords > 0 ? kStages * kWords : 1][kThreads];
  const bool rows = plan.lanes.rows;
  const Place place = Place::of<kSize>(plan);
  Normals<A, kSize> normals;
  const auto begin = [&] {
    if (!place.inside) return;
    normals.read_parameters(scaling, rows, place.channel);
    // Per-channel statistics are the same for the whole slice.
    if (!scaling.by_position)
      normals.read_statistics(scaling, rows, place.first_outer, place.channel, 0);
  };
  Ahead<A, kSize, X, kStages> x{under_way};
  Ahead<A, kSize, F, kStages> f{under_way + kWordsOf<A, kSize, X>};
  const auto load = [&](Stage stage, const auto& at) {
    x.load(stage, at[0], stream.x.dtype);
    if constexpr (kCoupled<F>) f.load(stage, at[1], stream.f.dtype);
  };
  const auto use = [&](Stage stage, const auto& at, int32_t unit) {
    A values[kSize];
    x.unpack(stage, values, stream.x.dtype);
    if constexpr (kCoupled<F>) {
      A added[kSize];
      f.unpack(stage, added, stream.f.dtype);
      stream.join<X>(values, added, at[1]);
    }
    if (scaling.by_position) read_statistics_of(unit, plan, place, scaling, normals);
    activate(normals, scaling.activation, values);
    store_as<H>(at[0], h.dtype, values);
  };
  const Field *const from[] = {&stream.x, &stream.f}, *const to[] = {&h, &stream.s};
  constexpr int kOperands = kCoupled<F> ? 2 : 1;
  for_each_unit<kSize, kStages, kWords, kOperands, kOperands>(plan, place, from, to, begin, load,
                                                              use);
}

// Whether statistics vary by position. In these backward kernels that is rare (norm_act_teams.cuh
// handles most cases), so only the Any instances support it.
template <class X, class A>
__device__ bool by_position(const Scaling<A>& scaling) {
  return std::is_same_v<X, Any> && scaling.by_position;
}

// Sums of dz and of dz * xhat of each channel in each slice, into `partial`.
template <class A, int kSize, class X, class D>
__global__ void __launch_bounds__(kThreads, kBlocksOf<3, A, kSize, X, D>)
    norm_gradient_sums(const __grid_constant__ Slicing plan, const __grid_constant__ Field dh,
                       const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                       double* partial) {
  constexpr int kWords = kWordsOfAll<A, kSize, X, D>, kStages = kStagesOf<kSize, kWords>;
  using Numbers = PerChannel<A, kSize, 32>;
  // Pipeline stages first, then the sums.
  __shared__ union {
    Word under_way[kStages * kWords > 0 ? kStages * kWords : 1][kThreads];
    double sums[2 * kSize][kThreads];
  } shared;
  // The block's channel parameters in shared memory: in registers they would spill.
  __shared__ struct {
    Numbers mean, weight, bias;
  } of;
  const bool rows = plan.lanes.rows;
  const int column = opaque(plan.lanes.x());
  const Place place = Place::of<kSize>(plan);
  Normals<A, kSize> normals;
  A dbias[kSize], dweight[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) dbias[e] = dweight[e] = A(0);
  const auto begin = [&] {
    if (place.inside) {
      if (plan.lanes.y() == 0) {
        normals.read_parameters(scaling, rows, place.channel);
        of.weight.write(column, normals.weight), of.bias.write(column, normals.bias);
      }
      if (!by_position<X>(scaling)) {
        normals.read_statistics(scaling, rows, place.first_outer, place.channel, 0);
        if (plan.lanes.y() == 0) of.mean.write(column, normals.mean);
      }
    }
    __syncthreads();
  };
  Ahead<A, kSize, X, kStages> ahead_x{shared.under_way};
  Ahead<A, kSize, D, kStages> ahead_dh{shared.under_way + kWordsOf<A, kSize, X>};
  const auto load = [&](Stage stage, const auto& at) {
    ahead_x.load(stage, at[0], x.dtype);
    ahead_dh.load(stage, at[1], dh.dtype);
  };
  const auto use = [&](Stage stage, const auto&, int32_t unit) {
    A values[kSize], gradient[kSize];
    if (by_position<X>(scaling)) read_statistics_of(unit, plan, place, scaling, normals);
    ahead_x.unpack(stage, values, x.dtype);
    ahead_dh.unpack(stage, gradient, dh.dtype);
    with_activation(scaling.activation, [&](auto kind) {
      typename Numbers::Group read_m, read_w, read_b;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const A mean = of.mean.read(column, e, read_m), w = of.weight.read(column, e, read_w);
        const ops::Normal<A> normal{by_position<X>(scaling) ? normals.mean[e] : mean,
                                    normals.rstd[e], w, of.bias.read(column, e, read_b)};
        const A xhat = normal.xhat(values[e]);
        const A dz = decltype(kind)::gradient(normal.z(xhat), gradient[e]);
        dbias[e] += dz;
        dweight[e] = ops::detail::fused(dz, xhat, dweight[e]);
        one_by_one<decltype(kind)>();
      }
    });
  };
  const Field* const from[] = {&x, &dh};
  for_each_unit<kSize, kStages, kWords, 2, 0>(plan, place, from, nullptr, begin, load, use);
  double total_dbias[kSize], total_dweight[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) total_dbias[e] = dbias[e], total_dweight[e] = dweight[e];
  sum_over_y(plan.lanes, total_dbias, total_dweight, shared.sums);
  leave(partial, place.slice, plan.channels, plan.lanes, place.channel, total_dbias, total_dweight);
}

// How dx follows from dz, given the sums over other blocks.
enum class Gradient { kConstant, kBatch, kGroup };

template <class A>
struct GradientSums {
  const A *dbias, *dweight;  // of a batch norm, [channels]; of a group norm the means of g and of
                             // g * xhat, [outer][groups], and count is 1
  A count;
  Gradient kind;
};

// dx = base + gradient, with known sums. X is the type of x, base and dx.
template <class A, int kSize, class X, class D>
__global__ void __launch_bounds__(kThreads, kBlocksOf<5, A, kSize, X, X, D>)
    norm_gradient(const __grid_constant__ Slicing plan, const __grid_constant__ Field dx,
                  const __grid_constant__ Field base, const __grid_constant__ Field dh,
                  const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                  const __grid_constant__ GradientSums<A> sums) {
  constexpr int kWords = kWordsOfAll<A, kSize, X, X, D>, kStages = kStagesOf<kSize, kWords>;
  using Numbers = PerChannel<A, kSize, 32>;
  // The block's channel parameters and the gradient's two means in shared memory: in registers they
  // would spill.
  __shared__ struct {
    Numbers weight, bias, mean_g, mean_gx;
  } of;
  // Shared memory does not suffice for three float32 operands; then base is loaded directly.
  constexpr bool kBaseAhead = kWords < 6;
  constexpr int kCells = kWords - (kBaseAhead ? 0 : kWordsOf<A, kSize, X>);
  __shared__ Word under_way[kStages * kCells > 0 ? kStages * kCells : 1][kThreads];
  const bool rows = plan.lanes.rows;
  const int column = opaque(plan.lanes.x());
  const Place place = Place::of<kSize>(plan);
  Normals<A, kSize> normals;
  const auto begin = [&] {
    if (place.inside) {
      if (plan.lanes.y() == 0) {
        normals.read_parameters(scaling, rows, place.channel);
        of.weight.write(column, normals.weight), of.bias.write(column, normals.bias);
        A of_g[kSize], of_gx[kSize];
        if (sums.kind != Gradient::kConstant) {
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            const int64_t channel = rows ? place.channel + e : place.channel;
            const int64_t at = scaling.place(place.first_outer, channel, 0);
            of_g[e] = sums.dbias[at] / sums.count;
            of_gx[e] = sums.dweight[at] / sums.count;
          }
          of.mean_g.write(column, of_g), of.mean_gx.write(column, of_gx);
        }
      }
      if (!by_position<X>(scaling))
        normals.read_statistics(scaling, rows, place.first_outer, place.channel, 0);
    }
    __syncthreads();
  };
  Ahead<A, kSize, X, kStages> ahead_x{under_way};
  Ahead<A, kSize, D, kStages> ahead_dh{under_way + kWordsOf<A, kSize, X>};
  Ahead<A, kSize, X, kStages> ahead_base{under_way + kWordsOfAll<A, kSize, X, D>};
  Raw<A, kSize, X> raw_base;
  const auto load = [&](Stage stage, const auto& at) {
    ahead_x.load(stage, at[0], x.dtype);
    ahead_dh.load(stage, at[1], dh.dtype);
    if (kBaseAhead && base.data) ahead_base.load(stage, at[2], base.dtype);
  };
  const auto use = [&](Stage stage, const auto& at, int32_t unit) {
    A values[kSize], gradient[kSize];
    if (!kBaseAhead && base.data) raw_base.load(at[1], base.dtype);
    if (by_position<X>(scaling)) read_statistics_of(unit, plan, place, scaling, normals);
    ahead_x.unpack(stage, values, x.dtype);
    ahead_dh.unpack(stage, gradient, dh.dtype);
    with_activation(scaling.activation, [&](auto kind) {
      typename Numbers::Group read_w, read_b, read_g, read_gx;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const A rstd = normals.rstd[e], w = of.weight.read(column, e, read_w);
        const ops::Normal<A> normal{normals.mean[e], rstd, w, of.bias.read(column, e, read_b)};
        const A of_g = of.mean_g.read(column, e, read_g);
        const A of_gx = of.mean_gx.read(column, e, read_gx);
        const A xhat = normal.xhat(values[e]);
        const A dz = decltype(kind)::gradient(normal.z(xhat), gradient[e]);
        if (sums.kind == Gradient::kConstant)
          values[e] = w * rstd * dz;
        else if (sums.kind == Gradient::kBatch)
          values[e] = ops::MeansGradient<A>{w * rstd, of_g, of_gx}(dz, xhat);
        else
          values[e] = ops::MeansGradient<A>{rstd, of_g, of_gx}(dz * w, xhat);
        one_by_one<decltype(kind)>();
      }
    });
    if (base.data) {
      A before[kSize];
      if (kBaseAhead)
        ahead_base.unpack(stage, before, base.dtype);
      else
        raw_base.unpack(before, base.dtype);
#pragma unroll
      for (int e = 0; e < kSize; ++e) values[e] = before[e] + values[e];
    }
    store_as<X>(at[0], dx.dtype, values);
  };
  const Field *const from[] = {&x, &dh, &base}, *const to[] = {&dx, &base};
  for_each_unit<kSize, kStages, kCells, kBaseAhead ? 3 : 2, kBaseAhead ? 1 : 2>(
      plan, place, from, to, begin, load, use);
}

}  // namespace revk::cuda
