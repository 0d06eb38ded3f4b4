// SPDX-License-Identifier: Apache-2.0
// How a team walks its positions: the next position, each thread's packets, sums over the team,
// channel parameters, and the prefetch of the next position.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/norm_act_ahead.cuh"
#include "cuda/norm_act_element.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// Sums one value or more over a team. All threads of the team get the same bits. Every thread of
// the block must call it.
template <class A, class... More>
__device__ void sum_over_team(const Lanes& lanes, A* shared, A& a, More&... more) {
  const int near = lanes.near_lanes();
  const auto add = [&](int away) {
    a += __shfl_xor_sync(~0u, a, away);
    ((more += __shfl_xor_sync(~0u, more, away)), ...);
  };
  if (lanes.rows) {
    if (near >= kWarp) {
#pragma unroll
      for (int away = kWarp / 2; away > 0; away /= 2) add(away);
    } else {
      for (int away = near / 2; away > 0; away /= 2) add(away);
    }
    if (near <= kWarp) return;
  }
  // Cells: for rows one per warp, a team's warps being consecutive; otherwise one per thread.
  const int cell = int(threadIdx.x) / (lanes.rows ? kWarp : 1);
  const int count = lanes.rows ? near / kWarp : lanes.xs();
  const int first = lanes.rows ? cell & -count : lanes.y();  // a power of two
  const int step = lanes.rows ? 1 : lanes.x_stride();
  constexpr int kValues = 1 + int(sizeof...(More));
  A* to = shared + kValues * cell;
  __syncthreads();  // all threads have read the last sum
  if (!lanes.rows || threadIdx.x % kWarp == 0) *to = a, ((*++to = more), ...);
  __syncthreads();
  a = A(0), ((more = A(0)), ...);
  for (int x = 0; x < count; ++x) {
    const A* from = shared + kValues * (first + x * step);
    a += *from, ((more += *++from), ...);
  }
}

// A team's current position.
struct Turn {
  int64_t unit;
  bool inside;

  __device__ static Turn of(const Teams& plan, int64_t round) {
    const int64_t unit = round * plan.lanes.ys() + plan.lanes.y();
    return {unit, unit < plan.units};
  }
  __device__ int64_t o(const Teams& plan) const { return plan.line_units.divide(unit); }
  __device__ int64_t i(const Teams& plan) const { return unit - o(plan) * plan.line_units.divisor; }
};

// The address of the packet that begins at channel c; T is the field's type. Packets of rows are
// contiguous.
template <class T, int kSize>
__device__ int64_t place_of(const Teams& plan, const Field& field, const Turn& turn, int64_t c) {
  if (kSize == 1 || !plan.straight) return field.at(turn.o(plan), c, turn.i(plan));
  int size = 0;  // in bytes
  if constexpr (std::is_same_v<T, Any>)
    size = int(element_size(field.dtype));
  else
    size = int(sizeof(T));
  return int64_t(reinterpret_cast<intptr_t>(field.data)) +
         int64_t(int32_t(turn.unit)) * int32_t(field.inner) + c * size;
}
// The index of the position's statistics, in elements.
template <class A, int kSize>
__device__ int64_t statistic_of(const Teams& plan, const Scaling<A>& scaling, const Turn& turn) {
  if (kSize == 1 || !plan.straight) return scaling.place(turn.o(plan), 0, turn.i(plan));
  return int64_t(int32_t(turn.unit)) * int32_t(scaling.inner);
}

// Calls body(j, c) for each of this thread's packets; c is its first channel, j its register index.
// kChunks is the number of packets in registers; 0: none are kept, and there may be any number.
template <int kSize, int kChunks, class Body>
__device__ void for_each_chunk(const Teams& plan, const Turn& turn, Body&& body) {
  if (!turn.inside) return;
  const int64_t first = plan.lanes.x() * kSize, span = plan.lanes.xs() * kSize;
  if constexpr (kChunks > 0) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      // Only the last one may lie beyond the channels.
      if (j + 1 < kChunks || first + j * span < plan.channels) body(j, first + j * span);
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

// The norm's parameters for a thread's channels: in registers for one packet, in shared memory for
// a few, otherwise read from memory each time.
template <class A, int kSize, int kChunks>
struct TeamParameters {
  static constexpr int kLanes = kChunks > 2 ? 32 : 64;  // lanes of a team: see Teams::most_chunks
  using Numbers = PerChannel<A, kSize, (kChunks > 1 ? kLanes : 1)>;
  struct Table {
    Numbers weight[kChunks > 1 ? kChunks : 1], bias[kChunks > 1 ? kChunks : 1];
  };
  Normals<A, kSize>& normals;
  Table& table;

  // Every thread of the block must call it.
  __device__ void begin(const Teams& plan, const Scaling<A>& scaling) {
    const int64_t first = plan.lanes.x() * kSize;
    if (kChunks == 1 && first < plan.channels) normals.read_parameters(scaling, true, first);
    if constexpr (kChunks > 1) {
      for (int c = int(threadIdx.x); c < int(plan.channels); c += kThreads) {
        Normals<A, 1> one;
        one.read_parameters(scaling, true, c);
        const int packet = c / kSize, lane = packet & (plan.lanes.xs() - 1);
        const int chunk = packet >> plan.lanes.log_near;
        table.weight[chunk].write(lane, c % kSize, one.weight[0]);
        table.bias[chunk].write(lane, c % kSize, one.bias[0]);
      }
      __syncthreads();
    }
  }
  // Call before weight() and bias() of the packet that begins at channel c.
  __device__ void read(const Scaling<A>& scaling, int64_t c) {
    if (kChunks == 0) normals.read_parameters(scaling, true, c);
  }
  __device__ A weight(int lane, int j, int e, typename Numbers::Group& kept) const {
    return kChunks > 1 ? table.weight[j].read(lane, e, kept) : normals.weight[e];
  }
  __device__ A bias(int lane, int j, int e, typename Numbers::Group& kept) const {
    return kChunks > 1 ? table.bias[j].read(lane, e, kept) : normals.bias[e];
  }
};

// One operand's prefetched packets of a team's next position.
template <class A, int kSize, int kChunks, class T>
struct NextPackets : Ahead<A, kSize, T, (kChunks > 0 ? kChunks : 1)> {
  using Ahead<A, kSize, T, (kChunks > 0 ? kChunks : 1)>::Ahead;
  static constexpr int kCells = kChunks * kWordsOf<A, kSize, T>;

  __device__ static Stage stage(int j) {
    return {j, j * kWordsOf<A, kSize, T> * kThreads + int(threadIdx.x)};
  }
};

}  // namespace revk::cuda
