// SPDX-License-Identifier: Apache-2.0
// How a block walks its slice: the units of each thread, and the pipelined loop over them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/norm_act_ahead.cuh"
#include "cuda/norm_act_element.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// One block's slice, and one thread's channels in it.
struct Place {
  int64_t slice, first_outer, first_inner, outers, units_in_line;
  int64_t channel;  // the thread's first
  bool inside;      // whether that channel exists

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

// Returns `value`, but the compiler must keep it in a register instead of recomputing it.
__device__ inline int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Iterates over a thread's units in a slice, with the unit's address in each of kFields fields.
template <int kSize, int kFields>
struct Cursor {
  int32_t unit, along;  // index in the slice, and in the unit's line; both fit in 32 bits
  int64_t at[kFields > 0 ? kFields : 1];

  __device__ Cursor(const Slicing& plan, const Place& place, const Field* const* fields) {
    unit = plan.lanes.y();
    const int64_t line = plan.line_units.divide(unit);
    along = int32_t(unit - line * plan.line_units.divisor);
#pragma unroll
    for (int k = 0; k < kFields; ++k)
      at[k] = fields[k]->at(place.first_outer + line, place.channel,
                            place.first_inner + int64_t(along) * (plan.lanes.rows ? 1 : kSize));
  }
  // `straight`: no field has a gap between its lines.
  __device__ void advance(const Slicing& plan, const Field* const* fields, bool straight) {
    unit += plan.ys;
#pragma unroll
    for (int k = 0; k < kFields; ++k) at[k] += fields[k]->ahead;
    if (straight || kFields == 0) return;
    along += plan.along_ahead;
    if (along < plan.line_units_in_reach) return;
    along -= plan.line_units_in_reach;
#pragma unroll
    for (int k = 0; k < kFields; ++k) at[k] += fields[k]->wrap;
  }
};

template <int kFields>
__device__ bool are_straight(const Field* const* fields) {
  bool straight = true;
#pragma unroll
  for (int k = 0; k < kFields; ++k) straight = straight && fields[k]->wrap == 0;
  return straight;
}

// Processes this thread's units with kStages - 1 of them in flight: load(stage, addresses in
// `from`) starts a unit's loads, use(stage, addresses in `to`, unit) consumes a loaded unit. A
// stage has kCells cells. All threads of the block call begin() after the first loads and before
// their use.
template <int kSize, int kStages, int kCells, int kFrom, int kTo, class Begin, class Load,
          class Use>
__device__ void for_each_unit(const Slicing& plan, const Place& place, const Field* const* from,
                              const Field* const* to, Begin&& begin, Load&& load, Use&& use) {
  const int32_t units = place.inside ? int32_t(place.outers * place.units_in_line) : 0;
  const bool straight = are_straight<kFrom>(from) && are_straight<kTo>(to);
  constexpr int kStep = kCells * kThreads;
  Cursor<kSize, kFrom> ahead(plan, place, from);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (ahead.unit < units) load(Stage{stage, stage * kStep + int(threadIdx.x)}, ahead.at);
    close_copies();
    ahead.advance(plan, from, straight);
  }
  begin();
  Cursor<kSize, kTo> here(plan, place, to);
  // Register stages need compile-time indices, so the body is unrolled once per stage.
  constexpr int kCopies = kSize == 1 ? kStages : 1;
  int now = opaque(int(threadIdx.x)), last = now + (kStages - 1) * kStep;
#pragma unroll 1
  while (here.unit < units) {
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      if (copy > 0 && here.unit >= units) break;
      // Refills the cells that were used last.
      if (ahead.unit < units) load(Stage{(copy + kStages - 1) % kStages, last}, ahead.at);
      close_copies();
      ahead.advance(plan, from, straight);
      wait_for_copies<kStages - 1>();
      use(Stage{copy, now}, here.at, here.unit);
      here.advance(plan, to, straight);
      last = now, now += kStep;
      if (now >= kStages * kStep) now -= kStages * kStep;
    }
  }
}

// Pipeline stages of kWords words per unit: enough to keep memory busy with three blocks per
// multiprocessor, within the shared memory of three blocks.
template <int kSize, int kWords>
constexpr int kStagesOf = kSize == 1    ? 4
                          : kWords <= 1 ? 4
                          : kWords == 2 ? 3
                                        : 2;
// Minimum resident blocks per multiprocessor: three for packets of up to kMost words whose types
// are known at compile time.
template <int kMost, class A, int kSize, class... Types>
constexpr int kBlocksOf =
    kSize > 1 && kWordsOfAll<A, kSize, Types...> <= kMost && !(... || std::is_same_v<Types, Any>)
        ? 3
        : 2;

// Reads one unit's statistics, where they vary by position.
template <class A, int kSize>
__device__ void read_statistics_of(int64_t unit, const Slicing& plan, const Place& place,
                                   const Scaling<A>& scaling, Normals<A, kSize>& normals) {
  const int64_t line = plan.line_units.divide(unit);
  const int64_t along = unit - line * plan.line_units.divisor;
  normals.read_statistics(scaling, plan.lanes.rows, place.first_outer + line, place.channel,
                          place.first_inner + along * (plan.lanes.rows ? 1 : kSize));
}

}  // namespace revk::cuda
