// SPDX-License-Identifier: Apache-2.0
// The kernels whose blocks walk a slice of the positions for some channels: sums by channel, and
// everything that goes element by element once the statistics are known.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/norm_act_element.cuh"
#include "cuda/norm_act_packet.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// One block's slice, and one thread's channels in it.
struct Place {
  int64_t slice, first_outer, first_inner, outers, units_in_line;
  int64_t channel;  // the thread's first
  bool inside;      // there is such a channel

  template <int kSize>
  __device__ static Place of(const Slicing& plan) {
    Place place;
    place.slice = plan.tiles.divide(blockIdx.x);
    const int64_t tile = blockIdx.x - place.slice * plan.tiles.divisor;
    const int64_t across = plan.inner_slices.divide(place.slice);
    place.first_outer = across * plan.outer_per_slice;
    place.first_inner = (place.slice - across * plan.inner_slices.divisor) * plan.inner_per_slice;
    const int64_t outers = plan.outer - place.first_outer;
    const int64_t inners = plan.inner - place.first_inner;
    place.outers = outers < plan.outer_per_slice ? outers : plan.outer_per_slice;
    place.units_in_line = (inners < plan.inner_per_slice ? inners : plan.inner_per_slice) /
                          (plan.lanes.rows ? 1 : kSize);
    place.channel = (tile * plan.lanes.xs() + plan.lanes.x()) * (plan.lanes.rows ? kSize : 1);
    place.inside = place.channel < plan.channels;
    return place;
  }
  // Elements of one channel in the slice.
  template <int kSize>
  __device__ double elements(const Slicing& plan) const {
    return double(outers * units_in_line * (plan.lanes.rows ? 1 : kSize));
  }
};

// Calls body(o, i) at each of this thread's units.
template <int kSize, class Body>
__device__ void for_each_unit(const Slicing& plan, const Place& place, Body&& body) {
  if (!place.inside) return;
  const int64_t units = place.outers * place.units_in_line;
#pragma unroll 1
  for (int64_t unit = plan.lanes.y(); unit < units; unit += plan.lanes.ys()) {
    // A slice of part of a line has units below line_units alone.
    const int64_t line = plan.line_units.divide(unit);
    const int64_t along = unit - line * plan.line_units.divisor;
    body(place.first_outer + line, place.first_inner + along * (plan.lanes.rows ? 1 : kSize));
  }
}

// Two sums a channel, over the lanes of one x. Elements of a packet are channels of their own for
// rows, otherwise they are summed first. The result is that of lane y = 0.
template <int kSize>
__device__ void sum_over_y(const Lanes& lanes, double (&a)[kSize], double (&b)[kSize],
                           double (*memory)[kThreads]) {
  double (*first)[kThreads] = memory, (*second)[kThreads] = memory + kSize;
  if (!lanes.rows)
#pragma unroll
    for (int e = 1; e < kSize; ++e) a[0] += a[e], b[0] += b[e];
  const int thread = int(threadIdx.x), y = lanes.y(), columns = lanes.rows ? kSize : 1;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (e < columns) first[e][thread] = a[e], second[e][thread] = b[e];
  // 16 at a time: a barrier costs about as much as the additions that it would save.
  for (int lanes_left = lanes.ys(); lanes_left > 1;) {
    const int fold = lanes_left < 16 ? lanes_left : 16;
    lanes_left /= fold;
    __syncthreads();
    if (y >= lanes_left) continue;
    for (int m = 1; m < fold; ++m) {
      const int other = thread + m * lanes_left * lanes.y_stride();
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        if (e < columns) first[e][thread] += first[e][other], second[e][thread] += second[e][other];
    }
  }
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (e < columns) a[e] = first[e][thread], b[e] = second[e][thread];
}

// partial[row][channel] <- (a, b), by lane y = 0.
template <int kSize>
__device__ void leave(double* partial, int64_t row, int64_t channels, const Lanes& lanes,
                      int64_t channel, const double (&a)[kSize], const double (&b)[kSize]) {
  if (lanes.y() != 0 || channel >= channels) return;
  double* const to = partial + 2 * (row * channels + channel);
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (lanes.rows || e == 0) to[2 * e] = a[e], to[2 * e + 1] = b[e];
}

// Mean and sum of squared deviations of each channel in each slice, into partial; s is written on
// the way where it comes from a coupling.
//
// A thread sums x - shift and its square, the shift being its own first element. If that is far
// from the mean, at distance D, the rounding of n such squares is about n eps D^2; but the
// channel's sum of squared deviations is D^2 at least, of that one element: the error is n eps of
// it, and n is kMostUnits at most. From there on all sums are float64.
template <class A, int kSize>
__global__ void __launch_bounds__(kThreads, kSize == 1 ? 3 : 0)
    norm_moments(const __grid_constant__ Slicing plan, const __grid_constant__ Stream stream,
                 double* partial) {
  __shared__ double memory[2 * kSize][kThreads];
  const Lanes& lanes = plan.lanes;
  const Place place = Place::of<kSize>(plan);
  A shift[kSize], sum[kSize], squares[kSize];
  int units = 0;
#pragma unroll
  for (int e = 0; e < kSize; ++e) shift[e] = sum[e] = squares[e] = A(0);
  for_each_unit<kSize>(plan, place, [&](int64_t o, int64_t i) {
    A value[kSize];
    stream.read(o, place.channel, i, value);
    if (units++ == 0)
#pragma unroll
      for (int e = 0; e < kSize; ++e) shift[e] = lanes.rows ? value[e] : value[0];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const A away = value[e] - shift[e];
      sum[e] += away;
      squares[e] += away * away;
    }
  });

  // All lanes of a channel move to the shift of lane y = 0, which has an element if any has.
  double origin[kSize], total[kSize], total_squares[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) memory[e][threadIdx.x] = double(shift[e]);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    origin[e] = memory[e][lanes.x() * lanes.x_stride()];
    const double by = units ? double(shift[e]) - origin[e] : 0.0;
    total[e] = double(sum[e]) + units * by;
    total_squares[e] = double(squares[e]) + by * (2.0 * double(sum[e]) + units * by);
  }
  sum_over_y(lanes, total, total_squares, memory);
  const double part = 1.0 / place.elements<kSize>(plan);
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    const double offset = total[e] * part;
    total_squares[e] -= total[e] * offset;
    total[e] = origin[e] + offset;
  }
  leave(partial, place.slice, plan.channels, lanes, place.channel, total, total_squares);
}

// h = activation(norm(s)) with the statistics given; s is written on the way where it comes from a
// coupling.
template <class A, int kSize>
__global__ void __launch_bounds__(kThreads)
    norm_apply(const __grid_constant__ Slicing plan, const __grid_constant__ Stream stream,
               const __grid_constant__ Field h, const __grid_constant__ Scaling<A> scaling) {
  const bool rows = plan.lanes.rows;
  const Place place = Place::of<kSize>(plan);
  if (!place.inside) return;
  Normals<A, kSize> normals;
  normals.read_parameters(scaling, rows, place.channel);
  // By channel, they are the same for the whole slice.
  if (!scaling.by_position)
    normals.read_statistics(scaling, rows, place.first_outer, place.channel, 0);
  for_each_unit<kSize>(plan, place, [&](int64_t o, int64_t i) {
    A values[kSize];
    stream.read(o, place.channel, i, values);
    if (scaling.by_position) normals.read_statistics(scaling, rows, o, place.channel, i);
    activate(normals, scaling.activation, values);
    store_rounded(h, h.offset(o, place.channel, i), values);
  });
}

// The sums of dz and of dz * xhat of each channel in each slice, into partial.
template <class A, int kSize>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradient_sums(const __grid_constant__ Slicing plan, const __grid_constant__ Field dh,
                       const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                       double* partial) {
  __shared__ double memory[2 * kSize][kThreads];
  const bool rows = plan.lanes.rows;
  const Place place = Place::of<kSize>(plan);
  Normals<A, kSize> normals;
  A dbias[kSize], dweight[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) dbias[e] = dweight[e] = A(0);
  if (place.inside) {
    normals.read_parameters(scaling, rows, place.channel);
    if (!scaling.by_position)
      normals.read_statistics(scaling, rows, place.first_outer, place.channel, 0);
  }
  for_each_unit<kSize>(plan, place, [&](int64_t o, int64_t i) {
    Raw<A, kSize> raw_x, raw_dh;
    A xhat[kSize], dz[kSize];
    raw_x.load(x, x.offset(o, place.channel, i));
    raw_dh.load(dh, dh.offset(o, place.channel, i));
    if (scaling.by_position) normals.read_statistics(scaling, rows, o, place.channel, i);
    raw_x.unpack(xhat, x);
    raw_dh.unpack(dz, dh);
    deactivate(normals, scaling.activation, xhat, dz);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      dbias[e] += dz[e];
      dweight[e] += dz[e] * xhat[e];
    }
  });
  double total_dbias[kSize], total_dweight[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) total_dbias[e] = dbias[e], total_dweight[e] = dweight[e];
  sum_over_y(plan.lanes, total_dbias, total_dweight, memory);
  leave(partial, place.slice, plan.channels, plan.lanes, place.channel, total_dbias, total_dweight);
}

// How dx comes from dz, where nothing but sums over other blocks ties the elements together.
enum class Gradient { kConstant, kBatch, kGroup };

template <class A>
struct GradientSums {
  const A *dbias, *dweight;  // of a batch norm, [channels]; of a group norm the means of g and of
                             // g * xhat, [outer][groups]
  A count;
  Gradient kind;
};

// dx = base + gradient, its sums being known.
template <class A, int kSize>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradient(const __grid_constant__ Slicing plan, const __grid_constant__ Field dx,
                  const __grid_constant__ Field base, const __grid_constant__ Field dh,
                  const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                  const __grid_constant__ GradientSums<A> sums) {
  const bool rows = plan.lanes.rows;
  const Place place = Place::of<kSize>(plan);
  if (!place.inside) return;
  Normals<A, kSize> normals;
  normals.read_parameters(scaling, rows, place.channel);
  if (!scaling.by_position)
    normals.read_statistics(scaling, rows, place.first_outer, place.channel, 0);
  // dbias and dweight, or the two means, of this thread's channels: as registers they would spill.
  __shared__ A memory[2 * kSize][kThreads];
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (sums.kind != Gradient::kConstant) {
      const int64_t channel = rows ? place.channel + e : place.channel;
      const int64_t at = scaling.place(place.first_outer, channel, 0);
      memory[2 * e][threadIdx.x] = sums.dbias[at];
      memory[2 * e + 1][threadIdx.x] = sums.dweight[at];
    }
  for_each_unit<kSize>(plan, place, [&](int64_t o, int64_t i) {
    Raw<A, kSize> raw_x, raw_dh, raw_base;
    A xhat[kSize], dz[kSize], result[kSize];
    raw_x.load(x, x.offset(o, place.channel, i));
    raw_dh.load(dh, dh.offset(o, place.channel, i));
    if (base.data) raw_base.load(base, base.offset(o, place.channel, i));
    if (scaling.by_position) normals.read_statistics(scaling, rows, o, place.channel, i);
    raw_x.unpack(xhat, x);
    raw_dh.unpack(dz, dh);
    deactivate(normals, scaling.activation, xhat, dz);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const A weight = normals.weight[e], rstd = normals.rstd[e], scale = weight * rstd;
      const A dbias = memory[2 * e][threadIdx.x], dweight = memory[2 * e + 1][threadIdx.x];
      if (sums.kind == Gradient::kConstant)
        dz[e] = scale * dz[e];
      else if (sums.kind == Gradient::kBatch)
        dz[e] = ops::BatchGradient<A>{scale, dweight, dbias, sums.count}(dz[e], xhat[e]);
      else
        dz[e] = ops::RowGradient<A>{rstd, dbias, dweight}(dz[e] * weight, xhat[e]);
    }
    if (base.data) {
      raw_base.unpack(result, base);
#pragma unroll
      for (int e = 0; e < kSize; ++e) dz[e] = result[e] + dz[e];
    }
    store_rounded(dx, dx.offset(o, place.channel, i), dz);
  });
}

}  // namespace revk::cuda
