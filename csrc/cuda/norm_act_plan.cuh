// SPDX-License-Identifier: Apache-2.0
// Which threads of the norm kernels take which elements. The decomposition goes by the shape and by
// how the operands lie in memory (packets need aligned ones), and never by the device, so that sums
// come out the same on each; the workspace is enough for every way, and so known from the shape.
//
// A packet is kSize neighbours in memory: of channels at one position (an (outer, inner) pair), for
// channels-last images and rows of tokens; or of positions in one channel, for NCHW. `rows` says
// which. A unit is what one packet covers of the positions: one, or kSize of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/backends.h"
#include "cuda/divider.cuh"
#include "cuda/layout.cuh"
#include "cuda/reduce.cuh"
#include "revkernels/revkernels.h"

namespace revk::cuda {

constexpr int32_t kLogThreads = 8;
static_assert(1 << kLogThreads == kThreads, "a block's threads are a power of two");

// The 256 threads of a block as xs() lanes over channels and ys() lanes over units. Lanes that are
// neighbours in memory are neighbours in the warp.
struct Lanes {
  bool rows;
  int32_t log_near;  // of how many lanes lie side by side: over channels for rows, else over units

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

// An operand, addressed by its three coordinates.
struct Field {
  void* data;
  int64_t outer, channel, inner;  // strides in bytes
  // From one unit of a thread to its next, in bytes, and what is added where that passes the end of
  // a line: see Slicing::field.
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
  // An address as a number: that of a field that is not there may be counted on, if not used.
  __device__ int64_t at(int64_t o, int64_t c, int64_t i) const {
    return int64_t(reinterpret_cast<intptr_t>(data)) + offset(o, c, i);
  }
};

struct Extent {
  int64_t outer, channels, inner;
  int64_t positions() const { return outer * inner; }
};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// log2 of the smallest power of two that is at least `least`, within 0..most.
inline int32_t log_of_power(int64_t least, int32_t most) {
  int32_t log = 0;
  while (log < most && (int64_t(1) << log) < least) ++log;
  return log;
}

// Blocks that fill any of today's devices a few times over.
constexpr int64_t kManyBlocks = 1024;
// Units that a thread of a reduction should have, to pay for the reduction, and may have: sums in
// float32 lose up to that many roundings, everything behind them is summed in float64.
constexpr int64_t kLeastUnits = 4, kMostUnits = 512;

// The positions cut into slices, for kernels whose blocks walk one slice of some channels: either
// whole lines (all of inner, some of outer), or a part of one line.
struct Slicing {
  Lanes lanes;
  int64_t outer, channels, inner;
  int64_t outer_per_slice, inner_per_slice;
  Divider inner_slices;  // slices along inner
  Divider line_units;    // units in a line
  int64_t slices;
  Divider tiles;  // groups of channels; a block is a (slice, tile)
  int64_t unit;   // positions of a unit
  // A thread's next unit is ys() units on: so many lines, and so many units in a line. Found so, it
  // takes no division.
  int64_t lines_ahead;
  int32_t ys, along_ahead;
  int32_t line_units_in_reach;  // units in a line, or more than any slice has
  bool backwards;               // the last slice first

  int64_t blocks() const { return slices * tiles.divisor; }

  // The operand with its steps.
  Field field(const revk_view& view) const {
    Field field(view);
    field.ahead = lines_ahead * field.outer + along_ahead * unit * field.inner;
    // Of a single line there is no end to pass, whatever its distance to the next is said to be.
    field.wrap = outer == 1 ? 0 : field.outer - line_units.divisor * unit * field.inner;
    return field;
  }
  // For a kernel that reads again what one before it has just read: the cache has the end of that.
  Slicing from_the_end() const {
    Slicing plan = *this;
    plan.backwards = true;
    return plan;
  }
};

// `alone`: a slice must not reach over several outer (group norm).
inline Slicing slice(const Extent& extent, bool rows, int packet, bool alone) {
  Slicing plan{};
  plan.outer = extent.outer, plan.channels = extent.channels, plan.inner = extent.inner;
  const int64_t unit = rows ? 1 : packet;  // positions
  const int64_t line = alone ? extent.inner : extent.positions();
  const int64_t lines = alone ? extent.outer : 1;
  if (rows) {
    // 32 packets side by side are 512 bytes; fewer, but at least 64
    // bytes of them, where that leaves no lane idle.
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
    // Short lines leave lanes for further channels, but 8 neighbours stay together, as do 32 of
    // single elements.
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

// Packets that a thread of a team keeps in registers at most: in the forward, and in the backward,
// which has several numbers for each.
constexpr int kMostChunks = 3, kMostChunksBack = 2;

// The positions handed out to teams, for kernels that normalise over channels: a team is the lanes
// over channels, and has one position at a time.
struct Teams {
  Lanes lanes;
  int64_t channels, units;
  int64_t rounds;      // positions a team
  int64_t chunks;      // packets of a position that one thread has
  Divider line_units;  // positions in a line
  bool straight;       // see runs_straight

  // Whether a thread has several packets, and keeps them all in registers.
  bool keeps() const { return chunks > 1 && lanes.rows && chunks <= most_chunks(lanes.log_near); }
  // Of a team of that many lanes, in the forward: a warp, or two of them.
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
  // As far as packets are words, a warp or two with a few packets a thread; else as many threads as
  // there are packets. Away from rows, 32 positions side by side and 8 lanes over channels.
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

// Whether positions lie at equal distances in an operand, and these and their number are of 32
// bits, so that an address takes one multiplication.
inline bool runs_straight(const Teams& plan, int64_t outer, int64_t inner) {
  constexpr int64_t kMost = int64_t(1) << 31;
  const int64_t line = plan.line_units.divisor;
  return (plan.units == line || outer == line * inner) && inner >= 0 && inner < kMost &&
         plan.units < kMost;
}

// Blocks of the teams' backward, where each leaves sums for all channels: few, because they are
// wide, and each of its threads has a position at least as often as one of a slice has units.
inline int64_t summing_blocks(const Teams& teams) {
  const int64_t each = teams.chunks > 1 ? 2 : 2 * kLeastUnits;
  const int64_t wanted = std::min(divided_up(teams.rounds, each), kManyBlocks / 4);
  return std::max(wanted, divided_up(teams.rounds, kMostUnits));
}
// Whether that kernel can: its threads then keep to their channels.
inline bool sums_beside(const Teams& teams) {
  return teams.lanes.rows && (teams.chunks == 1 || teams.keeps());
}

// The workspace: two float64 for every slice and channel, then two for every statistic.
inline int64_t partial_count(int64_t slices, int64_t channels) { return 2 * slices * channels; }

// How a call's operands are walked.
struct Walk3 {
  bool rows;
  bool words;  // packets of 16-byte words; otherwise single elements
};

// Elements in a packet: 16 bytes of a half type and 32 of float32, or 16 of float64.
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
