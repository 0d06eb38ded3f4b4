// SPDX-License-Identifier: Apache-2.0
// The kernels whose blocks walk a slice of the positions for some channels: sums by channel, and
// everything that goes element by element once the statistics are known.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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
    const int64_t block = plan.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    place.slice = plan.tiles.divide(block);
    const int64_t tile = block - place.slice * plan.tiles.divisor;
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

// Goes over this thread's units, kUnits of them at a time: load(u, at) for each, and only then
// use(u, at, unit) for each, so that as many loads are under way before the first is waited for.
// `at` has the unit's offset in each of the first kFields fields.
template <int kSize, int kUnits, int kFields, class Load, class Use>
__device__ void for_each_unit(const Slicing& plan, const Place& place, const Field* const* fields,
                              Load&& load, Use&& use) {
  if (!place.inside) return;
  const int64_t units = place.outers * place.units_in_line;
  const int64_t line_units = plan.line_units.divisor;
  int64_t unit = plan.lanes.y(), offset[kFields];
  const int64_t line = plan.line_units.divide(unit);
  int64_t along = unit - line * line_units;
#pragma unroll
  for (int k = 0; k < kFields; ++k)
    offset[k] = fields[k]->offset(place.first_outer + line, place.channel,
                                  place.first_inner + along * (plan.lanes.rows ? 1 : kSize));
#pragma unroll 1
  while (unit < units) {
    int64_t at[kUnits][kFields];
    const int64_t first = unit;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int k = 0; k < kFields; ++k) at[u][k] = offset[k];
      if (unit < units) load(u, at[u]);
      unit += plan.lanes.ys();
      along += plan.along_ahead;
      const bool wraps = along >= line_units;
      if (wraps) along -= line_units;
#pragma unroll
      for (int k = 0; k < kFields; ++k)
        offset[k] += fields[k]->ahead + (wraps ? fields[k]->wrap : 0);
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (first + u * plan.lanes.ys() < units) use(u, at[u], first + u * plan.lanes.ys());
  }
}

// The statistics of one unit, where they vary along positions.
template <class A, int kSize>
__device__ void read_statistics_of(int64_t unit, const Slicing& plan, const Place& place,
                                   const Scaling<A>& scaling, Normals<A, kSize>& normals) {
  const int64_t line = plan.line_units.divide(unit);
  const int64_t along = unit - line * plan.line_units.divisor;
  normals.read_statistics(scaling, plan.lanes.rows, place.first_outer + line, place.channel,
                          place.first_inner + along * (plan.lanes.rows ? 1 : kSize));
}

// Two sums a channel, over the lanes of one x. Elements of a packet are channels of their own for
// rows, otherwise they are summed first. The result is that of lane y = 0.
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
  // 16 lanes at a time, all threads taking part: (which of the sums, x, y of those that are left).
  for (int left = lanes.ys(); left > 1;) {
    const int fold = left < 16 ? left : 16;
    left /= fold;
    __syncthreads();
    const int cells = lanes.xs() * left, step = left * lanes.y_stride();
    for (int task = thread; task < 2 * columns * cells; task += kThreads) {
      const int cell = task % cells;
      double* const at =
          memory[task / cells] +
          (lanes.rows ? cell : cell / left * lanes.x_stride() + cell % left * lanes.y_stride());
      double sum = at[0];
      for (int m = 1; m < fold; ++m) sum += at[m * step];
      at[0] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    if (e < columns) a[e] = memory[2 * e][thread], b[e] = memory[2 * e + 1][thread];
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

template <class F>
constexpr bool kCoupled = !std::is_same_v<F, None>;

// Mean and sum of squared deviations of each channel in each slice, into partial; s is written on
// the way where it comes from a coupling.
//
// A thread sums x - shift and its square, the shift being its own first element. If that is far
// from the mean, at distance D, the rounding of n such squares is about n eps D^2; but the
// channel's sum of squared deviations is D^2 at least, of that one element: the error is n eps of
// it, and n is kMostUnits at most. From there on all sums are float64.
template <class A, int kSize, class X, class F>
__global__ void __launch_bounds__(kThreads, kSize == 1 ? 3 : 2)
    norm_moments(const __grid_constant__ Slicing plan, const __grid_constant__ Stream stream,
                 double* partial) {
  __shared__ double memory[2 * kSize][kThreads];
  const Lanes& lanes = plan.lanes;
  const Place place = Place::of<kSize>(plan);
  A shift[kSize], sum[kSize], squares[kSize];
  int units = 0;
#pragma unroll
  for (int e = 0; e < kSize; ++e) shift[e] = sum[e] = squares[e] = A(0);
  constexpr int kUnits = kAtOnce<kSize, X, F>, kFields = kCoupled<F> ? 3 : 1;
  const Field* const fields[] = {&stream.x, &stream.f, &stream.s};
  Stream::Loaded<A, kSize, X, F> loaded[kUnits];
  const auto load = [&](int u, const auto& at) {
    stream.load(loaded[u], at[0], at[kCoupled<F> ? 1 : 0]);
  };
  const auto use = [&](int u, const auto& at, int64_t) {
    A value[kSize];
    stream.finish(loaded[u], at[kCoupled<F> ? 2 : 0], value);
    if (units++ == 0)
#pragma unroll
      for (int e = 0; e < kSize; ++e) shift[e] = lanes.rows ? value[e] : value[0];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const A away = value[e] - shift[e];
      sum[e] += away;
      squares[e] += away * away;
    }
  };
  for_each_unit<kSize, kUnits, kFields>(plan, place, fields, load, use);

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
template <class A, int kSize, class X, class F, class H>
__global__ void __launch_bounds__(kThreads, 2)
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
  constexpr int kUnits = kAtOnce<kSize, X, F>, kFields = kCoupled<F> ? 4 : 2;
  const Field* const fields[] = {&h, &stream.x, &stream.f, &stream.s};
  Stream::Loaded<A, kSize, X, F> loaded[kUnits];
  const auto load = [&](int u, const auto& at) {
    stream.load(loaded[u], at[1], at[kCoupled<F> ? 2 : 1]);
  };
  const auto use = [&](int u, const auto& at, int64_t unit) {
    A values[kSize];
    stream.finish(loaded[u], at[kCoupled<F> ? 3 : 1], values);
    if (scaling.by_position) read_statistics_of(unit, plan, place, scaling, normals);
    activate(normals, scaling.activation, values);
    store_as<H>(h, at[0], values);
  };
  for_each_unit<kSize, kUnits, kFields>(plan, place, fields, load, use);
}

// The sums of dz and of dz * xhat of each channel in each slice, into partial.
template <class A, int kSize, class X, class D>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradient_sums(const __grid_constant__ Slicing plan, const __grid_constant__ Field dh,
                       const __grid_constant__ Field x, const __grid_constant__ Scaling<A> scaling,
                       double* partial) {
  // First the means and parameters, which would spill as registers, and then the sums.
  __shared__ double memory[(sizeof(A) == 8 ? 3 : 2) * kSize][kThreads];
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
  A(*const mean)[kThreads] = reinterpret_cast<A(*)[kThreads]>(memory);
  A(*const weight)[kThreads] = mean + kSize;
  A(*const bias)[kThreads] = weight + kSize;
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    mean[e][thread] = normals.mean[e];
    weight[e][thread] = normals.weight[e], bias[e][thread] = normals.bias[e];
  }
  constexpr int kUnits = kAtOnce<kSize, X, D>;
  const Field* const fields[] = {&x, &dh};
  Raw<A, kSize, X> raw_x[kUnits];
  Raw<A, kSize, D> raw_dh[kUnits];
  const auto load = [&](int u, const auto& at) {
    raw_x[u].load(x, at[0]);
    raw_dh[u].load(dh, at[1]);
  };
  const auto use = [&](int u, const auto&, int64_t unit) {
    A values[kSize], gradient[kSize];
    if (scaling.by_position) {
      read_statistics_of(unit, plan, place, scaling, normals);
#pragma unroll
      for (int e = 0; e < kSize; ++e) mean[e][thread] = normals.mean[e];
    }
    raw_x[u].unpack(values, x);
    raw_dh[u].unpack(gradient, dh);
    with_activation(scaling.activation, [&](auto kind) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const ops::Normal<A> normal{mean[e][thread], normals.rstd[e], weight[e][thread],
                                    bias[e][thread]};
        const A xhat = normal.xhat(values[e]);
        const A dz = decltype(kind)::gradient(normal.z(xhat), gradient[e]);
        dbias[e] += dz;
        dweight[e] += dz * xhat;
        asm volatile("" ::: "memory");  // element by element: all at once would spill
      }
    });
  };
  for_each_unit<kSize, kUnits, 2>(plan, place, fields, load, use);
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
                             // g * xhat, [outer][groups], and count is 1
  A count;
  Gradient kind;
};

// dx = base + gradient, its sums being known. X is the type of x, base and dx.
template <class A, int kSize, class X, class D>
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
  // What this thread's channels have, two means for the gradient and three numbers more: as
  // registers they would spill.
  __shared__ A mean_g[kSize][kThreads], mean_gx[kSize][kThreads];
  __shared__ A mean[kSize][kThreads], weight[kSize][kThreads], bias[kSize][kThreads];
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    mean[e][thread] = normals.mean[e];
    weight[e][thread] = normals.weight[e], bias[e][thread] = normals.bias[e];
    if (sums.kind == Gradient::kConstant) continue;
    const int64_t channel = rows ? place.channel + e : place.channel;
    const int64_t at = scaling.place(place.first_outer, channel, 0);
    mean_g[e][thread] = sums.dbias[at] / sums.count;
    mean_gx[e][thread] = sums.dweight[at] / sums.count;
  }
  constexpr int kUnits = kAtOnce<kSize, X, X, D>;
  const Field* const fields[] = {&x, &dh, &dx, &base};
  Raw<A, kSize, X> raw_x[kUnits], raw_base[kUnits];
  Raw<A, kSize, D> raw_dh[kUnits];
  const auto load = [&](int u, const auto& at) {
    raw_x[u].load(x, at[0]);
    raw_dh[u].load(dh, at[1]);
    if (base.data) raw_base[u].load(base, at[3]);
  };
  const auto use = [&](int u, const auto& at, int64_t unit) {
    A values[kSize], gradient[kSize], before[kSize];
    if (scaling.by_position) {
      read_statistics_of(unit, plan, place, scaling, normals);
#pragma unroll
      for (int e = 0; e < kSize; ++e) mean[e][thread] = normals.mean[e];
    }
    raw_x[u].unpack(values, x);
    raw_dh[u].unpack(gradient, dh);
    if (base.data) raw_base[u].unpack(before, base);
    with_activation(scaling.activation, [&](auto kind) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const A w = weight[e][thread], rstd = normals.rstd[e];
        const ops::Normal<A> normal{mean[e][thread], rstd, w, bias[e][thread]};
        const A xhat = normal.xhat(values[e]);
        const A dz = decltype(kind)::gradient(normal.z(xhat), gradient[e]);
        if (sums.kind == Gradient::kConstant)
          values[e] = w * rstd * dz;
        else if (sums.kind == Gradient::kBatch)
          values[e] =
              ops::MeansGradient<A>{w * rstd, mean_g[e][thread], mean_gx[e][thread]}(dz, xhat);
        else
          values[e] =
              ops::MeansGradient<A>{rstd, mean_g[e][thread], mean_gx[e][thread]}(dz * w, xhat);
        if (base.data) values[e] = before[e] + values[e];
      }
    });
    store_as<X>(dx, at[2], values);
  };
  for_each_unit<kSize, kUnits, 4>(plan, place, fields, load, use);
}

}  // namespace revk::cuda
