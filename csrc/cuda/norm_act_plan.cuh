// SPDX-License-Identifier: Apache-2.0
// Which threads of the norm kernels process which elements. The partition depends on the shape and
// the operands' memory layout (packets need alignment), never on the device, so that sums are the
// same on every device. The workspace covers every partition, so its size follows from the shape.
//
// A packet is kSize adjacent elements: channels of one position (an (outer, inner) pair) for
// channels-last images and rows of tokens, or positions of one channel for NCHW; `rows` tells
// which. A unit is the positions that one packet covers: one, or kSize.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "core/backends.h"
#include "cuda/divider.cuh"
#include "cuda/layout.cuh"
#include "cuda/reduce.cuh"
#include "revkernels/revkernels.h"

namespace revk::cuda {

constexpr int32_t kLogThreads = 8;
static_assert(1 << kLogThreads == kThreads, "a block's threads are a power of two");

// The 256 threads of a block as xs() lanes over channels and ys() lanes over units. Lanes that are
// adjacent in memory are adjacent in the warp.
struct Lanes {
  bool rows;
  int32_t log_near;  // log2 of adjacent lanes: over channels for rows, else over units

  __host__ __device__ int near_lanes() const { return 1 << log_near; }
  __host__ __device__ int far_lanes() const { return kThreads >> log_near; }
  __host__ __device__ int xs() const { return rows ? near_lanes() : far_lanes(); }
  __host__ __device__ int ys() const { return rows ? far_lanes() : near_lanes(); }
  __device__ int log_ys() const { return rows ? kLogThreads - log_near : log_near; }
  __device__ int near() const { return int(threadIdx.x) & (near_lanes() - 1); }
  __device__ int far() const { return int(threadIdx.x) >> log_near; }
  __device__ int x() const { return rows ? near() : far(); }
  __device__ int y() const { return rows ? far() : near(); }
  __device__ int x_stride() const { return rows ? 1 : near_lanes(); }
  __device__ int y_stride() const { return rows ? near_lanes() : 1; }
};

// An operand, addressed by three coordinates.
struct Field {
  void* data;
  int64_t outer, channel, inner;  // strides in bytes
  // Bytes from a thread's unit to its next, and the correction at the end of a line: see
  // Slicing::field.
  int64_t ahead, wrap;
  int32_t dtype;

  Field() = default;
  explicit Field(const revk_view& view)
      : data(view.data),
        outer(view.outer_stride * element_size(view.dtype)),
        channel(view.channel_stride * element_size(view.dtype)),
        inner(view.inner_stride * element_size(view.dtype)),
        ahead(0),
        wrap(0),
        dtype(view.dtype) {}
  __device__ int64_t offset(int64_t o, int64_t c, int64_t i) const {
    return o * outer + c * channel + i * inner;
  }
  // An address as an integer, so that a missing field's address may be computed, though not used.
  __device__ int64_t at(int64_t o, int64_t c, int64_t i) const {
    return int64_t(reinterpret_cast<intptr_t>(data)) + offset(o, c, i);
  }
};

struct Extent {
  int64_t outer, channels, inner;
  int64_t positions() const { return outer * inner; }
};

// Rows as positions of a single line: (rows, channels, 1), which the header suggests for them, as
// (1, channels, rows). Positions at equal distances along a line are found by one multiplication.
inline bool are_rows(const revk_view& x, const revk_norm& norm) {
  return over_channels(norm) && x.inner == 1;
}
inline void lay_along(revk_view& view) {
  std::swap(view.outer, view.inner);
  std::swap(view.outer_stride, view.inner_stride);
}
inline void lay_along(revk_norm& norm) {
  std::swap(norm.statistics_outer_stride, norm.statistics_inner_stride);
}

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// log2 of the smallest power of two that is at least `least`, within 0..most.
inline int32_t log_of_power(int64_t least, int32_t most) {
  int32_t log = 0;
  while (log < most && (int64_t(1) << log) < least) ++log;
  return log;
}

// Enough blocks to fill any current device several times.
constexpr int64_t kManyBlocks = 1024;
// Units per thread of a reduction: the minimum that pays for the reduction, and the maximum, which
// bounds the roundings of float32 sums. All later sums are float64.
constexpr int64_t kLeastUnits = 4, kMostUnits = 512;

// The positions cut into slices, for kernels whose blocks process one slice of some channels:
// either whole lines (all of inner, some of outer) or part of one line.
struct Slicing {
  Lanes lanes;
  int64_t outer, channels, inner;
  int64_t outer_per_slice, inner_per_slice;
  Divider inner_slices;  // slices along inner
  Divider line_units;    // units in a line
  int64_t slices;
  Divider tiles;  // groups of channels; a block is a (slice, tile)
  int64_t unit;   // positions per unit
  // A thread's next unit is ys() units further: lines_ahead lines and along_ahead units. This takes
  // no division.
  int64_t lines_ahead;
  int32_t ys, along_ahead;
  int32_t line_units_in_reach;  // units per line, or more than any slice has
  bool backwards;               // the last slice first

  int64_t blocks() const { return slices * tiles.divisor; }

  // The operand with its steps.
  Field field(const revk_view& view) const {
    Field field(view);
    field.ahead = lines_ahead * field.outer + along_ahead * unit * field.inner;
    // A single line has no end to pass, whatever its outer stride says.
    field.wrap = outer == 1 ? 0 : field.outer - line_units.divisor * unit * field.inner;
    return field;
  }
  // For a kernel that rereads the previous kernel's input: the cache holds the last part of it.
  Slicing from_the_end() const {
    Slicing plan = *this;
    plan.backwards = true;
    return plan;
  }
};

// `alone`: a slice must not span several outer indices (group norm).
inline Slicing slice(const Extent& extent, bool rows, int packet, bool alone) {
  Slicing plan{};
  plan.outer = extent.outer, plan.channels = extent.channels, plan.inner = extent.inner;
  const int64_t unit = rows ? 1 : packet;  // positions
  const int64_t line = alone ? extent.inner : extent.positions();
  const int64_t lines = alone ? extent.outer : 1;
  if (rows) {
    // 32 adjacent packets are 512 bytes; fewer, but at least 64 bytes, if that leaves no lane idle.
    const int64_t packets = divided_up(extent.channels, packet);
    int32_t log_near = log_of_power(packets, 5);
    for (int32_t fits = log_near; fits >= (packet == 1 ? 4 : 2); --fits)
      if (packets % (int64_t(1) << fits) == 0) {
        log_near = fits;
        break;
      }
    plan.lanes = {true, log_near};
    plan.tiles = Divider(divided_up(packets, plan.lanes.xs()));
  } else {
    // Short lines leave lanes for more channels, but at least 8 packets, or 32 single elements,
    // stay adjacent.
    const int32_t log_least = packet == 1 ? 5 : 3;
    const int64_t units = divided_up(line, unit * kLeastUnits);
    plan.lanes = {false, std::max(log_least, log_of_power(units, kLogThreads))};
    plan.tiles = Divider(divided_up(extent.channels, plan.lanes.xs()));
  }
  const int64_t round = unit * plan.lanes.ys();
  const int64_t most = divided_up(line, round * kLeastUnits);
  const int64_t least = divided_up(line, round * kMostUnits);
  const int64_t wanted = divided_up(kManyBlocks, plan.tiles.divisor * lines);
  const int64_t each = divided_up(line, std::max(std::min(wanted, most), least));
  if (!alone && each >= extent.inner) {
    plan.outer_per_slice = divided_up(each, extent.inner);
    plan.inner_per_slice = extent.inner;
  } else {
    const int64_t parts = divided_up(extent.inner, each);
    plan.outer_per_slice = 1;
    plan.inner_per_slice = divided_up(divided_up(extent.inner, parts), unit) * unit;
  }
  plan.inner_slices = Divider(divided_up(extent.inner, plan.inner_per_slice));
  plan.line_units = Divider(divided_up(extent.inner, unit));
  plan.slices = plan.inner_slices.divisor * divided_up(extent.outer, plan.outer_per_slice);
  plan.unit = unit;
  plan.ys = plan.lanes.ys();
  plan.lines_ahead = plan.lanes.ys() / plan.line_units.divisor;
  plan.along_ahead = int32_t(plan.lanes.ys() % plan.line_units.divisor);
  plan.line_units_in_reach = int32_t(std::min<int64_t>(plan.line_units.divisor, 1 << 30));
  return plan;
}

// The most packets that a thread of a team keeps in registers: in the forward, and in the backward,
// which holds several values per element.
constexpr int kMostChunks = 3, kMostChunksBack = 2;

// The positions assigned to teams, for kernels that normalise over channels. A team is the lanes
// over channels, and processes one position at a time.
struct Teams {
  Lanes lanes;
  int64_t channels, units;
  int64_t rounds;      // positions per team
  int64_t chunks;      // packets of a position per thread
  Divider line_units;  // positions in a line
  bool straight;       // see runs_straight

  // Whether a thread has several packets and keeps them all in registers.
  bool keeps() const { return chunks > 1 && lanes.rows && chunks <= most_chunks(lanes.log_near); }
  // For a team of 1 << log_near lanes in the forward: one warp, or two.
  static int64_t most_chunks(int32_t log_near) {
    return log_near == 5 ? kMostChunks : log_near == 6 ? kMostChunksBack : 1;
  }
};

inline Teams make_teams(const Extent& extent, bool rows, int packet, bool backward) {
  Teams plan{};
  plan.channels = extent.channels;
  plan.line_units = Divider(extent.inner);
  plan.units = extent.positions();
  const int64_t packets = divided_up(extent.channels, packet);
  // With 16-byte packets one or two warps with a few packets per thread; otherwise as many threads
  // as packets. Away from rows, 32 adjacent positions and 8 lanes over channels.
  int32_t log_most = kLogThreads;
  for (int32_t log = 6; packet > 1 && log >= 5; --log) {
    const int64_t most = Teams::most_chunks(log);
    if (packets <= std::min<int64_t>(most, backward ? kMostChunksBack : most) << log)
      log_most = log;
  }
  plan.lanes = rows ? Lanes{true, log_of_power(packets, log_most)} : Lanes{false, 5};
  plan.chunks = divided_up(packets, plan.lanes.xs());
  plan.rounds = divided_up(plan.units, plan.lanes.ys());
  return plan;
}

// Whether an operand's positions are equally spaced, with spacing and count below 2^31, so that an
// address takes one multiplication.
inline bool runs_straight(const Teams& plan, int64_t outer, int64_t inner) {
  constexpr int64_t kMost = int64_t(1) << 31;
  const int64_t line = plan.line_units.divisor;
  return (plan.units == line || outer == line * inner) && inner >= 0 && inner < kMost &&
         plan.units < kMost;
}

// Blocks of the teams' backward if each writes sums for all channels: few, because those are wide,
// and each thread gets at least as many positions as a slice's thread gets units.
inline int64_t summing_blocks(const Teams& teams) {
  const int64_t each = teams.chunks > 1 ? 2 : 2 * kLeastUnits;
  const int64_t wanted = std::min(divided_up(teams.rounds, each), kManyBlocks / 4);
  return std::max(wanted, divided_up(teams.rounds, kMostUnits));
}
// Whether that kernel can sum: its threads must keep their channels.
inline bool sums_beside(const Teams& teams) {
  return teams.lanes.rows && (teams.chunks == 1 || teams.keeps());
}

// The workspace holds two float64 per slice and channel, then two values per statistic.
inline int64_t partial_count(int64_t slices, int64_t channels) { return 2 * slices * channels; }

// How a call's operands are walked.
struct Walk3 {
  bool rows;
  bool words;  // packets of 16-byte words; otherwise single elements
};

// Elements per packet: 16 bytes of a half type, 32 of float32, or 16 of float64.
template <class A>
constexpr int kPacketOf = sizeof(A) == 8 ? 2 : 8;

template <class A, size_t kOperands>
Walk3 choose_walk(const std::array<const revk_view*, kOperands>& views) {
  const revk_view& first = *views[0];
  const bool rows =
      first.inner == 1 || (first.channels > 1 && first.channel_stride < first.inner_stride);
  const auto whole = [](int64_t bytes) { return bytes % kWord == 0; };
  const int64_t along = rows ? first.channels : first.inner;
  bool words = along % kPacketOf<A> == 0;
  for (const revk_view* view : views) {
    if (view == nullptr || view->data == nullptr) continue;
    const int64_t size = element_size(view->dtype);
    const int64_t across = rows ? view->inner : view->channels;
    words = words && (view->dtype == REVK_FLOAT64) == (sizeof(A) == 8) &&
            (rows ? view->channel_stride : view->inner_stride) == 1 &&
            whole(int64_t(reinterpret_cast<uintptr_t>(view->data))) &&
            (view->outer == 1 || whole(view->outer_stride * size)) &&
            (across == 1 || whole((rows ? view->inner_stride : view->channel_stride) * size));
  }
  return {rows, words};
}

}  // namespace revk::cuda
